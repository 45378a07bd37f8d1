"""What nn/runtime.py tells XLA, read off the compiled program."""
import jax
import jax.numpy as jnp
import pytest

from vino_jax.nn.runtime import compiler_options


def convolved(x, kernel):
    return jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))


@pytest.mark.parametrize("call, shapes", [(jnp.matmul, [(512, 768), (768, 768)]), (convolved, [(1, 16, 16, 32), (3, 3, 32, 32)])])
def test_products_and_convolutions_on_a_cpu_do_not_go_to_ynnpack(call, shapes):
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    assert "ynn_fusion" not in jax.jit(call, compiler_options=compiler_options()).lower(*inputs).compile().as_text()
