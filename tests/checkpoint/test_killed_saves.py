"""SIGKILL at any moment of a save: every step that has a complete one's name loads, with the values of that step alone."""
import multiprocessing
import time

import jax
import jax.numpy as jnp
import numpy as np

from tests.checkpoint import killed
from vino_jax.checkpoint.run import RunCheckpoints, complete_steps

KILLS = 20


def test_a_save_that_is_killed_is_never_taken_for_whole(tmp_path):
    """The saving processes are forked from one that has imported everything and has started no device."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.checkpoint.killed"])
    rng, cut, taken, last = np.random.default_rng(0), 0, [], 0
    for share in rng.permutation(np.arange(KILLS) / KILLS):  # of a save's time, at which its process is killed
        done = kill_one(context, tmp_path, share)
        assert done > last
        steps = complete_steps(tmp_path)
        cut += any(not (path.name.isdigit() and int(path.name) in steps) for path in tmp_path.iterdir())
        taken.append(steps[-1] > done)  # the save that was killed had come to its end
        last = check(tmp_path, steps)
        assert last in (done, done + 1)
    assert cut >= KILLS / 4, f"only {cut} kills cut a save"
    assert not all(taken)


def kill_one(context, folder, share):
    """The last step that was saved before the kill. The first save warms up, the second says how long one takes, the third is killed."""
    ours, theirs = context.Pipe()
    process = context.Process(target=killed.save_forever, args=(folder, theirs))
    process.start()
    met = [(ours.recv(), time.perf_counter()) for _ in range(6)]  # open, begin, done, begin, done, begin
    assert [what for (what, _), _ in met] == ["open", "begin", "done", "begin", "done", "begin"]
    time.sleep(share * (met[4][1] - met[3][1]))
    process.kill()
    process.join()
    seen = met[4][0][1]
    while ours.poll():
        try:
            what, step = ours.recv()
        except EOFError:
            break
        seen = step if what == "done" else seen
    return seen


def check(folder, steps):
    """The newest step, after a new run has opened the folder and read all of them."""
    abstract = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in killed.SHAPES.items()}
    with RunCheckpoints(folder, keep=2) as run:
        assert run.steps() == steps and steps
        for step in steps:
            state, meta = run.restore(step, abstract)
            assert meta == {"step": step}
            for name, values in state.items():
                np.testing.assert_array_equal(values, np.full(killed.SHAPES[name], step, np.float32))
        assert sorted(int(path.name) for path in folder.iterdir()) == steps
    return steps[-1]
