"""Flow time, interpolation and target against the formulas, worked by hand or in float64 numpy."""
import jax
import jax.numpy as jnp
import numpy as np

from vino_jax.flow.path import interpolate, logit_normal, target_velocity, warp


def test_logit_normal_is_the_sigmoid_of_a_standard_normal():
    key = jax.random.key(3)
    u = logit_normal(key, (20_000,))
    assert u.dtype == jnp.float32 and float(u.min()) > 0.0 and float(u.max()) < 1.0
    logit = np.log(np.asarray(u, np.float64) / (1.0 - np.asarray(u, np.float64)))
    assert abs(logit.mean()) < 0.03 and abs(logit.std() - 1.0) < 0.03


def test_warp_keeps_the_ends_and_follows_each_rows_shift():
    assert np.allclose(warp(jnp.asarray([0.0, 1.0]), 7.0), [0.0, 1.0])
    assert np.allclose(warp(jnp.asarray(0.5), 5.0), 2.5 / 3.0)
    rows = warp(jnp.asarray([0.5, 0.5, 0.25]), jnp.asarray([1.0, 5.0, 7.0]))
    assert np.allclose(rows, [0.5, 2.5 / 3.0, 1.75 / 2.5])


def test_interpolate_goes_from_data_to_noise_by_rows():
    x0, noise = jnp.full((3, 2, 2), 4.0, jnp.bfloat16), jnp.full((3, 2, 2), -2.0)
    x = interpolate(x0, noise, jnp.asarray([0.0, 0.25, 1.0]))
    assert x.dtype == jnp.float32
    assert np.allclose(x[:, 0, 0], [4.0, 2.5, -2.0])
    assert np.allclose(interpolate(x0, noise, 0.5), 1.0)


def test_target_is_the_derivative_of_the_path():
    x0, noise = jnp.asarray([[1.0, 2.0]]), jnp.asarray([[0.5, -1.0]])
    derivative = jax.jvp(lambda t: interpolate(x0, noise, t), (jnp.asarray([0.3]),), (jnp.ones((1,)),))[1]
    assert np.allclose(target_velocity(x0, noise), derivative)
