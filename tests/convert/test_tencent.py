"""HunyuanVideo in Tencent's own naming, with diffusers' converter as the witness."""
import json

import numpy as np
import pytest
import torch
from diffusers.loaders.single_file_utils import convert_hunyuan_video_transformer_to_diffusers

from launch import convert
from vino_jax.checkpoint import model as checkpoint
from vino_jax.convert.configs import write_mmdit
from vino_jax.convert.parts import Given
from vino_jax.errors import UserError
from vino_jax.settings import MMDiTConfig

CONFIG = MMDiTConfig(in_channels=4, out_channels=4, heads=2, head_dim=8, double_blocks=2, single_blocks=11, refiner_blocks=2, text_width=12,
                     pooled_width=10, rope_axes=(4, 2, 2))
D, H = CONFIG.width, CONFIG.head_dim


def linear(name, outputs, inputs):
    return {f"{name}.weight": (outputs, inputs), f"{name}.bias": (outputs,)}


def stream(at):
    return {**linear(f"{at}_mod.linear", 6 * D, D), **linear(f"{at}_attn_qkv", 3 * D, D), f"{at}_attn_q_norm.weight": (H,),
            f"{at}_attn_k_norm.weight": (H,), **linear(f"{at}_attn_proj", D, D), **linear(f"{at}_mlp.fc1", 4 * D, D),
            **linear(f"{at}_mlp.fc2", D, 4 * D)}


def release():
    """The names and shapes of mp_rank_00_model_states.pt, as its own model code makes them, at a tiny size; random values."""
    shapes = {"img_in.proj.weight": (D, 4, 1, 2, 2), "img_in.proj.bias": (D,)}
    for embedder in ("time_in", "guidance_in", "txt_in.t_embedder"):
        shapes |= linear(f"{embedder}.mlp.0", D, 256) | linear(f"{embedder}.mlp.2", D, D)
    shapes |= linear("vector_in.in_layer", D, 10) | linear("vector_in.out_layer", D, D) | linear("txt_in.input_embedder", D, 12)
    shapes |= linear("txt_in.c_embedder.linear_1", D, 12) | linear("txt_in.c_embedder.linear_2", D, D)
    for i in range(2):
        at = f"txt_in.individual_token_refiner.blocks.{i}"
        shapes |= {f"{at}.{norm}.{leaf}": (D,) for norm in ("norm1", "norm2") for leaf in ("weight", "bias")}
        shapes |= linear(f"{at}.self_attn_qkv", 3 * D, D) | linear(f"{at}.self_attn_proj", D, D) | linear(f"{at}.mlp.fc1", 4 * D, D)
        shapes |= linear(f"{at}.mlp.fc2", D, 4 * D) | linear(f"{at}.adaLN_modulation.1", 2 * D, D)
        shapes |= {f"double_blocks.{i}.{name}": shape for kind in ("img", "txt") for name, shape in stream(kind).items()}
    for i in range(11):
        at = f"single_blocks.{i}"
        shapes |= linear(f"{at}.linear1", 7 * D, D) | linear(f"{at}.linear2", D, 5 * D) | linear(f"{at}.modulation.linear", 3 * D, D)
        shapes |= {f"{at}.q_norm.weight": (H,), f"{at}.k_norm.weight": (H,)}
    shapes |= linear("final_layer.linear", 16, D) | linear("final_layer.adaLN_modulation.1", 2 * D, D)
    generator = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=generator).to(torch.bfloat16) for name, shape in shapes.items()}


def by_diffusers(tensors):
    """diffusers' names of a release. Its converter cuts linear1 at the published width whatever the model's is: that is done here."""
    whole = convert_hunyuan_video_transformer_to_diffusers({name: x for name, x in tensors.items() if ".linear1." not in name})
    for name, x in tensors.items():
        if ".linear1." in name:
            at, leaf = name.replace("single_blocks", "single_transformer_blocks").split(".linear1.")
            parts = ("attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp")
            whole |= {f"{at}.{part}.{leaf}": piece for part, piece in zip(parts, torch.split(x, (D, D, D, x.shape[0] - 3 * D)))}
    return whole


@pytest.fixture
def folder(tmp_path):
    """Tencent's file with config.json beside it, and the same weights as diffusers names them."""
    tensors = release()
    torch.save({"module": tensors, "global_steps": 3}, tmp_path / "mp_rank_00_model_states.pt")
    (tmp_path / "config.json").write_text(json.dumps(write_mmdit(CONFIG)))
    (tmp_path / "diffusers").mkdir()
    torch.save(by_diffusers(tensors), tmp_path / "diffusers" / "model.pt")
    (tmp_path / "diffusers" / "config.json").write_text(json.dumps(write_mmdit(CONFIG)))
    return tmp_path


def arrays(directory):
    return {path: x for path, x in checkpoint.iter_arrays(directory, "mmdit", checkpoint.read_info(directory))}


def test_it_is_imported_as_diffusers_reads_it(folder, capsys):
    convert.import_parts(folder / "ours", Given(mmdit=folder / "mp_rank_00_model_states.pt"), queries=4)
    convert.import_parts(folder / "theirs", Given(mmdit=folder / "diffusers" / "model.pt"), queries=4)
    ours, theirs = arrays(folder / "ours"), arrays(folder / "theirs")
    assert ours.keys() == theirs.keys()
    for path in ours:
        assert ours[path].dtype == theirs[path].dtype and ours[path].tobytes() == theirs[path].tobytes(), path
    # modulation of the output: [shift ; scale] there, [scale ; shift] here
    stored = release()["final_layer.adaLN_modulation.1.bias"].float().numpy()
    np.testing.assert_array_equal(ours["modulation_out/bias"].astype(np.float32), np.concatenate([stored[D:], stored[:D]]))
    convert.verify_parts(folder / "theirs", [folder / "mp_rank_00_model_states.pt"])
    assert "tensors of mmdit are identical" in capsys.readouterr().out


def test_what_the_release_does_not_have_is_named(folder):
    path = folder / "mp_rank_00_model_states.pt"
    tensors = release() | {"double_blocks.1.img_extra.weight": torch.zeros(3)}
    del tensors["single_blocks.10.linear1.bias"]
    torch.save({"module": tensors}, path)
    with pytest.raises(UserError) as error:
        convert.import_parts(folder / "ours", Given(mmdit=path), queries=4)
    assert "mmdit: double_blocks.1.img_extra.weight is not known" in str(error.value)
    assert "single_transformer_blocks.10.proj_mlp.bias is missing" in str(error.value)
    assert not (folder / "ours").exists()


def test_a_file_without_a_config_is_of_the_published_size(folder):
    (folder / "config.json").unlink()
    with pytest.raises(UserError, match=r"x_embedder.proj.weight has shape \[16, 4, 1, 2, 2\], which does not fill latent_in/kernel \[64, 3072\]"):
        convert.import_parts(folder / "ours", Given(mmdit=folder / "mp_rank_00_model_states.pt"), queries=4)
