"""Step caching on a velocity that can be followed by hand."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vino_jax.flow.euler import integrate, schedule
from vino_jax.models.mmdit import run_blocks
from vino_jax.sampling.step_cache import integrate_cached

TIMES = np.asarray(schedule(7, jnp.ones(1)))
START = np.linspace(0.5, 1.5, 6, dtype=np.float32).reshape(1, 6)


def velocity(x, t_B, through=run_blocks):
    """Of two passes, whose blocks add what depends on time, on the tokens and on the pass."""
    passes = [through(jnp.repeat(x[..., None], 3, axis=-1), lambda tokens, i=i: tokens + jnp.sin((i + 3) * t_B)[:, None, None] * tokens)
              for i in range(2)]
    return 2.0 * passes[0].mean(axis=-1) - passes[1].mean(axis=-1)


def by_hand(every):
    """(x at the end, the largest relative change of what is added between steps that compute it)."""
    x, kept, changes = START, None, []
    for i in range(len(TIMES) - 1):
        now = [np.sin((p + 3) * TIMES[i])[:, None] * x for p in range(2)]
        if i % every == 0:
            if kept is not None:
                changes += [np.linalg.norm(new - old) / np.linalg.norm(new) for new, old in zip(now, kept)]
            kept = now
        x = x - (TIMES[i] - TIMES[i + 1]) * (2.0 * (x + kept[0]) - (x + kept[1]))
    return x, max(changes, default=0.0)


@pytest.mark.parametrize("every", [2, 3, 7])
def test_blocks_run_in_every_nth_step(every):
    x, change = jax.jit(lambda x: integrate_cached(velocity, every, x, jnp.asarray(TIMES), 0, 7))(START)
    expected, largest = by_hand(every)
    np.testing.assert_allclose(x, expected, rtol=1e-5)
    assert float(change) == pytest.approx(largest, rel=1e-5)


def test_in_every_step_it_is_the_loop_without():
    x, _ = integrate_cached(velocity, 1, jnp.asarray(START), jnp.asarray(TIMES), 0, 7)
    np.testing.assert_allclose(x, integrate(velocity, jnp.asarray(START), jnp.asarray(TIMES)), rtol=1e-5)


def test_blocks_do_not_run_where_they_are_not_asked():
    program = jax.make_jaxpr(lambda x: integrate_cached(velocity, 3, x, jnp.asarray(TIMES), 0, 7))(START)
    (loop,) = (e for e in program.eqns if e.primitive.name in ("scan", "while"))
    inner = loop.params["jaxpr"] if "jaxpr" in loop.params else loop.params["body_jaxpr"]
    conditions = [e for e in inner.jaxpr.eqns if e.primitive.name == "cond"]
    assert len(conditions) == 2  # one a pass
    assert all(any(e.primitive.name == "sin" for e in branch.jaxpr.eqns) != any(e.primitive.name == "sin" for e in other.jaxpr.eqns)
               for branch, other in (e.params["branches"] for e in conditions))
