"""Tiled VAE: the numbers of diffusers' tiling, no seams on a smooth picture, bad sizes refused."""
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from safetensors.numpy import load_file

from tests.parity.conversion import to_params
from tests.parity.test_vae import CONFIG, channels_first, channels_last, converted, definition, diffusers_vae, draw
from tests.tolerances import PARITY_ABS, TILING_GREY
from vino_jax.convert.configs import read_vae
from vino_jax.convert.tables.vae import table
from vino_jax.errors import UserError
from vino_jax.models.vae import VAE
from vino_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime

PART = Path(__file__).resolve().parents[2] / "data_pipelines/shapes_parts/hunyuan/vae"

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


def test_encode_matches_diffusers_tiling(vae):
    pixels = draw(0, 1, 13, 16, 48, 3)  # windows of 9 and 5 frames, 32 and 16 columns
    moments = jitted(encode_tiled, TILING)(vae[1], jnp.asarray(pixels))
    np.testing.assert_allclose(moments, reference_encode(vae[0], pixels), rtol=0, atol=PARITY_ABS)


@pytest.mark.parametrize("shape", [(1, 4, 2, 6, 4), (2, 1, 5, 6, 4)])  # frames and columns; rows and columns
def test_decode_matches_diffusers_tiling(vae, shape):
    latents = 2 * draw(1, *shape)
    with torch.no_grad():
        expected = channels_last(vae[0].decode(channels_first(latents)).sample)
    np.testing.assert_allclose(jitted(decode_tiled, TILING)(vae[1], jnp.asarray(latents)), expected, rtol=0, atol=PARITY_ABS)


def test_tiling_that_does_not_apply_changes_nothing(vae):
    pixels = jnp.asarray(draw(2, 1, 1, 32, 32, 3))
    whole = jax.jit(lambda p, x: definition(CONFIG)(p).encode(x))(vae[1], pixels)
    np.testing.assert_array_equal(jitted(encode_tiled, TILING)(vae[1], pixels), whole)


def test_a_smooth_picture_has_no_seams():
    """With the trained small VAE: what tiling changes never jumps by a grey level between columns, as it does without overlap."""
    config = read_vae(PART)
    small = Definition(lambda rngs: VAE(config, Runtime(), rngs=rngs))
    params = to_params(table(config), load_file(PART / "diffusion_pytorch_model.safetensors"), small.abstract)
    row, column = np.meshgrid(np.arange(32) / 32, np.arange(96) / 96, indexing="ij")
    picture = np.stack([0.27 + 0.06 * np.cos(3 * column), 0.5 * row, 0.4 * np.sin(2 * row + 0.3 * column)], -1)
    picture = picture.astype(np.float32)[None, None]

    def change(tiling):
        def compare(params, pixels):
            vae = small(params)
            tiled = decode_tiled(vae, encode_tiled(vae, pixels, tiling)[..., :config.latent_channels], tiling)
            return 127.5 * (tiled - vae.decode(vae.encode(pixels)[..., :config.latent_channels]))

        return np.abs(np.diff(jax.jit(compare)(params, jnp.asarray(picture)), axis=3)).max()

    assert 0 < change(Tiling(side=64, stride=32)) < TILING_GREY
    assert change(Tiling(side=48, stride=48)) > TILING_GREY


@pytest.mark.parametrize("wrong", [dict(side=100), dict(stride=512), dict(frames=10), dict(frame_stride=0), dict(stride=60)])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UserError, match="tiling: (side|frames) .* multiples of (8|4)"):
        Tiling(**wrong)
