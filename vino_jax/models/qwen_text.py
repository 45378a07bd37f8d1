"""The decoder of Qwen3-VL: grouped-query attention with per-head norms, interleaved MRoPE, SwiGLU.

Source: transformers 4.57, models/qwen3_vl (Qwen3VLTextModel).

Dims: B batch, L tokens, S keys, W width, N heads, K key-value heads, H head width, D decoder layers, n DeepStack taps,
M merged patches.
"""
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from vino_jax.nn.attention import attend
from vino_jax.nn.layers import Embedding, Linear, RMSNorm
from vino_jax.nn.runtime import Runtime
from vino_jax.nn.stack import run_stack, stacked
from vino_jax.settings import VLMTextConfig
from vino_jax.sharding.constrain import constrain

Tables = tuple[jax.Array, jax.Array]  # cos_BLH, sin_BLH, float32
KeysValues = tuple[jax.Array, jax.Array]  # k_BSKH, v_BSKH


def mrope_tables(position_B3L: jax.Array, config: VLMTextConfig) -> Tables:
    """cos and sin (B, L, H), float32, of interleaved MRoPE: frequency j turns with the time, row or column position.

    The frequencies go T H W T H W ... until an axis has used up its section, the rest is time's.
    """
    half = config.head_dim // 2
    axis = np.zeros(half, np.int32)  # of each frequency
    for number in (1, 2):
        axis[number:3 * config.mrope_section[number]:3] = number
    frequency = config.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angles_BLh = jnp.swapaxes(position_B3L[:, axis], 1, 2).astype(jnp.float32) * frequency
    angles_BLH = jnp.concatenate([angles_BLh, angles_BLh], axis=-1)
    return jnp.cos(angles_BLH), jnp.sin(angles_BLH)


def rotate(x_BLNH: jax.Array, tables: Tables) -> jax.Array:
    """RoPE on halves, (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin), in float32, returned in the dtype of x."""
    cos, sin = (table[:, :, None, :] for table in tables)
    x = x_BLNH.astype(jnp.float32)
    x1, x2 = jnp.split(x, 2, axis=-1)
    return (x * cos + jnp.concatenate([-x2, x1], axis=-1) * sin).astype(x_BLNH.dtype)


def take_visual(features_BMW: jax.Array, visual_index_BL: jax.Array) -> jax.Array:
    """The merged patch of each visual token, (B, L, W); at text tokens (-1) row 0, to be masked by the caller."""
    return jnp.take_along_axis(features_BMW, jnp.maximum(visual_index_BL, 0)[..., None], axis=1)


class TextAttention(nnx.Module):
    """Grouped-query attention; q and k are normed a head, then rotated."""

    def __init__(self, config: VLMTextConfig, kernel: str, *, rngs: nnx.Rngs):
        inner, kv = config.heads * config.head_dim, config.kv_heads * config.head_dim
        self.q = Linear(config.width, inner, ("vlm_width", "heads"), bias=False, rngs=rngs)
        self.k = Linear(config.width, kv, ("vlm_width", "kv_heads"), bias=False, rngs=rngs)
        self.v = Linear(config.width, kv, ("vlm_width", "kv_heads"), bias=False, rngs=rngs)
        self.out = Linear(inner, config.width, ("heads", "vlm_width"), bias=False, rngs=rngs)
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_eps, rngs=rngs)
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_eps, rngs=rngs)
        self.head_dim, self.kernel_name = config.head_dim, kernel

    def __call__(self, x_BLW: jax.Array, tables: Tables, mask_B1LS: jax.Array, past: KeysValues | None) -> tuple[jax.Array, KeysValues]:
        """Output (B, L, W) and the keys and values of these L tokens; `past` ones come in front of them as keys."""
        def heads(x):
            return x.reshape(*x.shape[:2], x.shape[2] // self.head_dim, self.head_dim)

        q_BLNH = rotate(self.q_norm(heads(self.q(x_BLW))), tables)
        k_BLKH, v_BLKH = own = rotate(self.k_norm(heads(self.k(x_BLW))), tables), heads(self.v(x_BLW))
        if past is not None:
            k_BLKH, v_BLKH = (jnp.concatenate(pair, axis=1) for pair in zip(past, own))
        out_BLNH = attend(q_BLNH, k_BLKH, v_BLKH, mask=mask_B1LS, kernel=self.kernel_name)
        return self.out(jax.lax.collapse(out_BLNH, 2)), own


class TextBlock(nnx.Module):
    """One decoder layer: attention and SwiGLU, each behind an RMS norm and a residual."""

    def __init__(self, config: VLMTextConfig, kernel: str, *, rngs: nnx.Rngs):
        self.attention_norm = RMSNorm(config.width, eps=config.rms_eps, rngs=rngs)
        self.attention = TextAttention(config, kernel, rngs=rngs)
        self.mlp_norm = RMSNorm(config.width, eps=config.rms_eps, rngs=rngs)
        self.gate = Linear(config.width, config.mlp, ("vlm_width", "vlm_mlp"), bias=False, rngs=rngs)
        self.up = Linear(config.width, config.mlp, ("vlm_width", "vlm_mlp"), bias=False, rngs=rngs)
        self.down = Linear(config.mlp, config.width, ("vlm_mlp", "vlm_width"), bias=False, rngs=rngs)

    def __call__(self, x_BLW: jax.Array, tables: Tables, mask_B1LS: jax.Array, past: KeysValues | None) -> tuple[jax.Array, KeysValues]:
        y_BLW, own = self.attention(self.attention_norm(x_BLW), tables, mask_B1LS, past)
        x_BLW = x_BLW + y_BLW
        y_BLW = self.mlp_norm(x_BLW)
        x_BLW = x_BLW + self.down(jax.nn.silu(self.gate(y_BLW)) * self.up(y_BLW))
        return constrain(x_BLW, "batch", "tokens", "width"), own


class TextModel(nnx.Module):
    """Token embedding (tied with the output head), decoder layers, final norm."""

    def __init__(self, config: VLMTextConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        self.embed = Embedding(config.vocab, config.width, ("vocab", "vlm_width"), rngs=rngs)
        self.layers = stacked(lambda r: TextBlock(config, runtime.attention, rngs=r), config.layers, rngs)
        self.norm = RMSNorm(config.width, eps=config.rms_eps, rngs=rngs)
        self.config = config

    def run(self, x_BLW: jax.Array, position_B3L: jax.Array, mask_B1LS: jax.Array, *, count: int, remat: str,
            deepstack: tuple[jax.Array, jax.Array] | None = None, past: KeysValues | None = None,
            emit: bool = False) -> tuple[jax.Array, Any]:
        """Hidden states (B, L, W) after the first `count` layers, before the final norm, and what those layers emitted.

        mask_B1LS: bool, True where a token may see a key; S counts `past` keys first.
        deepstack: features (n, B, M, W) and visual_index (B, L): features[i] is added at visual tokens after layer i < n.
        past: keys and values (count, B, S', K, H) that come in front, one pair a layer.
        emit: also return each layer's keys and values, (count, B, L, K, H); else None.
        """
        tables = mrope_tables(position_B3L, self.config)

        def call(block, x_BLW, xs):
            layer, past = xs
            x_BLW, own = block(x_BLW, tables, mask_B1LS, past)
            if deepstack is not None:
                x_BLW = _add_deepstack(x_BLW, layer, *deepstack)
            return x_BLW, own if emit else None

        return run_stack(self.layers, call, x_BLW, (jnp.arange(count), past), remat=remat, frozen=True)

    def logits(self, x_BLW: jax.Array) -> jax.Array:
        """Scores of the next token, (B, L, vocab) float32, from hidden states after the last layer; the head is the tied embedding."""
        x_BLW = self.norm(x_BLW)
        return jnp.einsum("blw,vw->blv", x_BLW, self.embed.table[...].astype(x_BLW.dtype), preferred_element_type=jnp.float32)


def _add_deepstack(x_BLW: jax.Array, layer: jax.Array, features_nBMW: jax.Array, visual_index_BL: jax.Array) -> jax.Array:
    """Adds the layer's visual features at visual tokens; a no-op, by a mask, from layer n on: so one scan serves all layers."""
    taps = features_nBMW.shape[0]
    features_BMW = jax.lax.dynamic_index_in_dim(features_nBMW, jnp.minimum(layer, taps - 1), keepdims=False)
    here_BL = (visual_index_BL >= 0) & (layer < taps)
    return jnp.where(here_BL[..., None], x_BLW + take_visual(features_BMW, visual_index_BL), x_BLW)
