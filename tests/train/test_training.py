"""Training: the same on every mesh, resumed as never killed, stopped by a NaN, true to its stage table."""
import json
import math
import os
import signal
from types import SimpleNamespace

import jax
import numpy as np
import optax
import pytest

from tests import tolerances
from tests.train import tiny
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.errors import UserError
from vino_jax.nn.module import by_path
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import LogConfig
from vino_jax.train.initial import param_structs
from vino_jax.train.logging import MetricWriter
from vino_jax.train.loop import Hook, Meter, check_batches, run_stage
from vino_jax.train.optim import optimizer
from vino_jax.train.preemption import Preempted
from vino_jax.train.stage import rates, split
from vino_jax.train.state import new_state
from vino_jax.train.step import make_train_step

ONE = {"data": 1}
MESHES = {
    "replicated": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_seq": {"fsdp": 2, "seq": 2, "tensor": 2},
    "fsdp_all": {"data": 2, "fsdp": 2, "seq": 2},
}


def run(folder, *, mesh=None, name="fsdp", steps=4, stage=None, loader=tiny.Batches, hooks=(), **log):
    """(all parameters, averages, losses by step) of a stage run or gone on with in `folder`."""
    model = tiny.vino()
    sizes = mesh or {"fsdp": 2}
    mesh = make_mesh(sizes, jax.devices()[:math.prod(sizes.values())])
    plan = tiny.plan(model, stage or tiny.stage(steps), mesh, preset(name))
    log = LogConfig(**{"every": 1, "checkpoint_every": 2, **log})
    with RunCheckpoints(folder / "checkpoints", keep=2) as checkpoints:
        resume_at = {plan.stage.name: checkpoints.latest() or 0}
        with MetricWriter(folder, {plan.stage.name: plan.stage.steps}, resume_at=resume_at) as writer:
            out, average = run_stage(plan, tiny.params(model), loader, checkpoints, writer, log, quiet=True, hooks=hooks,
                                     say=lambda text: None)
    losses = {r["step"]: r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    return jax.device_get(out), jax.device_get(average), losses


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), mesh=ONE, steps=20, checkpoint_every=20)


# With "seq" a pass of 8 rows gives each device rows of its own, one of 2 rows (four microbatches) has devices share them.
@pytest.mark.parametrize("name, accumulate", [*((name, 1) for name in MESHES), ("fsdp_seq", 4)])
def test_eight_devices_give_the_loss_curve_of_one(name, accumulate, one_device, tmp_path):
    _, _, losses = run(tmp_path, mesh=MESHES[name], name=name, stage=tiny.stage(20, accumulate=accumulate), checkpoint_every=20)
    assert len(losses) == 20
    worst = max(abs(losses[step] - one_device[2][step]) for step in range(1, 21))
    assert worst < tolerances.MESH_LOSS_ABS, worst


def test_the_loss_falls(one_device):
    losses = one_device[2]
    first, last = (np.mean([losses[step] for step in steps]) for steps in (range(1, 6), range(16, 21)))
    assert last < 0.9 * first, (first, last)


def test_only_the_stage_s_parameters_move(tmp_path):
    before = by_path(tiny.params(tiny.vino()))
    after, average, _ = run(tmp_path, stage=tiny.stage(4, rules="stage1"))
    moved = {path.split("/")[0] for path, leaf in by_path(after).items() if not np.array_equal(leaf, before[path])}
    assert moved == {"connector"}
    assert not np.array_equal(by_path(average)["connector/up/kernel"], by_path(after)["connector/up/kernel"])  # the average lags behind


def test_resumed_is_never_killed_to_the_bit(tmp_path):
    """A run that stops at step 2 of 4 (its loader fails) and is started again equals the run that never stopped."""
    whole, whole_average, losses = run(tmp_path / "whole")

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", loader=tiny.Dies)
    again, again_average, curve = run(tmp_path / "killed")
    assert curve == losses
    for ours, theirs in ((again, whole), (again_average, whole_average)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_nan_stops_the_run_and_names_step_and_batch(tmp_path):
    with pytest.raises(UserError, match=r"step 3: loss nan.*bucket 'edit', samples \[0, 1.*last good checkpoint is step 2"):
        run(tmp_path, loader=lambda start: tiny.Batches(start, spoil=3))
    params, _, _ = run(tmp_path)  # what was saved is finite, and the run can go on from it
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_microbatches_give_the_gradient_of_the_whole_batch():
    model = tiny.vino()
    params, batch = tiny.params(model), tiny.BUCKET.fake(0, moments=8, vocab=800)
    batch = batch.replace(weight=np.linspace(0.2, 2.0, tiny.BUCKET.batch, dtype=np.float32))

    def step(accumulate):
        """Gradient (descent at rate 1 moves by it) and metrics."""
        stage, tx = tiny.stage(accumulate=accumulate), optax.sgd(1.0)
        trainable, frozen = split(params, rates(stage, params))
        state = new_state(trainable, tx, jax.random.key_data(jax.random.key(7)), ema=False)
        after, metrics = jax.jit(make_train_step(model, stage, tx))(state, frozen, batch, 1.0)
        return jax.tree.map(np.subtract, trainable, jax.device_get(after.trainable)), jax.device_get(metrics)

    (whole, told), (parts, told_parts) = step(1), step(2)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(whole))
    worst = max(jax.tree.leaves(jax.tree.map(lambda a, b: np.abs(a - b).max(), whole, parts)))
    assert worst < tolerances.GRADIENT_REL * largest and largest > 1e-3
    for name in ("loss", "gradient_norm", "bin_loss", "task_loss"):
        np.testing.assert_allclose(told[name], told_parts[name], rtol=tolerances.GRADIENT_REL)


def test_a_schedule_is_no_part_of_a_step_s_program():
    """So that a run with other steps or rates finds its programs in the compile cache."""
    model = tiny.vino()
    plans = [tiny.plan(model, tiny.stage(**schedule), make_mesh(ONE, jax.devices()[:1]), preset("fsdp"))
             for schedule in ({}, {"steps": 9, "learning_rate": 0.5, "warmup_steps": 0, "decay_steps": 3})]
    assert len({jax.jit(step).lower(*arguments).as_text() for step, arguments in map(step_and_arguments, plans)}) == 1


def step_and_arguments(plan):
    found = rates(plan.stage, plan.vino.abstract)
    trainable, frozen = split(plan.vino.abstract, found)
    tx = optimizer(plan.stage, found)
    rng = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0)))
    state = jax.eval_shape(lambda p, r: new_state(p, tx, r, ema=True), trainable, rng)
    return make_train_step(plan.vino, plan.stage, tx), (state, frozen, tiny.BUCKET.spec(8), jax.ShapeDtypeStruct((), np.float32))


def test_a_bucket_s_remat_policy_is_that_of_its_program():
    model, mesh, rules = tiny.vino(), make_mesh(ONE, jax.devices()[:1]), preset("fsdp")

    def products(policy):
        plan = tiny.plan(model, tiny.stage(remat={tiny.BUCKET.name: policy}), mesh, rules)
        structs = param_structs(model, [plan.stage], mesh, rules)
        return plan.lowered(tiny.BUCKET, *plan.abstract(structs)).as_text().count("stablehlo.dot_general")

    assert products("nothing") < products("save_attention") < products("full") == products(model.runtime.remat)


def test_hooks_come_at_the_start_by_their_cadence_and_at_the_end(tmp_path):
    seen = []
    hooks = [Hook(kind, every, lambda params, stage, step, kind=kind: seen.append((kind, stage, step, set(params) == set(tiny.vino().parts))))
             for kind, every in (("preview", 2), ("evaluate", 3))]
    run(tmp_path, steps=5, hooks=hooks)
    assert [entry for entry in seen if entry[0] == "preview"] == [("preview", "stage", step, True) for step in (0, 2, 4, 5)]
    assert [entry for entry in seen if entry[0] == "evaluate"] == [("evaluate", "stage", step, True) for step in (0, 3, 5)]


def test_cadences_of_0_leave_the_end(tmp_path):
    _, _, losses = run(tmp_path, steps=3, every=0, checkpoint_every=0)
    assert list(losses) == [3]
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


def test_sigterm_saves_before_a_preview_that_is_due(tmp_path):
    class Stopped(tiny.Batches):
        def __next__(self):
            step, name, batch = super().__next__()
            if step == 2:
                os.kill(os.getpid(), signal.SIGTERM)
            return step, name, batch

    seen = []
    with pytest.raises(Preempted):
        run(tmp_path, loader=Stopped, hooks=[Hook("preview", 1, lambda params, stage, step: seen.append(step))], checkpoint_every=0)
    assert seen == [0, 1, 2]
    with RunCheckpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest() == 3


def test_sigterm_in_a_stage_s_last_preview_ends_the_run_once_it_is_saved(tmp_path):
    def preview(params, stage, step):
        if step == 4:
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(Preempted):
        run(tmp_path, hooks=[Hook("preview", 4, preview)], checkpoint_every=0)
    with RunCheckpoints(tmp_path / "checkpoints", keep=2) as checkpoints:
        assert checkpoints.latest() == 4
    run(tmp_path, hooks=[Hook("preview", 4, lambda *_: pytest.fail("the stage is done"))])


def test_the_time_of_previews_does_not_count(monkeypatch):
    clock = SimpleNamespace(now=0.0, perf_counter=lambda: clock.now)
    monkeypatch.setattr("vino_jax.train.loop.time", clock)
    loader = SimpleNamespace(waited=3.0)
    meter = Meter(tiny.stage(), loader, None)
    metrics = {"loss": 2.0, "gradient_norm": 1.0, "finite": True, **{f"{kind}_{what}": np.ones(8) for kind in ("bin", "task")
                                                                     for what in ("loss", "weight")}}
    for step in (0, 1):
        clock.now += 2.0
        meter.started(step, tiny.BUCKET, [step], dict(metrics))
        with meter.paused():
            clock.now += 100.0
    loader.waited += 1.0
    record = meter.take(2)
    assert (record["seconds"], record["samples_a_second"], record["data_wait_share"], record["loss"]) == (4.0, 4.0, 0.25, 2.0)
    assert record["tokens"] == 16 * (tiny.BUCKET.target_tokens + tiny.BUCKET.reference_tokens + tiny.BUCKET.prompt_tokens)
    clock.now += 1.0
    meter.started(2, tiny.BUCKET, [2], dict(metrics))
    assert meter.take(3)["samples_a_second"] == 8.0


@pytest.mark.parametrize("accumulate,sizes,fits", [(1, {"data": 8}, True), (2, {"data": 2, "fsdp": 2, "tensor": 2}, True),
                                                   (2, {"data": 8}, False), (4, {"data": 2, "fsdp": 2, "seq": 2}, False)])
def test_microbatches_must_divide_over_the_data_shards(accumulate, sizes, fits):
    check = (tiny.stage(accumulate=accumulate), [tiny.BUCKET], make_mesh(sizes), preset("fsdp"))
    if fits:
        check_batches(*check)
    else:
        with pytest.raises(UserError, match=f"the 8 rows of bucket 'edit' do not divide by {accumulate} microbatches x"):
            check_batches(*check)
