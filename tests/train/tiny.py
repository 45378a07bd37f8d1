"""A tiny VINO, its stage, and batches, for the tests of training."""
import jax
import jax.numpy as jnp
import numpy as np

from configs import common, models
from vino_jax.batch import BucketSpec
from vino_jax.models.context import References
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig, build
from vino_jax.train.loop import StagePlan, make_encoder
from vino_jax.train.stage import StageConfig

BUCKET = BucketSpec("edit", 8, 5, 32, 32, 12, images=1, image_height=32, image_width=32)


def vino(dtype: str = "float32") -> Vino:
    return Vino(build(VinoConfig, models.tiny()), Runtime(dtype=dtype, remat="full"))


def params(model: Vino, seed: int = 0):
    """Random values by numpy: initialising by JAX costs more compilation than a test should."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda x: (rng.standard_normal(x.shape) * 0.05 + (0.9 if x.ndim == 1 else 0.0)).astype(np.float32), model.abstract)


def velocity(module, width: int):
    """Of an MMDiT of tiny's sizes for two rows of noise without references. width: of its context."""
    rng = np.random.default_rng(5)
    latents, context = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 4, 8, 4), (2, 9, width)))
    none = References(jnp.zeros((2, 0, 16)), jnp.zeros((2, 0, 64)), jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0, 3), jnp.int32))
    return module(jnp.asarray(latents), jnp.asarray([0.625, 0.25]), none, jnp.zeros((2,), jnp.int32), jnp.asarray(context), jnp.ones((2, 9), bool))


def stage(steps: int = 4, rules: str = "stage3", **entries) -> StageConfig:
    values = {"learning_rate": 1e-3, "warmup_steps": 2, "ema": 0.9, "tasks": {"i2v": 1.0}, "texts": {"long": 1.0}, **entries}
    return StageConfig(name="stage", steps=steps, rules=common.RULES[rules], buckets=(BUCKET.name,), **values)


def plan(model: Vino, stage_config: StageConfig, mesh, rules) -> StagePlan:
    return StagePlan(model, stage_config, (BUCKET,), mesh, rules, 7, make_encoder(model, mesh, rules))


class Batches:
    """Step -> batch, a pure function, as the real loader's plan is."""

    waited = 0.0

    def __init__(self, start: int, spoil: int | None = None):
        self._step, self._spoil = start, spoil

    def __iter__(self):
        return self

    def __next__(self):
        step, self._step = self._step, self._step + 1
        batch = BUCKET.fake(step, moments=8, vocab=800)
        if step == self._spoil:
            batch.target[3] = np.nan
        return step, BUCKET.name, batch

    def close(self):
        pass


class Dies(Batches):
    """Fails after step 2, as a run does that is killed."""

    def __next__(self):
        step, name, batch = super().__next__()
        if step == 3:
            raise RuntimeError("killed")
        return step, name, batch
