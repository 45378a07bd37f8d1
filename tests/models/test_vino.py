"""What ties the parts together."""
import dataclasses
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np

from tests.train import tiny
from vino_jax.batch import ROLE_MARKER, ROLE_PAD
from vino_jax.models.vino import Conditioning, Vino


def test_fresh_parameters_are_drawn_in_the_shapes_that_a_model_names():
    model = tiny.vino()
    assert jax.eval_shape(lambda: model.init(jax.random.key(0))) == model.abstract
    assert np.std(model.init(jax.random.key(0), ("connector",))["connector"]["up"]["kernel"]) > 0


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


def test_without_boundary_tokens_their_places_are_padding():
    """The experiment's switch gives what a batch without them gives."""
    whole = tiny.vino()
    without = Vino(dataclasses.replace(whole.config, boundary_tokens=False), whole.runtime)
    params, batch, rng = tiny.params(whole), tiny.BUCKET.fake(3, moments=8, vocab=800), np.random.default_rng(1)
    rows, length = batch.tokens.shape
    width = whole.abstract["connector"]["down"]["kernel"].shape[1]
    context = rng.standard_normal((rows, length, width), np.float32)
    markers = rng.standard_normal((rows, length, whole.config.mmdit.width), np.float32)
    conditioning = Conditioning(context, jnp.asarray(batch.prompt_mask), markers)
    noisy, time = np.asarray(whole.latents(batch.target, None)), jnp.full((rows,), 0.5)

    def velocity(vino, batch):
        return np.asarray(vino.velocity(params, noisy, time, vino.pool(batch, None), batch, conditioning))

    padded = batch.replace(role=np.where(batch.role == ROLE_MARKER, ROLE_PAD, batch.role))
    assert (batch.role == ROLE_MARKER).any()
    np.testing.assert_array_equal(velocity(without, batch), velocity(whole, padded))
    assert np.abs(velocity(without, batch) - velocity(whole, batch)).max() > 1e-4
