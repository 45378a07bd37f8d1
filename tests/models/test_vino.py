"""What ties the parts together."""
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tests.train import tiny


def test_posterior_noise_differs_between_rows_and_between_all_references():
    vino = tiny.vino()
    unit = lambda *shape: jnp.zeros((2, *shape, 2 * vino.config.vae.latent_channels))  # noqa: E731  mean 0, variance 1
    batch = SimpleNamespace(images=unit(2, 4, 4), video=unit(2, 4, 4))
    pool_BKP = np.asarray(vino.pool(batch, jax.random.split(jax.random.key(0), 2)))
    latents = pool_BKP.reshape(2 * 4, -1)  # of two rows: two images, then a clip of two latent frames
    assert np.abs(latents.std() - vino.config.vae.scaling_factor) < 0.1 * vino.config.vae.scaling_factor
    correlation = np.corrcoef(latents) - np.eye(len(latents))
    assert np.abs(correlation).max() < 0.6, correlation.round(2)
    np.testing.assert_array_equal(vino.pool(batch, None), np.zeros_like(pool_BKP))
