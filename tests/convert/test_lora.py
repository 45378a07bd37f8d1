"""Files of adapters: written and read to the bit, layers of several ranks, and wrong ones refused."""
import json

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from tests.convert.test_commands import command
from tests.train import tiny
from vino_jax.checkpoint import model as checkpoint
from vino_jax.convert import lora
from vino_jax.errors import UserError
from vino_jax.nn.lora import LowRank
from vino_jax.nn.module import by_path

DOUBLE, SINGLE, OUT = "double/visual/attention/query/kernel", "single/mlp/kernel", "time/up/kernel"


def kernels():
    return {path: tuple(leaf.shape) for path, leaf in by_path(tiny.vino().abstract["mmdit"]).items()}


def adapter(path, rank, alpha, seed=0):
    rng, shape = np.random.default_rng(seed), kernels()[path]
    return LowRank(rng.standard_normal((*shape[:-1], rank)).astype(np.float32),
                   rng.standard_normal((*shape[:-2], rank, shape[-1])).astype(np.float32), alpha)


def test_a_file_is_read_as_it_was_written(tmp_path):
    given = {DOUBLE: adapter(DOUBLE, 4, 8.0), SINGLE: adapter(SINGLE, 4, 8.0), OUT: adapter(OUT, 3, 6.0)}
    lora.write(tmp_path / "lora", given)
    tensors = load_file(tmp_path / "lora" / lora.FILE)
    assert tensors["transformer.single_transformer_blocks.0.proj_mlp.lora_A.weight"].shape == (4, kernels()[SINGLE][1])
    np.testing.assert_array_equal(tensors["transformer.time_text_embed.timestep_embedder.linear_1.lora_B.weight"], given[OUT].b.T)
    found = lora.read(tmp_path / "lora", kernels())
    assert found.keys() == given.keys()
    for path, theirs in given.items():
        np.testing.assert_array_equal(found[path].a, theirs.a)
        np.testing.assert_array_equal(found[path].b, theirs.b)
        assert found[path].alpha == theirs.alpha


def saved(path, ranks, metadata=None):
    """Adapters of the single blocks' MLP: a rank for each layer that has one."""
    _, inputs, outputs = kernels()[SINGLE]
    rng, tensors = np.random.default_rng(0), {}
    for layer, rank in ranks.items():
        name = f"transformer.single_transformer_blocks.{layer}.proj_mlp"
        tensors[f"{name}.lora_A.weight"] = rng.standard_normal((rank, inputs)).astype(np.float32)
        tensors[f"{name}.lora_B.weight"] = rng.standard_normal((outputs, rank)).astype(np.float32)
    save_file(tensors, path, {"lora_adapter_metadata": json.dumps(metadata)} if metadata else None)
    return {layer: tensors[f"transformer.single_transformer_blocks.{layer}.proj_mlp.lora_B.weight"]
            @ tensors[f"transformer.single_transformer_blocks.{layer}.proj_mlp.lora_A.weight"] for layer in ranks}


def test_layers_of_several_ranks_and_alphas_and_one_without(tmp_path):
    shape = (3, *kernels()[SINGLE][1:])
    products = saved(tmp_path / "a.safetensors", {0: 2, 2: 5})  # no metadata: alpha is the rank
    change = lora.read(tmp_path / "a.safetensors", {SINGLE: shape})[SINGLE].change
    for layer in range(3):
        np.testing.assert_allclose(change[layer], products[layer].T if layer in products else 0, rtol=1e-5, atol=1e-5)
    settings = {"transformer.lora_alpha": 6, "transformer.alpha_pattern": {"transformer_blocks.0.proj_mlp": 7, "2.proj_mlp": 1.0}}
    saved(tmp_path / "b.safetensors", {0: 2, 2: 5}, settings)
    change = lora.read(tmp_path / "b.safetensors", {SINGLE: shape})[SINGLE].change
    np.testing.assert_allclose(change[0], 3 * products[0].T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(change[2], 0.2 * products[2].T, rtol=1e-5, atol=1e-5)


A, B = (f"transformer.single_transformer_blocks.0.proj_mlp.lora_{side}.weight" for side in "AB")
BAD = {
    "no place": (lambda t: t | {"transformer.x_embedder.proj.lora_A.weight": np.zeros((4, 16), np.float32)}, "x_embedder.proj.lora_A.weight"),
    "layer too many": (lambda t: t | {A.replace(".0.", ".9."): t[A]}, "single_transformer_blocks.9.proj_mlp.lora_A.weight"),
    "other size": (lambda t: t | {A: t[A][:, :3]}, r"proj_mlp.lora_A.weight \[2, 3\]"),
    "half": (lambda t: {A: t[A]}, "proj_mlp without an A and a B of one rank"),
    "two ranks": (lambda t: t | {B: t[B][:, :1]}, "proj_mlp without an A and a B of one rank"),
    "other names": (lambda t: {"diffusion_model.x.lora_down.weight": t[A]}, "names are transformer.<module>.lora_A.weight"),
    "nothing": (lambda t: {}, "holds no adapters"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_does_not_fit_is_refused(tmp_path, case):
    change, message = BAD[case]
    saved(tmp_path / "good.safetensors", {0: 2})
    save_file(change(load_file(tmp_path / "good.safetensors")), tmp_path / "bad.safetensors")
    with pytest.raises(UserError, match=message):
        lora.read(tmp_path / "bad.safetensors", kernels())


def test_other_kinds_of_adapters_are_refused(tmp_path):
    saved(tmp_path / "a.safetensors", {0: 2}, {"transformer.use_rslora": True})
    with pytest.raises(UserError, match="use_rslora is not supported"):
        lora.read(tmp_path / "a.safetensors", kernels())


def test_merging_changes_the_kernels_and_nothing_else(tmp_path, monkeypatch, capsys):
    base = tiny.params(tiny.vino())
    base["mmdit"]["single"]["mlp"]["kernel"] = base["mmdit"]["single"]["mlp"]["kernel"].astype("bfloat16")
    checkpoint.save(tmp_path / "model", {part: base[part] for part in ("mmdit", "queries")}, tiny.vino().config)
    given = {DOUBLE: adapter(DOUBLE, 4, 8.0), SINGLE: adapter(SINGLE, 4, 8.0)}
    lora.write(tmp_path / "lora", given)
    given_flags = ["--checkpoint", tmp_path / "model", "--lora", tmp_path / "lora"]
    assert command(monkeypatch, "merge-lora", *given_flags, "--output", tmp_path / "out") == 0
    info = checkpoint.read_info(tmp_path / "out")
    assert list(info.parts) == ["mmdit", "queries"] and info.parts["mmdit"].dtype == "mixed"
    for path, leaf in checkpoint.iter_arrays(tmp_path / "out", "mmdit", info):
        before = by_path(base["mmdit"])[path]
        wanted = before.astype(np.float32) + given[path].change if path in given else before
        np.testing.assert_array_equal(leaf, wanted.astype(before.dtype), err_msg=path)
        assert leaf.dtype == before.dtype
    assert command(monkeypatch, "merge-lora", *given_flags, "--output", tmp_path / "out") == 2
    assert "already holds something" in capsys.readouterr().err
    assert command(monkeypatch, "export-lora", "--checkpoint", tmp_path / "model", "--output", tmp_path / "no") == 2
    assert "is no training run's workdir" in capsys.readouterr().err
