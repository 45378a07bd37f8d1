"""Euler's method along the flow from noise (t = 1) to data (t = 0), as one compiled loop."""
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vino_jax.flow.path import per_row, warp


def schedule(steps: int, shift: jax.Array) -> jax.Array:
    """Flow times t_0 = 1 > ... > t_steps = 0: linspace(1, 0, steps+1), warped by the shift of each row.

    shift (B,) -> (steps+1, B) float32. Raises ValueError when steps < 1.
    """
    if steps < 1:
        raise ValueError(f"sampling takes at least 1 step, not {steps}")
    return warp(jnp.linspace(1.0, 0.0, steps + 1, dtype=jnp.float32)[:, None], jnp.asarray(shift, jnp.float32)[None, :])


def integrate(velocity: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, times: jax.Array) -> jax.Array:
    """x <- x - (t_i - t_{i+1}) velocity(x, t_i), in float32 over all steps, in one scan.

    velocity: (x (B, ...), t (B,)) -> (B, ...); x: the noise (B, ...); times: (steps+1, B), falling, from `schedule`.
    """

    def step(x, pair):
        now, after = pair
        return x - per_row(now - after, x.ndim) * velocity(x, now).astype(jnp.float32), None

    return jax.lax.scan(step, x.astype(jnp.float32), (times[:-1], times[1:]))[0]
