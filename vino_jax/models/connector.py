"""What VINO adds between VLM and MMDiT: learnable queries and the connectors.

Dims: B batch, L length, W VLM width, D output width, Q queries.
"""
import math

import jax
from flax import nnx

from vino_jax.nn.layers import Linear, RMSNorm, gelu_tanh
from vino_jax.nn.module import param


class Connector(nnx.Module):
    """RMSNorm -> Linear(inputs, ratio * outputs) -> GELU(tanh) -> Linear(ratio * outputs, outputs)."""

    def __init__(self, inputs: int, outputs: int, ratio: int, *, rngs: nnx.Rngs):
        self.norm = RMSNorm(inputs, eps=1e-6, rngs=rngs)
        self.up = Linear(inputs, ratio * outputs, ("vlm_width", "mlp"), rngs=rngs)
        self.down = Linear(ratio * outputs, outputs, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x_BLW: jax.Array) -> jax.Array:
        """(B, L, inputs) -> (B, L, outputs), in the dtype of x."""
        return self.down(gelu_tanh(self.up(self.norm(x_BLW))))


class Queries(nnx.Module):
    """Learnable query tokens, N(0, 1/width) at init; called without arguments they are (Q, W) as stored."""

    def __init__(self, count: int, width: int, *, rngs: nnx.Rngs):
        self.embedding = param(rngs, (count, width), ("queries", "vlm_width"), lambda k, s, d: jax.random.normal(k, s, d) / math.sqrt(width))

    def __call__(self) -> jax.Array:
        return self.embedding[...]
