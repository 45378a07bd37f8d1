"""Self-attention over a sequence that lies on several devices: all-to-all over heads (Ulysses), and a ring where heads do not suffice.

Dims: B batch, L tokens of one device, N heads of one device, H head width.

Of `ways` devices, groups of u exchange tokens for heads (Jacobs et al., 2023, DeepSpeed-Ulysses), u being the largest number that
divides both; between the groups keys and values travel round (Liu et al., 2023, ring attention). All inside of a shard_map.
"""
import math
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name


class Kernel(Protocol):
    """Attention of (B, N, L, H) queries, scaled, over (B, N, S, H) keys and values; valid: (B, S) bool, keys that are seen."""

    def attend(self, q, k, v, valid) -> Any:
        """Output (B, N, L, H), differentiable."""

    def forward(self, q, k, v, valid) -> Any:
        """Output, and logsumexp of the scores (B, N, L) float32, of some of the keys."""

    def backward(self, q, k, v, valid, lse, grad, along) -> Any:
        """Gradients of q, k and v. lse: over all keys; along: (B, N, L) float32, row sums of output x grad."""


def parallel(kernel: Kernel, q_BLNH, k_BLNH, v_BLNH, valid_BL, seq: tuple[str, int]):
    """Output (B, L, N, H) of this device's tokens. seq: the mesh axis that tokens lie over, and its size (1: all are here)."""
    axis, ways = seq
    swap = lambda x: jnp.swapaxes(x, 1, 2)  # noqa: E731
    if ways == 1:
        return swap(kernel.attend(*(swap(x) for x in (q_BLNH, k_BLNH, v_BLNH)), valid_BL))
    share = math.gcd(q_BLNH.shape[2], ways)
    groups = None if share == ways else [[g * share + i for i in range(share)] for g in range(ways // share)]

    def exchange(x, split, concat):
        return x if share == 1 else jax.lax.all_to_all(x, axis, split, concat, tiled=True, axis_index_groups=groups)

    q, k, v = (swap(exchange(x, 2, 1)) for x in (q_BLNH, k_BLNH, v_BLNH))
    valid = valid_BL if share == 1 else jax.lax.all_gather(valid_BL, axis, axis=1, tiled=True, axis_index_groups=groups)
    if share == ways:
        out = kernel.attend(q, k, v, valid)
    else:
        out = _ring(kernel, axis, tuple((i, (i + share) % ways) for i in range(ways)), ways // share, q, k, v, valid)
    return exchange(swap(out), 1, 2)


def _ring_forward(kernel, axis, pairs, steps, q, k, v, valid):
    out, lse = kernel.forward(q, k, v, valid)
    out = out.astype(jnp.float32)
    for _ in range(steps - 1):
        k, v, valid = jax.lax.ppermute((k, v, valid), axis, pairs)
        part, part_lse = kernel.forward(q, k, v, valid)
        both = jnp.logaddexp(lse, part_lse)
        out = out * jnp.exp(lse - both)[..., None] + part.astype(jnp.float32) * jnp.exp(part_lse - both)[..., None]
        lse = both
    return checkpoint_name(out.astype(q.dtype), "attention"), checkpoint_name(lse, "attention")


def _ring_fwd(kernel, axis, pairs, steps, q, k, v, valid):
    out, lse = _ring_forward(kernel, axis, pairs, steps, q, k, v, valid)
    return out, (q, k, v, valid, out, lse)


def _ring_bwd(kernel, axis, pairs, steps, kept, grad):
    q, k, v, valid, out, lse = kept
    along = jnp.sum(out.astype(jnp.float32) * grad.astype(jnp.float32), axis=-1)
    dq, dk, dv = (jnp.zeros(x.shape, jnp.float32) for x in (q, k, v))
    for _ in range(steps):
        parts = kernel.backward(q, k, v, valid, lse, grad, along)
        dq, dk, dv = (total + part.astype(jnp.float32) for total, part in zip((dq, dk, dv), parts))
        k, v, valid, dk, dv = jax.lax.ppermute((k, v, valid, dk, dv), axis, pairs)  # the gradients come home with the last step
    return dq.astype(q.dtype), dk.astype(k.dtype), dv.astype(v.dtype), None


_ring = jax.custom_vjp(lambda *args: _ring_forward(*args)[0], nondiff_argnums=(0, 1, 2, 3))
_ring.defvjp(_ring_fwd, _ring_bwd)
