"""Rotary embedding: the forms of a turn by platform."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from vino_jax.aot.chips import topology_devices
from vino_jax.nn.rope import apply_rope, turned_by_product, turned_by_reversal
from vino_jax.sharding.constrain import use_sharding


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_turn_by_a_product_is_exact(dtype):
    x = jax.random.normal(jax.random.key(0), (2, 5, 3, 16), dtype)
    expected = np.stack([-x[..., 1::2], x[..., ::2]], axis=-1).reshape(x.shape).astype(np.float32)
    for turned in (turned_by_reversal, turned_by_product):
        found = jax.jit(turned)(x)
        assert found.dtype == jnp.float32 and np.array_equal(found, expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradients_of_both_turns_are_equal(dtype):
    x, weights = (jax.random.normal(jax.random.key(n), (2, 5, 3, 16), jnp.float32) for n in range(2))
    by_reversal, by_product = (jax.grad(lambda x, turned=turned: jnp.sum(turned(x) * weights))(x.astype(dtype))
                             for turned in (turned_by_reversal, turned_by_product))
    assert by_product.dtype == dtype and np.array_equal(by_reversal, by_product)


@pytest.mark.parametrize("platform, turn", [("tpu", "dot_general"), ("cpu", "rev")])
def test_a_tpu_turns_by_products(platform, turn):
    x, table = jnp.zeros((2, 5, 3, 16), jnp.bfloat16), jnp.zeros((2, 5, 16))
    devices = topology_devices("v5e:2x2") if platform == "tpu" else jax.devices()
    with use_sharding(Mesh(devices[:1], ("data",)), {}):
        operations = {equation.primitive.name for equation in jax.make_jaxpr(lambda *given: apply_rope(*given))(x, table, table).eqns}
    assert operations & {"dot_general", "rev"} == {turn}
