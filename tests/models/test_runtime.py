"""What nn/runtime.py tells XLA, read off the compiled program."""
import jax
import jax.numpy as jnp
import pytest

from vino_jax.nn.layers import RMSNorm
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import compiler_options

PRODUCT = (jnp.matmul, [(512, 768), (768, 768)])
CONVOLUTION = (lambda x, kernel: jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC")),
               [(1, 16, 16, 32), (3, 3, 32, 32)])


def program(call, shapes) -> str:
    inputs = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(call, compiler_options=compiler_options()).lower(*inputs).compile().as_text()


@pytest.mark.parametrize("call, shapes", [PRODUCT, CONVOLUTION])
def test_products_and_convolutions_on_a_cpu_take_xlas_own_code_where_programs_are_kept(call, shapes):
    assert jax.config.jax_compilation_cache_dir
    text = program(call, shapes)
    assert "ynn_fusion" not in text and "onednn_fusion" not in text


@pytest.mark.parametrize("call, shapes", [PRODUCT, CONVOLUTION])
def test_products_alone_take_onednn_where_no_program_is_kept(nothing_kept, call, shapes):
    text = program(call, shapes)
    assert "ynn_fusion" not in text and ("onednn_fusion" in text) == (call is jnp.matmul)


def test_a_large_product_is_not_taken_into_the_norm_of_it(nothing_kept):
    norm = Definition(lambda rngs: RMSNorm(128, rngs=rngs))
    text = program(lambda x, kernel, scale: norm({"scale": scale})((x @ kernel).reshape(4096, 6, 128)), [(4096, 768), (768, 768), (128,)])
    assert "onednn_fusion" in text and "ynn_fusion" in text
