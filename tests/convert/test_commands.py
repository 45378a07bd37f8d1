"""launch.convert as its user meets it: PyTorch folders in, PyTorch folders out with the same bits, and bad input refused."""
import json
import shutil
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from launch import cli, convert
from vino_jax.checkpoint import model as checkpoint
from vino_jax.convert import configs, engine, parts
from vino_jax.convert.io import TensorSource, open_source
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.module import by_path
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig

MMDIT = dict(in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=8, num_layers=2, num_single_layers=3,
             num_refiner_layers=1, text_embed_dim=12, pooled_projection_dim=10, rope_axes_dim=(4, 2, 2))
VAE = dict(latent_channels=4, block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2)
TEXT = dict(vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1,
            head_dim=8, rope_scaling={"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True},
            tie_word_embeddings=True)
VISION = dict(depth=2, hidden_size=8, num_heads=2, intermediate_size=12, patch_size=4, out_hidden_size=16, num_position_embeddings=16,
              deepstack_visual_indexes=[0, 1])
WIDTH, QUERIES = 16, 5
SHARED = Path(__file__).resolve().parents[2].parent / "shared"


def randomised(module, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    for tensor in module.parameters():
        tensor.data = torch.randn(tensor.shape, generator=generator)
    return module.to(dtype)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """The published layout at a tiny size: fp32 MMDiT and VAE, bf16 VLM in several shards, vino.ckpt with the VLM's tied head."""
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
    from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

    root = tmp_path_factory.mktemp("published")
    mmdit = randomised(HunyuanVideoTransformer3DModel(**MMDIT))
    mmdit.save_pretrained(root / "hunyuan/transformer")
    randomised(AutoencoderKLHunyuanVideo(**VAE)).save_pretrained(root / "hunyuan/vae")
    config = Qwen3VLConfig(text_config=TEXT, vision_config=VISION, tie_word_embeddings=True)
    vlm = randomised(Qwen3VLForConditionalGeneration(config), torch.bfloat16)
    vlm.save_pretrained(root / "qwen3vl", max_shard_size="8KB")
    (root / "qwen3vl/tokenizer.json").write_text("{}")
    (root / "qwen3vl/tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": {"61": {"content": "<|image_pad|>"}}}))
    (root / "qwen3vl/preprocessor_config.json").write_text("{}")
    added = {"metaquery": (QUERIES, WIDTH)}
    for name, outputs in (("connector", MMDIT["text_embed_dim"]), ("connector_vae_branch", 16)):
        added |= {f"{name}.norm_qwen.weight": (WIDTH,), f"{name}.mlp.0.weight": (4 * outputs, WIDTH), f"{name}.mlp.0.bias": (4 * outputs,),
                  f"{name}.mlp.2.weight": (outputs, 4 * outputs), f"{name}.mlp.2.bias": (outputs,)}
    tensors = {f"mm_encoder.{name}": torch.randn(shape) for name, shape in added.items()}
    tensors |= {f"transformer.{name}": x + 1 for name, x in mmdit.state_dict().items()}  # trained: not the base's values
    torch.save(tensors, root / "vino.ckpt")
    torch.save(tensors | {f"mm_encoder.mm_encoder.{name}": x for name, x in vlm.state_dict().items()}, root / "whole.ckpt")
    return root


def command(monkeypatch, *arguments):
    """Exit code of `python -m launch.convert ARGUMENTS`."""
    monkeypatch.setattr(sys, "argv", ["launch.convert", *map(str, arguments)])
    with pytest.raises(SystemExit) as end:
        cli.run(convert.main)
    return end.value.code


def everything(root, vino="vino.ckpt"):
    return ["--vino", root / vino, "--mmdit", root / "hunyuan", "--vae", root / "hunyuan/vae", "--vlm", root / "qwen3vl"]


@pytest.fixture(scope="module")
def imported(published, tmp_path_factory):
    folder = tmp_path_factory.mktemp("imported") / "checkpoint"
    with pytest.MonkeyPatch.context() as patch:
        assert command(patch, "import", "--output", folder, *everything(published, "whole.ckpt")) == 0
    return folder


def content(path):
    source = open_source(path)
    return {name: source.read(name) for name in source.manifest}


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert a[name].tobytes() == b[name].tobytes(), name


def test_import_records_architecture_sources_and_processor(published, imported):
    info = checkpoint.read_info(imported)
    assert list(info.parts) == ["mmdit", "connector", "vae_connector", "queries", "vlm", "vae"]
    assert (info.config.queries, info.config.connector_ratio, info.config.mmdit.single_blocks) == (QUERIES, 4, 3)
    assert info.config.vae.block_widths == (4, 4, 8, 8) and info.config.vlm.vision.deepstack == (0, 1)
    assert (info.parts["vlm"].dtype, info.parts["vae"].dtype) == ("bfloat16", "float32")
    digest = subprocess.run(["sha256sum", published / "whole.ckpt"], capture_output=True, text=True).stdout.split()[0]
    assert info.parts["mmdit"].sha256 == info.parts["queries"].sha256 == digest and info.parts["mmdit"].source.endswith("whole.ckpt")
    files = sorted(p.name for p in checkpoint.processor_folder(imported).iterdir())
    assert files == ["preprocessor_config.json", "tokenizer.json", "tokenizer_config.json"]
    checkpoint.restore(imported, Vino(info.config, Runtime()).abstract, info.config)


def test_each_file_is_hashed_once(published, tmp_path, monkeypatch):
    hashed, sha256 = [], TensorSource.sha256
    monkeypatch.setattr(TensorSource, "sha256", lambda self, stop: hashed.append(Path(self.label).name) or sha256(self, stop))
    assert command(monkeypatch, "import", "--output", tmp_path / "out", *everything(published, "whole.ckpt")) == 0
    assert sorted(hashed) == ["vae", "whole.ckpt"]


def test_a_folder_that_is_neither_checkpoint_nor_run_is_told(published, tmp_path, monkeypatch, capsys):
    given = ["--checkpoint", published / "qwen3vl", "--output", tmp_path / "out", "--format", "vino"]
    assert command(monkeypatch, "export", *given) == 2
    assert capsys.readouterr().err.endswith("qwen3vl is no model checkpoint: it has no model.json\n")


def test_vino_layout_round_trip(published, imported, tmp_path, monkeypatch, capsys):
    assert command(monkeypatch, "export", "--checkpoint", imported, "--output", tmp_path / "st", "--format", "vino") == 0
    assert command(monkeypatch, "export", "--checkpoint", imported, "--output", tmp_path / "pt", "--format", "vino", "--ckpt") == 0
    wanted = content(published / "whole.ckpt")
    assert "mm_encoder.mm_encoder.lm_head.weight" in wanted
    same_bits(content(tmp_path / "st"), wanted)
    same_bits(content(tmp_path / "pt/vino.ckpt"), wanted)
    assert "vae: not part of vino.ckpt" in capsys.readouterr().err


def test_diffusers_layout_opens_and_is_the_same(published, imported, tmp_path, monkeypatch):
    from diffusers import AutoencoderKLHunyuanVideo, HunyuanVideoTransformer3DModel
    from transformers import Qwen3VLForConditionalGeneration

    out = tmp_path / "out"
    assert command(monkeypatch, "export", "--checkpoint", imported, "--output", out, "--format", "diffusers") == 0
    same_bits(content(out / "vae"), content(published / "hunyuan/vae"))
    whole = content(published / "whole.ckpt")
    same_bits(content(out / "transformer"), {k.removeprefix("transformer."): x for k, x in whole.items() if k.startswith("transformer.")})
    same_bits(content(out / "vino"), {k: x for k, x in whole.items() if not k.startswith(("transformer.", "mm_encoder.mm_encoder."))})
    assert (out / "vlm/tokenizer.json").exists() and json.loads((out / "vlm/config.json").read_text())["image_token_id"] == 61
    for cls, ours, theirs in ((HunyuanVideoTransformer3DModel, "transformer", "hunyuan/transformer"),
                              (AutoencoderKLHunyuanVideo, "vae", "hunyuan/vae"), (Qwen3VLForConditionalGeneration, "vlm", "qwen3vl")):
        opened, loading = cls.from_pretrained(out / ours, output_loading_info=True)
        assert not loading["missing_keys"] and not loading["unexpected_keys"] and not loading["mismatched_keys"]
        known = cls.from_pretrained(published / theirs).config
        for name in MMDIT if ours == "transformer" else VAE if ours == "vae" else ():
            assert opened.config[name] == known[name], name
    again = tmp_path / "again"  # our own export is input as good as the original
    given = ["--vino", out / "vino", "--mmdit", out, "--vae", out, "--vlm", out / "vlm"]
    assert command(monkeypatch, "import", "--output", again, *given) == 0
    assert checkpoint.read_info(again).config == checkpoint.read_info(imported).config


def test_all_in_bfloat16_round_trips(published, tmp_path, monkeypatch):
    source = tmp_path / "in"
    shutil.copytree(published, source)
    torch.save({name: x.to(torch.bfloat16) for name, x in torch.load(source / "whole.ckpt").items()}, source / "whole.ckpt")
    vae = {name: torch.from_numpy(x).to(torch.bfloat16) for name, x in content(source / "hunyuan/vae").items()}
    save_file(vae, source / "hunyuan/vae/diffusion_pytorch_model.safetensors")
    assert command(monkeypatch, "import", "--output", tmp_path / "model", *everything(source, "whole.ckpt")) == 0
    assert {part.dtype for part in checkpoint.read_info(tmp_path / "model").parts.values()} == {"bfloat16"}
    for layout, ours, theirs in (("vino", "", "whole.ckpt"), ("diffusers", "vae", "hunyuan/vae")):
        assert command(monkeypatch, "export", "--checkpoint", tmp_path / "model", "--output", tmp_path / layout, "--format", layout) == 0
        same_bits(content(tmp_path / layout / ours), content(source / theirs))


def test_export_casts_to_the_dtype_asked(published, imported, tmp_path, monkeypatch):
    out = tmp_path / "out"
    assert command(monkeypatch, "export", "--checkpoint", imported, "--output", out, "--format", "vino", "--dtype", "bfloat16") == 0
    assert any(tensor.dtype != ml_dtypes.bfloat16 for tensor in content(published / "whole.ckpt").values())
    same_bits(content(out), {name: x.astype(ml_dtypes.bfloat16) for name, x in content(published / "whole.ckpt").items()})


def test_verify_tells_what_differs(published, imported, monkeypatch, capsys):
    paths = [published / "whole.ckpt", published / "hunyuan", published / "qwen3vl"]
    assert command(monkeypatch, "verify", "--checkpoint", imported, "--against", *paths) == 0
    assert "are identical" in capsys.readouterr().out
    assert command(monkeypatch, "verify", "--checkpoint", imported, "--against", published / "hunyuan/transformer") == 2
    line = capsys.readouterr().err
    assert line.startswith("error: ") and "tensors differ: mmdit " in line and line.count("\n") == 1


def test_subsets_and_dtype(published, tmp_path, monkeypatch):
    assert command(monkeypatch, "import", "--output", tmp_path / "vae", "--vae", published / "hunyuan", "--dtype", "bfloat16") == 0
    info = checkpoint.read_info(tmp_path / "vae")
    assert list(info.parts) == ["vae"] and info.parts["vae"].dtype == "bfloat16" and info.config.mmdit.in_channels == 4
    wanted = content(published / "hunyuan/vae")["encoder.conv_in.conv.weight"].astype(ml_dtypes.bfloat16)
    stored = dict(checkpoint.iter_arrays(tmp_path / "vae", "vae", info))["encoder/conv_in/kernel"]
    np.testing.assert_array_equal(stored, np.moveaxis(wanted, (0, 1), (-1, -2)))
    assert command(monkeypatch, "import", "--output", tmp_path / "vlm", "--vlm", published / "qwen3vl", "--queries", "7") == 0
    assert checkpoint.read_info(tmp_path / "vlm").config.queries == 7
    assert command(monkeypatch, "verify", "--checkpoint", tmp_path / "vae", "--against", published / "hunyuan/vae") == 0


def test_an_import_over_a_mesh_writes_the_same_in_shards(published, imported, tmp_path, monkeypatch):
    assert command(monkeypatch, "import", "--output", tmp_path / "out", "--mesh", "fsdp=4,tensor=2", *everything(published, "whole.ckpt")) == 0
    ours, theirs = checkpoint.read_info(tmp_path / "out"), checkpoint.read_info(imported)
    assert ours.parts == theirs.parts
    for part in theirs.parts:
        same_bits(*(dict(checkpoint.iter_arrays(folder, part, info)) for folder, info in ((tmp_path / "out", ours), (imported, theirs))))
    assert command(monkeypatch, "import", "--output", tmp_path / "more", "--mesh", "fsdp=5", *everything(published)) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("words", ["import", "export"])
def test_a_full_disk_is_told_and_leaves_nothing(published, imported, tmp_path, words):
    """A disk of 64 kB, mounted where only the command's own process sees it."""
    given = ["--vlm", published / "qwen3vl"] if words == "import" else ["--checkpoint", imported, "--format", "diffusers"]
    run = " ".join(map(str, [sys.executable, "-m", "launch.convert", words, "--output", tmp_path / "disk/out", *given]))
    (tmp_path / "disk").mkdir()
    mounted = f"mount -t tmpfs -o size=64k tmpfs {tmp_path}/disk && {{ {run}; echo $?; ls -A {tmp_path}/disk; }}"
    done = subprocess.run(["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", mounted], capture_output=True, text=True)
    assert done.stdout.split() == ["2"], done.stderr
    assert done.stderr.splitlines()[-1] == f"error: cannot write {tmp_path}/disk/out: No space left on device"


def change_pickle(root, name, value):
    tensors = torch.load(root / "vino.ckpt")
    torch.save(tensors | {name: value}, root / "vino.ckpt")


def change_config(folder, name, value):
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))


def cut(path):
    path.write_bytes(path.read_bytes()[:-100])


BAD = {
    "no such file": (lambda r: (r / "vino.ckpt").unlink(), "vino.ckpt does not exist"),
    "truncated": (lambda r: cut(r / "hunyuan/vae/diffusion_pytorch_model.safetensors"), "is cut off"),
    "truncated pickle": (lambda r: cut(r / "vino.ckpt"), "cut off"),
    "missing shard": (lambda r: next((r / "qwen3vl").glob("model-00002-*")).unlink(), "which is not there"),
    "extra key": (lambda r: change_pickle(r, "transformer.more.weight", torch.zeros(2)), "mmdit: more.weight is not known"),
    "key of no part": (lambda r: change_pickle(r, "optimizer", torch.zeros(2)), "belong to no part: optimizer"),
    "wrong shape": (lambda r: change_pickle(r, "transformer.proj_out.bias", torch.zeros(3)),
                    "proj_out.bias has shape [3], which does not fill out/bias [16]"),
    "wrong type": (lambda r: change_pickle(r, "transformer.proj_out.bias", torch.zeros(16, dtype=torch.int64)), "proj_out.bias is int64"),
    "NaN": (lambda r: change_pickle(r, "mm_encoder.metaquery", torch.full((QUERIES, WIDTH), float("nan"))), "metaquery holds NaN"),
    "no tensors": (lambda r: change_pickle(r, "transformer.proj_out.bias", "text"), "no flat dict of tensors"),
    "unsupported": (lambda r: change_config(r / "hunyuan/transformer", "qk_norm", "layer_norm"),
                    "qk_norm is 'layer_norm', supported is 'rms_norm'"),
    "unknown field": (lambda r: change_config(r / "hunyuan/vae", "sample_size", 3), "sample_size is not supported"),
    "a head of its own": (lambda r: change_config(r / "qwen3vl", "tie_word_embeddings", False),
                          "tie_word_embeddings is False, supported is True"),
    "other class": (lambda r: change_config(r / "qwen3vl", "model_type", "qwen2_vl"), "model_type is 'qwen2_vl', supported is 'qwen3_vl'"),
    "parts that do not fit": (lambda r: change_config(r / "hunyuan/vae", "latent_channels", 8), "the VAE gives 8 latent channels"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_exits_2_and_leaves_nothing(published, tmp_path, monkeypatch, capsys, case):
    root = tmp_path / "in"
    shutil.copytree(published, root)
    change, message = BAD[case]
    change(root)
    out = tmp_path / "out"
    out.mkdir()
    assert command(monkeypatch, "import", "--output", out / "checkpoint", *everything(root)) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and message in lines[-1]
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("words", ["import", "export"])
def test_an_output_that_holds_something_is_refused(published, imported, tmp_path, monkeypatch, capsys, words):
    (tmp_path / "precious").touch()
    given = ["--vae", published / "hunyuan"] if words == "import" else ["--checkpoint", imported, "--format", "vino"]
    assert command(monkeypatch, words, "--output", tmp_path, *given) == 2
    assert "already holds something" in capsys.readouterr().err
    assert [p.name for p in tmp_path.iterdir()] == ["precious"]


def test_as_a_program(tmp_path):
    done = subprocess.run([sys.executable, "-m", "launch.convert", "import", "--output", tmp_path / "x"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr == "error: nothing to convert: give at least one of --vino, --mmdit, --vae, --vlm\n"
    assert done.stdout == ""


@pytest.mark.skipif(not SHARED.is_dir(), reason="needs ../shared/golden/manifests.json")
def test_published_manifests_are_planned():
    """Every published name and shape has its leaf; the one that is left out on purpose is the VLM's tied head."""
    published = json.loads((SHARED / "golden/manifests.json").read_text()) | {"metaquery": {"metaquery": [256, 2560]}}
    names = {"mmdit": "transformer", "vlm": "qwen3vl", "vae": "vae", "connector": "connector", "vae_connector": "connector_vae_branch",
             "queries": "metaquery"}
    abstract, tables = Vino(VinoConfig(), Runtime()).abstract, parts.tables(VinoConfig())
    plans = {}
    for part, key in names.items():
        manifest = {name: (tuple(shape), np.dtype(np.float32)) for name, shape in published[key].items()}
        plans[part] = engine.make_plan(tables[part], abstract[part], manifest)
    engine.check(plans)
    assert [name for plan in plans.values() for name in plan.left_out] == ["lm_head.weight"]


def test_full_size_plans_both_ways():
    """The published architecture: every leaf has its tensors and they their shapes, from abstract trees alone."""
    config = VinoConfig()
    abstract, tables = Vino(config, Runtime()).abstract, parts.tables(config)
    counts, plans = {}, {}
    for part in parts.PARTS:
        manifest = engine.export_manifest(tables[part], by_path(abstract[part]), configs.kernels(config).get(part, ()))
        counts[part], plans[part] = len(manifest), engine.make_plan(tables[part], abstract[part], manifest)
    engine.check(plans)
    assert counts == {"mmdit": 1264, "connector": 5, "vae_connector": 5, "queries": 1, "vlm": 713, "vae": 248}  # the VLM's head is tied


@pytest.mark.parametrize("error, code, text", [(KeyboardInterrupt(), 130, ""), (UserError("a\n b"), 2, "error: a b\n"), (None, 0, "")])
def test_how_an_entry_point_ends(capsys, error, code, text):
    def main():
        if error:
            raise error
    with pytest.raises(SystemExit) as end:
        cli.run(main)
    assert end.value.code == code and capsys.readouterr().err == text
