"""Products of quantized values, by qwix, for modules whose code knows nothing of it: a table from a runtime's name to what it does.

Weights stay float masters; they and activations are rounded at every product, the gradients that come back at the products of the backward
pass. Every row of activations and every column of weights has a scale of its own.
"""
from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx

from vino_jax.errors import UserError

# Modules of the MMDiT, by path: the Linears in its blocks, without those that modulate, which every token's value hangs on. Attention's own
# products and that of single/out, which are computed in a block's own code, stay as they are, as do the first and last maps.
_LINEARS = r"(double|single)/(?!.*modulation).+"


def _int8(module: nnx.Module) -> nnx.Module:
    try:
        import qwix
    except ImportError:
        raise UserError("runtime.quantize 'int8' needs qwix: pip install 'vino_jax[int8]'") from None
    rule = qwix.QtRule(module_path=_LINEARS, weight_qtype=jnp.int8, act_qtype=jnp.int8, bwd_qtype=jnp.int8)
    return qwix.quantize_model(module, qwix.QtProvider([rule]), skip_nnx_init=True)


QUANTIZERS: dict[str, Callable[[nnx.Module], nnx.Module]] = {"": lambda module: module, "int8": _int8}
