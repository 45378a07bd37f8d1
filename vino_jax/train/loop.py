"""The loop of one stage: place, compile, step, log, preview, save, and stop cleanly."""
import signal
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from vino_jax.batch import Batch, BucketSpec
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params
from vino_jax.sharding.constrain import use_sharding
from vino_jax.sharding.resolve import batch_shardings, shardings
from vino_jax.train import stage as stages
from vino_jax.train.config import LogConfig
from vino_jax.train.logging import Accumulator, MetricWriter, progress_bar
from vino_jax.train.optim import learning_rate, optimizer
from vino_jax.train.stage import StageConfig
from vino_jax.train.state import TrainState, new_state, state_shardings, with_shardings
from vino_jax.train.step import encode_batch, make_train_step

EXIT_PREEMPTED = 42  # job sets restart on it


class Preempted(SystemExit):
    """SIGTERM arrived and the step was saved; exits with EXIT_PREEMPTED."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


@dataclass(frozen=True)
class StagePlan:
    """All that a stage's programs are built from."""

    vino: Vino
    stage: StageConfig
    buckets: tuple[BucketSpec, ...]
    mesh: Mesh
    rules: dict
    seed: int
    encode: Callable[[Params, Batch], Batch]  # pixels to moments, see `make_encoder`

    def compiled_steps(self, tx, state: TrainState, frozen: Params, log: Callable[[str], None]) -> dict[str, Any]:
        """One executable a bucket, compiled before the first step; logs the seconds each took."""
        step = make_train_step(self.vino, self.stage, tx)
        moments = 2 * self.vino.config.vae.latent_channels
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, frozen))
        placed = jax.tree.map(lambda x: x.sharding, state)
        programs = {}
        for bucket in self.buckets:
            if bucket.batch % self.stage.accumulate:
                raise UserError(f"bucket {bucket.name!r}: {bucket.batch} rows do not divide into {self.stage.accumulate} microbatches")
            start = time.perf_counter()
            batch = bucket.spec(moments)
            batch = with_shardings(batch, batch_shardings(batch, self.mesh, self.rules))
            with use_sharding(self.mesh, self.rules):
                jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, None))
                programs[bucket.name] = jitted.lower(*abstract, batch).compile()
            log(f"{self.stage.name}: compiled bucket {bucket.name} in {time.perf_counter() - start:.1f} s")
        return programs


def make_encoder(vino: Vino, mesh: Mesh, rules: dict) -> Callable[[Params, Batch], Batch]:
    """encode(vae parameters, batch) -> batch with moments, compiled once a bucket for the whole run."""

    @jax.jit
    def encode(vae, batch):
        encoded = encode_batch(vino, vae, batch)
        clips = {name: getattr(encoded, name) for name in ("target", "images", "video")}
        return jax.lax.with_sharding_constraint(clips, batch_shardings(clips, mesh, rules))

    def call(vae, batch):
        with use_sharding(mesh, rules):
            return batch.replace(**encode(vae, batch))

    return call


def start_state(plan: StagePlan, params: Params, checkpoints: RunCheckpoints) -> tuple[TrainState, Params, Any]:
    """The state to go on from (the last complete checkpoint, else `params`), the frozen rest, and the optimizer."""
    rates = stages.rates(plan.stage, params)
    params = jax.device_put(params, shardings(params, plan.vino.axes_of(params), plan.mesh, plan.rules))
    trainable, frozen = stages.split(params, rates)
    trainable_shardings = jax.tree.map(lambda x: x.sharding, trainable)
    tx = optimizer(plan.stage, rates)
    rng = jax.random.key_data(jax.random.key(plan.seed))
    make = lambda p: new_state(p, tx, rng, ema=plan.stage.ema > 0)  # noqa: E731
    abstract = jax.eval_shape(make, trainable)
    placed = state_shardings(abstract, trainable_shardings, tx, plan.mesh)
    if checkpoints.latest() is None:
        return jax.jit(make, out_shardings=placed, donate_argnums=0)(trainable), frozen, tx
    state, _ = checkpoints.restore(checkpoints.latest(), with_shardings(abstract, placed))
    return state, frozen, tx


def place_batch(batch: Batch, mesh: Mesh, rules: dict) -> Batch:
    """This process's rows (numpy) -> global arrays on the mesh."""
    placed = batch_shardings(batch, mesh, rules)
    return jax.tree.map(lambda x, s: jax.make_array_from_process_local_data(s, np.asarray(x)), batch, placed)


class _Stop:
    """Whether SIGTERM arrived; restores the former handler afterwards."""

    def __enter__(self):
        self.asked = False
        self._former = signal.signal(signal.SIGTERM, self._ask)
        return self

    def _ask(self, *_):
        self.asked = True

    def __exit__(self, *_):
        signal.signal(signal.SIGTERM, self._former)


def run_stage(plan: StagePlan, params: Params, loader: Callable[[int], Iterable], checkpoints: RunCheckpoints, writer: MetricWriter,
              log: LogConfig, *, total_before: int = 0, preview: Callable[[Params, str, int], None] | None = None,
              quiet: bool = False, say: Callable[[str], None] = print) -> tuple[Params, Params]:
    """Train one stage to its end, going on from its last checkpoint; all parameters, and the same with averages where kept.

    loader(step) gives an iterable of (step, bucket name, Batch of this process's rows) with `waited` (seconds) and close().
    preview(params, stage name, step) draws samples. Raises UserError when a loss or gradient is not finite, naming step and batch.
    """
    stage = plan.stage
    state, frozen, tx = start_state(plan, params, checkpoints)
    step = int(state.step)

    def whole(average: bool = False) -> Params:
        return stages.merge(frozen, state.ema if average and state.ema else state.trainable)

    if step >= stage.steps:
        return whole(), whole(average=True)
    programs = plan.compiled_steps(tx, state, frozen, say)
    rate = learning_rate(stage)
    gathered, pending = Accumulator(), None

    def settle():
        """Read the metrics of the step before, one step late, so that the device never waits for the host."""
        nonlocal pending
        if pending is None:
            return
        at, bucket, samples, metrics = pending
        pending = None
        metrics = jax.device_get(metrics)
        if not metrics.pop("finite"):
            checkpoints.wait()
            raise UserError(f"stage {stage.name!r} step {at}: loss {float(metrics['loss'])} or gradient norm "
                            f"{float(metrics['gradient_norm'])} is not finite; bucket {bucket!r}, samples {samples}; "
                            f"the last good checkpoint is step {checkpoints.latest()}")
        gathered.add(metrics)

    if step == 0 and preview:
        preview(whole(), stage.name, 0)
    batches = loader(step)
    clock, rows, tokens, waited = time.perf_counter(), 0, 0, 0.0
    with _Stop() as stop, progress_bar(stage.steps, step, stage.name, quiet) as bar:
        for at, bucket, batch in batches:
            spec = next(b for b in plan.buckets if b.name == bucket)
            samples = np.asarray(batch.sample).tolist()
            batch = plan.encode(frozen["vae"], place_batch(batch, plan.mesh, plan.rules))
            state, metrics = programs[bucket](state, frozen, batch)
            settle()
            step, pending = at + 1, (at, bucket, samples, metrics)
            rows, tokens = rows + spec.batch, tokens + spec.batch * (spec.target_tokens + spec.reference_tokens + spec.prompt_tokens)
            bar.update()
            if step % log.every == 0 or step == stage.steps:
                settle()
                seconds = time.perf_counter() - clock
                values = {**gathered.take(), "learning_rate": float(rate(step - 1)), "samples_a_second": rows / seconds,
                          "tokens_a_second": tokens / seconds, "tokens": tokens, "seconds": seconds,
                          "data_wait_share": (batches.waited - waited) / seconds}
                writer.write(stage.name, step, total_before + step, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
                clock, rows, tokens, waited = time.perf_counter(), 0, 0, batches.waited
            last = step == stage.steps or stop.asked
            if last or (log.checkpoint_every and step % log.checkpoint_every == 0):
                settle()
                checkpoints.save(step, state, {"stage": stage.name, "step": step, "seed": plan.seed}, force=True)
            if preview and log.preview_every and (step % log.preview_every == 0 or step == stage.steps):
                preview(whole(average=True), stage.name, step)
                clock = time.perf_counter()
            if stop.asked:
                checkpoints.wait()
                say(f"{stage.name}: stopped by SIGTERM, saved at step {step}")
                raise Preempted()
            if last:
                break
    batches.close()
    checkpoints.wait()
    return whole(), whole(average=True)
