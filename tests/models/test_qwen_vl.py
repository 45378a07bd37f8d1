"""Qwen3-VL's structure: full size, its conversion table, what of it has a backward pass, and bfloat16."""
import json
import re
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.conversion import flatten, torch_names
from vino_jax.batch import BucketSpec
from vino_jax.convert.tables.qwen_vl import TABLE
from vino_jax.models.qwen_vl import QwenVL
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VLMConfig, VLMTextConfig, VLMVisionConfig
from vino_jax.sharding.axes import PARAM_AXES

MANIFESTS = Path(__file__).resolve().parents[3] / "shared" / "golden" / "manifests.json"
TINY = VLMConfig(
    text=VLMTextConfig(vocab=64, width=32, layers=4, heads=4, kv_heads=2, head_dim=8, mlp=64, mrope_section=(2, 1, 1)),
    vision=VLMVisionConfig(layers=3, width=16, heads=2, mlp=32, out_width=32, positions=16, deepstack=(0, 1)))
BUCKET = BucketSpec("test", batch=2, frames=1, height=32, width=32, prompt_tokens=96, patches=16)


@pytest.fixture(scope="module")
def full():
    return Definition(lambda rngs: QwenVL(VLMConfig(), Runtime(), rngs=rngs))


def tiny(config=TINY, **runtime):
    return Definition(lambda rngs: QwenVL(config, Runtime(**runtime), rngs=rngs))


@pytest.fixture(scope="module")
def params():
    """Random parameters, drawn by numpy: quicker than compiling the initialisers."""
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: (rng.standard_normal(leaf.shape) * leaf.shape[-1] ** -0.5).astype(np.float32), tiny().abstract)


def with_pictures(seed=0):
    """A batch whose prompts hold visual tokens: the 4 merged patches at tokens 3..6."""
    batch = BUCKET.fake(seed, vocab=64)
    batch.visual_index[:, 3:7] = np.arange(4)
    batch.patch_coords[...] = [0, 0, 4, 4]
    batch.patch_segment[...] = 1
    return batch


def test_full_size_and_axes(full):
    assert sum(leaf.size for leaf in jax.tree.leaves(full.abstract)) == 4_437_815_808
    leaves, axes = flatten(full.abstract), flatten(full.axes)
    for path, names in axes.items():
        assert len(names) == leaves[path].ndim and set(names) <= {None, *PARAM_AXES}, path
    assert axes["text/layers/attention/k/kernel"] == ("layers", "vlm_width", "kv_heads")


@pytest.mark.skipif(not MANIFESTS.exists(), reason="needs ../shared/golden/manifests.json, which lies beside the repository")
def test_table_covers_the_published_names_both_ways(full):
    manifest = json.loads(MANIFESTS.read_text())["qwen3vl"]
    left_out = {name for name in manifest if any(re.fullmatch(rule.torch, name) for rule in TABLE.left_out)}
    names, leaves = torch_names(TABLE, full.abstract), flatten(full.abstract)
    assert left_out == {"lm_head.weight"} and set(names) == set(manifest) - left_out
    for name, (path, layer, op) in names.items():
        ours = leaves[path].shape if layer is None else leaves[path].shape[1:]
        assert tuple(op.shape(tuple(manifest[name]))) == ours, name


def flops_of_products(jaxpr) -> int:
    """Multiply-adds of all matrix products in a jaxpr, scans multiplied by their length."""
    total = 0
    for eqn in jaxpr.eqns:
        if eqn.primitive.name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            total += eqn.outvars[0].aval.size * int(np.prod([eqn.invars[0].aval.shape[d] for d in contracted]))
        times = eqn.params.get("length", 1)
        total += times * sum(flops_of_products(inner) for inner in jax.core.jaxprs_in_params(eqn.params))
    return total


def test_only_the_queries_have_a_backward_pass(params):
    definition, batch = tiny(), with_pictures()
    loss = lambda params, queries: sum(jnp.sum(x) for x in definition(params).conditioning(batch, queries))  # noqa: E731

    def flops(function, amount):
        return flops_of_products(jax.make_jaxpr(function)(params, jnp.ones((amount, 32))).jaxpr)

    prompt_alone = flops(loss, 0)
    queries_forward = flops(loss, 4) - prompt_alone
    assert prompt_alone > 10 * queries_forward
    # forward, recomputation, and gradients for the activations alone (attention has two products a product)
    assert flops(jax.grad(loss, argnums=(0, 1)), 4) <= prompt_alone + 5 * queries_forward
    gradient, query_gradient = jax.jit(jax.grad(loss, argnums=(0, 1)))(params, jax.random.normal(jax.random.key(1), (4, 32)))
    assert all(not np.any(leaf) for leaf in jax.tree.leaves(gradient)) and np.all(np.any(query_gradient, axis=1))


def test_no_copy_of_the_weights_that_run():
    """The last decoder layer stays out of conditioning without the other layers' weights being copied."""
    config = replace(TINY, text=replace(TINY.text, mlp=4096))
    definition = tiny(config)
    spec = BucketSpec("test", batch=1, frames=1, height=32, width=32, prompt_tokens=8).spec()
    compiled = jax.jit(lambda p, b, q: definition(p).conditioning(b, q)).lower(
        definition.abstract, spec, jax.ShapeDtypeStruct((4, 32), jnp.float32)).compile()
    one_stack = 4 * 32 * 4096 * 4
    assert compiled.memory_analysis().temp_size_in_bytes < one_stack


def test_padding_and_queries_do_not_reach_the_prompt(params):
    definition, batch = tiny(), with_pictures()
    call = jax.jit(lambda b, q: definition(params).conditioning(b, q))
    queries = jax.random.normal(jax.random.key(1), (4, 32))
    prompt, hidden = call(batch, queries)
    other = batch.replace(tokens=np.where(batch.prompt_mask, batch.tokens, 63 - batch.tokens))
    prompt2, hidden2 = call(other, queries)
    np.testing.assert_array_equal(hidden, hidden2)
    np.testing.assert_array_equal(prompt[batch.prompt_mask], prompt2[batch.prompt_mask])
    prompt3, hidden3 = call(batch, queries.at[2].add(1.0))
    np.testing.assert_array_equal(prompt, prompt3)
    np.testing.assert_array_equal(hidden[:, :2], hidden3[:, :2])
    assert np.all(np.any(hidden[:, 2:] != hidden3[:, 2:], axis=-1))


def test_bfloat16_with_strict_promotion_and_stored_bfloat16(params):
    batch, queries = with_pictures(), jax.random.normal(jax.random.key(1), (4, 32))
    exact = jax.jit(lambda p: tiny()(p).conditioning(batch, queries))(params)
    half = jax.tree.map(lambda p: p.astype(jnp.bfloat16), params)
    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(lambda p: tiny(dtype="bfloat16")(p).conditioning(batch, queries))(half)
        logits = jax.eval_shape(lambda p: tiny(dtype="bfloat16")(p).logits(batch), half)
    assert all(x.dtype == jnp.bfloat16 for x in ours) and logits.dtype == jnp.float32
    for x, y in zip(ours, exact):
        assert np.abs(x.astype(jnp.float32) - y).mean() < 0.03 * np.abs(y).mean()
