"""launch.aot_compile --sampling: the programs of one sample, and what lies on the chips beside each."""
import contextlib
import dataclasses
import json
import re
import tempfile

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from launch import aot_compile
from vino_jax.aot.chips import CHIPS, topology_devices
from vino_jax.aot.cost import program_cost
from vino_jax.aot.measure import measure
from vino_jax.errors import UserError

CONFIG = """
from configs import common, models
from configs.data import bucket

def get_config():
    return common.config(model=models.tiny(), runtime={"attention": "xla"}, mesh={"preset": "fsdp_seq"},
                         buckets={"edit": bucket(8, 1, 32, 32, 32, patches=16, images=1)})
"""
CONDITIONS = ["condition positive, negative", "condition negative without images"]  # those of equal shapes are one program


@pytest.fixture
def command(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    return ["--sampling", "--config", str(tmp_path / "tiny.py"), "--topology", "v5e:2x2", "--json", str(tmp_path / "out.json")]


@pytest.fixture
def levels(monkeypatch, tmp_path):
    """The compiler's level for each program that is measured, as the compiler writes it down; none where it was not given."""
    found = []

    @contextlib.contextmanager
    def kept():
        (folder := tmp_path / str(len(found))).mkdir()
        yield str(folder)
        (config,) = folder.glob("*.hlo_module_config.txt")
        found.append(re.findall(r"^optimization_level: (\w+)", config.read_text(), re.MULTILINE))

    monkeypatch.setattr(tempfile, "TemporaryDirectory", kept)
    return found


def test_the_programs_of_one_sample(command, tmp_path, capsys, levels):
    assert aot_compile.main([*command, "--check"]) == 0
    assert levels == [["EFFORT_O1"], [], [], [], ["EFFORT_O1"]]  # the VAE's, which run once a task
    rows = {row["stage"]: row for row in json.loads((tmp_path / "out.json").read_text())["rows"]}
    assert list(rows) == ["encode reference 1", *CONDITIONS, "denoise", "decode"]
    assert all(row["fits"] and row["bucket"] == "edit" and row["rows_a_chip"] == 0.25 for row in rows.values())
    memory = {name: row["memory"] for name, row in rows.items()}
    # the weights that a program takes do not lie beside it: what differs is the VAE, or the MMDiT
    assert memory["encode reference 1"]["beside"] == memory["decode"]["beside"] > memory["denoise"]["beside"] > 0
    assert all(one["beside"] < one["peak"] < one["limit"] for one in memory.values())
    assert rows["denoise"]["unknown_loops"] and rows["denoise"]["flops"]["executed"] > rows["decode"]["flops"]["executed"] > 0
    assert "encode reference 1" in capsys.readouterr().out


@pytest.mark.parametrize("flag, words", [("--bucket=edits", "unknown bucket 'edits', did you mean 'edit'"),
                                         ("--stage=decoding", "unknown stage 'decoding' of sampling, did you mean 'decode'")])
def test_an_unknown_name_is_told(command, flag, words):
    with pytest.raises(UserError, match=words):
        aot_compile.main([*command, flag])


def test_one_kind_of_program(command, tmp_path):
    assert aot_compile.main([*command, "--stage", "condition"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert [row["stage"] for row in rows] == CONDITIONS


@pytest.fixture
def lowered():
    mesh = Mesh(topology_devices("v5e:2x2"), ("x",))
    return jax.jit(lambda x: x @ x.T).lower(jax.ShapeDtypeStruct((512, 1024), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("x"))))


def test_what_lies_beside_a_program_counts(lowered):
    chip = CHIPS["v5e"]
    alone, crowded = measure(lowered, chip), measure(lowered, chip, beside=int(chip.hbm) - 1)
    assert alone.fits and alone.memory.beside == 0
    assert not crowded.fits and crowded.memory.needed == crowded.memory.peak == alone.memory.peak + chip.hbm - 1
    assert dataclasses.replace(crowded.memory, beside=0, needed=None, peak=alone.memory.peak) == alone.memory


def test_a_program_that_jax_cannot_read_is_counted_all_the_same(lowered, monkeypatch):
    """As some of the 13 B model are; the text is the compiler's own."""
    def unreadable(compiled):
        raise jax.errors.JaxRuntimeError("INTERNAL: RET_CHECK failure: async-update instruction should have 1 operands but sees 3")

    read = program_cost(lowered.compile().as_text())
    monkeypatch.setattr(jax.stages.Compiled, "as_text", unreadable)
    cost = measure(lowered, CHIPS["v5e"]).cost
    assert cost == read and cost.matmul == 2 * 128 * 512 * 1024 and cost.collectives
