"""Optimizers that remember less: how much, how well, where it lies, and the same after a resume."""
import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests import tolerances
from tests.train import tiny
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.nn.module import by_path
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset
from vino_jax.train.config import LogConfig
from vino_jax.train.logging import MetricWriter
from vino_jax.train.loop import run_stage
from vino_jax.train.optim import OPTIMIZERS, optimizer, stochastic_bf16
from vino_jax.train.stage import rates, split
from vino_jax.train.state import new_state, state_shardings

SMALL = [name for name in OPTIMIZERS if name != "adamw"]
# bytes of moments that a parameter costs
BYTES = {
    "adamw": lambda path, shape: 8 * np.prod(shape),
    "adamw_bf16": lambda path, shape: 4 * np.prod(shape),
    "adafactor": lambda path, shape: 4 * (np.prod(shape[:-1]) + np.prod(shape[:-2]) * shape[-1] if path.endswith("kernel") else np.prod(shape) + 1),
}


def stage(name, **entries):
    return dataclasses.replace(tiny.stage(**entries), optimizer=name)


def parts(name):
    """The state of tiny's stage in the abstract, its transformation, the paths that train."""
    model, entry = tiny.vino(), stage(name)
    found = rates(entry, model.abstract)
    tx, trainable = optimizer(entry, found), split(model.abstract, found)[0]
    state = jax.eval_shape(lambda p: new_state(p, tx, jax.random.key_data(jax.random.key(0)), ema=False), trainable)
    return model, found, tx, trainable, state


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_moments_take_the_bytes_that_they_should(name):
    *_, trainable, state = parts(name)
    moments = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim)
    assert moments == sum(BYTES[name](path, leaf.shape) for path, leaf in by_path(trainable).items())


@pytest.mark.parametrize("name", SMALL)
def test_moments_lie_as_their_parameters(name):
    model, found, tx, _, state = parts(name)
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    placed = split(shardings(model.abstract, model.axes, mesh, preset("fsdp")), found)[0]
    where = state_shardings(state, placed, tx, mesh).opt_state
    leaves, spread = jax.tree.leaves_with_path(state.opt_state), jax.tree.leaves(where)
    assert len(leaves) == len(spread)
    specs = {jax.tree_util.keystr(path): (leaf.shape, tuple(place.spec)) for (path, leaf), place in zip(leaves, spread)}
    kernel = {key: spec for key, spec in specs.items() if "['double']['visual']['mlp']['up']['kernel']" in key}
    wanted = {"adamw_bf16": [(None, "fsdp", "tensor")] * 2, "adafactor": [(None, "fsdp", None), (None, None, "tensor")]}[name]
    assert [spec for _, spec in kernel.values()] == wanted
    assert all(size % 2 == 0 for shape, spec in specs.values() for size, axis in zip(shape, spec) if axis)


def test_rounding_is_right_on_average():
    values = jnp.asarray([1.0 + 2.0**-10, -3.0 - 2.0**-9, 1e-20, 0.7, 1.5, 0.0, -2.0], jnp.float32)
    bits = jax.random.bits(jax.random.key(1), (1 << 16, values.size))
    drawn = np.asarray(jax.vmap(lambda b: stochastic_bf16(values, b))(bits).astype(jnp.float32), np.float64)
    step = np.abs(np.asarray(values)) * 2.0**-7
    assert (np.abs(drawn - values) <= step).all()
    np.testing.assert_array_less(np.abs(drawn.mean(0) - values), 5 * step / 2 / np.sqrt(1 << 16) + 1e-30)
    assert (drawn[:, 4:] == np.asarray(values)[4:]).all()  # what bfloat16 holds stays
    nearest = np.asarray(values.astype(jnp.bfloat16).astype(jnp.float32))
    assert (np.abs(nearest - values)[:2] > 50 * np.abs(drawn.mean(0) - values)[:2]).all()


def test_moments_move_where_rounding_to_the_nearest_would_leave_them():
    """The second moment of gradients that grow from 1 to 1.5: each step moves it by a thousandth of the distance."""
    entry = stage("adamw_bf16", b2=0.999)
    whole, small = (OPTIMIZERS[name](entry) for name in ("adamw", "adamw_bf16"))
    params = {"kernel": jnp.zeros((64, 64))}

    def nu(tx, cast):
        state = tx.init(params)._replace(nu={"kernel": jnp.ones((64, 64), tx.init(params).nu["kernel"].dtype)})

        def step(state, _):
            new = tx.update({"kernel": jnp.full((64, 64), 1.5)}, state)[1]
            return cast(new), None

        return jnp.mean(jax.lax.scan(step, state, None, 500)[0].nu["kernel"].astype(jnp.float32))

    exact, ours = nu(whole, lambda s: s), nu(small, lambda s: s)
    nearest = nu(whole, lambda s: s._replace(nu=jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), s.nu)))
    assert exact > 1.4 and abs(ours - exact) < 0.01 and abs(nearest - exact) > 0.4


@pytest.mark.parametrize("name", SMALL)
def test_a_map_is_learned_as_well_as_by_adamw(name):
    rng = np.random.default_rng(0)
    x, wanted = rng.standard_normal((256, 16)).astype(np.float32), rng.standard_normal((16, 8)).astype(np.float32)
    loss = lambda p: jnp.mean(jnp.square(x @ p["kernel"] + p["bias"] - x @ wanted - 1.0))  # noqa: E731

    def learned(name):
        tx, params = optimizer(stage(name), {"kernel": 1.0, "bias": 1.0}), {"kernel": jnp.zeros((16, 8)), "bias": jnp.zeros((8,))}

        def step(carry, rate):
            updates, state = tx.update(jax.grad(loss)(carry[0]), carry[1], carry[0])
            return (jax.tree.map(lambda p, u: p + rate * u, carry[0], updates), state), None

        return loss(jax.lax.scan(step, (params, tx.init(params)), jnp.linspace(0.05, 0.0, 300))[0][0])

    assert learned(name) < max(2 * learned("adamw"), 1e-3)


def run(folder, name, loader=tiny.Batches, steps=6):
    model = tiny.vino()
    mesh = make_mesh({"fsdp": 2}, jax.devices()[:2])
    plan = tiny.plan(model, stage(name, steps=steps, learning_rate=3e-3), mesh, preset("fsdp"))
    with RunCheckpoints(folder / "checkpoints", keep=1) as checkpoints:
        with MetricWriter(folder, {"stage": steps}, resume_at={"stage": checkpoints.latest() or 0}) as writer:
            out, _ = run_stage(plan, tiny.params(model), loader, checkpoints, writer, LogConfig(every=1, checkpoint_every=2), quiet=True,
                               say=lambda text: None)
    return by_path(jax.device_get(out)), [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def adamw(tmp_path_factory):
    return run(tmp_path_factory.mktemp("adamw"), "adamw")[1]


@pytest.mark.parametrize("name", SMALL)
def test_losses_are_near_those_of_adamw_and_a_resumed_run_is_the_unbroken_one(name, adamw, tmp_path):
    whole, losses = run(tmp_path / "whole", name)
    if name == "adamw_bf16":
        np.testing.assert_allclose(losses, adamw, rtol=tolerances.BF16_MOMENTS_LOSS_REL)
    assert losses != adamw and losses[-1] < 0.9 * losses[0]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", name, tiny.Dies)
    again, curve = run(tmp_path / "killed", name)
    assert curve == losses
    for path, leaf in whole.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
