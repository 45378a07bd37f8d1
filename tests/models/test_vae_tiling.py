"""Tiled VAE: the numbers of diffusers' tiling, no seams on a smooth picture, bad sizes refused."""
import math
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


def smooth(frames, height, width):
    """(1, F, H, W, 3) of slow waves that drift."""
    time, row, column = np.meshgrid(np.arange(frames) / 96, np.arange(height) / 32, np.arange(width) / 96, indexing="ij")
    x = np.stack([0.27 + 0.06 * np.cos(3 * (column + time)), 0.5 * np.clip(row, 0, 1), 0.4 * np.sin(2 * row + 0.3 * column + time)], -1)
    return jnp.asarray(x.astype(np.float32)[None])


@pytest.fixture(scope="module")
def trained():
    """(definition of the trained small VAE, its parameters)."""
    config = read_vae(PART)
    small = Definition(lambda rngs: VAE(config, Runtime(), rngs=rngs))
    return small, to_params(table(config), load_file(PART / "diffusion_pytorch_model.safetensors"), small.abstract)


def jump(trained, pixels, encode, decode):
    """Largest step, in grey levels between columns, of what tiling (None: not) changes in pixels that were encoded and decoded."""
    small, params = trained

    def compare(params, pixels):
        vae = small(params)

        def through(encode, decode):
            moments = vae.encode(pixels) if encode is None else encode_tiled(vae, pixels, encode)
            latents = moments[..., :vae.config.latent_channels]
            return vae.decode(latents) if decode is None else decode_tiled(vae, latents, decode)

        return 127.5 * (through(encode, decode) - through(None, None))

    return np.abs(np.diff(jax.jit(compare)(params, pixels), axis=3)).max()


def test_a_smooth_picture_has_no_seams(trained):
    """With the trained small VAE: what tiling changes never jumps by a grey level between columns, as it does without overlap."""
    picture, overlapping, bare = smooth(1, 32, 96), Tiling(side=64, stride=32), Tiling(side=48, stride=48)
    assert 0 < jump(trained, picture, overlapping, overlapping) < TILING_GREY
    assert jump(trained, picture, bare, bare) > TILING_GREY


@pytest.mark.parametrize("encode, decode", [(True, False), (False, True)])
def test_neither_encoding_nor_decoding_tiles_leaves_a_seam(trained, encode, decode):
    tiling = Tiling(side=64, stride=32)
    assert 0 < jump(trained, smooth(1, 32, 96), tiling if encode else None, tiling if decode else None) < TILING_GREY


@pytest.mark.parametrize("call, shape", [(VAE.encode, (1, 33, 720, 1280, 3)), (VAE.decode, (1, 9, 90, 160, CONFIG.latent_channels))])
def test_no_mask_over_all_positions_is_made(call, shape):
    """720p and 33 frames, untiled: 129,600 positions see each other in the middle block; nothing is as large as a tenth of their pairs."""
    whole = definition(CONFIG)
    program = jax.make_jaxpr(lambda params, x: call(whole(params), x))(whole.abstract, jax.ShapeDtypeStruct(shape, jnp.float32))
    assert 33 * 720 * 1280 < max(sizes(program.jaxpr)) < (9 * 90 * 160) ** 2 / 10


def sizes(jaxpr):
    """Values of everything that a program computes, and the programs in it."""
    for equation in jaxpr.eqns:
        yield from (math.prod(out.aval.shape) for out in equation.outvars)
        for inner in jax.core.jaxprs_in_params(equation.params):
            yield from sizes(inner)


@pytest.mark.parametrize("wrong", [dict(side=100), dict(stride=512), dict(frames=10), dict(frame_stride=0), dict(stride=60)])
def test_sizes_that_do_not_fit_are_refused(wrong):
    with pytest.raises(UserError, match="tiling: (side|frames) .* multiples of (8|4)"):
        Tiling(**wrong)
