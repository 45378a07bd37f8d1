"""Step caching: the blocks run in every N-th step alone, in between what they added last is added again (Delta-DiT, arXiv 2406.01125, for
all blocks at once). Embedders, refiner and output layers run in every step, and the text's and the pictures' guidance as ever.

Dims: B rows, V visual tokens, D width.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vino_jax.flow import euler
from vino_jax.models.mmdit import Through
from vino_jax.sharding.constrain import constrain

Added = list[jax.Array]  # what the blocks added to the visual tokens (B, V, D), of every pass of a step


def integrate_cached(velocity: Callable[[jax.Array, jax.Array, Through], jax.Array], every: int, x: jax.Array, times: jax.Array,
                     first: int | jax.Array, last: int | jax.Array) -> tuple[jax.Array, jax.Array]:
    """flow/euler.py: integrate, whose blocks run in the steps that `every` divides; first must be one of them.

    velocity: (x (B, ...), t (B,), what each of its passes hands to the MMDiT as `through`, in the same order in every step) -> (B, ...).
    Returns x and the largest change of what blocks added from one step that ran them to the next, relative to what they added: float32, 0
    where they ran once.
    """
    def one(x, i, kept: Added | None) -> tuple[jax.Array, Added]:
        """The velocity, and what the blocks added: kept, where this step does not run them."""
        added: Added = []

        def through(x_BVD, blocks):
            def run():
                return constrain(blocks(x_BVD) - x_BVD, "batch", "tokens", "width")

            own = run() if kept is None else jax.lax.cond(i % every == 0, run, lambda: kept[len(added)])
            added.append(own)
            return x_BVD + own

        return velocity(x, times[i], through), added

    def step(i, carry):
        x, kept, change = carry
        v, added = one(x, i, kept)
        own = jnp.max(jnp.stack([_change(*pair) for pair in zip(kept, added)]))
        change = jnp.where(i > first, jnp.maximum(change, own), change)  # where blocks did not run it is 0
        return euler.step(x, v, times, i), added, change

    x = x.astype(jnp.float32)
    shapes = jax.eval_shape(lambda x: one(x, 0, None)[1], x)
    none = [constrain(jnp.zeros(s.shape, s.dtype), "batch", "tokens", "width") for s in shapes]
    x, _, change = jax.lax.fori_loop(first, last, step, (x, none, jnp.float32(0)))
    return x, change


def _change(before: jax.Array, now: jax.Array) -> jax.Array:
    before, now = before.astype(jnp.float32), now.astype(jnp.float32)
    return optax.global_norm(now - before) / jnp.maximum(optax.global_norm(now), 1e-12)
