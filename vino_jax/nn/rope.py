"""Rotary position embedding over several axes, on adjacent pairs of a head's dims.

Dims: B batch, L length, N heads, H head width, A axes of a position.
"""
import jax
import jax.numpy as jnp
import numpy as np

from vino_jax.sharding.constrain import active_platform


def rope_tables(position_BLA: jax.Array, axes: tuple[int, ...], theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, L, H) float32 of integer positions (B, L, A); axis a fills axes[a] dims of the head, H = sum(axes).

    Frequencies theta^(-2i/axes[a]), each twice in a row (diffusers' get_1d_rotary_pos_embed with use_real).
    """
    angles = []
    for a, dims in enumerate(axes):
        frequencies = (theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)).astype(np.float32)
        angles.append(position_BLA[..., a, None].astype(jnp.float32) * jnp.asarray(np.repeat(frequencies, 2)))
    angle_BLH = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle_BLH), jnp.sin(angle_BLH)


def apply_rope(x_BLNH: jax.Array, cos_BLH: jax.Array, sin_BLH: jax.Array) -> jax.Array:
    """Rotate each pair (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin); in float32, returned in the dtype of x."""
    turned = _TURNED.get(active_platform(), turned_by_reversal)(x_BLNH)
    return (x_BLNH.astype(jnp.float32) * cos_BLH[:, :, None] + turned * sin_BLH[:, :, None]).astype(x_BLNH.dtype)


def turned_by_reversal(x: jax.Array) -> jax.Array:
    """Each pair (x0, x1) of the last dim as (-x1, x0), float32."""
    pairs = x.astype(jnp.float32).reshape(*x.shape[:-1], -1, 2)
    return (pairs[..., ::-1] * jnp.asarray([-1.0, 1.0])).reshape(x.shape)


def turned_by_product(x: jax.Array) -> jax.Array:
    """The same, and as exact: of each sum all terms but one are zero."""
    turn_HH = np.zeros((x.shape[-1],) * 2, np.float32)
    first = np.arange(0, len(turn_HH), 2)
    turn_HH[first + 1, first], turn_HH[first, first + 1] = -1, 1
    return jax.lax.dot_general(x, jnp.asarray(turn_HH, x.dtype), (((x.ndim - 1,), (0,)), ((), ())), precision=jax.lax.Precision.HIGHEST,
                               preferred_element_type=jnp.float32)


# By platform. A TPU pads a dim of 2 to its 128 lanes: queries of 6,144 tokens with their product and norm take 1.60 million cycles and 216 MiB
# by reversal, 0.97 and 72 by products, as its compiler estimates for v6e (tests/benchmarks/rope.py). On a CPU products take four times as long.
_TURNED = {"tpu": turned_by_product}
