"""JAX's splash attention for TPU, with a fused backward pass and padding as a segment of its own.

Dims: B batch, N heads, L queries, S keys, H head width.

A fused backward computes 7 matrix products where the unfused one computes 9; forward has 2. Off TPU the kernel is interpreted, for tests.
"""
import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

TILE = 128  # what lengths and blocks are multiples of
# Largest blocks: queries, keys, and keys of one product, forward; the same backward. What the compilers for v5e, v5p and v6e take in the
# 16 MB of vector memory that a kernel gets; large blocks of keys keep the backward pass's partial sums of dq few.
BLOCKS = ((1024, 2048, 1024), (1024, 2048, 512))
_SLACK = 1.02  # of the length: how much padding may be spent on blocks that fit better


@dataclass(frozen=True)
class Tiles:
    """A padded length, and blocks that divide it: (queries, keys, keys of one product) forward and backward."""

    length: int
    forward: tuple[int, int, int]
    backward: tuple[int, int, int]


@functools.cache
def tiles(length: int) -> Tiles:
    """Of the padded lengths that cost little, the one whose blocks are largest for what its padding costs."""
    best, least = None, float("inf")
    first = -(-length // TILE) * TILE
    for padded in range(first, max(first, int(length * _SLACK)) + 1, TILE):
        found = [_blocks(padded, caps) for caps in BLOCKS]
        # a block's start-up costs about as much as 128 rows of it
        cost = padded**2 * sum((1 + TILE / q) * (1 + TILE / compute) for q, _, compute in found)
        if cost < least:
            best, least = Tiles(padded, *found), cost
    return best


def _blocks(length: int, caps: tuple[int, int, int]) -> tuple[int, int, int]:
    q, keys, compute = caps
    keys = _divisor(length, keys)
    return _divisor(length, q), keys, _divisor(keys, compute)


def _divisor(length: int, most: int) -> int:
    """The largest multiple of TILE, at most `most`, that divides `length`."""
    return max(size for size in range(TILE, min(length, most) + 1, TILE) if length % size == 0)


@functools.cache
def _kernel(heads: int, queries: Tiles, keys: Tiles, interpret: bool, lse: bool):
    (q, _, _), (q_back, _, _) = queries.forward, queries.backward
    (_, k, compute), (_, k_back, compute_back) = keys.forward, keys.backward
    sizes = kernels.BlockSizes(block_q=q, block_kv=k, block_kv_compute=compute, block_q_dkv=q_back, block_kv_dkv=k_back,
                               block_kv_dkv_compute=compute_back, use_fused_bwd_kernel=True)
    mask = masks.MultiHeadMask([masks.FullMask((queries.length, keys.length))] * heads)
    with jax.ensure_compile_time_eval():  # it outlives the trace that asks for it first, so its tables must be no values of that trace
        return kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1, save_residuals=lse, interpret=interpret,
                                       residual_checkpoint_name="attention")


def _pad(x, length: int, axis: int):
    return jnp.pad(x, [(0, length - x.shape[axis] if i == axis else 0) for i in range(x.ndim)])


@dataclass(frozen=True)
class Splash:
    """See nn/sequence.py: Kernel. platform: "tpu" compiles it, others interpret it."""

    platform: str = "tpu"

    def _ready(self, q, k, v, valid, lse: bool = False):
        """Everything padded to its tiles, and the kernel for it."""
        queries, keys = tiles(q.shape[2]), tiles(k.shape[2])
        q, k, v = (_pad(x, size, 2) for x, size in ((q, queries.length), (k, keys.length), (v, keys.length)))
        valid = _pad(valid.astype(jnp.int32), keys.length, 1)
        segments = kernels.SegmentIds(jnp.ones((q.shape[0], queries.length), jnp.int32), valid)
        return _kernel(q.shape[1], queries, keys, self.platform != "tpu", lse), q, k, v, segments

    def attend(self, q, k, v, valid):
        kernel, *inputs = self._ready(q, k, v, valid)
        return jax.vmap(kernel)(*inputs)[:, :, :q.shape[2]]

    def forward(self, q, k, v, valid):
        kernel, *inputs = self._ready(q, k, v, valid, lse=True)
        out, (lse,) = jax.vmap(kernel)(*inputs)
        return out[:, :, :q.shape[2]], lse[:, :, :q.shape[2]]

    def backward(self, q, k, v, valid, lse, grad, along):
        kernel, q_, k_, v_, segments = self._ready(q, k, v, valid)
        sizes = kernel.kwargs["block_sizes"]

        def row(q, k, v, segments, lse, grad, along):
            return kernels._splash_attention_bwd_dkv(  # of the pinned JAX; no public function takes a logsumexp over other keys too
                q, k, v, segments, None, lse, grad, along, bq=sizes.block_q_dkv, bkv=sizes.block_kv_dkv,
                bkv_compute=sizes.block_kv_dkv_compute, is_mqa=False, mask_info=kernel.dkv_mask_info,
                mask_value=kernel.kwargs["mask_value"], attn_logits_soft_cap=None, use_fused_bwd_kernel=True, q_layout=sizes.q_layout,
                k_layout=sizes.k_layout, v_layout=sizes.v_layout, mask_function=kernel.kwargs["mask_function"],
                interpret=kernel.kwargs["interpret"])

        # padded queries have no gradient and no output: whatever their logsumexp is, they add nothing
        lse, grad, along = (_pad(x, q_.shape[2], 2) for x in (lse, grad, along))
        dq, dk, dv = jax.vmap(row)(q_, k_, v_, segments, lse, grad.astype(q.dtype), along)
        return dq[:, :, :q.shape[2]], dk[:, :, :k.shape[2]], dv[:, :, :k.shape[2]]
