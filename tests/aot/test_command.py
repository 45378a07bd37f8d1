"""launch.aot_compile: the report of a tiny model for four chips, and how wrong names end."""
import json

import pytest

from launch import aot_compile, cli
from launch.aot_compile import chosen, suggest
from launch.config import load_config
from vino_jax.aot import report
from vino_jax.aot.chips import CHIPS, GIB
from vino_jax.aot.measure import Measured, Memory
from vino_jax.errors import UserError
from vino_jax.nn.stack import REMAT_POLICIES
from vino_jax.train.config import run_config

CONFIG = """
from configs import common, models
from configs.data import bucket

def get_config():
    stages = common.curriculum((1, 1, 1), (1.0, 1.0, 1.0), ("picture",), ("picture", "edit"))
    buckets = {"picture": bucket(4, 1, 32, 32, 16), "edit": bucket(4, 1, 32, 32, 32, patches=16, images=1)}
    return common.config(model=models.tiny(), runtime={"attention": "xla"}, buckets=buckets, stages=stages)
"""


@pytest.fixture
def config(tmp_path):
    (tmp_path / "tiny.py").write_text(CONFIG)
    return str(tmp_path / "tiny.py")


def lacking(lowered, chip):
    return Measured(1.0, Memory(31.25 * GIB, needed=33.2 * GIB), False, None)


@pytest.fixture
def unfit(monkeypatch):
    """No program fits, and no step is traced."""
    monkeypatch.setattr(aot_compile, "measure", lacking)
    monkeypatch.setattr(aot_compile.StagePlan, "lowered", lambda *arguments: None)


def test_a_report_of_a_tiny_model(config, tmp_path, capsys):
    code = aot_compile.main(["--config", config, "--topology", "v5e:2x2", "--stage", "stage1", "--json", str(tmp_path / "out.json"), "--check"])
    told = capsys.readouterr().out
    assert code == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert (written["topology"], written["chips"], written["mesh"], written["preset"]) == ("v5e:2x2", 4, {"fsdp": 4}, "fsdp")
    (row,) = written["rows"]
    assert (row["stage"], row["bucket"], row["remat"], row["rows_a_chip"], row["fits"]) == ("stage1", "picture", "full", 1.0, True)
    assert set(row) == {"stage", "bucket", "remat", "rows_a_chip", "fits", "compile_seconds", "memory", "flops", "collectives", "kernels", "host",
                        "unknown_loops", "unknown_cycles", "estimate"}
    memory, flops, guess = row["memory"], row["flops"], row["estimate"]
    assert 0 < memory["arguments"] and memory["peak"] < memory["limit"] == CHIPS["v5e"].hbm and memory["needed"] is None
    assert flops["executed"] == flops["matmul"] + flops["kernels"] and 1 <= flops["executed_over_model"] < 1.5  # full remat: below 4/3
    assert {one["kind"] for one in row["collectives"]} >= {"all-gather"} and not row["unknown_loops"]
    assert 0 < guess["compute"] < guess["step"] and 0 < guess["mfu"] < 1
    head, line = told.split("\n")[1:3]
    assert head.split()[:3] == ["stage", "bucket", "remat"] and line.split()[:4] == ["stage1", "picture", "full", "1"]
    assert "all-gather over 4 chips" in told and all(line in told for line in written["assumptions"])


def test_what_does_not_fit_is_a_row(config, unfit, capsys):
    flags = ["--config", config, "--topology", "v5e:2x2", "--stage", "stage1", "--markdown"]
    assert aot_compile.main(flags) == 0 and aot_compile.main([*flags, "--check"]) == 1
    assert "| stage1 | picture | full | 1 | does not fit (33.2 of 31.25 GiB) | - |" in capsys.readouterr().out


def test_every_program_of_a_config_and_its_encoders(config, unfit, capsys):
    aot_compile.main(["--config", config, "--topology", "v5e:2x2", "--encode"])
    lines = [line.split()[:2] for line in capsys.readouterr().out.split("\n")[2:8]]
    assert lines == [["stage1", "picture"], ["stage2", "picture"], ["stage3", "picture"], ["stage3", "edit"], ["encode", "picture"],
                     ["encode", "edit"]]


@pytest.mark.parametrize("fitting, tried", [(2, 3), (99, len(REMAT_POLICIES))])
def test_the_first_policy_that_fits_is_suggested(fitting, tried, config, capsys):
    seen = []

    def compile_with(remat):
        seen.append(remat)
        fits = len(seen) > fitting
        return {"stage": "s", "bucket": "b", "remat": remat, "fits": fits, "memory": {"peak": GIB, "needed": 3 * GIB, "limit": 2 * GIB}}

    names, told = list(REMAT_POLICIES), []
    row = suggest(compile_with, told.append)
    assert seen == names[:min(tried, len(names))] and row["remat"] == seen[-1]
    assert told[0] == f"s, b: remat {names[0]!r}: does not fit (3.0 of 2.00 GiB)" and len(told) == len(seen)


@pytest.mark.parametrize("flags, words", [
    ("--topology v9z:2x2", "unknown topology 'v9z:2x2'; it must be a chip and a shape of whole hosts, such as v5e:2x2, v5e:8x8"),
    ("--topology v5e:3x3", "unknown topology 'v5e:3x3'"),
    ("--topology v5e:2x2 --config.mesh.fsdp=8", "mesh data=1,fsdp=8,seq=1,tensor=1 does not fit 4 devices"),
    ("--topology v5e:2x2 --stage stage4", "unknown stage 'stage4', did you mean 'stage"),
    ("--topology v5e:2x2 --bucket pictures", "unknown bucket 'pictures', did you mean 'picture'"),
    ("--topology v5e:2x2 --stage stage1 --bucket edit", "stage 'stage1' does not draw bucket 'edit'; it draws picture"),
])
def test_wrong_names_are_one_line(flags, words, config, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["launch.aot_compile", "--config", config, *flags.split()])
    with pytest.raises(SystemExit) as ended:
        cli.run(aot_compile.main)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: ") and words in told and told.count("\n") == 1


def test_a_bucket_that_no_stage_draws_is_told():
    values = load_config("configs/shapes.py", {})
    values["buckets"]["idle"] = values["buckets"]["picture"]
    with pytest.raises(UserError, match="no stage draws bucket 'idle'"):
        chosen(run_config(values), None, "idle")


def test_the_architecture_is_that_of_the_parts_that_a_config_names():
    found = aot_compile.architecture(run_config(load_config("configs/shapes.py", {})))
    assert (found.mmdit.heads, found.vlm.text.layers, found.queries) == (4, 4, 8)


def test_kernels_and_loops_that_nobody_can_count_are_told():
    row = {"fits": True, "collectives": [], "unknown_loops": ["while.3"], "unknown_cycles": ["fusion.7"],
           "kernels": [{"name": "mine", "operands": "bf16[8, 128]", "known": False, "count": 2.0, "flops": 0.0}]}
    assert report.details(row) == ["kernel mine bf16[8, 128]: 2 calls, 0 TFLOP (unknown, counted as 0)",
                                   "loop while.3: its turns cannot be read, counted as one",
                                   "fusion.7: the compiler has no estimate of its cycles, counted as none"]
