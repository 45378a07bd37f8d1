"""The engine on a toy part: coverage on both sides in one list, round trips to the bit, and the readers and writers of files."""
import json
import threading
from types import SimpleNamespace

import ml_dtypes
import numpy as np
import pytest

from vino_jax.convert import engine
from vino_jax.convert.io import SafetensorsWriter, TensorSource, open_source, write_pickle
from vino_jax.convert.ops import CONV, COPY, LINEAR, PATCH
from vino_jax.convert.rules import LeftOut, Rule, Table
from vino_jax.errors import UserError
from vino_jax.nn.module import by_path

TABLE = Table(
    rules=(Rule("embed/kernel", "embed.weight", PATCH), Rule("blocks/up/kernel", "blocks.{i}.up.weight", LINEAR),
           Rule("blocks/up/bias", "blocks.{i}.up.bias", COPY), Rule("none/bias", "none.{i}.bias"),
           Rule("conv/kernel", "conv.weight", CONV)),
    left_out=(LeftOut(r"head\..*", "tied"),),
)
KERNEL = (1, 2, 2)
SHAPES = {"embed.weight": (6, 3, *KERNEL), "conv.weight": (4, 5, 3, 2, 1), "head.weight": (7, 6),
          **{f"blocks.{i}.up.weight": (8, 6) for i in range(3)}, **{f"blocks.{i}.up.bias": (8,) for i in range(3)}}


def struct(*shape):
    return SimpleNamespace(shape=shape, dtype="float32")


ABSTRACT = {"embed": {"kernel": struct(12, 6)}, "blocks": {"up": {"kernel": struct(3, 6, 8), "bias": struct(3, 8)}},
            "none": {"bias": struct(0, 8)}, "conv": {"kernel": struct(3, 2, 1, 5, 4)}}


def tensors(dtype=np.float32):
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(dtype) for name, shape in SHAPES.items()}


def manifest(arrays):
    return {name: (x.shape, x.dtype) for name, x in arrays.items()}


def source(arrays):
    def read_into(name, out, first):
        out[...] = arrays[name][first:first + len(out)]

    return TensorSource("memory", (), manifest(arrays), read_into)


def same_bits(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert (a[name].shape, a[name].dtype) == (b[name].shape, b[name].dtype), name
        assert a[name].tobytes() == b[name].tobytes(), name


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_round_trip_to_the_bit(dtype):
    arrays, kept = tensors(dtype), {}
    plan = engine.make_plan(TABLE, ABSTRACT, manifest(arrays))
    engine.check({"toy": plan})
    leaves = dict(engine.import_leaves(plan, source(arrays), kept))
    assert {path: x.shape for path, x in leaves.items()} == {path: x.shape for path, x in by_path(ABSTRACT).items()}
    np.testing.assert_array_equal(leaves["blocks/up/kernel"][2], arrays["blocks.2.up.weight"].T)
    assert list(kept) == ["head.weight"] and plan.left_out == ("head.weight",)

    planned = engine.export_manifest(TABLE, leaves, KERNEL)  # from our side alone, as for a model that was never imported
    assert planned == {name: entry for name, entry in manifest(arrays).items() if name != "head.weight"}
    back = dict(engine.export_tensors(engine.make_plan(TABLE, ABSTRACT, planned), leaves.items()))
    same_bits({**back, **kept}, arrays)


def test_casts_to_the_dtype_asked():
    arrays = tensors()
    plan = engine.make_plan(TABLE, ABSTRACT, manifest(arrays), "bfloat16")
    leaves = dict(engine.import_leaves(plan, source(arrays)))
    assert {x.dtype for x in leaves.values()} == {np.dtype(ml_dtypes.bfloat16)}
    np.testing.assert_array_equal(leaves["blocks/up/bias"][1], arrays["blocks.1.up.bias"].astype(ml_dtypes.bfloat16))


def test_every_problem_is_in_one_list():
    found = manifest(tensors())
    del found["blocks.1.up.weight"]
    found["conv.weight"] = ((4, 5, 3), np.dtype(np.float32))
    found["embed.weight"] = (SHAPES["embed.weight"], np.dtype(np.int8))
    found["blocks.3.up.bias"] = ((8,), np.dtype(np.float32))
    found["blocks.0.up.bias"] = ((8,), np.dtype(np.float16))
    table = Table((*TABLE.rules, Rule("embed/kernel", "embed.weight"), Rule("gone/bias", "gone"), Rule("again/bias", "blocks.2.up.bias")))
    plan = engine.make_plan(table, {**ABSTRACT, "again": {"bias": struct(8)}, "new": {"scale": struct(1)}}, found)
    with pytest.raises(UserError) as error:
        engine.check({"toy": plan, "fine": engine.make_plan(TABLE, ABSTRACT, manifest(tensors()))})
    expected = [
        "10 problems", "blocks.1.up.weight is missing (for blocks/up/kernel)",
        "conv.weight has shape [4, 5, 3], which does not fill conv/kernel",
        "embed.weight is int8", "blocks.3.up.bias is not known", "head.weight is not known",
        "blocks/up/bias is made of tensors of several dtypes",
        "embed/kernel is mapped twice", "names gone/bias, which the model does not have",
        "blocks.2.up.bias is mapped to both blocks/up/bias and again/bias",
        "new/scale of the model has no rule",
    ]
    for text in expected:
        assert text in str(error.value), text
    assert "fine:" not in str(error.value)


def test_nan_is_told_by_name():
    arrays = tensors(ml_dtypes.bfloat16)
    arrays["blocks.1.up.bias"][3] = np.nan
    plan = engine.make_plan(TABLE, ABSTRACT, manifest(arrays))
    with pytest.raises(UserError, match="blocks.1.up.bias holds NaN"):
        list(engine.import_leaves(plan, source(arrays)))


def write(folder, arrays):
    writer = SafetensorsWriter(folder, manifest(arrays))
    for name in reversed(arrays):  # any order
        writer.write(name, arrays[name])
    writer.close()


@pytest.mark.parametrize("shard", [10**9, 400])
def test_safetensors_both_ways_with_the_library_as_witness(tmp_path, monkeypatch, shard):
    from safetensors.numpy import load_file

    monkeypatch.setattr("vino_jax.convert.io.SHARD_BYTES", shard)
    odd = {"scalar": np.float32(3.0).reshape(()), "empty": np.zeros((0, 3), np.float16)}
    arrays = tensors() | odd | {"half": tensors(ml_dtypes.bfloat16)["conv.weight"]}
    write(tmp_path / "out", arrays)
    files = sorted((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (shard == 10**9) and (tmp_path / "out/model.safetensors.index.json").exists() == (shard == 400)
    same_bits({name: x for file in files for name, x in load_file(file).items()}, arrays)
    opened = open_source(tmp_path / "out")
    same_bits({name: opened.read(name) for name in opened.manifest}, arrays)
    assert opened.manifest == manifest(arrays) and len(opened.sha256(threading.Event())) == 64


def test_pickle_both_ways_and_refused_if_not_plain(tmp_path):
    import torch

    arrays = tensors() | {"half": tensors(ml_dtypes.bfloat16)["conv.weight"]}
    write(tmp_path / "files", arrays | {"scalar": np.float32(3.0).reshape(()), "empty": np.zeros((0, 3), np.float16)})
    write_pickle(tmp_path / "vino.ckpt", tmp_path / "files")
    assert float(torch.load(tmp_path / "vino.ckpt")["scalar"]) == 3.0 and torch.load(tmp_path / "vino.ckpt")["empty"].shape == (0, 3)
    write(tmp_path / "plain", arrays)
    write_pickle(tmp_path / "vino.ckpt", tmp_path / "plain")
    opened = open_source(tmp_path / "vino.ckpt")
    assert opened.manifest == manifest(arrays)
    same_bits({name: opened.read(name) for name in opened.manifest}, arrays)

    class Trap:
        def __reduce__(self):
            return (open, (str(tmp_path / "executed"), "w"))

    torch.save({"x": Trap()}, tmp_path / "trap.ckpt")
    torch.save({"state": {"x": torch.zeros(1)}}, tmp_path / "nested.ckpt")
    torch.save({"x": torch.zeros(2).to_sparse()}, tmp_path / "sparse.ckpt")
    (tmp_path / "cut.ckpt").write_bytes((tmp_path / "vino.ckpt").read_bytes()[:-2000])
    for name, message in [("trap", "other than plain tensors"), ("nested", "no flat dict"), ("sparse", "sparse"), ("cut", "cut off")]:
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / f"{name}.ckpt")
    assert not (tmp_path / "executed").exists()


def break_cut(folder):
    file = sorted(folder.glob("*.safetensors"))[-1]
    file.write_bytes(file.read_bytes()[:-10])


def break_header(folder):
    sorted(folder.glob("*.safetensors"))[0].write_bytes(b"\xff" * 30)


def header(**entry):
    def change(folder):
        text = json.dumps({"conv.weight": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4], **entry}}).encode()
        sorted(folder.glob("*.safetensors"))[0].write_bytes(len(text).to_bytes(8, "little") + text + bytes(4))
    return change


def break_shard(folder):
    sorted(folder.glob("*.safetensors"))[1].unlink()


def break_twice(folder):
    files = sorted(folder.glob("*.safetensors"))
    files[1].write_bytes(files[0].read_bytes())


def redirect(target):
    def change(folder):
        index = folder / "model.safetensors.index.json"
        data = json.loads(index.read_text())
        data["weight_map"]["conv.weight"] = target
        index.write_text(json.dumps(data))
    return change


def break_index(folder):
    (folder / "model.safetensors.index.json").unlink()


BROKEN = {
    "cut off": (break_cut, "is cut off"), "no header": (break_header, "no safetensors file"),
    "one offset": (header(data_offsets=[0]), "its header cannot be read"), "half a row": (header(shape=[1.5]), "its header cannot be read"),
    "missing shard": (break_shard, "is not there"),
    "twice": (break_twice, "where it is not"), "absent": (redirect("absent.safetensors"), "names absent.safetensors, which is not there"),
    "outside": (redirect("../model.safetensors"), "outside of its folder"), "elsewhere": (redirect("/etc/passwd"), "outside of its folder"),
    "no index": (break_index, "no index"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_safetensors_are_named(tmp_path, monkeypatch, case):
    monkeypatch.setattr("vino_jax.convert.io.SHARD_BYTES", 400)
    change, message = BROKEN[case]
    write(tmp_path / "in", tensors())
    (tmp_path / "model.safetensors").touch()
    change(tmp_path / "in")
    with pytest.raises(UserError, match=message):
        open_source(tmp_path / "in")


def test_what_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        open_source(tmp_path / "vino.ckpt")
    with pytest.raises(UserError, match="no safetensors file"):
        open_source(tmp_path)
