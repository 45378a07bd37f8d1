"""attend(): queries in chunks, kernels, and sequences on several devices give what products on one device give."""
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerances import BATCH_ROW_ABS, KERNEL_ABS
from vino_jax.errors import UserError
from vino_jax.nn import attention, splash
from vino_jax.sharding.constrain import use_sharding
from vino_jax.sharding.mesh import make_mesh, parse_mesh
from vino_jax.sharding.rules import preset


def _inputs(length):
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, heads, 8)), jnp.float32) for n, heads in ((length, 4), (10, 2), (10, 2)))
    mask = rng.random((2, 1, length, 10)) < 0.7
    mask[..., 0] = True
    return q, k, v, jnp.asarray(mask)


@pytest.mark.parametrize("limit", [("_MAX_SCORES", 200), ("_CACHED_SCORES", 50)])  # of 2 x 4 x length x 10: by rows, or head by head
@pytest.mark.parametrize("rows", ["none", "one", "each", "heads"])
@pytest.mark.parametrize("length", [7, 12, 13])
def test_chunks_of_queries_change_nothing(monkeypatch, length, rows, limit):
    q, k, v, mask = _inputs(length)
    mask = {"none": None, "one": mask[:, :, :1], "each": mask, "heads": mask[:1] | (jnp.arange(4) == 2)[None, :, None, None]}[rows]

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention.attend(q, k, v, mask=mask)))

    whole = attention.attend(q, k, v, mask=mask), jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(attention, *limit)
    assert "while" in jax.jit(loss).lower(q, k, v).as_text()
    parts = attention.attend(q, k, v, mask=mask), jax.grad(loss, (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=BATCH_ROW_ABS), whole, parts)


def test_an_unknown_kernel_is_told():
    q, k, v, _ = _inputs(4)
    with pytest.raises(UserError, match="'splesh' is unknown; choose one of auto, xla"):
        attention.attend(q, k, v, kernel="splesh")


def _self_attention(length, heads=6, width=16):
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(2, length, heads, width)), jnp.float32) for _ in range(3))
    valid = np.arange(length) < np.array([[length], [length - length // 3]])  # rows of unequal lengths
    valid[:, 3] = False  # padding inside
    return q, k, v, jnp.asarray(valid)


def _value_and_gradients(q, k, v, valid, **options):
    """Output, and gradients of a loss that reads what counts."""
    def loss(q, k, v):
        out = attention.attend(q, k, v, valid=valid, **options)
        return jnp.sum(jnp.where(valid[:, :, None, None], jnp.sin(out), 0.0)), out

    (_, out), grads = jax.jit(jax.value_and_grad(loss, (0, 1, 2), has_aux=True))(q, k, v)
    return jax.device_get((jnp.where(valid[:, :, None, None], out, 0.0), grads))


def _same(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=KERNEL_ABS), a, b)


@pytest.mark.parametrize("length", [130, 256, 300])
def test_splash_interpreted_is_the_products(length):
    inputs = _self_attention(length)
    _same(_value_and_gradients(*inputs, kernel="splash"), _value_and_gradients(*inputs, kernel="xla"))


def test_cudnn_gets_valid_keys_in_front(monkeypatch):
    """What is handed to it is right: jax.nn's products in its place, as there is no GPU here."""
    monkeypatch.setitem(attention.KERNELS, "cudnn", lambda platform: attention.Cudnn("xla"))
    inputs = _self_attention(40)
    _same(_value_and_gradients(*inputs, kernel="cudnn"), _value_and_gradients(*inputs, kernel="xla"))


# 6 heads: over 2 and 3 of them tokens travel all to all, over 4 two groups of 2 exchange keys on a ring, over 8 four do; with "tensor" 2
# there are 3 heads a device and all of it is a ring
@pytest.mark.parametrize("kernel", ["xla", "splash"])
@pytest.mark.parametrize("mesh", ["data=2,seq=2", "seq=3", "fsdp=2,seq=4", "seq=8", "tensor=2,seq=4", "tensor=2,seq=2"])
def test_a_sequence_on_several_devices_is_that_on_one(mesh, kernel):
    sizes = parse_mesh(mesh)
    inputs = _self_attention(264)
    alone = _value_and_gradients(*inputs, kernel="xla")
    with use_sharding(make_mesh(sizes, jax.devices()[:math.prod(sizes.values())]), preset("fsdp_seq")):
        text = jax.jit(lambda *a: attention.attend(*a[:3], valid=a[3], kernel=kernel)).lower(*inputs).as_text()
        assert ("all_to_all" in text) == (mesh != "tensor=2,seq=2" and mesh != "tensor=2,seq=4")
        assert ("collective_permute" in text) == (sizes["seq"] in (4, 8) or "tensor" in sizes)
        _same(_value_and_gradients(*inputs, kernel=kernel), alone)


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("kind", ["valid", "mask"])
def test_rows_that_a_mesh_does_not_divide_lie_whole(kind, rows):
    q, k, v, valid = (jnp.concatenate([x, x])[:rows] for x in _self_attention(24))
    seen = {"valid": valid} if kind == "valid" else {"mask": valid[:, None, None, :]}
    alone = attention.attend(q, k, v, **seen)
    with use_sharding(make_mesh({"data": 2, "fsdp": 2, "seq": 2}), preset("fsdp")):
        there = jax.jit(lambda q, k, v, seen: attention.attend(q, k, v, **seen))(q, k, v, seen)
    assert there.shape == alone.shape
    np.testing.assert_allclose(there, alone, rtol=0, atol=KERNEL_ABS)


def test_tiles_divide_their_length_and_cost_little():
    for length in (1, 127, 128, 5297, 6065, 36864, 38144, 65280):
        found = splash.tiles(length)
        assert length <= found.length <= max(128, splash._SLACK * length, length + 127) and found.length % 128 == 0
        for (q, keys, compute), caps in zip((found.forward, found.backward), splash.BLOCKS):
            assert found.length % q == found.length % keys == keys % compute == compute % 128 == 0
            assert all(size <= cap for size, cap in zip((q, keys, compute), caps))
    assert min(splash.tiles(38144).forward) >= 512  # 298 x 128, and 149 is a prime: padding buys larger blocks
