"""The algebra of guidance: fixed points, the reference's formulas in numpy, scales by rows."""
import jax.numpy as jnp
import numpy as np
import pytest

from vino_jax.flow.guidance import guide


def _velocities(branches, rows=3):
    return np.random.default_rng(branches).standard_normal((branches, rows, 2, 4)).astype(np.float32)


def test_scale_one_gives_the_positive_branch():
    v = _velocities(2)
    assert np.allclose(guide(jnp.asarray(v), 1.0, 1.0), v[0], atol=1e-6)
    assert np.allclose(guide(jnp.asarray(v), 0.0, 9.0), v[1], atol=1e-6)


def test_three_branches_with_scales_one_give_the_positive_branch():
    v = _velocities(3)
    assert np.allclose(guide(jnp.asarray(v), 1.0, 1.0), v[0], atol=1e-6)


def test_scales_by_rows_follow_the_formula():
    v, text, image = _velocities(3), np.float32([5, 7, 1]), np.float32([3, 1, 2])
    positive, negative, without = v
    wanted = without + image[:, None, None] * (negative - without) + text[:, None, None] * (positive - negative)
    assert np.allclose(guide(jnp.asarray(v), jnp.asarray(text), jnp.asarray(image)), wanted, atol=1e-5)
    wanted = negative + text[:, None, None] * (positive - negative)
    assert np.allclose(guide(jnp.asarray(v[:2]), jnp.asarray(text), jnp.asarray(image)), wanted, atol=1e-5)


def test_another_number_of_branches_is_an_error():
    with pytest.raises(ValueError, match="2 or 3 branches"):
        guide(jnp.zeros((1, 2, 3)), 1.0, 1.0)
