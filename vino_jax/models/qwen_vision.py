"""The vision tower of Qwen3-VL: patches in, merged patches and DeepStack features out.

Source: transformers 4.57, models/qwen3_vl (Qwen3VLVisionModel). Patches come in 2x2 merge order; each carries its own row, column
and grid size, so pictures of any grids lie side by side in one row of the batch, told apart by their segment.

Dims: B batch, P patches, M = P / merge^2 merged patches, X pixels a patch, V vision width, N heads, H head width, W output width,
n DeepStack taps.
"""
import math

import jax
import jax.numpy as jnp
from flax import nnx

from vino_jax.models.qwen_text import Tables, rotate
from vino_jax.nn.attention import attend
from vino_jax.nn.layers import Embedding, LayerNorm, Linear, gelu_tanh
from vino_jax.nn.runtime import Runtime
from vino_jax.nn.stack import run_stack, stacked
from vino_jax.settings import VLMVisionConfig
from vino_jax.sharding.constrain import constrain

_ROPE_THETA = 10000.0


def rope_2d_tables(row_BP: jax.Array, column_BP: jax.Array, head_dim: int) -> Tables:
    """cos and sin (B, P, H), float32: a quarter of the dims turns with the row, a quarter with the column, then both again."""
    quarter = head_dim // 4
    frequency = _ROPE_THETA ** (-jnp.arange(quarter, dtype=jnp.float32) / quarter)
    angles = [position[..., None].astype(jnp.float32) * frequency for position in (row_BP, column_BP)]
    angles_BPH = jnp.concatenate(angles * 2, axis=-1)
    return jnp.cos(angles_BPH), jnp.sin(angles_BPH)


def interpolation(coords_BP4: jax.Array, side: int) -> tuple[jax.Array, jax.Array]:
    """Rows of a side x side table and their weights, (B, P, 4) int32 and float32: bilinear, corners of the grid on corners of the table."""
    position_BP2 = coords_BP4[..., :2].astype(jnp.float32) * (side - 1) / jnp.maximum(coords_BP4[..., 2:] - 1, 1).astype(jnp.float32)
    low_BP2 = jnp.floor(position_BP2)
    part_BP2 = position_BP2 - low_BP2
    low_BP2 = low_BP2.astype(jnp.int32)
    high_BP2 = jnp.minimum(low_BP2 + 1, side - 1)
    index, weight = [], []
    for row, row_weight in ((low_BP2, 1 - part_BP2), (high_BP2, part_BP2)):
        for column, column_weight in ((low_BP2, 1 - part_BP2), (high_BP2, part_BP2)):
            index.append(row[..., 0] * side + column[..., 1])
            weight.append(row_weight[..., 0] * column_weight[..., 1])
    return jnp.stack(index, -1), jnp.stack(weight, -1)


class VisionBlock(nnx.Module):
    """Attention and GELU MLP, each behind a layer norm and a residual."""

    def __init__(self, config: VLMVisionConfig, kernel: str, *, rngs: nnx.Rngs):
        width = config.width
        self.attention_norm = LayerNorm(width, rngs=rngs)
        self.qkv = Linear(width, 3 * width, ("vlm_width", "heads"), rngs=rngs)
        self.out = Linear(width, width, ("heads", "vlm_width"), rngs=rngs)
        self.mlp_norm = LayerNorm(width, rngs=rngs)
        self.up = Linear(width, config.mlp, ("vlm_width", "vlm_mlp"), rngs=rngs)
        self.down = Linear(config.mlp, width, ("vlm_mlp", "vlm_width"), rngs=rngs)
        self.heads, self.kernel_name = config.heads, kernel

    def __call__(self, x_BPV: jax.Array, tables: Tables, mask_B1PP: jax.Array) -> jax.Array:
        qkv_BP3NH = self.qkv(self.attention_norm(x_BPV)).reshape(*x_BPV.shape[:2], 3, self.heads, -1)
        q_BPNH, k_BPNH, v_BPNH = (qkv_BP3NH[:, :, i] for i in range(3))
        y_BPNH = attend(rotate(q_BPNH, tables), rotate(k_BPNH, tables), v_BPNH, mask=mask_B1PP, kernel=self.kernel_name)
        x_BPV = x_BPV + self.out(y_BPNH.reshape(x_BPV.shape))
        x_BPV = x_BPV + self.down(gelu_tanh(self.up(self.mlp_norm(x_BPV))))
        return constrain(x_BPV, "batch", "tokens", "width")


class Merger(nnx.Module):
    """merge^2 neighbouring patches to one token of the text model. norm_merged: the norm sees them merged (DeepStack), not singly."""

    def __init__(self, config: VLMVisionConfig, *, norm_merged: bool, rngs: nnx.Rngs):
        merged = config.width * config.merge**2
        self.norm = LayerNorm(merged if norm_merged else config.width, rngs=rngs)
        self.up = Linear(merged, merged, ("vlm_width", "vlm_mlp"), rngs=rngs)
        self.down = Linear(merged, config.out_width, ("vlm_mlp", "vlm_width"), rngs=rngs)
        self.merged, self.norm_merged = merged, norm_merged

    def __call__(self, x_BPV: jax.Array) -> jax.Array:
        x_BMX = (x_BPV if self.norm_merged else self.norm(x_BPV)).reshape(x_BPV.shape[0], -1, self.merged)
        x_BMX = self.norm(x_BMX) if self.norm_merged else x_BMX
        return self.down(jax.nn.gelu(self.up(x_BMX), approximate=False))


class VisionTower(nnx.Module):
    """Patch embedding with interpolated positions, blocks, mergers."""

    def __init__(self, config: VLMVisionConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        pixels = config.channels * config.temporal_patch * config.patch**2
        self.patch_embed = Linear(pixels, config.width, (None, "vlm_width"), rngs=rngs)
        self.positions = Embedding(config.positions, config.width, (None, "vlm_width"), rngs=rngs)
        self.layers = stacked(lambda r: VisionBlock(config, runtime.attention, rngs=r), config.layers, rngs)
        self.merger = Merger(config, norm_merged=False, rngs=rngs)
        self.deepstack = stacked(lambda r: Merger(config, norm_merged=True, rngs=r), len(config.deepstack), rngs)
        self.config, self.runtime = config, runtime

    def __call__(self, patches_BPX: jax.Array, coords_BP4: jax.Array, segment_BP: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Merged patches (B, M, W) and DeepStack features (n, B, M, W), in the compute dtype.

        patches_BPX: float, pixels of a patch in the order (channel, frame, row, column), normalised.
        coords_BP4: int32 row, column, grid height, grid width. segment_BP: int32; a patch attends within its segment only, so
        padding (segment 0) never meets a picture.
        """
        config, dtype = self.config, self.runtime.compute_dtype
        index_BP4, weight_BP4 = interpolation(coords_BP4, math.isqrt(config.positions))
        positions_BPV = jnp.einsum("bpcv,bpc->bpv", self.positions(index_BP4, jnp.float32), weight_BP4)
        x_BPV = self.patch_embed(patches_BPX.astype(dtype)) + positions_BPV.astype(dtype)
        x_BPV = constrain(x_BPV, "batch", "tokens", "width")
        tables = rope_2d_tables(coords_BP4[..., 0], coords_BP4[..., 1], config.width // config.heads)
        mask_B1PP = (segment_BP[:, :, None] == segment_BP[:, None, :])[:, None]

        # One scan keeps the taps: layer i writes slot (number of taps before i), so each slot is left with its tap's hidden state, and
        # what comes after the last tap goes to a slot of its own.
        slots = jnp.asarray([sum(tap < i for tap in config.deepstack) for i in range(config.layers)], jnp.int32)

        def call(block, carry, slot):
            x_BPV, kept = carry
            x_BPV = block(x_BPV, tables, mask_B1PP)
            return (x_BPV, jax.lax.dynamic_update_index_in_dim(kept, x_BPV, slot, 0)), None

        kept = jnp.zeros((len(config.deepstack) + 1, *x_BPV.shape), dtype)
        (x_BPV, kept), _ = run_stack(self.layers, call, (x_BPV, kept), slots, remat="nothing")
        _, features_nBMW = run_stack(self.deepstack, lambda merger, carry, x: (carry, merger(x)), None, kept[:-1], remat="nothing")
        return self.merger(x_BPV), features_nBMW
