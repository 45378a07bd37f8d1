"""From packed tasks to latents and pixels: references to the pool, branches to conditioning, one compiled denoising loop, decoding.

Dims: B tasks in one pass, G guidance branches (positive, negative, negative without images), K pool tokens, P values a latent token,
F H W frames, height, width in pixels, f h w in latents, C latent channels. A pass of some branches (passes.py) has the rows of its first
branch, a task each, then those of the next, and repeats its last row where rows lie on several devices and do not divide.
"""
import contextlib
import functools
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.batch import LATENT_COMPRESSION, Batch, PackedTask, latent_frames, visual_tokens
from vino_jax.errors import UserError
from vino_jax.flow.euler import integrate, schedule
from vino_jax.flow.guidance import guide
from vino_jax.models.context import patchify
from vino_jax.models.mmdit import run_blocks
from vino_jax.models.vino import Conditioning, Vino
from vino_jax.nn.runtime import compiler_options
from vino_jax.sampling.passes import Passes, choose
from vino_jax.sampling.step_cache import integrate_cached
from vino_jax.sharding.constrain import shards, use_sharding

POSTERIORS = ("sample", "mode")
BRANCHES = ("positive", "negative", "negative without images")
_TELLS = 10  # times that a denoising loop tells of its progress
_KEPT = 16  # conditionings, of 20 MB each at full size
# Fields of a Batch that the VLM and the connectors read; of the others only the MMDiT does.
_READ = ("tokens", "prompt_mask", "mrope", "visual_index", "patches", "patch_coords", "patch_segment")


@dataclass(frozen=True)
class Result:
    """What one task gave."""

    index: str
    latents: np.ndarray  # (1, f, h, w, C) float32, scaled
    pixels: np.ndarray  # (F, H, W, 3) uint8; F = 1 is a picture
    change: float = 0.0  # with step caching (step_cache.py: integrate_cached); of the tasks side by side


@dataclass(frozen=True)
class Progress:
    """Of tasks side by side: their names, the branches of every pass, and how many of `steps` are done."""

    tasks: tuple[str, ...]
    passes: Passes
    step: int
    steps: int


class Sampler:
    """Generates with `vino` and `params` (which may be replaced between calls, as previews of a training run do).

    mesh, rules: where given, params lie on that mesh and the model's sharding hints follow the rules (sharding/rules.py).
    tell: called with the Progress of a denoising loop, at its start and some ten times on its way.
    A set of shapes is compiled at its first use and kept for the life of the sampler.
    """

    def __init__(self, vino: Vino, params: Any, *, mesh: Mesh | None = None, rules: dict | None = None,
                 tell: Callable[[Progress], None] | None = None):
        self.vino, self.params = vino, params
        self._mesh, self._rules, self._tell = mesh, rules, tell
        whole = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
        jit, jit_vae = (functools.partial(jax.jit, compiler_options=compiler_options(mesh, once=once)) for once in (False, True))
        self._encode = jit_vae(self._encode_rows)
        self._condition = jit(vino.condition)
        self._denoise = jit(self._denoise_rows, static_argnames=("steps", "passes", "every"), **whole)
        self._decode = jit_vae(vino.decode, **whole)

    @property
    def params(self) -> Any:
        return self._params

    @params.setter
    def params(self, params: Any) -> None:
        self._params = params
        self._conditioned: OrderedDict[bytes, Conditioning] = OrderedDict()  # of these parameters alone

    def generate(self, task: PackedTask, *, steps: int, posterior: str = "sample", noise: np.ndarray | None = None,
                 step_cache: int = 1) -> Result:
        """One task in `steps` Euler steps.

        posterior: reference latents are a "sample" of the VAE's posterior, or its "mode". noise: (1, f, h, w, C) to start from instead
        of normal noise of key(task.seed). step_cache: the MMDiT's blocks run in every so many steps (step_cache.py); 1: in all.
        Raises UserError for an unknown posterior, no steps, or noise of another shape.
        """
        return self.generate_many([task], steps=steps, posterior=posterior, noise=None if noise is None else [noise], step_cache=step_cache)[0]

    def generate_many(self, tasks: Sequence[PackedTask], *, steps: int, posterior: str = "sample", batch: int = 8,
                      noise: Sequence[np.ndarray | None] | None = None, step_cache: int = 1) -> list[Result]:
        """The same for many tasks, those of equal shapes together, up to `batch` at a time; results in the order of `tasks`.

        A task's result does not depend on its neighbours: noise and posterior samples come from its own seed.
        """
        if posterior not in POSTERIORS:
            raise UserError(f"posterior {posterior!r} is unknown; choose one of {', '.join(POSTERIORS)}")
        if steps < 1:
            raise UserError(f"sampling takes at least 1 step, not {steps}")
        if step_cache < 1:
            raise UserError(f"step_cache {step_cache} must be at least 1")
        starts = [self._noise(task, given) for task, given in zip(tasks, noise or [None] * len(tasks), strict=True)]
        groups: dict[tuple, list[int]] = {}
        for i, task in enumerate(tasks):
            groups.setdefault(shapes(task), []).append(i)
        results: dict[int, Result] = {}
        for members in groups.values():
            for first in range(0, len(members), batch):
                rows = members[first:first + batch]
                # The last ones are filled up with their last row, so that they need no program of their own.
                filled = rows + [rows[-1]] * (min(batch, len(members)) - len(rows))
                latents, pixels, change = self._run([tasks[i] for i in filled], np.concatenate([starts[i] for i in filled]), steps, posterior,
                                                    step_cache)
                for row, i in enumerate(rows):
                    results[i] = Result(tasks[i].index, latents[row:row + 1], pixels[row], change)
        return [results[i] for i in range(len(tasks))]

    def passes(self, tasks: Sequence[PackedTask]) -> Passes:
        """Which branches of tasks of equal shapes run together."""
        config = self.vino.config
        with self._active():
            return choose([branch_tokens(tasks[0], branch) + config.queries for branch in tasks[0].branches], config.mmdit.width,
                          copies=len(tasks), shards=shards("batch"))

    def lowered(self, task: PackedTask, *, steps: int) -> Iterator[tuple[str, jax.stages.Lowered]]:
        """(name, program) of all that generating `task` runs, for ahead-of-time compilation; params may be ShapeDtypeStructs."""
        passes, tokens = self.passes([task]), []
        with self._active():
            keys = jax.eval_shape(lambda: jnp.stack([jax.random.key(0)]))
            for i, pixels in enumerate(task.references):
                yield f"encode reference {i + 1}", self._encode.lower(self.params, pixels[None], keys)
                tokens.append(jax.eval_shape(self._encode_rows, self.params, pixels[None], keys))
            alike: dict[tuple, list[tuple[str, Batch]]] = {}  # branches of equal shapes share a program
            for branch, name in zip(task.branches, BRANCHES):
                alike.setdefault(_leaf_shapes(branch), []).append((name, branch))
            for found in alike.values():
                yield f"condition {', '.join(name for name, _ in found)}", self._condition.lower(self.params, found[0][1])
            conditionings = [jax.eval_shape(self.vino.condition, self.params, branch) for branch in task.branches]
            pool = jax.eval_shape(_joined, tokens) if tokens else None
            latents, one = jax.ShapeDtypeStruct(self._latent_shape(task), jnp.float32), np.ones(1, np.float32)
            rows = self._rows([task], passes, [conditionings])
            yield "denoise", self._denoise.lower(self.params, latents, pool, rows, one, one, one, 0, steps, steps=steps, passes=passes,
                                                 every=1)
            yield "decode", self._decode.lower(self.params, latents)

    def _active(self) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if self._mesh is None else use_sharding(self._mesh, self._rules)

    def _latent_shape(self, task: PackedTask) -> tuple[int, ...]:
        return (1, latent_frames(task.frames), task.height // LATENT_COMPRESSION, task.width // LATENT_COMPRESSION,
                self.vino.config.vae.latent_channels)

    def _noise(self, task: PackedTask, given: np.ndarray | None) -> np.ndarray:
        """(1, f, h, w, C) float32."""
        shape = self._latent_shape(task)
        if given is None:
            return np.asarray(jax.random.normal(jax.random.key(task.seed), shape, jnp.float32))
        if given.shape != shape:
            raise UserError(f"task {task.index}: the initial noise has the shape {given.shape} (1, f, h, w, C), the task needs {shape}")
        return np.asarray(given, np.float32)

    def _run(self, tasks: list[PackedTask], noise: np.ndarray, steps: int, posterior: str,
             every: int) -> tuple[np.ndarray, np.ndarray, float]:
        """Tasks of equal shapes side by side: latents (B, f, h, w, C), pixels (B, F, H, W, 3), and the change of step_cache.py."""
        passes, latents, changes = self.passes(tasks), noise, []
        numbers = [np.asarray([getattr(task, name) for task in tasks], np.float32) for name in ("shift", "guidance", "image_guidance")]
        with self._active():
            pool = self._pool(tasks, posterior)
            rows = self._rows(tasks, passes, [[self._conditioning(branch) for branch in task.branches] for task in tasks])
            # One program for every stretch of the loop; only who tells of progress takes several. With step caching the blocks run at the
            # start of each, and once more, so that their change is known.
            size = steps if self._tell is None else max(1, steps // _TELLS)
            size = size if every == 1 else -(-size // (2 * every)) * 2 * every
            for first in range(0, steps, size):
                if self._tell is not None:
                    jax.block_until_ready(latents)
                    self._tell(Progress(tuple(task.index for task in tasks), passes, first, steps))
                latents, change = self._denoise(self.params, latents, pool, rows, *numbers, first, min(first + size, steps), steps=steps,
                                                passes=passes, every=every)
                changes.append(change)
            pixels = self._decode(self.params, latents)
        return np.asarray(latents), np.asarray(pixels), max(map(float, changes))

    def _pool(self, tasks: list[PackedTask], posterior: str) -> jax.Array | None:
        """Latent tokens (B, K, P) of all references in pool order; None without references."""
        tokens = []
        for i, same in enumerate(zip(*(task.references for task in tasks), strict=True)):
            keys = None
            if posterior == "sample":  # the noise has the seed's key itself, reference i its (i+1)-th fold
                keys = jnp.stack([jax.random.fold_in(jax.random.key(task.seed), i + 1) for task in tasks])
            tokens.append(self._encode(self.params, np.stack(same), keys))
        return _joined(tokens) if tokens else None

    def _encode_rows(self, params: Any, pixels_BFHWC: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """uint8 pixels of one reference of each task -> its latent tokens (B, fhw/4, P); keys None: the posterior's mode."""
        latents = self.vino.latents(self.vino.encode(params, pixels_BFHWC), keys_B)
        return patchify(latents, self.vino.config.mmdit.patch)

    def _conditioning(self, branch: Batch) -> Conditioning:
        """Of a branch, one row; those of equal prompts (a task file's negative ones) are computed once."""
        key = hashlib.sha256(repr(bool(branch.role.shape[1])).encode())
        for name in _READ:
            array = np.ascontiguousarray(getattr(branch, name))
            key.update(repr(array.shape).encode() + array.tobytes())
        name = key.digest()
        if name not in self._conditioned:
            self._conditioned[name] = self._condition(self.params, branch)
        self._conditioned.move_to_end(name)
        found = self._conditioned[name]
        if len(self._conditioned) > _KEPT:
            self._conditioned.popitem(last=False)
        return found

    def _rows(self, tasks: Sequence[PackedTask], passes: Passes, conditionings: Sequence[Sequence[Any]]) -> list[list[tuple[Batch, Any]]]:
        """Of every pass its rows, (branch without what the VLM reads, conditioning), filled up to a multiple of the shards of rows."""
        rows = [[(task.branches[g].replace(**dict.fromkeys(_READ)), own[g]) for g in members for task, own in zip(tasks, conditionings)]
                for members in passes]
        return [own + own[-1:] * (-len(own) % shards("batch")) for own in rows]

    def _denoise_rows(self, params: Any, latents_BfhwC: jax.Array, pool_BKP: jax.Array | None, rows: list[list[tuple[Batch, Conditioning]]],
                      shift_B: jax.Array, text_B: jax.Array, image_B: jax.Array, first: jax.Array, last: jax.Array, *, steps: int,
                      passes: Passes, every: int) -> tuple[jax.Array, jax.Array]:
        """Scaled latents (B, f, h, w, C) after the steps first <= i < last of `steps`, and the change of step_cache.py, 0 at every = 1."""
        count = len(latents_BfhwC)
        joined = [_joined_rows(own) for own in rows]

        def spread(x_B: jax.Array, i: int) -> jax.Array:  # a task's values for its rows in pass i
            return jnp.take(x_B, np.arange(len(rows[i])) % count, axis=0)

        pools = [None if pool_BKP is None else spread(pool_BKP, i) for i in range(len(passes))]

        def velocity(x, time_B, through=run_blocks):
            of_branch = {}
            for i, members in enumerate(passes):
                v = self.vino.velocity(params, spread(x, i), spread(time_B, i), pools[i], *joined[i], through=through)
                of_branch |= zip(members, v[:len(members) * count].reshape(len(members), *x.shape))
            return guide(jnp.stack([of_branch[g] for g in sorted(of_branch)]), text_B, image_B)

        times = schedule(steps, shift_B)
        if every == 1:
            return integrate(velocity, latents_BfhwC, times, first, last), jnp.float32(0)
        return integrate_cached(velocity, every, latents_BfhwC, times, first, last)


def shapes(task: PackedTask) -> tuple:
    """What must be equal for two tasks to run side by side."""
    branches = tuple(map(_leaf_shapes, task.branches))
    return branches, tuple(r.shape for r in task.references), task.frames, task.height, task.width


def _leaf_shapes(branch: Batch) -> tuple[tuple[int, ...], ...]:
    return tuple(leaf.shape for leaf in jax.tree.leaves(branch))


def branch_tokens(task: PackedTask, branch: Batch) -> int:
    """Of a branch in the MMDiT: target, references and prompt; the queries come on top."""
    return visual_tokens(task.frames, task.height, task.width) + branch.role.shape[1] + branch.tokens.shape[1]


def _joined(tokens: Sequence[jax.Array]) -> jax.Array:
    return jnp.concatenate(tokens, axis=1)


def _joined_rows(rows: Sequence[tuple[Batch, Conditioning]]) -> tuple[Batch, Conditioning]:
    """Rows of one pass, their tokens (dim 1) padded to the longest: zeros are padding in all of these fields."""
    def join(*leaves):
        longest = max(leaf.shape[1] for leaf in leaves) if leaves[0].ndim > 1 else 0
        return jnp.concatenate([x if x.ndim == 1 else jnp.pad(x, [(0, 0), (0, longest - x.shape[1]), *[(0, 0)] * (x.ndim - 2)]) for x in leaves])

    batch, conditioning = jax.tree.map(join, *rows)
    return batch, conditioning
