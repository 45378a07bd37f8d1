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


def integrate(velocity: Callable[[jax.Array, jax.Array], jax.Array], x: jax.Array, times: jax.Array, first: int | jax.Array = 0,
              last: int | jax.Array | None = None) -> jax.Array:
    """x <- x - (t_i - t_{i+1}) velocity(x, t_i) for the steps first <= i < last (by default all), in float32, in one loop.

    velocity: (x (B, ...), t (B,)) -> (B, ...); x: at first = 0 the noise (B, ...); times: (steps+1, B), falling, from `schedule`.
    first, last: may be traced, so that one program takes any part of the way.
    """

    last = len(times) - 1 if last is None else last
    return jax.lax.fori_loop(first, last, lambda i, x: step(x, velocity(x, times[i]), times, i), x.astype(jnp.float32))


def step(x: jax.Array, velocity: jax.Array, times: jax.Array, i: int | jax.Array) -> jax.Array:
    """x (B, ...) at t_i -> x at t_{i+1}, float32."""
    return x - per_row(times[i] - times[i + 1], x.ndim) * velocity.astype(jnp.float32)
