"""MMDiT, connectors and context: sizes, rows of a batch, memory switches, precision, order of tokens."""
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.conversion import flatten, torch_names
from tests.tolerances import BATCH_ROW_ABS
from vino_jax.batch import ROLE_LATENT, ROLE_MARKER, ROLE_PAD, BucketSpec
from vino_jax.convert.tables import vino as vino_tables
from vino_jax.convert.tables.mmdit import MMDIT
from vino_jax.errors import UserError
from vino_jax.models.connector import Connector, Queries
from vino_jax.models.context import References, patchify, select_references, target_positions, unpatchify
from vino_jax.models.mmdit import MMDiT
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime, compiler_options
from vino_jax.nn.stack import REMAT_POLICIES
from vino_jax.settings import MMDiTConfig

MANIFESTS = Path(__file__).resolve().parents[2].parent / "shared" / "golden" / "manifests.json"
TINY = MMDiTConfig(in_channels=4, out_channels=4, heads=2, head_dim=16, double_blocks=2, single_blocks=2, refiner_blocks=1,
                   text_width=24, pooled_width=12, rope_axes=(4, 6, 6))
FULL = {
    "transformer": (lambda rngs: MMDiT(MMDiTConfig(), Runtime(), rngs=rngs), MMDIT, 12_821_012_544),
    "connector": (lambda rngs: Connector(2560, 4096, 4, rngs=rngs), vino_tables.CONNECTOR, 109_074_944),
    "connector_vae_branch": (lambda rngs: Connector(2560, 3072, 4, rngs=rngs), vino_tables.VAE_CONNECTOR, 69_223_936),
    "queries": (lambda rngs: Queries(256, 2560, rngs=rngs), vino_tables.QUERIES, 655_360),
}


@pytest.fixture(scope="module", params=FULL)
def full(request):
    build, table, count = FULL[request.param]
    return request.param, Definition(build), table, count


def test_full_size(full):
    _, definition, table, count = full
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(definition.abstract)) == count
    torch_names(table, definition.abstract)  # rules and leaves match one to one


def test_published_names(full):
    if not MANIFESTS.is_file():
        pytest.skip("../shared/golden is not here")
    part, definition, table, _ = full
    manifest = {"metaquery": [256, 2560]} if part == "queries" else json.loads(MANIFESTS.read_text())[part]
    leaves, names = flatten(definition.abstract), torch_names(table, definition.abstract)
    assert names.keys() == manifest.keys()
    for name, (path, i, op) in names.items():
        assert op.shape(tuple(manifest[name])) == leaves[path].shape[i is not None:], name


def definition(**runtime):
    return Definition(lambda rngs: MMDiT(TINY, Runtime(**runtime), rngs=rngs))


@pytest.fixture(scope="module")
def params():
    """Random everywhere: biases and norm scales too."""
    rng = np.random.default_rng(0)

    def fill(path, leaf):
        kind = path[-1].key
        scale = leaf.shape[-2] ** -0.5 if kind == "kernel" else 0.1
        return jnp.asarray((kind == "scale") + scale * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(fill, definition().abstract)


def compiled(function):
    """jit that spends little on optimising what runs once."""
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def inputs(rows=3, latent=(2, 4, 6), references=14, context=11):
    """Arguments of MMDiT.__call__ with other numbers of reference and context tokens in each row, and rubbish in the padding."""
    rng = np.random.default_rng(0)
    normal = lambda *shape: rng.standard_normal(shape).astype(np.float32)  # noqa: E731
    counts, lengths = [references, 0, references // 2][:rows], [4, context, context - 3][:rows]
    role = np.zeros((rows, references), np.int32)
    for row, count in enumerate(counts):
        role[row, :count] = ROLE_LATENT
        role[row, :count:5] = ROLE_MARKER
    refs = References(normal(rows, references, 16), normal(rows, references, TINY.width), role,
                      rng.integers(0, 5, (rows, references, 3)).astype(np.int32))
    mask = np.arange(context)[None] < np.asarray(lengths)[:, None]
    return (normal(rows, *latent, 4), np.linspace(0.2, 0.9, rows).astype(np.float32), refs, np.arange(rows, dtype=np.int32),
            normal(rows, context, 24), mask), counts, lengths


def test_rows_as_alone(params):
    (latents, time, refs, start, context, mask), counts, lengths = inputs()
    run = compiled(lambda *args: definition()(params)(*args))
    together = run(latents, time, refs, start, context, mask)
    for row, (count, length) in enumerate(zip(counts, lengths)):
        one = slice(row, row + 1)
        few = References(*(x[one, :count] for x in (refs.tokens_BRP, refs.markers_BRD, refs.role_BR, refs.position_BR3)))
        alone = run(latents[one], time[one], few, start[one], context[one, :length], mask[one, :length])
        np.testing.assert_allclose(together[one], alone, rtol=0, atol=BATCH_ROW_ABS)


def test_memory_order_is_free(params):
    (latents, time, refs, start, context, mask), *_ = inputs()
    order = np.random.default_rng(1).permutation(refs.role_BR.shape[1])
    run = compiled(lambda refs: definition()(params)(latents, time, refs, start, context, mask))
    np.testing.assert_allclose(run(refs), run(jax.tree.map(lambda x: x[:, order], refs)), rtol=0, atol=BATCH_ROW_ABS)


def assert_same(found, expected):
    """Of a loss and its gradients."""
    np.testing.assert_allclose(found[0], expected[0], rtol=1e-6)
    for a, b in zip(jax.tree.leaves(found[1]), jax.tree.leaves(expected[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * max(1.0, float(jnp.abs(b).max())))


def test_remat_changes_nothing(params):
    args, *_ = inputs(rows=2)

    def value_and_gradient(remat):
        loss = lambda p: jnp.sum(jnp.square(definition(remat=remat)(p)(*args)))  # noqa: E731
        return compiled(jax.value_and_grad(loss))(params)

    expected = value_and_gradient("nothing")
    for remat in (*(name for name in REMAT_POLICIES if name != "nothing"), "budget:0.0002"):
        assert_same(value_and_gradient(remat), expected)


def test_products_by_onednn_change_nothing(params, nothing_kept):
    """Nor do they end the process, as products do that oneDNN is given with what is around them."""
    args, *_ = inputs(rows=2)
    args = jax.tree.map(jnp.asarray, args)
    loss = jax.value_and_grad(lambda p: jnp.sum(jnp.square(definition()(p)(*args))))
    chosen = jax.jit(loss, compiler_options=compiler_options()).lower(params).compile()
    assert "onednn_fusion" in chosen.as_text()
    assert_same(chosen(params), compiled(loss)(params))


@pytest.mark.parametrize("stored", ["float32", "bfloat16"])
def test_bfloat16(params, stored):
    args, *_ = inputs()
    args = jax.tree.map(jnp.asarray, args)
    exact = compiled(lambda p: definition()(p)(*args))(params)
    with jax.numpy_dtype_promotion("strict"):
        velocity = compiled(lambda p: definition(dtype="bfloat16")(p)(*args))(jax.tree.map(lambda x: x.astype(stored), params))
    assert velocity.dtype == jnp.float32
    error = float(jnp.linalg.norm(velocity - exact) / jnp.linalg.norm(exact))
    assert 0 < error < 0.05, error


def test_patches():
    latents = np.arange(2 * 2 * 4 * 6 * 3, dtype=np.float32).reshape(2, 2, 4, 6, 3)
    tokens = np.asarray(patchify(jnp.asarray(latents), (1, 2, 2)))
    assert tokens.shape == (2, 12, 12)
    # token (frame 1, row 0, column 2), values in the order (C, row, column) of the patch
    np.testing.assert_array_equal(tokens[1, 8], latents[1, 1, 0:2, 4:6].transpose(2, 0, 1).reshape(-1))
    np.testing.assert_array_equal(unpatchify(jnp.asarray(tokens), (2, 2, 3), (1, 2, 2)), latents)
    np.testing.assert_array_equal(unpatchify(patchify(latents, (2, 2, 1)), (1, 2, 6), (2, 2, 1)), latents)
    with pytest.raises(UserError, match="patches"):
        patchify(jnp.zeros((1, 1, 3, 4, 2)), (1, 2, 2))
    positions = np.asarray(target_positions(2, 1, 2, jnp.asarray([5, 0])))
    np.testing.assert_array_equal(positions[0], [[5, 0, 0], [5, 0, 1], [6, 0, 0], [6, 0, 1]])
    np.testing.assert_array_equal(positions[1], [[0, 0, 0], [0, 0, 1], [1, 0, 0], [1, 0, 1]])


def test_select_references():
    bucket = BucketSpec("edit", 2, 1, 32, 32, 8, images=1, image_height=32, image_width=32)
    batch = bucket.fake()
    batch.role[1] = ROLE_PAD
    pool, markers = np.arange(2 * 4 * 5.0).reshape(2, 4, 5), 100 + np.arange(2 * 8 * 3.0).reshape(2, 8, 3)
    picked = select_references(jnp.asarray(pool), jnp.asarray(markers), batch)
    np.testing.assert_array_equal(picked.tokens_BRP[0, 1:5], pool[0])
    np.testing.assert_array_equal(picked.markers_BRD[0, [0, 5]], markers[0, [0, 1]])
    for leaf in (picked.tokens_BRP[1], picked.markers_BRD[1], picked.tokens_BRP[0, [0, 5]], picked.markers_BRD[0, 1:5]):
        assert not np.any(leaf)
    none = select_references(jnp.zeros((2, 0, 5)), jnp.asarray(markers), BucketSpec("t2i", 2, 1, 32, 32, 8).fake())
    assert none.tokens_BRP.shape == (2, 0, 5) and none.markers_BRD.shape == (2, 0, 3)
