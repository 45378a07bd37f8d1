"""Switches of how a model is computed, none of which changes what it computes."""
from dataclasses import dataclass

import jax.numpy as jnp


@dataclass(frozen=True)
class Runtime:
    """dtype: of activations and products; norms, softmax, RoPE and losses stay float32.
    remat: policy name of nn/stack.py ("nothing" saves everything, "full" recomputes each block in the backward pass).
    attention: kernel name of nn/attention.py.
    """

    dtype: str = "float32"
    remat: str = "full"
    attention: str = "xla"

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)
