"""Text that Qwen3-VL writes, token for token against transformers' generate: greedy, sampled, with pictures and clips, in padded batches."""
import copy
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from transformers import LogitsProcessorList, Qwen3VLForConditionalGeneration, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from configs import models
from data_pipelines import shapes
from data_pipelines.packing import prompt_row
from data_pipelines.prompts import REWRITE_SYSTEM, Prompter
from tests.data.folders import SMALL_VLM
from tests.parity import qwen_reference as reference
from tests.parity.conversion import to_params
from tests.tolerances import FREQUENCY_SIGMAS, PARITY_ABS
from vino_jax.batch import Batch
from vino_jax.convert.tables.qwen_vl import TABLE
from vino_jax.models.qwen_vl import QwenVL
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime
from vino_jax.sampling.rewrite import Decoding, Rewriter, warp
from vino_jax.settings import VLMConfig, build
from vino_jax.sharding.mesh import make_mesh, parse_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset

NEW = 24


def clip_prompt() -> reference.Prompt:
    """A clip of three steps of 2x4 patches, then text."""
    step = [reference.VISION_START, *[reference.VIDEO] * 2, reference.VISION_END]
    return reference.Prompt([7, 2, *step, 9, *step, 4, *step, 30, 31, 5], videos=((3, 2, 4),), seed=3)


PROMPTS = {"text": reference.text_prompt(19, 1), "short text": reference.text_prompt(7, 6), "pictures": reference.small_picture_prompt(),
           "clip": clip_prompt(), "picture and clip": reference.picture_prompt()}


@pytest.fixture(scope="module", autouse=True)
def jax_settings():
    """Strict dtypes, and little time spent on programs that run for a moment."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    with jax.numpy_dtype_promotion("strict"):
        yield
    jax.config.update("jax_disable_most_optimizations", before)


def various(model: Qwen3VLForConditionalGeneration) -> Qwen3VLForConditionalGeneration:
    """The model with a small embedding, which is the head too: with a large one a random model follows every token by itself."""
    model.get_input_embeddings().weight.data.mul_(0.1)
    return model


def weights_of(model: Qwen3VLForConditionalGeneration, vlm: Definition):
    return to_params(TABLE, {name: value.numpy() for name, value in model.state_dict().items()}, vlm.abstract)


@functools.cache
def torch_model():
    return various(copy.deepcopy(reference.torch_model()))


@functools.cache
def params():
    return weights_of(torch_model(), reference.DEFINITION)


@functools.cache
def theirs(name: str, stops: tuple[int, ...] | None = None, **how) -> list[int]:
    """What transformers adds to a prompt, with the one of `stops` that ended it."""
    prompt = PROMPTS[name]
    inputs = {key: value for key, value in prompt.torch_inputs().items() if key not in ("position_ids", "use_cache")}
    out = torch_model().generate(**inputs, max_new_tokens=NEW, eos_token_id=stops and list(stops), pad_token_id=0, **{"do_sample": False, **how})
    return out[0, len(prompt.tokens):].tolist()


def rows_of(prompts: list[reference.Prompt], length: int = 40, patches: int = 64) -> list[Batch]:
    batch = reference.pack(prompts, length, patches)
    return [jax.tree.map(lambda x, i=i: x[i:i + 1], batch) for i in range(len(prompts))]


@functools.cache
def rewriter(decoding: Decoding, stops: tuple[int, ...]) -> Rewriter:
    return Rewriter(reference.DEFINITION, params(), decoding, stops)


def ours(names, decoding: Decoding | None = None, stops: tuple[int, ...] = (), seeds: list[int] | None = None) -> list[list[int]]:
    """Greedy by default."""
    return rewriter(decoding or Decoding(NEW), stops).generate(rows_of([PROMPTS[name] for name in names]), seeds or [0] * len(names))


def test_greedy_in_one_padded_batch():
    for name, tokens in zip(PROMPTS, ours(PROMPTS), strict=True):
        assert len(tokens) == NEW and len(set(tokens)) > 5, name
        assert tokens == theirs(name), name


@pytest.mark.parametrize("name", ["short text", "picture and clip"])
def test_greedy_alone_without_padding(name):
    prompt = PROMPTS[name]
    [row] = rows_of([prompt], len(prompt.tokens), len(prompt.patches(prompt.images + prompt.videos, 0)))
    assert Rewriter(reference.DEFINITION, params(), Decoding(NEW), ()).generate([row], [0]) == [theirs(name)]


def test_a_row_ends_with_its_first_stop():
    """At once, on the way, and not at all, in one batch."""
    lengths, stops = [], (61, 2)
    for name, tokens in zip(PROMPTS, ours(PROMPTS, stops=stops), strict=True):
        expected = theirs(name, stops)
        assert tokens == (expected[:-1] if expected[-1] in stops else expected), name
        lengths.append(len(tokens))
    assert min(lengths) == 0 and 1 < sorted(lengths)[2] < NEW and max(lengths) == NEW


def test_one_new_token():
    assert ours(PROMPTS, Decoding(1)) == [theirs(name)[:1] for name in PROMPTS]


# name -> decoding, and transformers' processors in the order in which its generate runs them
WARPS = {
    "temperature": (Decoding(1, 0.7), [TemperatureLogitsWarper(0.7)]),
    "top_k": (Decoding(1, 1.0, 5), [TopKLogitsWarper(5)]),
    "top_k above the vocabulary": (Decoding(1, 1.0, 100), [TopKLogitsWarper(100)]),
    "top_p": (Decoding(1, 1.0, 0, 0.8), [TopPLogitsWarper(0.8)]),
    "a top_p below rounding": (Decoding(1, 1.0, 0, 1e-8), [TopPLogitsWarper(1e-8)]),
    "all": (Decoding(1, 0.6, 20, 0.8), [TemperatureLogitsWarper(0.6), TopKLogitsWarper(20), TopPLogitsWarper(0.8)]),
    "all, hot": (Decoding(1, 3.0, 7, 0.5), [TemperatureLogitsWarper(3.0), TopKLogitsWarper(7), TopPLogitsWarper(0.5)]),
}


@pytest.mark.parametrize("kind", WARPS)
def test_what_is_sampled_from(kind):
    decoding, processors = WARPS[kind]
    scores = np.random.default_rng(3).standard_normal((6, 64)).astype(np.float32) * 3
    expected = LogitsProcessorList(processors)(None, torch.tensor(scores)).softmax(-1).numpy()
    mine = np.asarray(jax.nn.softmax(warp(jnp.asarray(scores), decoding), axis=-1))
    np.testing.assert_array_equal(mine > 0, expected > 0)
    np.testing.assert_allclose(mine, expected, rtol=0, atol=PARITY_ABS)


def test_frequencies_of_sampled_tokens():
    """Of the second token after its commonest first one, so through the cache; each of 4,000 rows has its own seed."""
    decoding, rows = Decoding(2, 0.1, 6, 0.9), 4000
    [row] = rows_of([PROMPTS["text"]], 20, 0)
    pairs = np.asarray(Rewriter(reference.DEFINITION, params(), decoding, ()).generate([row] * rows, range(rows)))
    processors = LogitsProcessorList([TemperatureLogitsWarper(0.1), TopKLogitsWarper(6), TopPLogitsWarper(0.9)])
    first = int(np.bincount(pairs[:, 0]).argmax())
    for before, tokens in (([], pairs[:, 0]), ([first], pairs[pairs[:, 0] == first, 1])):
        scores = torch_model()(torch.tensor([PROMPTS["text"].tokens + before])).logits[0, -1:]
        share = processors(None, scores).softmax(-1)[0].numpy()
        count = len(tokens)
        seen = np.bincount(tokens, minlength=64) / count
        assert count > 500 and 1 < (share > 0).sum() < 7
        assert not seen[share == 0].any()
        assert (np.abs(seen - share) <= FREQUENCY_SIGMAS * np.sqrt(share * (1 - share) / count)).all(), (seen[share > 0], share[share > 0])


def test_sampling_from_one_token_is_greedy():
    assert ours(PROMPTS, Decoding(NEW, 0.7, 1)) == [theirs(name, None, do_sample=True, temperature=0.7, top_k=1) for name in PROMPTS]


def test_a_row_does_not_depend_on_its_neighbours():
    decoding, names = Decoding(NEW, 0.1, 20, 0.95), list(PROMPTS)
    together = ours(names, decoding, seeds=[1, 2, 3, 4, 5])
    assert ours(names[::-1], decoding, seeds=[5, 4, 3, 2, 1]) == together[::-1]
    assert ours(names[2:3], decoding, seeds=[3]) == together[2:3]
    assert ours(names[2:3], decoding, seeds=[4]) != together[2:3]
    assert together != [theirs(name) for name in names]


@pytest.mark.parametrize("mesh, rows", [("data=2,fsdp=2,seq=2", 4), ("fsdp=2,tensor=2,seq=2", 3)])  # that it divides, and that it does not
def test_a_mesh_gives_the_same_tokens(mesh, rows):
    mesh, rules, names = make_mesh(parse_mesh(mesh)), preset("fsdp"), list(PROMPTS)[-rows:]
    placed = jax.device_put(params(), shardings(reference.DEFINITION.abstract, reference.DEFINITION.axes, mesh, rules))
    spread = Rewriter(reference.DEFINITION, placed, Decoding(NEW), (61, 2), mesh=mesh, rules=rules)
    assert spread.generate(rows_of([PROMPTS[name] for name in names]), [0] * rows) == ours(names, stops=(61, 2))


def test_the_embedded_vlm_with_a_whole_prompt():
    """Template, tokenizer, a picture and a clip: what launch.rewrite gives to the model, against transformers on the same folder."""
    model = various(Qwen3VLForConditionalGeneration.from_pretrained(SMALL_VLM, dtype=torch.float32))
    for layer in model.model.language_model.layers:
        layer.self_attn.q_norm.weight.data.mul_(3.0)  # attention that picks: otherwise the long prompt decides every token
    prompter = Prompter(SMALL_VLM)
    sample = shapes.sample(0, 0, "tiv2v", 5, 64, 64)
    images, video = [prompter.see_image(image) for image in sample.images], prompter.see_clip(sample.video)
    prompt = prompter.encode(sample.texts["instruction"], images, video, REWRITE_SYSTEM)
    ids = torch.tensor(prompt.ids[None].astype(np.int64))
    out = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=NEW, do_sample=False, eos_token_id=list(prompter.stops),
        pad_token_id=0, pixel_values=torch.tensor(np.concatenate([i.values for i in images])),
        image_grid_thw=torch.tensor([i.grid for i in images]), pixel_values_videos=torch.tensor(video.values),
        video_grid_thw=torch.tensor([video.grid]))
    vlm = Definition(lambda rngs: QwenVL(build(VLMConfig, models.shapes()["vlm"]), Runtime(), rngs=rngs))
    [tokens] = Rewriter(vlm, weights_of(model, vlm), Decoding(NEW), prompter.stops).generate([prompt_row(prompt, "tiv2v")], [0])
    assert len(set(tokens)) > 5 and tokens == out[0, len(prompt.ids):].tolist()
