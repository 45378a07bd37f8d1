"""Training: the same on every mesh, resumed as never killed, stopped by a NaN, true to its stage table."""
import json
import math

import jax
import numpy as np
import pytest

from tests import tolerances
from tests.train import tiny
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.errors import UserError
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import LogConfig
from vino_jax.train.logging import MetricWriter
from vino_jax.train.loop import run_stage
from vino_jax.train.stage import by_path

ONE = {"data": 1}
MESHES = {
    "replicated": {"data": 8},
    "fsdp": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp_seq": {"fsdp": 2, "seq": 2, "tensor": 2},
}


def run(folder, *, mesh=None, name="fsdp", steps=4, stage=None, loader=tiny.Batches, preview=None, save_every=2):
    """(all parameters, averages, losses by step) of a stage run or gone on with in `folder`."""
    model = tiny.vino()
    sizes = mesh or {"fsdp": 2}
    mesh = make_mesh(sizes, jax.devices()[:math.prod(sizes.values())])
    plan = tiny.plan(model, stage or tiny.stage(steps), mesh, preset(name))
    checkpoints = RunCheckpoints(folder / "checkpoints", keep=2, every=save_every)
    resume = checkpoints.latest() or 0
    writer = MetricWriter(folder, resume_at={plan.stage.name: resume})
    try:
        log = LogConfig(every=1, checkpoint_every=save_every)
        out, average = run_stage(plan, tiny.params(model), loader, checkpoints, writer, log, quiet=True, preview=preview, say=lambda text: None)
    finally:
        checkpoints.close()
        writer.close()
    losses = {r["step"]: r["loss"] for r in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())}
    return jax.device_get(out), jax.device_get(average), losses


@pytest.fixture(scope="module")
def one_device(tmp_path_factory):
    return run(tmp_path_factory.mktemp("one"), mesh=ONE, steps=20, save_every=20)


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_the_loss_curve_of_one(name, one_device, tmp_path):
    _, _, losses = run(tmp_path, mesh=MESHES[name], name=name, steps=20, save_every=20)
    assert len(losses) == 20
    worst = max(abs(losses[step] - one_device[2][step]) for step in range(1, 21))
    assert worst < tolerances.MESH_LOSS_ABS, worst


def test_the_loss_falls_and_only_the_stage_s_parameters_move(tmp_path):
    model = tiny.vino()
    before = by_path(tiny.params(model))
    after, average, losses = run(tmp_path, steps=4, stage=tiny.stage(4, rules="stage1"))
    moved = {path.split("/")[0] for path, leaf in by_path(after).items() if not np.array_equal(leaf, before[path])}
    assert moved == {"connector"}
    assert not np.array_equal(by_path(average)["connector/up/kernel"], by_path(after)["connector/up/kernel"])  # the average lags behind


def test_resumed_is_never_killed_to_the_bit(tmp_path):
    """A run that stops at step 2 of 4 (its loader fails) and is started again equals the run that never stopped."""
    whole, whole_average, losses = run(tmp_path / "whole")

    class Dies(tiny.Batches):
        def __next__(self):
            step, name, batch = super().__next__()
            if step == 3:
                raise RuntimeError("killed")
            return step, name, batch

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", loader=Dies)
    again, again_average, curve = run(tmp_path / "killed")
    assert curve == losses
    for ours, theirs in ((again, whole), (again_average, whole_average)):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def test_a_nan_stops_the_run_and_names_step_and_batch(tmp_path):
    with pytest.raises(UserError, match=r"step 3: loss nan.*bucket 'edit', samples \[0, 1.*last good checkpoint is step 2"):
        run(tmp_path, loader=lambda start: tiny.Batches(start, spoil=3))
    params, _, _ = run(tmp_path)  # what was saved is finite, and the run can go on from it
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))


def test_microbatches_give_the_gradient_of_the_whole_batch(tmp_path):
    whole, _, losses = run(tmp_path / "whole", steps=2)
    parts, _, split_losses = run(tmp_path / "parts", steps=2, stage=tiny.stage(2, accumulate=2))
    assert max(abs(losses[s] - split_losses[s]) for s in losses) < tolerances.MESH_LOSS_ABS
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), whole["connector"], parts["connector"])


def test_previews_come_at_the_start_and_at_the_end(tmp_path):
    seen = []
    run(tmp_path, steps=2, preview=lambda params, stage, step: seen.append((stage, step, set(params) == set(tiny.vino().parts))))
    assert seen == [("stage", 0, True)]
