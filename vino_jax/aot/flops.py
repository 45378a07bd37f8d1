"""Model FLOPs of a training step by formula: what the mathematics needs, whatever a program recomputes.

Matrix products alone, 2 a multiply-add; a bucket's padding counts as tokens. Attention counts every pair of a query and a key, causal or
not, and every pair of patches of the vision tower, masked or not: as programs without sparse masks compute them.

The backward pass adds the forward's FLOPs once for the gradient of a product's weights, where a stage trains them, and once for that of its
input, where something in front of it trains. So a frozen prompt costs its forward pass alone; the queries run backward to activations
only; stage 1, which trains the connector alone, runs backward through the MMDiT's frozen weights to activations only. Of the first block's
visual stream, which no gradient need enter then, the formula counts it all the same (0.3 % of the 13 B model's step). The products of
adapters (LoRA), which are small, do not count.
"""
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vino_jax.batch import BucketSpec
from vino_jax.settings import VinoConfig, VLMConfig

_TIME_FEATURES = 256  # of models/mmdit.py


@dataclass(frozen=True)
class Work:
    """Products of one kind in a row of a batch. forward: FLOPs. weights, inputs: whether their gradients are computed.
    attention: without weights, two gradients an input."""

    name: str
    forward: float
    weights: bool = False
    inputs: bool = False
    attention: bool = False

    @property
    def total(self) -> float:
        return self.forward * (1 + self.weights + (2 if self.attention else 1) * self.inputs)


def step_flops(config: VinoConfig, bucket: BucketSpec, rates: Mapping[str, float]) -> float:
    """Of one training step over all rows of the bucket. rates: of every parameter path, 0 frozen (train/stage.py: rates)."""
    return bucket.batch * sum(work.total for work in row_work(config, bucket, rates))


def row_work(config: VinoConfig, bucket: BucketSpec, rates: Mapping[str, float]) -> list[Work]:
    """All products of one row's step. An absent path counts as frozen."""

    def trains(*prefixes: str) -> bool:
        return any(rate and path.startswith(prefixes) for path, rate in rates.items())

    # an adapter lets gradients flow, and leaves its kernel without one
    kernels = {path: rate for path, rate in rates.items() if not path.rpartition("/")[2].startswith("lora_")}

    def learns(prefix: str) -> bool:
        return any(rate and path.startswith(prefix) for path, rate in kernels.items())

    return [*_vlm(config.vlm, config.queries, bucket, trains("queries/")), *_connectors(config, bucket, trains),
            *_mmdit(config, bucket, trains, learns)]


def _vlm(config: VLMConfig, queries: int, bucket: BucketSpec, queries_train: bool) -> list[Work]:
    """Vision tower and prompt forward; the queries forward, and backward to activations. The last decoder layer never runs."""
    text, layers, prompt = config.text, config.text.layers - 1, bucket.prompt_tokens
    inner, kv = text.heads * text.head_dim, text.kv_heads * text.head_dim
    token = layers * 2 * text.width * (2 * inner + 2 * kv + 3 * text.mlp)
    pairs = layers * 4 * inner  # of a query and a key
    work = [Work("prompt", prompt * token + pairs * prompt**2),
            Work("queries", queries * token, inputs=queries_train),
            # the prompt's keys and values are constants: of the four gradients' products two
            Work("queries' attention to the prompt", pairs * queries * prompt, inputs=queries_train),
            Work("queries' attention to queries", pairs * queries**2, inputs=queries_train, attention=True)]
    vision, patches = config.vision, bucket.patches
    pixels, merged = vision.channels * vision.temporal_patch * vision.patch**2, vision.width * vision.merge**2
    patch = 2 * vision.width * pixels + vision.layers * 2 * vision.width * (4 * vision.width + 2 * vision.mlp)
    mergers = (1 + len(vision.deepstack)) * patches // vision.merge**2 * 2 * merged * (merged + vision.out_width)
    return [*work, Work("vision", patches * patch + vision.layers * 4 * vision.width * patches**2 + mergers)]


def _connectors(config: VinoConfig, bucket: BucketSpec, trains: Callable[..., bool]) -> list[Work]:
    """A connector that trains runs backward to its norm, in front of its first product; the VAE branch only where there are references."""
    work, markers = [], bucket.prompt_tokens if bucket.reference_tokens else 0
    for name, width, tokens, flows in (("connector", config.mmdit.text_width, bucket.prompt_tokens, False),
                                       ("connector", config.mmdit.text_width, config.queries, trains("queries/")),
                                       ("vae_connector", config.mmdit.width, markers, False)):
        own = trains(f"{name}/")
        token = 2 * config.connector_ratio * width * (config.vlm.text.width + width)
        work.append(Work(name, tokens * token, own, own or flows))
    return work


def _mmdit(config: VinoConfig, bucket: BucketSpec, trains: Callable[..., bool], learns: Callable[[str], bool]) -> list[Work]:
    """Modulations and embedders run once a row, all else once a token; the guidance, one a batch, does not count."""
    mmdit, width, volume = config.mmdit, config.mmdit.width, math.prod(config.mmdit.patch)
    visual, context = bucket.target_tokens + bucket.reference_tokens, bucket.prompt_tokens + config.queries
    # where a gradient flows: behind whatever trains
    connected = trains("connector/", "queries/")
    refiner = connected or trains("mmdit/refiner/")
    signal = trains("mmdit/time/", "mmdit/guidance/")
    double = refiner or signal or trains("mmdit/latent_in/", "vae_connector/", "mmdit/double/")
    single = double or trains("mmdit/single/")
    time, refiner_time = trains("mmdit/time/"), trains("mmdit/refiner/time/")
    embedder, block = 2 * (_TIME_FEATURES + width) * width, 4 * width**2 + 2 * width * int(width * mmdit.mlp_ratio)

    def blocks(path: str, count: int, tokens: int, weights: int, modulation: int, flows: bool, signal_flows: bool) -> list[Work]:
        """weights: numbers that a token meets in a block; modulation: model widths that a block makes of a row's signal."""
        return [Work(path, count * 2 * tokens * weights, learns(path), flows),
                Work(f"{path} attention", count * 4 * tokens**2 * width, inputs=flows, attention=True),
                Work(f"{path} modulation", count * 2 * width**2 * modulation, learns(path), signal_flows)]

    return [
        Work("mmdit/latent_in", 2 * visual * mmdit.in_channels * volume * width, trains("mmdit/latent_in/")),
        Work("mmdit/time", embedder, time, time),
        Work("mmdit/refiner/time", embedder, refiner_time, refiner_time),
        Work("mmdit/refiner/pooled", 2 * (mmdit.text_width + width) * width, trains("mmdit/refiner/pooled/"), connected),
        Work("mmdit/refiner/context_in", 2 * context * mmdit.text_width * width, trains("mmdit/refiner/context_in/"), connected),
        *blocks("mmdit/refiner/blocks/", mmdit.refiner_blocks, context, 12 * width**2, 2, refiner, refiner),
        *blocks("mmdit/double/", mmdit.double_blocks, visual + context, block, 12, double, signal),
        *blocks("mmdit/single/", mmdit.single_blocks, visual + context, block, 3, single, signal),
        Work("mmdit/modulation_out", 4 * width**2, trains("mmdit/modulation_out/"), signal),
        Work("mmdit/out", 2 * bucket.target_tokens * width * mmdit.out_channels * volume, trains("mmdit/out/"), single),
    ]
