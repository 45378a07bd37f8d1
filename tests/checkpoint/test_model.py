"""Model checkpoints: bits, sharded restore in another dtype, atomic writes, refusals."""
import json
import shutil
import time

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.settings import MMDiTConfig, VinoConfig

RNG = np.random.default_rng(0)
PARTS = {
    "mmdit": {"blocks": {"kernel": RNG.normal(size=(3, 16, 8)).astype(np.float32), "none": np.zeros((0, 4), np.float32)},
              "bias": RNG.normal(size=8).astype(np.float32)},
    "queries": {"embedding": RNG.normal(size=(4, 8)).astype(ml_dtypes.bfloat16)},
}
SOURCES = {"mmdit": {"source": "hunyuan/transformer", "sha256": "ab" * 32}}


def structs(tree, dtype=None, mesh=None):
    def struct(x):
        spec = PartitionSpec(*(None,) * (x.ndim - 1), "fsdp") if x.size and x.shape[-1] % 8 == 0 else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, dtype or x.dtype, sharding=mesh and NamedSharding(mesh, spec))
    return jax.tree.map(struct, tree)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "checkpoint"
    tokenizer = folder.with_name("tokenizer.json")
    tokenizer.write_text("{}")
    kept = {"mmdit": {"head.weight": RNG.normal(size=(2, 3)).astype(ml_dtypes.bfloat16)}}
    checkpoint.save(folder, PARTS, VinoConfig(), SOURCES, [tokenizer], kept)
    return folder, kept


def test_same_bits_and_what_it_says(saved):
    folder, kept = saved
    info = checkpoint.read_info(folder)
    assert info.config == VinoConfig()
    assert (info.parts["mmdit"].parameters, info.parts["mmdit"].dtype) == (3 * 16 * 8 + 8, "float32")
    assert (info.parts["mmdit"].source, info.parts["mmdit"].sha256) == ("hunyuan/transformer", "ab" * 32)
    assert info.parts["queries"].dtype == "bfloat16"
    restored = checkpoint.restore(folder, structs(PARTS), VinoConfig())
    assert jax.tree.structure(restored) == jax.tree.structure(PARTS)
    for a, b in zip(jax.tree.leaves(restored), jax.tree.leaves(PARTS)):
        assert a.dtype == b.dtype and np.asarray(a).tobytes() == b.tobytes()
    left_out = checkpoint.read_left_out(folder, "mmdit")["head.weight"]
    assert left_out.dtype == ml_dtypes.bfloat16 and left_out.tobytes() == kept["mmdit"]["head.weight"].tobytes()
    assert checkpoint.read_left_out(folder, "queries") == {}
    assert (checkpoint.processor_folder(folder) / "tokenizer.json").read_text() == "{}"
    host = dict(checkpoint.iter_arrays(folder, "mmdit", info))
    assert host.keys() == info.parts["mmdit"].leaves.keys() and host["bias"].tobytes() == PARTS["mmdit"]["bias"].tobytes()


def test_restores_onto_a_mesh_in_the_dtype_asked(saved):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    wanted = {"mmdit": structs(PARTS["mmdit"], jnp.bfloat16, mesh)}  # one part alone is fine
    kernel = checkpoint.restore(saved[0], wanted)["mmdit"]["blocks"]["kernel"]
    assert kernel.sharding == wanted["mmdit"]["blocks"]["kernel"].sharding
    assert {s.data.shape for s in kernel.addressable_shards} == {(3, 16, 1)}
    np.testing.assert_array_equal(kernel, PARTS["mmdit"]["blocks"]["kernel"].astype(ml_dtypes.bfloat16))


def test_streams_in_groups_and_takes_sharded_arrays(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 1000)
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(jax.sharding.AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("fsdp"))
    leaves = {f"a/{i}": np.full((8, 10), i, np.float32) for i in range(7)} | {"large": np.ones((8, 100), np.float32)}
    checkpoint.save(tmp_path / "c", {"vae": ((path, jax.device_put(x, sharding)) for path, x in leaves.items())}, VinoConfig())
    groups = [leaf.group for leaf in checkpoint.read_info(tmp_path / "c").parts["vae"].leaves.values()]
    assert groups == [0, 0, 0, 1, 1, 1, 2, 3]
    restored = checkpoint.restore(tmp_path / "c", structs({"vae": checkpoint.nested(leaves)}))
    assert [float(restored["vae"]["a"][str(i)][0, 0]) for i in range(7)] == list(range(7))


def test_is_copied_part_by_part_while_it_is_read(tmp_path, monkeypatch):
    """Each part is read while the one before is still being written, which Orbax does not bear on its own."""
    monkeypatch.setattr(checkpoint, "GROUP_BYTES", 1000)
    tree = {str(i): np.full((8, 10), i, np.float32) for i in range(9)}
    checkpoint.save(tmp_path / "a", {name: tree for name in ("mmdit", "vae", "vlm")}, VinoConfig())
    info, active, most = checkpoint.read_info(tmp_path / "a"), [], []

    def counted(call):
        def counts(*args):
            active.append(call)
            most.append(len(active))
            time.sleep(0.02)
            try:
                return call(*args)
            finally:
                active.pop()
        return counts

    for name in ("save", "load"):
        monkeypatch.setattr(checkpoint.ocp, name, counted(getattr(checkpoint.ocp, name)))
    checkpoint.save(tmp_path / "b", {name: checkpoint.iter_arrays(tmp_path / "a", name, info) for name in info.parts}, VinoConfig())
    assert len(most) > 10 and max(most) == 1
    for name in info.parts:
        copied = dict(checkpoint.iter_arrays(tmp_path / "b", name, info))
        assert copied.keys() == tree.keys() and all((copied[path] == x).all() for path, x in tree.items())


def test_a_failed_save_leaves_nothing(tmp_path):
    def broken():
        yield "a", np.ones(3, np.float32)
        raise UserError("the source ended early")

    with pytest.raises(UserError, match="ended early"):
        checkpoint.save(tmp_path / "c", {"vae": broken()}, VinoConfig())
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "c").mkdir()
    (tmp_path / "c" / "precious").touch()
    with pytest.raises(UserError, match="already holds something"):
        checkpoint.save(tmp_path / "c", PARTS, VinoConfig())
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["precious"]
    with pytest.raises(UserError, match="cannot write"):
        checkpoint.save(tmp_path / "c" / "precious" / "below", PARTS, VinoConfig())


def test_skipped_arrays_are_checked_and_not_read(saved):
    wanted = {"mmdit": structs(PARTS["mmdit"])}
    restored = checkpoint.restore(saved[0], wanted, skip={"mmdit/blocks/kernel"})
    assert set(restored["mmdit"]) == {"bias", "blocks"} and set(restored["mmdit"]["blocks"]) == {"none"}
    wanted["mmdit"]["blocks"]["kernel"] = jax.ShapeDtypeStruct((3, 16, 9), jnp.float32)
    with pytest.raises(UserError, match=r"mmdit/blocks/kernel is \[3, 16, 8\] there"):
        checkpoint.restore(saved[0], wanted, skip={"mmdit/blocks/kernel"})


def test_a_checkpoint_is_replaced_by_a_whole_one_or_stays(tmp_path):
    def broken():
        yield "a", np.ones(3, np.float32)
        raise UserError("the source ended early")

    for steps in (4, 6):
        checkpoint.save(tmp_path / "c", PARTS, VinoConfig(), trained={"stage1": steps}, replace=True)
        assert checkpoint.read_info(tmp_path / "c").trained == {"stage1": steps}
    with pytest.raises(UserError, match="ended early"):
        checkpoint.save(tmp_path / "c", {"vae": broken()}, VinoConfig(), trained={"stage1": 8}, replace=True)
    assert checkpoint.read_info(tmp_path / "c").trained == {"stage1": 6}
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_refusals_name_the_first_difference(saved, tmp_path):
    folder, wanted = saved[0], structs(PARTS)
    with pytest.raises(UserError, match="mmdit.heads is 24 there, 2 here"):
        checkpoint.restore(folder, wanted, VinoConfig(mmdit=MMDiTConfig(heads=2)))
    with pytest.raises(UserError, match="has no vae, vlm"):
        checkpoint.restore(folder, {**wanted, "vae": {}, "vlm": {}})
    struct = jax.ShapeDtypeStruct((9,), jnp.float32)
    with pytest.raises(UserError, match=r"mmdit/bias is \[8\] there, \[9\] here"):
        checkpoint.restore(folder, {"mmdit": {**wanted["mmdit"], "bias": struct}})
    with pytest.raises(UserError, match="mmdit lacks more"):
        checkpoint.restore(folder, {"mmdit": {**wanted["mmdit"], "more": struct}})
    with pytest.raises(UserError, match="mmdit has bias"):
        checkpoint.restore(folder, {"mmdit": {"blocks": wanted["mmdit"]["blocks"]}})
    with pytest.raises(UserError, match="no model.json"):
        checkpoint.read_info(tmp_path)
    for text, message in [("{", "cannot be read"), (json.dumps({"format": 99}), "format 99"),
                          (json.dumps({"format": 1, "config": {}}), "damaged")]:
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(UserError, match=message):
            checkpoint.read_info(tmp_path)
    with pytest.raises(UserError, match="no processor"):
        checkpoint.processor_folder(tmp_path)


@pytest.mark.parametrize("damage", ["folder gone", "cut off", "file gone"])
def test_damaged_arrays_are_told(saved, tmp_path, damage):
    shutil.copytree(saved[0], tmp_path / "c")
    group = tmp_path / "c/arrays/mmdit/0"
    largest = max((f for f in group.rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
    if damage == "cut off":
        largest.write_bytes(largest.read_bytes()[:100])
    elif damage == "file gone":
        largest.unlink()
    else:
        shutil.rmtree(group)
    with pytest.raises(UserError, match="mmdit/0 is damaged or incomplete"):
        checkpoint.restore(tmp_path / "c", structs(PARTS))
