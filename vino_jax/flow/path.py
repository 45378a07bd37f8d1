"""The straight path between data and noise: flow time, interpolation, target (rectified flow, arXiv 2209.03003).

t = 0 is data, t = 1 is noise. Everything is float32; a per-row value has the shape (B,).
"""
import jax
import jax.numpy as jnp

TIME_BINS = 10  # equal parts of the flow time, by which losses are told


def per_row(value: jax.Array, ndim: int) -> jax.Array:
    """`value` (scalar or (B,)) with trailing ones, so that it broadcasts against an array of `ndim` dims by rows."""
    value = jnp.asarray(value, jnp.float32)
    return value.reshape(value.shape + (1,) * (ndim - value.ndim)) if value.ndim else value


def logit_normal(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Flow times u = sigmoid(n), n ~ N(0, 1), in (0, 1), float32 (arXiv 2403.03206, section 3.1)."""
    return jax.nn.sigmoid(jax.random.normal(key, shape, jnp.float32))


def warp(t: jax.Array, shift: jax.Array) -> jax.Array:
    """shift*t / (1 + (shift-1)*t): moves flow times towards noise for shift > 1; keeps 0 and 1 (arXiv 2403.03206, eq. 23).

    t and shift broadcast against each other; a scalar shift is the same for all rows. Returns float32.
    """
    t, shift = jnp.asarray(t, jnp.float32), jnp.asarray(shift, jnp.float32)
    return shift * t / (1.0 + (shift - 1.0) * t)


def interpolate(x0: jax.Array, noise: jax.Array, t: jax.Array) -> jax.Array:
    """x_t = (1 - t) x0 + t noise in float32; x0 and noise (B, ...), t (B,) or a scalar (arXiv 2209.03003, eq. 1)."""
    t = per_row(t, x0.ndim)
    return (1.0 - t) * x0.astype(jnp.float32) + t * noise.astype(jnp.float32)


def target_velocity(x0: jax.Array, noise: jax.Array) -> jax.Array:
    """dx_t/dt = noise - x0 in float32: what the model predicts."""
    return noise.astype(jnp.float32) - x0.astype(jnp.float32)


def velocity_loss(velocity: jax.Array, x0: jax.Array, noise: jax.Array) -> jax.Array:
    """Mean squared error of a velocity against `target_velocity`, by row: all (B, ...) -> (B,) float32 (arXiv 2209.03003, eq. 1)."""
    return jnp.mean(jnp.square(velocity - target_velocity(x0, noise)), axis=tuple(range(1, x0.ndim)))
