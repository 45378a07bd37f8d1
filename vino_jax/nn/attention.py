"""One attend() over a table of kernels, on one device or on a mesh.

Dims: B batch, L queries, S keys, N heads, K key-value heads (N a multiple of K), H head width.

On a mesh (sharding/constrain.py) rows, tokens and heads stay where they lie. Self-attention over long sequences (`valid` given) travels
by all-to-all and, beyond the number of heads, on a ring (nn/sequence.py); other attention gathers its few keys.
"""
import math
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from vino_jax.errors import UserError
from vino_jax.nn import splash
from vino_jax.nn.sequence import Kernel, parallel
from vino_jax.sharding.constrain import active_platform, map_shards

# Above this many scores (a gigabyte in float32), queries go through in chunks, so that the scores never stand in memory whole.
_MAX_SCORES = 1 << 28
# On a CPU, whose products of one head are no slower than those of all, what lies in its caches (8 MB) is read again at once.
_CACHED_SCORES = 1 << 21
_LEAST = jnp.finfo(jnp.float32).min


def _scores(q_BNLH, k_BNSH, mask_BNLS):
    scores = jnp.einsum("bnlh,bnsh->bnls", q_BNLH, k_BNSH, preferred_element_type=jnp.float32)
    return scores if mask_BNLS is None else jnp.where(mask_BNLS, scores, _LEAST)


def _softmax(q_BNLH, k_BNSH, v_BNSH, mask_BNLS):
    weights = jax.nn.softmax(_scores(q_BNLH, k_BNSH, mask_BNLS), axis=-1).astype(v_BNSH.dtype)
    return jnp.einsum("bnls,bnsh->bnlh", weights, v_BNSH)


def _softmax_of_many(q_BNLH, k_BNSH, v_BNSH, mask_BNLS):
    """The same numbers, divided by the sum of the weights after the product: H divisions a query for S. Its gradient needs that product."""
    scores = _scores(q_BNLH, k_BNSH, mask_BNLS)
    weights = jnp.exp(scores - jax.lax.stop_gradient(jnp.max(scores, axis=-1, keepdims=True)))
    out = jnp.einsum("bnls,bnsh->bnlh", weights.astype(v_BNSH.dtype), v_BNSH, preferred_element_type=jnp.float32)
    return (out / jnp.sum(weights, axis=-1)[..., None]).astype(v_BNSH.dtype)


def _attended(q, k, v, mask):
    """_softmax, on a CPU head by head where there is much of it."""
    rows, heads = q.shape[:2]
    if active_platform() != "cpu" or math.prod(q.shape[:3]) * k.shape[2] <= 2 * _CACHED_SCORES:
        return _in_chunks(_softmax, q, k, v, mask)

    # Heads are cut out of (B, L, N, H): what the caller swapped is swapped back, so that no whole array is copied.
    whole = [jnp.swapaxes(x, 1, 2) for x in (q, k, v)]

    @jax.checkpoint
    def head(number):
        row, own = number // heads, number % heads
        # of a mask what all rows or all heads share has size 1
        seen = None if mask is None else mask[None, None, row if len(mask) > 1 else 0, own if mask.shape[1] > 1 else 0]
        return _in_chunks(_softmax_of_many, *(x[None, None, row, :, own] for x in whole), seen, _CACHED_SCORES)[0, 0]

    return jax.lax.map(head, jnp.arange(rows * heads)).reshape(*q.shape[:3], v.shape[3])


def _in_chunks(call: Callable, q, k, v, mask, limit: int | None = None):
    """call(q, k, v, mask) by chunks of queries, few enough that a chunk's scores are at most `limit`, by default _MAX_SCORES."""
    length = q.shape[2]
    chunks = -(-math.prod(q.shape[:3]) * k.shape[2] // (limit or _MAX_SCORES))
    if chunks <= 1:  # 0 where there is nothing to attend
        return call(q, k, v, mask)
    size = -(-length // chunks)

    def split(x):  # (B, N, L, ...) -> (chunks, B, N, size, ...); what the last chunk lacks is filled with zeros and dropped at the end
        x = jnp.pad(x, [(0, 0), (0, 0), (0, chunks * size - length), *[(0, 0)] * (x.ndim - 3)])
        return jnp.moveaxis(x.reshape(*x.shape[:2], chunks, size, *x.shape[3:]), 2, 0)

    if mask is None or mask.shape[2] == 1:
        out = jax.lax.map(jax.checkpoint(lambda qc: call(qc, k, v, mask)), split(q))
    else:
        out = jax.lax.map(jax.checkpoint(lambda c: call(c[0], k, v, c[1])), (split(q), split(mask)))
    return jax.tree.map(lambda x: jnp.moveaxis(x, 0, 2).reshape(*q.shape[:2], chunks * size, *x.shape[4:])[:, :, :length], out)


class Xla:
    """Plain products and softmax, for any device. Of a ring's backward pass the scores of one part stand in memory whole."""

    def attend(self, q, k, v, valid):
        return checkpoint_name(_attended(q, k, v, valid[:, None, None, :]), "attention")

    def forward(self, q, k, v, valid):
        def call(q, k, v, mask):
            scores = _scores(q, k, mask)
            lse = jax.nn.logsumexp(scores, axis=-1)
            return jnp.einsum("bnls,bnsh->bnlh", jnp.exp(scores - lse[..., None]).astype(v.dtype), v), lse

        return _in_chunks(call, q, k, v, valid[:, None, None, :])

    def backward(self, q, k, v, valid, lse, grad, along):
        # d softmax: Dao et al., 2022 (FlashAttention), appendix B.2; `along` is the row sum of out x grad
        weights = jnp.exp(_scores(q, k, valid[:, None, None, :]) - lse[..., None])
        grad_scores = weights * (jnp.einsum("bnlh,bnsh->bnls", grad, v, preferred_element_type=jnp.float32) - along[..., None])
        weights, grad_scores = weights.astype(v.dtype), grad_scores.astype(q.dtype)
        return (jnp.einsum("bnls,bnsh->bnlh", grad_scores, k), jnp.einsum("bnls,bnlh->bnsh", grad_scores, q),
                jnp.einsum("bnls,bnlh->bnsh", weights, grad))


@dataclass(frozen=True)
class Cudnn(Xla):
    """cuDNN's fused attention on a GPU, for 16-bit values; others, and a ring's parts, go by products. A remat policy that saves "attention"
    runs it again all the same: what its backward pass reads has no name. implementation: of jax.nn."""

    implementation: str = "cudnn"

    def attend(self, q, k, v, valid):
        if q.dtype == jnp.float32 and self.implementation == "cudnn":
            return super().attend(q, k, v, valid)
        # it takes lengths, not masks: valid keys go to the front, which changes no sum
        order = jnp.argsort(~valid, axis=1, stable=True)[:, :, None, None]
        q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
        k, v = (jnp.take_along_axis(x, order, axis=1) for x in (k, v))
        out = jax.nn.dot_product_attention(q, k, v, scale=1.0, implementation=self.implementation,
                                           key_value_seq_lengths=jnp.sum(valid, axis=1, dtype=jnp.int32))
        return checkpoint_name(jnp.swapaxes(out, 1, 2), "attention")


# name -> kernel for self-attention with `valid`, given the platform; all else is Xla
KERNELS: dict[str, Callable[[str], Kernel]] = {
    "auto": lambda platform: KERNELS[_BEST.get(platform, "xla")](platform),
    "xla": lambda platform: Xla(),
    "splash": lambda platform: splash.Splash(platform),
    "cudnn": lambda platform: Cudnn(),
}
_BEST = {"tpu": "splash", "gpu": "cudnn", "cuda": "cudnn"}


def attend(q_BLNH: jax.Array, k_BSKH: jax.Array, v_BSKH: jax.Array, *, mask: jax.Array | None = None, valid: jax.Array | None = None,
           scale: float | None = None, kernel: str = "auto") -> jax.Array:
    """Softmax attention, (B, L, N, H) in the dtype of q; scores and softmax in float32.

    mask: bool, True where a query may see a key, broadcastable to (B, N, L, S); every row must see at least one key to mean anything.
    valid: (B, L) bool, for self-attention (S = L) in the place of a mask: which keys are seen. It takes the kernel; other attention goes by
    products. scale: of the scores, by default H**-0.5.
    Raises UserError for a kernel that is not in KERNELS.
    """
    if kernel not in KERNELS:
        raise UserError(f"attention kernel {kernel!r} is unknown; choose one of {', '.join(KERNELS)}")
    scale = q_BLNH.shape[-1] ** -0.5 if scale is None else scale
    q_BLNH = q_BLNH * jnp.asarray(scale, q_BLNH.dtype)
    whole = ("batch", "tokens", "act_heads", None)
    if valid is not None:
        chosen = KERNELS[kernel](active_platform())
        return map_shards(lambda q, k, v, ok, seq: parallel(chosen, q, k, v, ok, seq), (q_BLNH, k_BSKH, v_BSKH, valid),
                          (whole, whole, whole, whole[:2]), whole, over="tokens")
    gathered = ("batch", None, "act_heads", None)
    masks = () if mask is None else (mask,)
    return map_shards(lambda q, k, v, *m, seq: _plain(q, k, v, *m), (q_BLNH, k_BSKH, v_BSKH, *masks),
                      (whole, gathered, gathered, *(("batch", "act_heads", "tokens", None) for _ in masks)), whole, over="tokens")


def _plain(q, k, v, mask=None):
    groups = q.shape[2] // k.shape[2]
    q, k, v = (jnp.swapaxes(x, 1, 2) for x in (q, k, v))
    if groups > 1:
        k, v = (jnp.repeat(x, groups, axis=1) for x in (k, v))
    return jnp.swapaxes(_attended(q, k, v, mask), 1, 2)
