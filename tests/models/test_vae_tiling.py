"""Tiled VAE: the numbers of diffusers' tiling, no seams on a smooth picture, bad sizes refused."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity.test_vae import CONFIG, channels_first, channels_last, converted, definition, diffusers_vae, draw
from tests.tolerances import PARITY_ABS, TILING_GREY
from vino_jax.errors import UserError
from vino_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled

TILING = Tiling(frames=8, frame_stride=4, side=32, stride=16)


@pytest.fixture(scope="module")
def vae():
    """(diffusers' VAE with tiling on, the same weights as our tree)."""
    reference = diffusers_vae(CONFIG)
    reference.enable_tiling(TILING.side, TILING.side, TILING.frames, TILING.stride, TILING.stride, TILING.frame_stride)
    return reference, converted(reference, CONFIG)


def jitted(function, tiling):
    return jax.jit(lambda p, x: function(definition(CONFIG)(p), x, tiling))


def reference_encode(reference, pixels):
    with torch.no_grad():
        posterior = reference.encode(channels_first(pixels)).latent_dist
    return np.concatenate([channels_last(posterior.mean), channels_last(posterior.logvar)], -1)


@pytest.mark.parametrize("shape", [(1, 13, 16, 48, 3), (2, 1, 40, 48, 3)])  # frames and columns; rows and columns
def test_encode_matches_diffusers_tiling(vae, shape):
    pixels = draw(0, *shape)
    np.testing.assert_allclose(jitted(encode_tiled, TILING)(vae[1], jnp.asarray(pixels)), reference_encode(vae[0], pixels), rtol=0, atol=PARITY_ABS)


@pytest.mark.parametrize("shape", [(1, 4, 2, 6, 4), (2, 1, 5, 6, 4)])
def test_decode_matches_diffusers_tiling(vae, shape):
    latents = 2 * draw(1, *shape)
    with torch.no_grad():
        expected = channels_last(vae[0].decode(channels_first(latents)).sample)
    np.testing.assert_allclose(jitted(decode_tiled, TILING)(vae[1], jnp.asarray(latents)), expected, rtol=0, atol=PARITY_ABS)


@pytest.mark.parametrize("wrong", [dict(side=100), dict(stride=512), dict(frames=10), dict(frame_stride=0), dict(stride=60)])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UserError, match="tiling: (side|frames) .* multiples of (8|4)"):
        Tiling(**wrong)
