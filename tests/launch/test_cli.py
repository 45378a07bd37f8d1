"""How every command ends on wrong input: one line, exit code 2."""
import importlib
import sys
from pathlib import Path

import pytest

from launch import cli
from launch.config import load_config
from vino_jax.errors import UserError

# module of a command -> flags of which each {} takes a path
COMMANDS = {
    "train": "--config configs/shapes.py --workdir {}",
    "train: config": "--workdir out --config {}",
    "train: config key": "--config configs/shapes.py --workdir out --config.init.checkpoint={}",
    "sample": "--checkpoint {} --tasks {} --output {} --root {} --initial_noise {}",
    "evaluate": "--config configs/shapes.py --checkpoint {} --output {}",
    "evaluate: against": "--config configs/shapes.py --checkpoint a --output b --against=base={}",
    "benchmark: generate": "generate --benchmark gedit --prompts {} --checkpoint {} --output {} --images {}",
    "benchmark: check": "check --benchmark gedit --prompts {} --output {}",
    "benchmark: aggregate": "aggregate --benchmark gedit --scores {} --prompts {} --json {}",
    "convert: import": "import --output {} --vino {} --mmdit {} --vae {} --vlm {}",
    "convert: export": "export --checkpoint {} --output {} --format vino",
    "convert: verify": "verify --checkpoint {} --against a {}",
    "measure": "--outputs {} --references {} --sources {} --captions {} --json {} --clip {} --lpips {} --fid {} --fvd {}",
    "demo": "--output {}",
    "report": "--evaluation {} --output {} --run a={}",
    "experiment": "--name queries --output {}",
    "make_vlm": "--output {}",
}


def end(monkeypatch, capsys, name, arguments):
    """(exit code, stderr) of a command."""
    module = name.split(":")[0]
    monkeypatch.setattr(sys, "argv", [f"launch.{module}", *arguments])
    with pytest.raises(SystemExit) as ended:
        cli.run(importlib.import_module(f"launch.{module}").main)
    return ended.value.code, capsys.readouterr().err


@pytest.mark.parametrize("name", COMMANDS)
def test_an_address_is_no_path(name, monkeypatch, capsys, tmp_path):
    flags = COMMANDS[name].split()
    (tmp_path / "configs").symlink_to(Path("configs").absolute())
    monkeypatch.chdir(tmp_path)
    places = [i for i, flag in enumerate(flags) if "{}" in flag]
    for wrong in places:
        given = [flag.format("gs://bucket/run" if i == wrong else "local") for i, flag in enumerate(flags)]
        code, told = end(monkeypatch, capsys, name, given)
        assert code == 2 and told.startswith("error: gs://bucket/run is no local path") and told.count("\n") == 1, given
    assert [p.name for p in tmp_path.iterdir()] == ["configs"]


@pytest.mark.parametrize("name, arguments, words", [
    ("train", "--config configs/shapes.py", "the following arguments are required: --workdir"),
    ("train", "--config configs/shapes.py --workdir x --quite", "unknown flag '--quite'"),
    ("benchmark", "", "the following arguments are required: {generate,check,aggregate}"),
    ("benchmark", "check --benchmark vbench --output x", "the following arguments are required: --prompts"),
    ("benchmark", "generate --benchmark vbench --prompts x --checkpoint y --output z --tasks w", "unrecognized arguments: --tasks w"),
    ("convert", "", "the following arguments are required: {import,export,verify,export-lora,merge-lora}"),
    ("convert", "imprt", "invalid choice: 'imprt'"),
    ("convert", "export --checkpoint x --output y", "the following arguments are required: --format"),
    ("convert", "export --checkpoint x --output y --format gguf", "invalid choice: 'gguf'"),
    ("convert", "import --output y --vaee x", "unrecognized arguments: --vaee x"),
    ("make_vlm", "--output x --seed one", "invalid int value: 'one'"),
])
def test_a_wrong_flag_is_one_line(name, arguments, words, monkeypatch, capsys):
    code, told = end(monkeypatch, capsys, name, arguments.split())
    assert code == 2 and told.startswith("error: ") and words in told and told.count("\n") == 1


@pytest.mark.parametrize("name, text, words", [
    ("README.md", "# no code", "is no Python file"),
    ("empty.py", "", "must define get_config"),
    ("dict.py", "def get_config():\n    return {}", "must define get_config"),
])
def test_a_file_that_is_no_config(name, text, words, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=f"{name} {words}"):
        load_config(tmp_path / name, {})


def test_a_folder_that_takes_nothing(tmp_path):
    (tmp_path / "file").touch()
    for folder in (tmp_path / "file", tmp_path / "file" / "out", Path("/proc/nothing")):
        with pytest.raises(UserError, match=f"cannot write to the folder {folder}: "):
            cli.make_output(folder)
    cli.make_output(tmp_path / "a" / "b")
    assert (tmp_path / "a" / "b").is_dir() and not any((tmp_path / "a" / "b").iterdir())


@pytest.mark.parametrize("flags, given, threads", [
    ("--xla_force_host_platform_device_count=64", {}, "256"), ("--xla_force_host_platform_device_count=64", {"PJRT_NPROC": "5"}, "5"),
    ("--xla_force_host_platform_device_count=1", {}, None), ("", {}, None)])
def test_each_virtual_device_has_several_threads(flags, given, threads):
    environment = {"XLA_FLAGS": flags, **given}
    cli.roomy_thread_pool(environment)
    assert environment.get("PJRT_NPROC") == threads


@pytest.mark.parametrize("environment, words", [
    ({"JAX_COORDINATOR_ADDRESS": "host:1"}, "JAX_COORDINATOR_ADDRESS is set, but not JAX_NUM_PROCESSES, JAX_PROCESS_ID"),
    ({"JAX_PROCESS_ID": "0", "JAX_NUM_PROCESSES": "2"}, "JAX_NUM_PROCESSES, JAX_PROCESS_ID is set, but not JAX_COORDINATOR_ADDRESS"),
    *(({"JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": count, "JAX_PROCESS_ID": index}, "they must be HOST:PORT, a number")
      for address, count, index in (("host", "2", "0"), ("host:1", "two", "0"), ("host:1", "2", "2"), ("host:1", "2", "-1")))])
def test_processes_that_are_half_described(environment, words):
    with pytest.raises(UserError, match=words):
        cli.join_processes(environment)


@pytest.mark.parametrize("environment, given", [
    ({}, None), ({"VINO_DISTRIBUTED": "0"}, None), ({"VINO_DISTRIBUTED": "1"}, {}), ({"VINO_DISTRIBUTED": "1", "JAX_PROCESS_ID": "1"}, {}),
    ({"JAX_COORDINATOR_ADDRESS": "host:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
     {"coordinator_address": "host:1", "num_processes": 2, "process_id": 1})])
def test_what_the_environment_says_of_other_processes(environment, given, monkeypatch):
    met = []
    monkeypatch.setattr("jax.distributed.initialize", lambda **arguments: met.append(arguments))
    monkeypatch.setattr("jax.config.update", lambda *_: None)
    cli.join_processes(environment)
    assert met == ([] if given is None else [{**given, "initialization_timeout": 1860, "shutdown_timeout_seconds": 60}])
