"""What is exported, opened by diffusers, computes what we compute."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel

from launch import convert
from tests.tolerances import PARITY_ABS
from tests.train import tiny
from vino_jax.checkpoint import model as checkpoint
from vino_jax.models.context import References

LATENT, CONTEXT, TIME = (1, 3, 4, 8, 4), 9, 0.625


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model, parameters, folder of the export)."""
    folder, model = tmp_path_factory.mktemp("export"), tiny.vino()
    params = {part: tiny.params(model)[part] for part in ("mmdit", "vae")}
    params["mmdit"]["pooled"]["down"] = jax.tree.map(np.zeros_like, params["mmdit"]["pooled"]["down"])  # VINO has no pooled text
    checkpoint.save(folder / "model", params, model.config)
    convert.export_parts(folder / "model", folder / "out", "diffusers")
    return model, params, folder / "out"


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def test_the_transformer(exported):
    model, params, folder = exported
    config, latents, context = model.config.mmdit, normal(1, *LATENT), normal(2, 1, CONTEXT, model.config.mmdit.text_width)
    theirs = HunyuanVideoTransformer3DModel.from_pretrained(folder / "transformer")
    with torch.no_grad():
        expected = theirs(torch.tensor(np.moveaxis(latents, -1, 1)), torch.tensor([TIME * 999.0]), torch.tensor(context),
                          torch.ones(1, CONTEXT, dtype=torch.long), torch.zeros(1, config.pooled_width), guidance=torch.tensor([1000.0]),
                          return_dict=False)[0].numpy()
    none = References(jnp.zeros((1, 0, 16)), jnp.zeros((1, 0, config.width)), jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 0, 3), jnp.int32))
    ours = model.parts["mmdit"](params["mmdit"])(jnp.asarray(latents), jnp.asarray([TIME]), none, jnp.zeros((1,), jnp.int32),
                                                 jnp.asarray(context), jnp.ones((1, CONTEXT), bool))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(np.asarray(ours), np.moveaxis(expected, 1, -1), rtol=0, atol=PARITY_ABS)


def test_the_vae(exported):
    model, params, folder = exported
    latents = normal(3, *LATENT[:-1], model.config.vae.latent_channels)
    with torch.no_grad():
        decoder = AutoencoderKLHunyuanVideo.from_pretrained(folder / "vae")
        expected = decoder.decode(torch.tensor(np.moveaxis(latents, -1, 1))).sample.numpy()
    ours = model.parts["vae"](params["vae"]).decode(jnp.asarray(latents))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(np.asarray(ours), np.moveaxis(expected, 1, -1), rtol=0, atol=PARITY_ABS)
