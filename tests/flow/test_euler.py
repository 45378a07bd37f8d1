"""Euler's method against closed forms: a constant field exactly, a linear one by its product of factors and its limit."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vino_jax.flow.euler import integrate, schedule


def test_schedule_is_the_warped_linspace_of_each_row():
    times = np.asarray(schedule(4, jnp.asarray([1.0, 5.0])))
    t = np.linspace(1.0, 0.0, 5)
    assert times.shape == (5, 2)
    assert np.allclose(times[:, 0], t) and np.allclose(times[:, 1], 5 * t / (1 + 4 * t))
    with pytest.raises(ValueError, match="at least 1 step"):
        schedule(0, jnp.asarray([1.0]))


def test_a_straight_path_is_followed_exactly():
    x0, noise = jnp.asarray([[1.0, -2.0], [0.5, 3.0]]), jnp.asarray([[0.0, 1.0], [2.0, 2.0]])
    x = integrate(lambda x, t: noise - x0, noise, schedule(3, jnp.asarray([5.0, 7.0])))
    assert np.allclose(x, x0, atol=1e-6)


def test_a_linear_field_gives_the_product_of_its_factors_and_the_exponential_in_the_limit():
    rate, noise = jnp.asarray([[0.7], [-1.3]]), jnp.asarray([[2.0], [1.0]])  # dx/dt = rate x has x(0) = x(1) exp(-rate)
    solve = jax.jit(lambda steps: integrate(lambda x, t: rate * x, noise, schedule(steps, jnp.asarray([1.0, 5.0]))), static_argnums=0)
    times = np.asarray(schedule(8, jnp.asarray([1.0, 5.0])), np.float64)
    factors = np.prod(1.0 - (times[:-1] - times[1:]) * np.asarray(rate)[:, 0], axis=0)
    assert np.allclose(solve(8)[:, 0], np.asarray(noise)[:, 0] * factors, rtol=1e-5)
    assert np.allclose(solve(4000), noise * jnp.exp(-rate), rtol=2e-3)


def test_the_field_sees_each_rows_own_time():
    seen = integrate(lambda x, t: t[:, None], jnp.zeros((2, 1)), schedule(2, jnp.asarray([1.0, 3.0])))
    middle = 1.5 / 2.0  # warp(0.5, 3)
    assert np.allclose(seen[:, 0], [-(0.5 * 1.0 + 0.5 * 0.5), -((1 - middle) * 1.0 + middle * middle)], atol=1e-6)
