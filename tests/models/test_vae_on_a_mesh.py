"""Tiles of the VAE shared out among devices: the numbers of one device, and each device with its share alone."""
import contextlib
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.test_vae import CONFIG, definition, draw
from tests.tolerances import VAE_MESH_ABS
from vino_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled
from vino_jax.sharding.constrain import use_sharding
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset

CLIP, PICTURE = Tiling(frames=4, frame_stride=4, side=None), Tiling(side=16, stride=8)
VAE = definition(CONFIG)


@pytest.fixture(scope="module")
def params():
    return VAE.init(jax.random.key(0))


def jitted(function, tiling):
    return jax.jit(lambda p, x: function(VAE(p), x, tiling))


@contextlib.contextmanager
def placed(sizes, params):
    """Parameters as the preset stores them, on the mesh that is active inside."""
    mesh, rules = make_mesh(sizes, jax.devices()[:math.prod(sizes.values())]), preset("fsdp")
    with use_sharding(mesh, rules):
        yield jax.device_put(params, shardings(VAE.abstract, VAE.axes, mesh, rules))


# rows, tiling, frames, height, width
CLIPS, ONE_CLIP = (2, CLIP, 9, 16, 16), (1, CLIP, 17, 16, 16)
PICTURES, ONE_PICTURE = (8, PICTURE, 1, 8, 32), (1, PICTURE, 1, 8, 40)  # the last tile of each is smaller, and so alone of its shape


@pytest.mark.parametrize("sizes, case", [({"seq": 8}, ONE_CLIP), ({"fsdp": 8}, ONE_PICTURE), ({"fsdp": 2, "seq": 4}, CLIPS),
                                         ({"tensor": 2}, PICTURES)], ids=str)
def test_a_mesh_gives_the_pixels_and_moments_of_one_device(params, sizes, case):
    rows, tiling, frames, height, width = case
    pixels = jnp.asarray(draw(1, rows, frames, height, width, 3))
    latents = jnp.asarray(2 * draw(2, rows, 1 + (frames - 1) // 4, height // 8, width // 8, CONFIG.latent_channels))
    for function, x in ((encode_tiled, pixels), (decode_tiled, latents)):
        alone = jitted(function, tiling)(params, x)
        assert np.ptp(alone) > 0.5
        with placed(sizes, params) as stored:
            spread = jitted(function, tiling)(stored, x)
        np.testing.assert_allclose(spread, alone, rtol=0, atol=VAE_MESH_ABS)
        grey = (np.clip(127.5 * np.asarray(a) + 127.5, 0, 255).astype(np.uint8).astype(int) for a in (spread, alone))
        assert np.abs(np.subtract(*grey)).max() <= 1


@pytest.mark.parametrize("sizes, share", [({"seq": 8}, 2), ({"fsdp": 2, "seq": 4}, 4), ({"fsdp": 2}, 14)])
def test_each_device_takes_its_share_of_the_tiles(params, sizes, share):
    """Of 14 windows of 3 latent frames: 2 rows lie over fsdp where there is one, the windows over what is left."""
    latents = jnp.asarray(draw(3, 2, 29, 2, 2, CONFIG.latent_channels))
    with placed(sizes, params) as stored:
        program = str(jitted(decode_tiled, Tiling(frames=8, frame_stride=8, side=None)).trace(stored, latents).jaxpr)
    lengths = {int(n) for n in re.findall(r" length=(\d+)", program)}
    assert lengths == {share, 3, 5, 9}  # of loops over windows, and over the frames of a window in the decoder's blocks
