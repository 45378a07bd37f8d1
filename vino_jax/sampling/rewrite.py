"""Caption rewriting: the VLM reads an instruction with its references and writes the caption that is generated then.

Dims: B prompts in one pass, T new tokens, V vocabulary.
"""
import contextlib
import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.batch import Batch
from vino_jax.errors import UserError
from vino_jax.nn.module import Definition, Params
from vino_jax.sharding.constrain import use_sharding


@dataclass(frozen=True)
class Decoding:
    """How the next token is chosen: the likeliest at temperature 0, else a sample of softmax(scores / temperature), of the top_k likeliest
    tokens alone (0: of all), and of those of the least number that hold top_p of what is then left.

    Raises UserError for values that mean nothing.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def __post_init__(self):
        for name, right, words in (
                ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
                ("temperature", 0 <= self.temperature < math.inf, "at least 0, where the likeliest token is taken"),
                ("top_k", self.top_k >= 0, "at least 0, where all tokens are kept"),
                ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1")):
            if not right:
                raise UserError(f"{name} {getattr(self, name)} must be {words}")
        if not self.temperature and (self.top_k or self.top_p < 1):
            raise UserError("top_k and top_p need a temperature above 0: at 0 the likeliest token is taken")


def warp(scores_BV: jax.Array, decoding: Decoding) -> jax.Array:
    """Logits (B, V) of the distribution that a token is sampled from, -inf at tokens that are out; the temperature must be above 0.

    Temperature, top_k, top_p in this order, each as transformers' processor of that name does it. Tokens of equal score stay together.
    """
    logits_BV = scores_BV / decoding.temperature
    ordered_BV = jnp.sort(logits_BV, axis=-1)  # the likeliest last
    kept_BV = jnp.full(ordered_BV.shape, True)
    if 0 < decoding.top_k < ordered_BV.shape[-1]:
        kept_BV = ordered_BV >= ordered_BV[:, -decoding.top_k, None]
    if decoding.top_p < 1:
        share_BV = jnp.cumsum(jax.nn.softmax(jnp.where(kept_BV, ordered_BV, -jnp.inf), axis=-1), axis=-1)
        kept_BV &= (share_BV > 1 - decoding.top_p).at[:, -1].set(True)
    least_B1 = jnp.min(jnp.where(kept_BV, ordered_BV, jnp.inf), axis=-1, keepdims=True)
    return jnp.where(logits_BV >= least_B1, logits_BV, -jnp.inf)


class Rewriter:
    """Writes on from prompts with the VLM: `vlm` is the part of that name of a Vino, `params` its parameters.

    stops: ids of the tokens that end a text. mesh, rules: where given, params lie on that mesh and the model's sharding hints follow the
    rules (sharding/rules.py). A set of shapes is compiled at its first use and kept for the life of the rewriter.
    """

    def __init__(self, vlm: Definition, params: Params, decoding: Decoding, stops: Sequence[int], *, mesh: Mesh | None = None,
                 rules: dict | None = None):
        self.params = params
        self._vlm, self._decoding, self._stops = vlm, decoding, tuple(stops)
        self._mesh, self._rules = mesh, rules
        self._rows: dict[tuple, int] = {}  # of the program of each set of shapes
        whole = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
        self._generate = jax.jit(self._generate_rows, **whole)

    def generate(self, prompts: Sequence[Batch], seeds: Sequence[int]) -> list[list[int]]:
        """Ids of the new tokens of prompts (B = 1 each) of equal shapes in one pass, up to max_new_tokens, without the one that ended them.

        A row's tokens do not depend on its neighbours: what is sampled comes from its own seed.
        """
        shapes = tuple(leaf.shape for leaf in jax.tree.leaves(prompts[0]))
        rows = self._rows.setdefault(shapes, len(prompts))
        fill = [-1] * (rows - len(prompts))  # the last row again: a pass that is not full needs no program of its own
        batch = jax.tree.map(lambda *leaves: np.concatenate(leaves), *prompts, *(prompts[i] for i in fill))
        active = contextlib.nullcontext() if self._mesh is None else use_sharding(self._mesh, self._rules)
        with active:
            tokens_BT = self._generate(self.params, batch, np.asarray([*seeds, *(seeds[i] for i in fill)], np.uint32))
        texts = np.asarray(tokens_BT)[:len(prompts)]
        return [row[(row >= 0) & ~np.isin(row, self._stops)].tolist() for row in texts]

    def _generate_rows(self, params: Params, batch: Batch, seed_B: jax.Array) -> jax.Array:
        """(B, T) int32, -1 behind the end."""
        key_B = jax.vmap(jax.random.key)(seed_B)

        def choose(scores_BV, number):
            if not self._decoding.temperature:
                return jnp.argmax(scores_BV, axis=-1).astype(jnp.int32)
            keys = jax.vmap(jax.random.fold_in, (0, None))(key_B, number)
            return jax.vmap(jax.random.categorical)(keys, warp(scores_BV, self._decoding)).astype(jnp.int32)

        return self._vlm(params).generate(batch, choose, stops=self._stops, limit=self._decoding.max_new_tokens)
