"""A tiny Qwen3-VL of transformers with seeded weights, and prompts for it: what the three Qwen parity tests share."""
import functools
from dataclasses import dataclass

import jax
import numpy as np
import torch
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from tests.parity.conversion import to_params
from vino_jax.batch import Batch
from vino_jax.convert.tables.qwen_vl import TABLE
from vino_jax.models.qwen_vl import QwenVL
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VLMConfig, VLMTextConfig, VLMVisionConfig

VISION_START, VISION_END, IMAGE, VIDEO = 60, 61, 62, 63
CONFIG = VLMConfig(
    text=VLMTextConfig(vocab=64, width=32, layers=4, heads=4, kv_heads=2, head_dim=16, mlp=48, mrope_section=(4, 2, 2)),
    vision=VLMVisionConfig(layers=5, width=32, heads=2, mlp=48, patch=4, out_width=32, positions=49, deepstack=(0, 2)))
DEFINITION = Definition(lambda rngs: QwenVL(CONFIG, Runtime(), rngs=rngs))
PIXELS = 3 * 2 * 4 * 4


@functools.cache
def torch_model() -> Qwen3VLForConditionalGeneration:
    """The reference with every parameter random (norms around 1), float32, eager attention."""
    torch.set_num_threads(1)
    text, vision = CONFIG.text, CONFIG.vision
    config = Qwen3VLConfig(
        text_config=dict(
            vocab_size=text.vocab, hidden_size=text.width, num_hidden_layers=text.layers, num_attention_heads=text.heads,
            num_key_value_heads=text.kv_heads, head_dim=text.head_dim, intermediate_size=text.mlp, rms_norm_eps=text.rms_eps,
            rope_theta=text.rope_theta, tie_word_embeddings=True, pad_token_id=None,
            rope_scaling={"rope_type": "default", "mrope_section": list(text.mrope_section), "mrope_interleaved": True}),
        vision_config=dict(
            depth=vision.layers, hidden_size=vision.width, num_heads=vision.heads, intermediate_size=vision.mlp,
            patch_size=vision.patch, out_hidden_size=vision.out_width, num_position_embeddings=vision.positions,
            deepstack_visual_indexes=list(vision.deepstack)),
        image_token_id=IMAGE, video_token_id=VIDEO, vision_start_token_id=VISION_START, vision_end_token_id=VISION_END,
        tie_word_embeddings=True)
    model = Qwen3VLForConditionalGeneration._from_config(config, attn_implementation="eager").eval().float()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + 0.2 * noise if "norm" in name and name.endswith("weight") else 0.2 * noise)
            parameter.requires_grad_(False)
    return model


@functools.cache
def params():
    """The reference's weights as our tree."""
    with jax.ensure_compile_time_eval():  # kept between calls, so it must not be a tracer of the first one's
        return to_params(TABLE, {name: value.numpy() for name, value in torch_model().state_dict().items()}, DEFINITION.abstract)


def merge_order(height: int, width: int) -> np.ndarray:
    """(row, column, height, width) of a grid's patches, 2x2 neighbours together, (height * width, 4)."""
    row, column = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    coords = np.stack([row, column, np.full_like(row, height), np.full_like(row, width)], -1)
    return coords.reshape(height // 2, 2, width // 2, 2, 4).transpose(0, 2, 1, 3, 4).reshape(-1, 4)


@dataclass
class Prompt:
    """One prompt: token ids, and its pictures and clips as grids (frames, height, width) with random patches."""

    tokens: list[int]
    images: tuple[tuple[int, int, int], ...] = ()
    videos: tuple[tuple[int, int, int], ...] = ()
    seed: int = 0

    def patches(self, grids, kind) -> torch.Tensor:
        rng = np.random.default_rng([self.seed, kind])
        return torch.tensor(rng.standard_normal((sum(t * h * w for t, h, w in grids), PIXELS)), dtype=torch.float32)

    def torch_inputs(self) -> dict:
        """Keyword arguments of the reference's forward, for this prompt alone.

        Without an attention mask and a cache transformers takes MRoPE's repeated positions for several packed sequences: so one is given.
        """
        ids = torch.tensor([self.tokens])
        image_grid, video_grid = (torch.tensor(grids) if grids else None for grids in (self.images, self.videos))
        position, _ = torch_model().model.get_rope_index(ids, image_grid, video_grid)
        inputs = dict(input_ids=ids, position_ids=position, attention_mask=torch.ones_like(ids), use_cache=False)
        if self.images:
            inputs |= dict(pixel_values=self.patches(self.images, 0), image_grid_thw=image_grid)
        if self.videos:
            inputs |= dict(pixel_values_videos=self.patches(self.videos, 1), video_grid_thw=video_grid)
        return inputs


def text_prompt(length: int, seed: int) -> Prompt:
    return Prompt(np.random.default_rng(seed).integers(0, 60, length).tolist())


def picture_prompt() -> Prompt:
    """Text, a picture of 4x6 patches, a clip of two steps of 4x4 patches, text."""
    step = [VISION_START, *[VIDEO] * 4, VISION_END]
    return Prompt([3, 7, 9, VISION_START, *[IMAGE] * 6, VISION_END, 11, *step, 12, 13, *step, 5, 6, 8, 2],
                  images=((1, 4, 6),), videos=((2, 4, 4),), seed=1)


def small_picture_prompt() -> Prompt:
    """Two pictures, of 4x2 and 2x2 patches, and less text."""
    return Prompt([1, VISION_START, *[IMAGE] * 2, VISION_END, VISION_START, IMAGE, VISION_END, 2, 4], images=((1, 4, 2), (1, 2, 2)), seed=2)


def pack(prompts: list[Prompt], length: int, patches: int) -> Batch:
    """Prompts as rows of a batch, right-padded to `length` tokens and `patches` patches; padding holds rubbish on purpose."""
    rng, rows = np.random.default_rng(9), len(prompts)
    batch = dict(
        tokens=rng.integers(0, 60, (rows, length)).astype(np.int32), prompt_mask=np.zeros((rows, length), bool),
        mrope=np.full((rows, 3, length), 1, np.int32), visual_index=np.full((rows, length), -1, np.int32),
        patches=rng.standard_normal((rows, patches, PIXELS)).astype(np.float32),
        patch_coords=np.zeros((rows, patches, 4), np.int32), patch_segment=np.zeros((rows, patches), np.int32))
    for row, prompt in enumerate(prompts):
        size, tokens = len(prompt.tokens), np.asarray(prompt.tokens)
        batch["tokens"][row, :size], batch["prompt_mask"][row, :size] = tokens, True
        batch["mrope"][row, :, :size] = prompt.torch_inputs()["position_ids"][:, 0].numpy()
        visual = np.isin(tokens, (IMAGE, VIDEO))
        batch["visual_index"][row, :size] = np.where(visual, np.cumsum(visual) - 1, -1)
        at = segment = 0
        batch["patches"][row, :len(prompt.patches(prompt.images + prompt.videos, 0))] = torch.cat(
            [prompt.patches(prompt.images, 0), prompt.patches(prompt.videos, 1)]).numpy()
        for frames, height, width in prompt.images + prompt.videos:
            for _ in range(frames):
                here, segment = slice(at, at + height * width), segment + 1
                batch["patch_coords"][row, here], batch["patch_segment"][row, here] = merge_order(height, width), segment
                at = here.stop
    empty = np.zeros((rows, 0), np.int32)
    scalars = dict.fromkeys(("target_start", "shift", "task", "weight", "sample"), np.zeros(rows, np.int32))
    return Batch(**batch, role=empty, source=empty, position=np.zeros((rows, 0, 3), np.int32), **scalars)


def torch_conditioning(prompt: Prompt, queries: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The reference with queries appended: the last-but-one layer's output at prompt and queries (L, W), (Q, W)."""
    model, inputs = torch_model(), prompt.torch_inputs()
    embeds = model.get_input_embeddings()(inputs.pop("input_ids"))
    position = inputs.pop("position_ids")
    behind = position[:, :, -1:] + torch.arange(len(queries))
    inputs["attention_mask"] = torch.ones(position.shape[1], position.shape[2] + len(queries), dtype=torch.long)
    kept = []
    hook = model.model.language_model.layers[CONFIG.text.layers - 2].register_forward_hook(lambda module, args, output: kept.append(output))
    model.model(inputs_embeds=torch.cat([embeds, queries[None]], 1), position_ids=torch.cat([position, behind], -1), **inputs)
    hook.remove()
    return kept[0][0, :-len(queries)], kept[0][0, -len(queries):]
