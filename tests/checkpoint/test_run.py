"""Run checkpoints: bits, structure, another mesh, the last k, and steps that were not finished."""
import shutil
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vino_jax.checkpoint import storage
from vino_jax.checkpoint.run import RunCheckpoints, complete_steps, read_leaves
from vino_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclass
class State:
    """Dicts, dataclasses and optax's tuples in one tree, as in a run."""

    step: jax.Array
    trainable: dict
    opt_state: Any
    ema: dict


def mesh(*shape):
    return jax.make_mesh(shape, ("data", "fsdp"), axis_types=(jax.sharding.AxisType.Auto,) * 2)


def trained_state(steps=3):
    """A state whose moments, counters and average hold real values; one leaf is a stack without layers."""
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-2, weight_decay=0.1))
    params = {"block": {"kernel": jax.random.normal(jax.random.key(0), (16, 8)), "none": jnp.zeros((0, 4))},
              "half": jax.random.normal(jax.random.key(1), (8,), jnp.bfloat16)}
    state = State(jnp.zeros((), jnp.int32), params, tx.init(params), jax.tree.map(jnp.copy, params))
    for i in range(steps):
        grads = jax.tree.map(lambda p, i=i: (p * 0.3 + i).astype(p.dtype), state.trainable)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        state = State(state.step + 1, optax.apply_updates(state.trainable, updates), opt_state, state.ema)
    return state


def on_mesh(state, on):
    """Abstract state with every leaf of two dims cut over fsdp."""
    def place(leaf):
        return NamedSharding(on, PartitionSpec("fsdp") if leaf.ndim == 2 and leaf.size else PartitionSpec())
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place(leaf)), state)


def assert_same_bits(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b)):
        assert x.dtype == y.dtype and x.shape == y.shape
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_restores_structure_and_bits_on_another_mesh(tmp_path):
    state = trained_state()
    placed = jax.tree.map(lambda x, s: jax.device_put(x, s.sharding), state, on_mesh(state, mesh(2, 4)))
    meta = {"step": 3, "stage": "one", "seeds": [1, 2], "data": {"index": 7, "name": None}}
    with RunCheckpoints(tmp_path / "run", keep=2) as run:
        assert run.save(3, placed, meta)
    with RunCheckpoints(tmp_path / "run", keep=2) as run:
        target = on_mesh(state, mesh(1, 8))
        restored, found = run.restore(run.latest(), target)
    assert found == meta
    assert_same_bits(restored, state)
    assert isinstance(restored.opt_state[1][0], optax.ScaleByAdamState)
    assert restored.trainable["block"]["kernel"].sharding == target.trainable["block"]["kernel"].sharding


def test_keeps_the_last_k(tmp_path):
    state = trained_state(0)
    assert complete_steps(tmp_path / "absent") == []
    with RunCheckpoints(tmp_path, keep=2) as run:
        assert run.latest() is None
        assert [run.save(i, state, {"step": i}) for i in (2, 4, 6, 10)] == [True] * 4
        assert not run.save(10, state, {"step": 10})  # already there
        run.wait()
        assert run.steps() == [6, 10] and run.latest() == 10
    assert sorted(p.name for p in tmp_path.iterdir()) == ["10", "6"]
    (tmp_path / "12").mkdir()  # not complete
    assert complete_steps(tmp_path) == [6, 10]


def test_part_of_a_state_is_restored_alone(tmp_path):
    state = trained_state()
    with RunCheckpoints(tmp_path, keep=1) as run:
        run.save(3, state, {})
        run.wait()
        wanted = {"trainable": {"block": {"kernel": jax.ShapeDtypeStruct((16, 8), jnp.float32)}}}
        restored, _ = run.restore(3, wanted, partial=True)
        assert_same_bits(restored, {"trainable": {"block": {"kernel": state.trainable["block"]["kernel"]}}})
        with pytest.raises(UserError, match="it lacks trainable.more"):
            run.restore(3, {"trainable": {"more": wanted["trainable"]["block"]["kernel"]}}, partial=True)


def test_arrays_may_be_donated_while_they_are_saved(tmp_path):
    state = {"x": jnp.arange(400_000, dtype=jnp.float32)}
    before = np.array(state["x"])
    double = jax.jit(lambda s: jax.tree.map(lambda x: x * 2, s), donate_argnums=0)
    with RunCheckpoints(tmp_path, keep=1) as run:
        run.save(1, state, {})
        for _ in range(3):
            state = double(state)
        run.wait()
        restored, _ = run.restore(1, {"x": jax.ShapeDtypeStruct(before.shape, before.dtype)})
    np.testing.assert_array_equal(restored["x"], before)


@pytest.mark.parametrize("left_behind", ["writing", "deleting"])
def test_a_half_written_step_is_never_taken(tmp_path, left_behind):
    state = trained_state(0)
    with RunCheckpoints(tmp_path, keep=3) as run:
        run.save(1, state, {})
        run.save(2, state, {})
    if left_behind == "writing":  # a save that was killed: the folder has not got its name yet
        shutil.move(tmp_path / "2", tmp_path / "2.orbax-checkpoint-tmp")
        (tmp_path / "2.orbax-checkpoint-tmp" / "commit_success.txt").unlink(missing_ok=True)
    else:  # killed while an old step was removed
        (tmp_path / "2" / "_CHECKPOINT_METADATA").unlink()
        shutil.rmtree(tmp_path / "2" / "state" / "d", ignore_errors=True)
    with RunCheckpoints(tmp_path, keep=3) as run:
        assert run.latest() == 1
        assert run.save(2, state, {"again": True})
        run.wait()
        assert run.meta(2) == {"again": True}


@pytest.mark.parametrize("damage", ["cut off", "gone"])
def test_a_damaged_step_is_told(tmp_path, damage):
    state = {"kernel": jax.random.normal(jax.random.key(0), (64, 64)), "bias": jnp.ones(8)}
    with RunCheckpoints(tmp_path / "c", 2) as checkpoints:
        for step in (1, 2):
            checkpoints.save(step, state, {})
        checkpoints.wait()
        largest = max((file for file in (tmp_path / "c/2").rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)
        largest.write_bytes(largest.read_bytes()[:100]) if damage == "cut off" else largest.unlink()
        abstract = on_mesh(state, mesh(2, 2))
        with pytest.raises(UserError, match="step 2 of .*/c is damaged or incomplete; put it back, or, .*remove its folder"):
            checkpoints.restore(2, abstract)
        assert_same_bits(checkpoints.restore(1, abstract)[0], state)
    with pytest.raises(UserError, match="/c/2 is damaged or incomplete; a run removes its older steps"):
        list(read_leaves(tmp_path / "c", 2, ["kernel"]))
    with pytest.raises(UserError, match="/c/7 is damaged or incomplete"):
        list(read_leaves(tmp_path / "c", 7, ["kernel"]))


@pytest.mark.parametrize("method", ["save_checkpointables_async", "wait", "close"])
def test_a_full_disk_is_told(tmp_path, monkeypatch, method):
    def full(*_, **__):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing local file: No space left on device")

    checkpoints = RunCheckpoints(tmp_path / "c", 2)
    with monkeypatch.context() as patched, pytest.raises(UserError, match="^cannot write .*/c: No space left on device$"):
        patched.setattr(checkpoints._steps, method, full)
        checkpoints.save(1, {"x": jnp.ones(3)}, {})
        checkpoints.wait()
        checkpoints.close()
    checkpoints.close()


@pytest.mark.parametrize("context", [lambda: storage.writing("it"), lambda: storage.reading("it", "copy it again")])
@pytest.mark.parametrize("error, told", [
    (OSError(24, "Too many open files"), "it: Too many open files"), (PermissionError(13, "Permission denied"), "it: Permission denied"),
    (TimeoutError("after 600 s"), ""), (KeyError("a bug"), ""), (RuntimeError("RESOURCE_EXHAUSTED: Out of memory"), "")])
def test_only_what_the_disk_says_is_told(context, error, told):
    with pytest.raises(UserError if told else type(error)) as raised, context():
        raise error
    assert raised.value is error if not told else str(raised.value).endswith(told) and "damaged" not in str(raised.value)


def test_a_failed_save_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
    def fails(*_):
        raise KeyError("a bug")

    with pytest.raises(UserError, match="cannot read the image") as raised, RunCheckpoints(tmp_path / "c", 2) as checkpoints:
        monkeypatch.setattr(checkpoints, "close", fails)
        try:
            (tmp_path / "none").read_bytes()
        except OSError:
            raise UserError("cannot read the image") from None
    assert raised.value.__notes__ == ["and the last save failed: 'a bug'"]


def test_another_setup_is_refused_by_the_first_difference(tmp_path):
    state = {"a": jnp.zeros((2, 3)), "b": jnp.zeros(4)}
    with RunCheckpoints(tmp_path, keep=1) as run:
        run.save(1, state, {})
        run.wait()
        for other, message in [({"a": jnp.zeros((2, 4)), "b": jnp.zeros(4)}, r"a is float32\[2, 3\] there, float32\[2, 4\] here"),
                               ({"a": jnp.zeros((2, 3))}, "it holds b"), ({**state, "c": jnp.zeros(1)}, "it lacks c"),
                               ({**state, "b": jnp.zeros(4, jnp.bfloat16)}, "b is float32")]:
            with pytest.raises(UserError, match=message):
                run.restore(1, jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), other))
        with pytest.raises(UserError, match="no complete step 5"):
            run.restore(5, state)
        with pytest.raises(TypeError):
            run.save(2, state, {"x": object()})
    with pytest.raises(UserError, match="at least 1"):
        RunCheckpoints(tmp_path, keep=0)
