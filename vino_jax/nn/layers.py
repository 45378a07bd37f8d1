"""Linear maps, norms and embeddings. Parameters are float32 masters, cast to the activations' dtype at use.

Dims: B batch, L length, D width.
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from vino_jax.nn.module import param
from vino_jax.sharding.constrain import weight


def _fan_in(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) / math.sqrt(math.prod(shape[:-1]))


def _zeros(key, shape, dtype):
    return jnp.zeros(shape, dtype)


def _ones(key, shape, dtype):
    return jnp.ones(shape, dtype)


def _product(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """x @ kernel, but traced anew at every call: JAX keeps one trace of `@` for all products of the same shapes, and so would mix up those
    that nn/quantize.py changes with those that it does not."""
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


class Linear(nnx.Module):
    """y = x W + b with W (inputs, outputs), in the dtype of x. axes: logical names of the two dims of W; W starts N(0, gain^2/inputs).
    With an adapter (nn/lora.py) y = x W + b + scale (x A) B."""

    def __init__(self, inputs: int, outputs: int, axes: tuple[str | None, str | None], *, bias: bool = True, gain: float = 1.0,
                 rngs: nnx.Rngs):
        self.kernel = param(rngs, (inputs, outputs), axes, lambda k, s, d: gain * _fan_in(k, s, d))
        self.bias = param(rngs, (outputs,), axes[1:], _zeros) if bias else None
        self.lora_a = self.lora_b = nnx.data(None)
        self.axes = axes

    def adapt(self, rank: int, scale: float, rngs: nnx.Rngs) -> None:
        """Give it an adapter: A starts N(0, 1/inputs), B zero; one a layer where the kernel is stacked."""
        *layers, inputs, outputs = self.kernel.shape
        row, column = self.axes
        a = jax.random.normal(rngs.params(), (*layers, inputs, rank), jnp.float32) / math.sqrt(inputs)
        self.lora_a = nnx.Param(a, axes=(row, None))
        self.lora_b = nnx.Param(jnp.zeros((*layers, rank, outputs), jnp.float32), axes=(None, column))
        self.lora_scale = scale

    def weights(self, dtype: jnp.dtype) -> tuple[jax.Array, jax.Array | None]:
        """W and b as a product takes them (sharding/constrain.py)."""
        return weight(self.kernel[...], self.axes, dtype), None if self.bias is None else weight(self.bias[...], self.axes[1:], dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        kernel, bias = self.weights(x.dtype)
        y = _product(x, kernel)
        y = y if bias is None else y + bias
        return y if self.lora_a is None else y + self._change(x)

    def _change(self, x: jax.Array) -> jax.Array:
        """What the adapter adds. Its two products are small beside W's, and so are their gradients; W has none."""
        a = weight(self.lora_a[...], (self.axes[0], None), x.dtype)
        b = weight(self.lora_b[...], (None, self.axes[1]), x.dtype)
        return _product(self.lora_scale * _product(x, a), b)


class RMSNorm(nnx.Module):
    """x / rms(x) * scale over the last dim, computed in float32, returned in the dtype of x."""

    def __init__(self, width: int, *, eps: float = 1e-6, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), (None,), _ones)
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        over_rms = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        # A clamp that changes nothing, and that YNNPACK does not know: on a CPU it takes the product that gave x into its sums without it, and
        # its products are slow (nn/runtime.py).
        over_rms = jax.lax.clamp(jnp.float32(0), over_rms, jnp.float32(jnp.inf))
        return (x32 * over_rms * self.scale[...].astype(jnp.float32)).astype(x.dtype)


class LayerNorm(nnx.Module):
    """Layer norm over the last dim in float32; affine=False has no parameters (as modulated norms have)."""

    def __init__(self, width: int, *, eps: float = 1e-6, affine: bool = True, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), (None,), _ones) if affine else None
        self.bias = param(rngs, (width,), (None,), _zeros) if affine else None
        self.eps = eps

    def __call__(self, x: jax.Array) -> jax.Array:
        x32 = x.astype(jnp.float32)
        x32 = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        x32 = x32 * jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + self.eps)
        if self.scale is not None:
            x32 = x32 * self.scale[...].astype(jnp.float32) + self.bias[...].astype(jnp.float32)
        return x32.astype(x.dtype)


class Embedding(nnx.Module):
    """Rows of a table (count, width), N(0, 1/width) at init. axes: logical names of the two dims."""

    def __init__(self, count: int, width: int, axes: tuple[str | None, str | None], *, rngs: nnx.Rngs):
        self.table = param(rngs, (count, width), axes, lambda k, s, d: jax.random.normal(k, s, d) / math.sqrt(width))

    def __call__(self, ids: jax.Array, dtype: jnp.dtype) -> jax.Array:
        return self.table[...][ids].astype(dtype)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """GELU in its tanh form (PyTorch's approximate="tanh")."""
    return jax.nn.gelu(x, approximate=True)


def sinusoid(t_B: jax.Array, width: int, max_period: float = 10000.0) -> jax.Array:
    """Timestep features (B, width), cosines first, float32 (diffusers' Timesteps with flip_sin_to_cos, shift 0)."""
    half = width // 2
    frequencies = jnp.exp(-math.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = t_B.astype(jnp.float32)[:, None] * frequencies[None, :]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)
