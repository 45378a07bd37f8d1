"""Exported adapters, opened by diffusers and PEFT, compute what we compute; what diffusers saves, we merge."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoPipeline, HunyuanVideoTransformer3DModel

from launch import convert
from tests.parity.test_export import CONTEXT, LATENT, TIME, normal
from tests.tolerances import PARITY_ABS
from tests.train import tiny
from tests.train.test_lora import filled, stage
from vino_jax.checkpoint import model as checkpoint
from vino_jax.convert import lora
from vino_jax.models.context import References
from vino_jax.nn.lora import kernel_of, low_ranks, within
from vino_jax.nn.module import by_path
from vino_jax.train.initial import training_model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(model with adapters, its parameters, folder with the base and the adapters)."""
    folder, base = tmp_path_factory.mktemp("lora"), tiny.vino()
    model = training_model(base.config, base.runtime, [stage()])
    params = filled(model, b=0.3)
    params["mmdit"]["pooled"]["down"] = jax.tree.map(np.zeros_like, params["mmdit"]["pooled"]["down"])  # VINO has no pooled text
    own = within("mmdit", low_ranks({path: leaf for path, leaf in by_path(params).items() if kernel_of(path)}, model.adapters))
    lora.write(folder / "lora", own)
    plain = {path: leaf for path, leaf in by_path(params["mmdit"]).items() if kernel_of(path) is None}
    checkpoint.save(folder / "model", {"mmdit": checkpoint.nested(plain)}, base.config)
    convert.export_parts(folder / "model", folder / "out", "diffusers")
    return model, params, folder


def torch_velocity(transformer):
    with torch.no_grad():
        out = transformer(torch.tensor(np.moveaxis(normal(1, *LATENT), -1, 1)), torch.tensor([TIME * 999.0]),
                          torch.tensor(normal(2, 1, CONTEXT, transformer.config.text_embed_dim)), torch.ones(1, CONTEXT, dtype=torch.long),
                          torch.zeros(1, transformer.config.pooled_projection_dim), guidance=torch.tensor([1000.0]), return_dict=False)[0]
    return np.moveaxis(out.numpy(), 1, -1)


def our_velocity(model, mmdit):
    config = model.config.mmdit
    none = References(jnp.zeros((1, 0, 16)), jnp.zeros((1, 0, config.width)), jnp.zeros((1, 0), jnp.int32), jnp.zeros((1, 0, 3), jnp.int32))
    return np.asarray(model.parts["mmdit"](mmdit)(
        jnp.asarray(normal(1, *LATENT)), jnp.asarray([TIME]), none, jnp.zeros((1,), jnp.int32),
        jnp.asarray(normal(2, 1, CONTEXT, config.text_width)), jnp.ones((1, CONTEXT), bool)))


def load(transformer, folder):
    """As HunyuanVideoPipeline.load_lora_weights does, without a pipeline's other parts."""
    state, metadata = HunyuanVideoPipeline.lora_state_dict(folder, weight_name=lora.FILE, return_lora_metadata=True)
    HunyuanVideoPipeline.load_lora_into_transformer(state, transformer=transformer, metadata=metadata)


def test_diffusers_computes_with_the_exported_adapters_what_we_compute(exported):
    model, params, folder = exported
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(folder / "out/transformer")
    without = torch_velocity(transformer)
    load(transformer, folder / "lora")
    ours, theirs = our_velocity(model, params["mmdit"]), torch_velocity(transformer)
    assert np.abs(theirs - without).max() > 100 * PARITY_ABS
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=PARITY_ABS)


def test_what_diffusers_saves_is_merged(exported, tmp_path):
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    model, _, folder = exported
    transformer = HunyuanVideoTransformer3DModel.from_pretrained(folder / "out/transformer")
    transformer.add_adapter(LoraConfig(r=4, lora_alpha=12, target_modules=["attn.to_q", "attn.to_out.0", "single_transformer_blocks.0.proj_out"],
                                       rank_pattern={"single_transformer_blocks.0.proj_out": 2}, alpha_pattern={"attn.to_out.0": 5}))
    generator = torch.Generator().manual_seed(0)
    for name, tensor in transformer.named_parameters():
        if "lora_" in name:
            tensor.data = 0.3 * torch.randn(tensor.shape, generator=generator)
    HunyuanVideoPipeline.save_lora_weights(tmp_path / "lora", get_peft_model_state_dict(transformer),
                                           transformer_lora_adapter_metadata=transformer.peft_config["default"].to_dict())
    convert.merge_lora(folder / "model", tmp_path / "lora", tmp_path / "merged")
    merged = checkpoint.restore(tmp_path / "merged", {"mmdit": tiny.vino().abstract["mmdit"]})["mmdit"]
    np.testing.assert_allclose(our_velocity(tiny.vino(), merged), torch_velocity(transformer), rtol=0, atol=PARITY_ABS)
