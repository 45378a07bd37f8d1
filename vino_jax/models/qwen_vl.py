"""Qwen3-VL as VINO's frozen reader: a prompt with pictures in, hidden states at its tokens and at learnable queries out (SPEC 4).

Queries stand behind the prompt under a causal mask, so the prompt's keys and values do not depend on them: the prompt runs once
without gradient, and only the query positions run backward.

Dims: B batch, L prompt tokens, Q queries, W width, M merged patches.
"""
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
        """Scores of the next token at every prompt token, (B, L, vocab) float32: Qwen3-VL's own forward, without queries."""
        frozen = _frozen(self)
        x_BLW, deepstack = frozen._embed(batch)
        x_BLW, _ = frozen.text.run(
            x_BLW, batch.mrope, _causal(batch.prompt_mask), count=self.config.text.layers, remat="nothing", deepstack=deepstack)
        return frozen.text.logits(x_BLW)

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
    last_B = jnp.maximum(jnp.sum(prompt_mask_BL, axis=1, dtype=jnp.int32) - 1, 0)
    last_B31 = jnp.take_along_axis(mrope_B3L, last_B[:, None, None], axis=2)
    return last_B31 + jnp.arange(amount, dtype=mrope_B3L.dtype)


def _causal(valid_BL: jax.Array) -> jax.Array:
    """Mask (B, 1, L, L), True where a token may see a key: itself and earlier ones, padding hidden."""
    length = valid_BL.shape[1]
    return (jnp.tril(jnp.ones((length, length), jnp.bool_)) & valid_BL[:, None, :])[:, None]


def _frozen(model: QwenVL) -> QwenVL:
    """The same model on parameters that no gradient enters."""
    graphdef, state = nnx.split(model)
    return nnx.merge(graphdef, jax.tree.map(jax.lax.stop_gradient, state))
