"""One attend() over a table of kernels.

Dims: B batch, L queries, S keys, N heads, K key-value heads (N a multiple of K), H head width.
"""
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp

from vino_jax.errors import UserError

# Above this many scores (a gigabyte in float32), queries go through in chunks, so that the scores never stand in memory whole.
_MAX_SCORES = 1 << 28


def _xla(q_BNLH, k_BNSH, v_BNSH, mask_BNLS, scale):
    scores = jnp.einsum("bnlh,bnsh->bnls", q_BNLH * jnp.asarray(scale, q_BNLH.dtype), k_BNSH, preferred_element_type=jnp.float32)
    if mask_BNLS is not None:
        scores = jnp.where(mask_BNLS, scores, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v_BNSH.dtype)
    return jnp.einsum("bnls,bnsh->bnlh", weights, v_BNSH)


def _xla_chunked(q, k, v, mask, scale):
    length = q.shape[2]
    chunks = -(-math.prod(q.shape[:3]) * k.shape[2] // _MAX_SCORES)
    if chunks <= 1:  # 0 where there is nothing to attend
        return _xla(q, k, v, mask, scale)
    size = -(-length // chunks)

    def split(x):  # (B, N, L, ...) -> (chunks, B, N, size, ...); what the last chunk lacks is filled with zeros and dropped at the end
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * size - length), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, size, *x.shape[3:]), 2, 0)

    if mask is None or mask.shape[2] == 1:
        out = jax.lax.map(jax.checkpoint(lambda qc: _xla(qc, k, v, mask, scale)), split(q))
    else:
        out = jax.lax.map(jax.checkpoint(lambda c: _xla(c[0], k, v, c[1], scale)), (split(q), split(mask)))
    return jnp.moveaxis(out, 0, 2).reshape(*q.shape[:2], chunks * size, q.shape[3])[:, :, :length]


KERNELS: dict[str, Callable] = {"xla": _xla_chunked}


def attend(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask: jax.Array | None = None, scale: float | None = None,
           kernel: str = "xla") -> jax.Array:
    """Softmax attention, (B, L, N, H) in the dtype of q; scores and softmax in float32.

    mask: bool, True where a query may see a key, broadcastable to (B, N, L, S); every row must see at least one key to mean anything.
    scale: of the scores, by default H**-0.5. Raises UserError for a kernel that is not in KERNELS.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention kernel {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    scale = q_BLNH.shape[-1] ** -0.5 if scale is None else scale
    groups = q_BLNH.shape[2] // k_BSKH.shape[2]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q_BLNH, k_BSKH, v_BSKH))
    if groups > 1:
        k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    return jnp.swapaxes(KERNELS[kernel](q, k, v, mask, scale), 1, 2)
