"""The process that test_killed_saves kills: it saves one step after another and says so."""
from vino_jax.checkpoint.run import RunCheckpoints

SHAPES = {"large": (1 << 20,), "table": (64, 1024), "number": ()}


def state(step):
    """Every value is the step's number."""
    import jax.numpy as jnp

    return {name: jnp.full(shape, step, jnp.float32) for name, shape in SHAPES.items()}


def save_forever(folder, told):
    with RunCheckpoints(folder, keep=2) as run:
        step = run.latest() or 0
        told.send(("open", step))
        while True:
            step += 1
            values = state(step)
            told.send(("begin", step))
            run.save(step, values, {"step": step})
            run.wait()
            told.send(("done", step))
