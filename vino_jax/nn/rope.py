"""Rotary position embedding over several axes, on adjacent pairs of a head's dims.

Dims: B batch, L length, N heads, H head width, A axes of a position.
"""
import jax
import jax.numpy as jnp
import numpy as np


def rope_tables(position_BLA: jax.Array, axes: tuple[int, ...], theta: float) -> tuple[jax.Array, jax.Array]:
    """cos and sin (B, L, H) float32 of integer positions (B, L, A); axis a fills axes[a] dims of the head, H = sum(axes).

    Frequencies theta^(-2i/axes[a]), each twice in a row (SPEC 5; diffusers' get_1d_rotary_pos_embed with use_real).
    """
    angles = []
    for a, dims in enumerate(axes):
        frequencies = (theta ** (-np.arange(0, dims, 2, dtype=np.float64) / dims)).astype(np.float32)
        angles.append(position_BLA[..., a, None].astype(jnp.float32) * jnp.asarray(np.repeat(frequencies, 2)))
    angle_BLH = jnp.concatenate(angles, axis=-1)
    return jnp.cos(angle_BLH), jnp.sin(angle_BLH)


def apply_rope(x_BLNH: jax.Array, cos_BLH: jax.Array, sin_BLH: jax.Array) -> jax.Array:
    """Rotate each pair (x0, x1) to (x0 cos - x1 sin, x1 cos + x0 sin); in float32, returned in the dtype of x."""
    x = x_BLNH.astype(jnp.float32)
    # by shifts: a dim of size 2 would be padded to 128 on a TPU; what they shift in is not read
    even, still = jnp.arange(x.shape[-1]) % 2 == 0, [(0, 0, 0)] * (x.ndim - 1)
    after, before = jax.lax.pad(x[..., 1:], 0.0, [*still, (0, 1, 0)]), jax.lax.pad(x[..., :-1], 0.0, [*still, (1, 0, 0)])
    turned = jnp.where(even, -after, before)
    return (x * cos_BLH[:, :, None] + turned * sin_BLH[:, :, None]).astype(x_BLNH.dtype)
