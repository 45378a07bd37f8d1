"""Qwen3-VL as VINO's frozen reader: a prompt with pictures in, hidden states at its tokens and at learnable queries out; and as a
writer, which goes on from a prompt with pictures (caption rewriting).

Queries stand behind the prompt under a causal mask, so the prompt's keys and values do not depend on them: the prompt runs once
without gradient, and only the query positions run backward. New tokens see the prompt by the same keys and values.

Dims: B batch, L prompt tokens, Q queries, T new tokens, S keys in the cache, V vocabulary, D decoder layers, W width, M merged patches.
"""
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vino_jax.batch import Batch
from vino_jax.models.qwen_text import TextModel, take_visual
from vino_jax.models.qwen_vision import VisionTower
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VLMConfig
from vino_jax.sharding.constrain import constrain


class QwenVL(nnx.Module):
    """Vision tower and text model. Never trained: no gradient reaches its parameters."""

    def __init__(self, config: VLMConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        self.vision = VisionTower(config.vision, runtime, rngs=rngs)
        self.text = TextModel(config.text, runtime, rngs=rngs)
        self.config, self.runtime = config, runtime

    def conditioning(self, batch: Batch, queries_QW: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Hidden states after the last-but-one decoder layer, before the final norm: prompt (B, L, W) and queries (B, Q, W), compute dtype.

        Only the queries' states carry a gradient, and only to `queries_QW`. States of padded prompt tokens mean nothing.
        """
        frozen, count = _frozen(self), self.config.text.layers - 1
        x_BLW, deepstack = frozen._embed(batch)
        prompt_BLW, past = frozen.text.run(
            x_BLW, batch.mrope, _causal(batch.prompt_mask), count=count, remat="nothing", deepstack=deepstack, emit=True)

        rows, amount = batch.tokens.shape[0], queries_QW.shape[0]
        x_BQW = jnp.broadcast_to(queries_QW.astype(self.runtime.compute_dtype), (rows, *queries_QW.shape))
        x_BQW = constrain(x_BQW, "batch", "tokens", "width")
        sees_prompt = jnp.broadcast_to(batch.prompt_mask[:, None, None, :], (rows, 1, amount, batch.prompt_mask.shape[1]))
        mask_B1QS = jnp.concatenate([sees_prompt, _causal(jnp.ones((rows, amount), jnp.bool_))], axis=-1)
        queries_BQW, _ = frozen.text.run(
            x_BQW, query_positions(batch.mrope, batch.prompt_mask, amount), mask_B1QS, count=count, remat="dots", past=past)
        return prompt_BLW, queries_BQW

    def logits(self, batch: Batch) -> jax.Array:
        """Scores of the next token at every prompt token, (B, L, V) float32: Qwen3-VL's own forward, without queries."""
        frozen = _frozen(self)
        return frozen.text.logits(frozen._read(batch, emit=False)[0])

    def generate(self, batch: Batch, choose: Callable[[jax.Array, jax.Array], jax.Array], *, stops: Sequence[int], limit: int) -> jax.Array:
        """Up to `limit` new tokens of every row, (B, T) int32 with T = limit: a row ends with its first token of `stops`, behind it lies -1.

        choose: (scores (B, V) float32, number of the new token, scalar int32) -> token ids (B,) int32.
        The loop ends when all rows have. The cache has room for L + T - 1 keys from the start: the last token's are never read.
        """
        frozen, (rows, length) = _frozen(self), batch.tokens.shape
        x_BLW, own = frozen._read(batch, emit=True)
        x_B1W = jnp.take_along_axis(x_BLW, _last(batch.prompt_mask)[:, None, None], axis=1)
        following_B11 = jnp.max(jnp.where(batch.prompt_mask[:, None], batch.mrope, -1), axis=(1, 2), keepdims=True) + 1
        ended = jnp.asarray(stops, jnp.int32)

        def extend(x_B1W, i, tokens_BT, done_B):
            new_B = jnp.where(done_B, -1, choose(frozen.text.logits(x_B1W)[:, 0], i))
            return jax.lax.dynamic_update_slice_in_dim(tokens_BT, new_B[:, None], i, axis=1), done_B | jnp.isin(new_B, ended)

        def step(carry):
            i, tokens_BT, done_B, cache = carry  # token i - 1 goes in, token i comes out
            new_B1 = jnp.maximum(jax.lax.dynamic_slice_in_dim(tokens_BT, i - 1, 1, axis=1), 0)
            written = jnp.broadcast_to(jnp.arange(limit) < i - 1, (rows, limit)).at[:, -1].set(True)  # the last one: this token's own
            mask_B11S = jnp.concatenate([batch.prompt_mask, written], axis=1)[:, None, None, :]
            position_B31 = jnp.broadcast_to(following_B11 + i - 1, (rows, 3, 1))
            x_B1W, own = frozen.text.run(frozen.text.embed(new_B1, self.runtime.compute_dtype), position_B31, mask_B11S,
                                         count=self.config.text.layers, remat="nothing", past=cache, emit=True)
            cache = _whole(jax.tree.map(lambda c, x: jax.lax.dynamic_update_slice_in_dim(c, x, length + i - 1, axis=2), cache, own))
            return i + 1, *extend(x_B1W, i, tokens_BT, done_B), cache

        start = extend(x_B1W, jnp.int32(0), jnp.full((rows, limit), -1, jnp.int32), jnp.zeros((rows,), jnp.bool_))
        cache = _whole(jax.tree.map(lambda x: jnp.pad(x, [(0, 0), (0, 0), (0, limit - 1), (0, 0), (0, 0)]), own))
        carry = jax.lax.while_loop(lambda carry: (carry[0] < limit) & ~jnp.all(carry[2]), step, (jnp.int32(1), *start, cache))
        return carry[1]

    def _read(self, batch: Batch, *, emit: bool) -> tuple[jax.Array, Any]:
        """The prompt through all layers: hidden states (B, L, W) before the final norm and, with `emit`, keys and values (D, B, L, K, H)."""
        x_BLW, deepstack = self._embed(batch)
        return self.text.run(x_BLW, batch.mrope, _causal(batch.prompt_mask), count=self.config.text.layers, remat="nothing",
                             deepstack=deepstack, emit=emit)

    def _embed(self, batch: Batch) -> tuple[jax.Array, tuple[jax.Array, jax.Array] | None]:
        """Embedded prompt (B, L, W) with merged patches at visual tokens; DeepStack features and where they go (None without patches)."""
        x_BLW = constrain(self.text.embed(batch.tokens, self.runtime.compute_dtype), "batch", "tokens", "width")
        if batch.patches.shape[1] == 0:
            return x_BLW, None
        visual_BMW, features_nBMW = self.vision(batch.patches, batch.patch_coords, batch.patch_segment)
        x_BLW = jnp.where((batch.visual_index >= 0)[..., None], take_visual(visual_BMW, batch.visual_index), x_BLW)
        return x_BLW, (features_nBMW, batch.visual_index) if features_nBMW.shape[0] else None


def query_positions(mrope_B3L: jax.Array, prompt_mask_BL: jax.Array, amount: int) -> jax.Array:
    """MRoPE positions (B, 3, Q) of the queries: last+0, last+1, ..., where last is the position of the prompt's last token.

    QUIRK of the reference: the first query shares the last token's position.
    """
    last_B31 = jnp.take_along_axis(mrope_B3L, _last(prompt_mask_BL)[:, None, None], axis=2)
    return last_B31 + jnp.arange(amount, dtype=mrope_B3L.dtype)


def _last(prompt_mask_BL: jax.Array) -> jax.Array:
    """Where the last token of each prompt lies, (B,) int32."""
    return jnp.maximum(jnp.sum(prompt_mask_BL, axis=1, dtype=jnp.int32) - 1, 0)


def _causal(valid_BL: jax.Array) -> jax.Array:
    """Mask (B, 1, L, L), True where a token may see a key: itself and earlier ones, padding hidden."""
    length = valid_BL.shape[1]
    return (jnp.tril(jnp.ones((length, length), jnp.bool_)) & valid_BL[:, None, :])[:, None]


def _whole(cache: Any) -> Any:
    """Keys and values (D, B, S, K, H) with all of a row's keys on one shard of the tokens: a new token sees them all, and is one."""
    return jax.tree.map(lambda x: constrain(x, None, "batch", None, "act_heads", None), cache)


def _frozen(model: QwenVL) -> QwenVL:
    """The same model on parameters that no gradient enters."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jax.lax.stop_gradient, state))
