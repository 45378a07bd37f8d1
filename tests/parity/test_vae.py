"""VAE against diffusers' AutoencoderKLHunyuanVideo at a tiny size, and its names and sizes at full size."""
import math
import re
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo

from tests.parity.conversion import flatten, to_params, torch_names
from tests.tolerances import BATCH_ROW_ABS, PARITY_ABS
from vino_jax.convert.tables.vae import table
from vino_jax.models.vae import VAE, CausalConv3d
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VAEConfig

CONFIG = VAEConfig(block_widths=(8, 16, 16, 24), layers_per_block=1, norm_groups=4, latent_channels=4)


def definition(config, dtype="float32"):
    return Definition(lambda rngs: VAE(config, Runtime(dtype=dtype), rngs=rngs))


def diffusers_vae(config, seed=0):
    """diffusers' class with seeded weights; biases and norm scales are not left at 0 and 1."""
    torch.set_num_threads(1)
    torch.manual_seed(seed)
    vae = AutoencoderKLHunyuanVideo(latent_channels=config.latent_channels, block_out_channels=config.block_widths,
                                    layers_per_block=config.layers_per_block, norm_num_groups=config.norm_groups).eval()
    with torch.no_grad():
        for value in vae.parameters():
            if value.ndim == 1:
                value.add_(0.2 * torch.randn_like(value))
    return vae


def converted(vae, config):
    return to_params(table(config), {k: v.numpy() for k, v in vae.state_dict().items()}, definition(config).abstract)


@pytest.fixture(scope="module")
def tiny():
    vae = diffusers_vae(CONFIG)
    params = converted(vae, CONFIG)
    return SimpleNamespace(torch=vae, params=params, encode=jax.jit(lambda p, x: definition(CONFIG)(p).encode(x)),
                           decode=jax.jit(lambda p, z: definition(CONFIG)(p).decode(z)))


def draw(seed, *shape):
    return np.random.default_rng(seed).uniform(-1, 1, shape).astype(np.float32)


def channels_last(x):
    return np.moveaxis(x.numpy(), 1, -1)


def channels_first(x):
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1)))


@pytest.mark.parametrize("frames, height, width", [(1, 48, 32), (5, 32, 48), (9, 32, 32)])
def test_encode_and_decode_match_diffusers(tiny, frames, height, width):
    pixels = draw(frames, 2, frames, height, width, 3)
    with torch.no_grad(), jax.numpy_dtype_promotion("strict"):
        posterior = tiny.torch.encode(channels_first(pixels)).latent_dist
        expected = np.concatenate([channels_last(posterior.mean), channels_last(posterior.logvar)], -1)
        moments = tiny.encode(tiny.params, jnp.asarray(pixels))
        assert moments.shape == (2, 1 + (frames - 1) // 4, height // 8, width // 8, 2 * CONFIG.latent_channels)
        assert np.ptp(expected) > 0.5
        np.testing.assert_allclose(moments, expected, rtol=0, atol=PARITY_ABS)

        latents = 2 * draw(frames, *moments.shape[:-1], CONFIG.latent_channels)
        expected = channels_last(tiny.torch.decode(channels_first(latents)).sample)
        decoded = tiny.decode(tiny.params, jnp.asarray(latents))
        assert decoded.shape == pixels.shape
        assert np.ptp(expected) > 0.5
        np.testing.assert_allclose(decoded, expected, rtol=0, atol=PARITY_ABS)


def test_rows_of_a_batch_equal_themselves_alone(tiny):
    pixels = jnp.asarray(draw(7, 2, 5, 32, 48, 3)) * jnp.asarray([0.2, 2.0])[:, None, None, None, None]
    latents = jnp.asarray(draw(8, 2, 1, 6, 4, 4)) * jnp.asarray([0.2, 2.0])[:, None, None, None, None]
    for function, rows in ((tiny.encode, pixels), (tiny.decode, latents)):
        together = function(tiny.params, rows)
        for i in range(2):
            np.testing.assert_allclose(function(tiny.params, rows[i:i + 1])[0], together[i], rtol=0, atol=BATCH_ROW_ABS)


def test_log_variance_is_clipped(tiny):
    params = jax.tree.map(lambda p: p, tiny.params)
    params["quant_conv"]["bias"] = jnp.where(jnp.arange(2 * CONFIG.latent_channels) % 2 == 0, -100.0, 100.0)
    logvar = tiny.encode(params, jnp.zeros((2, 1, 48, 32, 3)))[..., CONFIG.latent_channels:]
    assert float(logvar.min()) == -30.0 and float(logvar.max()) == 20.0


def test_bfloat16_stays_near_float32(tiny):
    pixels = jnp.asarray(draw(3, 2, 1, 48, 32, 3))
    stored = jax.tree.map(lambda p: p.astype(jnp.bfloat16), tiny.params)
    with jax.numpy_dtype_promotion("strict"):
        moments = jax.jit(lambda p, x: definition(CONFIG, "bfloat16")(p).encode(x))(stored, pixels)
    full = tiny.encode(tiny.params, pixels)
    assert moments.dtype == jnp.float32
    error = float(jnp.abs(moments - full).max() / jnp.abs(full).max())
    assert 0 < error < 0.1


@pytest.mark.parametrize("platform, dims", [("cpu", "[b, 0, 1, f]x[0, 1, i, o]"), ("tpu", "[b, 0, 1, 2, f]x[0, 1, 2, i, o]")])
def test_clips_lower_to_the_platforms_own_convolution(platform, dims):
    conv = Definition(lambda rngs: CausalConv3d(4, 8, rngs=rngs))
    clip = jax.ShapeDtypeStruct((1, 5, 16, 16, 4), jnp.float32)
    text = jax.jit(lambda p, x: conv(p)(x)).trace(conv.abstract, clip).lower(lowering_platforms=(platform,)).as_text()
    assert set(re.findall(r"dim_numbers = (\S.*?)->", text)) == {dims}


def test_full_size_has_the_published_parameters():
    config = VAEConfig()
    abstract = definition(config).abstract
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(abstract)) == 246_478_803
    leaves, names = flatten(abstract), torch_names(table(config), abstract)
    with torch.device("meta"):
        expected = {name: tuple(value.shape) for name, value in AutoencoderKLHunyuanVideo().state_dict().items()}
    assert len(expected) == 248 and set(names) == set(expected)
    for name, (path, _, op) in names.items():
        assert op.shape(expected[name]) == leaves[path].shape, name
