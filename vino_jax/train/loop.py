"""The loop of one stage: place, compile, step, log, preview, save, and stop cleanly."""
import contextlib
import functools
import math
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.batch import Batch, BucketSpec
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params
from vino_jax.nn.runtime import compiler_options
from vino_jax.sharding.constrain import use_sharding
from vino_jax.sharding.resolve import batch_shardings, data_shards, shardings
from vino_jax.sharding.rules import for_rows
from vino_jax.train import compile_cache
from vino_jax.train import stage as stages
from vino_jax.train.config import LogConfig
from vino_jax.train.goodput import Goodput
from vino_jax.train.logging import Accumulator, MetricWriter, progress_bar
from vino_jax.train.optim import learning_rate, optimizer
from vino_jax.train.preemption import Preempted, Stop
from vino_jax.train.stage import StageConfig
from vino_jax.train.state import TrainState, new_state, state_shardings, with_shardings
from vino_jax.train.step import encode_batch, make_train_step
from vino_jax.train.watchdog import Watchdog


@dataclass(frozen=True)
class StagePlan:
    """All that a stage's programs are built from."""

    vino: Vino
    stage: StageConfig
    buckets: tuple[BucketSpec, ...]  # those that the stage draws
    mesh: Mesh
    rules: dict
    seed: int
    encode: Callable[[Params, Batch], Batch]  # pixels to moments, see `make_encoder`

    def abstract(self, params: Params) -> tuple[optax.GradientTransformation, TrainState, Params]:
        """The optimizer, and the stage's state and frozen parameters as ShapeDtypeStructs with their shardings.

        params: of all parts, ShapeDtypeStructs; train/initial.py: param_structs.
        """
        rates = stages.rates(self.stage, self.vino.abstract)
        tx = optimizer(self.stage, rates)
        trainable, frozen = stages.split(params, rates)
        rng = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(self.seed)))
        state = jax.eval_shape(lambda p, r: new_state(p, tx, r, ema=self.stage.ema > 0), trainable, rng)
        placed = jax.tree.map(lambda struct: struct.sharding, trainable)
        return tx, with_shardings(state, state_shardings(state, placed, tx, self.mesh)), frozen

    def lowered(self, bucket: BucketSpec, tx: optax.GradientTransformation, state: TrainState, frozen: Params) -> jax.stages.Lowered:
        """The step of a bucket, ready to compile. state, frozen: arrays, or ShapeDtypeStructs with shardings."""
        vino = self.vino.with_remat(self.stage.remat.get(bucket.name, self.vino.runtime.remat))
        step = make_train_step(vino, self.stage, tx)
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), (state, frozen))
        placed = jax.tree.map(lambda x: x.sharding, state)
        batch = bucket.spec(2 * self.vino.config.vae.latent_channels)
        batch = with_shardings(batch, batch_shardings(batch, self.mesh, self.rules))
        with use_sharding(self.mesh, for_rows(self.rules, self.mesh, bucket.batch // self.stage.accumulate)):
            read = NamedSharding(self.mesh, PartitionSpec())  # metrics lie whole on every device, so that every process can read them
            jitted = jax.jit(step, donate_argnums=0, out_shardings=(placed, read))
            return jitted.lower(*abstract, batch, jax.ShapeDtypeStruct((), np.float32))

    def compiled_steps(self, tx, state: TrainState, frozen: Params, log: Callable[[str], None]) -> dict[str, Any]:
        """One executable a bucket, compiled before the first step; logs the seconds each took."""
        programs = {}
        for bucket in self.buckets:
            start = time.perf_counter()
            programs[bucket.name] = self.lowered(bucket, tx, state, frozen).compile()
            log(f"{self.stage.name}: compiled bucket {bucket.name} in {time.perf_counter() - start:.1f} s")
        return programs


def _encoder(vino: Vino, mesh: Mesh, rules: dict) -> jax.stages.Wrapped:
    @functools.partial(jax.jit, compiler_options=compiler_options(mesh))
    def encode(vae, batch):
        encoded = encode_batch(vino, vae, batch)
        clips = {name: getattr(encoded, name) for name in ("target", "images", "video")}
        return jax.lax.with_sharding_constraint(clips, batch_shardings(clips, mesh, rules))

    return encode


def make_encoder(vino: Vino, mesh: Mesh, rules: dict) -> Callable[[Params, Batch], Batch]:
    """encode(vae parameters, batch) -> batch with moments, compiled once a bucket for the whole run."""
    encode = _encoder(vino, mesh, rules)

    def call(vae, batch):
        with use_sharding(mesh, rules):
            return batch.replace(**encode(vae, batch))

    return call


def lowered_encoder(vino: Vino, vae: Params, bucket: BucketSpec, mesh: Mesh, rules: dict) -> jax.stages.Lowered:
    """The same for the pixels of a bucket, ready to compile. vae: ShapeDtypeStructs with shardings."""
    batch = bucket.spec()
    with use_sharding(mesh, rules):
        return _encoder(vino, mesh, rules).lower(vae, with_shardings(batch, batch_shardings(batch, mesh, rules)))


def start_state(plan: StagePlan, params: Params, checkpoints: RunCheckpoints) -> tuple[TrainState, Params, Any]:
    """The state to go on from (the last complete checkpoint, else `params`), the frozen rest, and the optimizer.

    params: where there is a checkpoint, what the stage trains may be absent: it would lie in memory beside what is restored.
    """
    rates = stages.rates(plan.stage, plan.vino.abstract)
    placed = shardings(plan.vino.abstract, plan.vino.axes, plan.mesh, plan.rules)
    tx, abstract, _ = plan.abstract(with_shardings(plan.vino.abstract, placed))
    (trainable, frozen), (_, frozen_shardings) = stages.split(params, rates), stages.split(placed, rates)
    frozen = jax.device_put(frozen, frozen_shardings)
    if checkpoints.latest() is not None:
        state, _ = checkpoints.restore(checkpoints.latest(), abstract)
        return state, frozen, tx
    placed_state = jax.tree.map(lambda struct: struct.sharding, abstract)
    rng = jax.random.key_data(jax.random.key(plan.seed))
    make = jax.jit(lambda p: new_state(p, tx, rng, ema=plan.stage.ema > 0), out_shardings=placed_state, donate_argnums=0)
    return make(jax.device_put(trainable, placed_state.trainable)), frozen, tx


def check_batches(stage: StageConfig, buckets: Iterable[BucketSpec], mesh: Mesh, rules: dict) -> None:
    """Raises UserError for a bucket whose rows do not divide into the stage's microbatches over the data shards of the mesh."""
    sizes = {axis: mesh.shape[axis] for axis in rules["batch"]}
    shards = math.prod(sizes.values())
    for bucket in buckets:
        if bucket.batch % (stage.accumulate * shards):
            raise UserError(f"stage {stage.name!r}: the {bucket.batch} rows of bucket {bucket.name!r} do not divide by {stage.accumulate} "
                            f"microbatches x {shards} data shards ({', '.join(f'{axis}={n}' for axis, n in sizes.items())}); change the "
                            f"bucket's batch, the stage's accumulate or the mesh")


def place_batch(batch: Batch, mesh: Mesh, rules: dict) -> Batch:
    """The rows that this process's devices hold (numpy, see `data_shards`) -> global arrays on the mesh."""
    held, count = data_shards(mesh, rules)
    size = len(jax.tree.leaves(batch)[0]) // len(held)  # rows a shard
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct((size * count, *np.shape(x)[1:]), np.asarray(x).dtype), batch)

    def place(x, struct, sharding):
        def shard(index: tuple[slice, ...]) -> np.ndarray:
            first = held.index((index[0].start or 0) // size) * size
            return np.asarray(x)[first:first + size]

        return jax.make_array_from_callback(struct.shape, sharding, shard)

    return jax.tree.map(place, batch, whole, batch_shardings(whole, mesh, rules))


class Meter:
    """Losses, rows, tokens and seconds between two log records.

    A step's metrics are read when the next step has been started, so that the device never waits for the host.
    """

    def __init__(self, stage: StageConfig, loader: Any, checkpoints: RunCheckpoints):
        self._stage, self._loader, self._checkpoints = stage, loader, checkpoints
        self._gathered, self._pending = Accumulator(), None
        self._begin()

    def _begin(self) -> None:
        self._start, self._rows, self._tokens, self._waited = time.perf_counter(), 0, 0, self._loader.waited

    def started(self, at: int, bucket: BucketSpec, samples: list[int], metrics: dict[str, jax.Array]) -> None:
        """Step `at` (from 0) is on the device."""
        self.settle()
        self._pending = (at, bucket.name, samples, metrics)
        self._rows += bucket.batch
        self._tokens += bucket.batch * bucket.tokens

    def settle(self) -> None:
        """Read what is not read yet. Raises UserError for a loss or gradient that is not finite, naming step and batch."""
        if self._pending is None:
            return
        (at, bucket, samples, metrics), self._pending = self._pending, None
        metrics = jax.device_get(metrics)
        if not metrics.pop("finite"):
            self._checkpoints.wait()
            raise UserError(f"stage {self._stage.name!r} step {at}: loss {float(metrics['loss'])} or gradient norm "
                            f"{float(metrics['gradient_norm'])} is not finite; bucket {bucket!r}, samples {samples}; "
                            f"the last good checkpoint is step {self._checkpoints.latest()}")
        self._gathered.add(metrics)

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What takes time in this block is no training: its seconds do not count."""
        self.settle()
        before = time.perf_counter()
        yield
        self._start += time.perf_counter() - before

    def take(self, step: int) -> dict[str, float | None]:
        """The record after `step` steps; `tokens` and `seconds` are those since the record before."""
        self.settle()
        seconds = time.perf_counter() - self._start
        values = {**self._gathered.take(), "learning_rate": learning_rate(self._stage, step - 1), "samples_a_second": self._rows / seconds,
                  "tokens_a_second": self._tokens / seconds, "tokens": self._tokens, "seconds": seconds,
                  "data_wait_share": (self._loader.waited - self._waited) / seconds}
        self._begin()
        return values


@dataclass(frozen=True)
class Hook:
    """What a run does with all its parameters (averages where kept) at the start of a stage, every so many steps and at its end.

    kind: where its seconds go, see train/goodput.py: KINDS. call(params, stage name, step) must not keep the parameters: the next step
    donates them.
    """

    kind: str
    every: int
    call: Callable[[Params, str, int], None]


def encoded_batches(plan: StagePlan, vae: Params, batches: Iterable, goodput: Goodput,
                    watchdog: Watchdog) -> Iterator[tuple[int, str, list[int], Batch]]:
    """(step, bucket name, the samples of this process's rows, batch with moments on the mesh)."""
    met: set[str] = set()
    for at, bucket, batch in goodput.waiting(batches):
        with contextlib.ExitStack() as aside:
            if bucket not in met:  # the encoder's program is compiled now, if no stage before has
                aside.enter_context(watchdog.paused())
                aside.enter_context(goodput.spend("compile"))
            encoded = plan.encode(vae, place_batch(batch, plan.mesh, plan.rules))
        met.add(bucket)
        yield at, bucket, np.asarray(batch.sample).tolist(), encoded


def run_stage(plan: StagePlan, params: Params, loader: Callable[[int], Iterable], checkpoints: RunCheckpoints, writer: MetricWriter,
              log: LogConfig, *, hooks: Sequence[Hook] = (), quiet: bool = False,
              say: Callable[[str], None] = print, goodput: Goodput | None = None) -> tuple[Params, Params]:
    """Train one stage to its end, going on from its last checkpoint; all parameters, and the same with averages where kept.

    params: see `start_state`; they are donated. loader(step) gives an iterable of (step, bucket name, Batch of the rows that this
    process's devices hold) with `waited` (seconds) and close(). On several processes call it on every one.
    Raises UserError when a loss or gradient is not finite, naming step and batch; Preempted after SIGTERM to any process.
    """
    stage, goodput = plan.stage, goodput or Goodput()
    state, frozen, tx = start_state(plan, params, checkpoints)
    step = int(state.step)

    def whole(average: bool = False) -> Params:
        return stages.merge(frozen, state.ema if average and state.ema else state.trainable)

    def due(every: int) -> bool:
        return step == stage.steps or bool(every) and step % every == 0

    if step >= stage.steps:
        return whole(), whole(average=True)
    with goodput.spend("compile"), compile_cache.told(stage.name, say):
        programs = plan.compiled_steps(tx, state, frozen, say)
    buckets = {bucket.name: bucket for bucket in plan.buckets}
    for hook in hooks if step == 0 else ():
        with goodput.spend(hook.kind):
            hook.call(whole(), stage.name, 0)
    with contextlib.closing(loader(step)) as batches, Stop(stage.name) as stop, Watchdog(60 * log.hang_minutes) as watchdog, \
            progress_bar(stage.steps, step, stage.name, quiet) as bar, goodput.spend("step"):
        meter = Meter(stage, batches, checkpoints)
        for at, bucket, samples, batch in encoded_batches(plan, frozen["vae"], batches, goodput, watchdog):
            state, metrics = programs[bucket](state, frozen, batch, np.float32(learning_rate(stage, at)))
            step = at + 1
            meter.started(at, buckets[bucket], samples, metrics)
            watchdog.beat()
            bar.update()
            stopping = stop.now()  # asked once a step: what comes later in it is the next step's
            if due(log.every):
                values = meter.take(step)
                writer.write(stage.name, step, values)
                bar.set_postfix(loss=f"{values['loss']:.4f}", refresh=False)
            if stopping or due(log.checkpoint_every):
                meter.settle()
                with goodput.spend("save"):
                    checkpoints.save(step, state, {"stage": stage.name, "step": step, "seed": plan.seed})
            if stopping:  # before a hook, which could outlast the time that is left
                with goodput.spend("save"):
                    checkpoints.wait()
            if stopping or due(log.every) or due(log.checkpoint_every):
                goodput.write(stage.name, step)
            if stopping:
                say(f"{stage.name}: stopped by SIGTERM, saved at step {step}")
                raise Preempted()
            for hook in (hook for hook in hooks if due(hook.every)):
                with meter.paused(), watchdog.paused(), goodput.spend(hook.kind):
                    hook.call(whole(average=True), stage.name, step)
            if step == stage.steps:
                break
        with goodput.spend("save"):
            checkpoints.wait()
    if stop.late:  # after the last question: the stage is saved, and what follows is the next start's
        say(f"{stage.name}: stopped by SIGTERM at its end, saved at step {step}")
        raise Preempted()
    return whole(), whole(average=True)
