"""From packed tasks to latents and pixels: references to the pool, branches to conditioning, one compiled denoising loop, decoding.

Dims: B tasks in one pass, G guidance branches (positive, negative, negative without images), K pool tokens, P values a latent token,
F H W frames, height, width in pixels, f h w in latents, C latent channels. Branch g of task b is row g*B + b.
"""
import contextlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.batch import LATENT_COMPRESSION, Batch, PackedTask, latent_frames
from vino_jax.errors import UserError
from vino_jax.flow.euler import integrate, schedule
from vino_jax.flow.guidance import guide
from vino_jax.models.context import patchify
from vino_jax.models.vino import Conditioning, Vino
from vino_jax.sharding.constrain import use_sharding

POSTERIORS = ("sample", "mode")


@dataclass(frozen=True)
class Result:
    """What one task gave."""

    index: str
    latents: np.ndarray  # (1, f, h, w, C) float32, scaled
    pixels: np.ndarray  # (F, H, W, 3) uint8; F = 1 is a picture


class Sampler:
    """Generates with `vino` and `params` (which may be replaced between calls, as previews of a training run do).

    mesh, rules: where given, params lie on that mesh and the model's sharding hints follow the rules (sharding/rules.py).
    A set of shapes is compiled at its first use and kept for the life of the sampler.
    """

    def __init__(self, vino: Vino, params: Any, *, mesh: Mesh | None = None, rules: dict | None = None):
        self.vino, self.params = vino, params
        self._mesh, self._rules = mesh, rules
        whole = {} if mesh is None else {"out_shardings": NamedSharding(mesh, PartitionSpec())}
        self._encode = jax.jit(self._encode_rows)
        self._condition = jax.jit(vino.condition)
        self._denoise = jax.jit(self._denoise_rows, static_argnames=("steps",), **whole)
        self._decode = jax.jit(vino.decode, **whole)

    def generate(self, task: PackedTask, *, steps: int, posterior: str = "sample", noise: np.ndarray | None = None) -> Result:
        """One task in `steps` Euler steps.

        posterior: reference latents are a "sample" of the VAE's posterior, or its "mode". noise: (1, f, h, w, C) to start from instead
        of normal noise of key(task.seed). Raises UserError for an unknown posterior, no steps, or noise of another shape.
        """
        return self.generate_many([task], steps=steps, posterior=posterior, noise=None if noise is None else [noise])[0]

    def generate_many(self, tasks: Sequence[PackedTask], *, steps: int, posterior: str = "sample", batch: int = 8,
                      noise: Sequence[np.ndarray | None] | None = None) -> list[Result]:
        """The same for many tasks, those of equal shapes together, up to `batch` in a pass; results in the order of `tasks`.

        A task's result does not depend on its neighbours: noise and posterior samples come from its own seed.
        """
        if posterior not in POSTERIORS:
            raise UserError(f"posterior {posterior!r} is unknown; choose one of {', '.join(POSTERIORS)}")
        if steps < 1:
            raise UserError(f"sampling takes at least 1 step, not {steps}")
        starts = [self._noise(task, given) for task, given in zip(tasks, noise or [None] * len(tasks), strict=True)]
        groups: dict[tuple, list[int]] = {}
        for i, task in enumerate(tasks):
            groups.setdefault(_shapes(task), []).append(i)
        results: dict[int, Result] = {}
        for members in groups.values():
            for first in range(0, len(members), batch):
                rows = members[first:first + batch]
                # The last pass is filled up with its last row, so that it needs no program of its own.
                filled = rows + [rows[-1]] * (min(batch, len(members)) - len(rows))
                latents, pixels = self._run([tasks[i] for i in filled], np.concatenate([starts[i] for i in filled]), steps, posterior)
                for row, i in enumerate(rows):
                    results[i] = Result(tasks[i].index, latents[row:row + 1], pixels[row])
        return [results[i] for i in range(len(tasks))]

    def _noise(self, task: PackedTask, given: np.ndarray | None) -> np.ndarray:
        """(1, f, h, w, C) float32."""
        shape = (1, latent_frames(task.frames), task.height // LATENT_COMPRESSION, task.width // LATENT_COMPRESSION,
                 self.vino.config.vae.latent_channels)
        if given is None:
            return np.asarray(jax.random.normal(jax.random.key(task.seed), shape, jnp.float32))
        if given.shape != shape:
            raise UserError(f"task {task.index}: the initial noise has the shape {given.shape} (1, f, h, w, C), the task needs {shape}")
        return np.asarray(given, np.float32)

    def _run(self, tasks: list[PackedTask], noise: np.ndarray, steps: int, posterior: str) -> tuple[np.ndarray, np.ndarray]:
        """Tasks of equal shapes in one pass: latents (B, f, h, w, C) and pixels (B, F, H, W, 3)."""
        rows = [task.branches[g] for g in range(len(tasks[0].branches)) for task in tasks]
        branches = jax.device_put(jax.tree.map(lambda *leaves: np.concatenate(leaves), *rows))
        per_task = [np.asarray([getattr(task, name) for task in tasks], np.float32) for name in ("shift", "guidance", "image_guidance")]
        active = contextlib.nullcontext() if self._mesh is None else use_sharding(self._mesh, self._rules)
        with active:
            pool = self._pool(tasks, posterior)
            conditioning = self._condition(self.params, branches)
            latents = self._denoise(self.params, noise, pool, branches, conditioning, *per_task, steps=steps)
            pixels = self._decode(self.params, latents)
        return np.asarray(latents), np.asarray(pixels)

    def _pool(self, tasks: list[PackedTask], posterior: str) -> jax.Array | None:
        """Latent tokens (B, K, P) of all references in pool order; None without references."""
        tokens = []
        for i, same in enumerate(zip(*(task.references for task in tasks), strict=True)):
            keys = None
            if posterior == "sample":  # the noise has the seed's key itself, reference i its (i+1)-th fold
                keys = jnp.stack([jax.random.fold_in(jax.random.key(task.seed), i + 1) for task in tasks])
            tokens.append(self._encode(self.params, np.stack(same), keys))
        return jnp.concatenate(tokens, axis=1) if tokens else None

    def _encode_rows(self, params: Any, pixels_BFHWC: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """uint8 pixels of one reference of each task -> its latent tokens (B, fhw/4, P); keys None: the posterior's mode."""
        latents = self.vino.latents(self.vino.encode(params, pixels_BFHWC), keys_B)
        return patchify(latents, self.vino.config.mmdit.patch)

    def _denoise_rows(self, params: Any, noise_BfhwC: jax.Array, pool_BKP: jax.Array | None, branches: Batch,
                      conditioning: Conditioning, shift_B: jax.Array, text_B: jax.Array, image_B: jax.Array, *, steps: int) -> jax.Array:
        """Scaled latents (B, f, h, w, C); branches and conditioning have G*B rows, all of them in one pass a step."""
        count = branches.role.shape[0] // noise_BfhwC.shape[0]

        def all_branches(x):
            return jnp.concatenate([x] * count, axis=0)

        pool = None if pool_BKP is None else all_branches(pool_BKP)

        def velocity(x, time_B):
            v = self.vino.velocity(params, all_branches(x), all_branches(time_B), pool, branches, conditioning)
            return guide(v.reshape(count, *x.shape), text_B, image_B)

        return integrate(velocity, noise_BfhwC, schedule(steps, shift_B))


def _shapes(task: PackedTask) -> tuple:
    """What must be equal for two tasks to run in one pass."""
    leaves = tuple(leaf.shape for branch in task.branches for leaf in jax.tree.leaves(branch))
    return len(task.branches), leaves, tuple(r.shape for r in task.references), task.frames, task.height, task.width
