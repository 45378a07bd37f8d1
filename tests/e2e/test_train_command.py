"""launch.train as a user runs it: killed and started again, and given wrong input."""
import json
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from launch import cli, train
from tests.compiling import xla_flags
from tests.data.folders import SMALL_VLM
from tests.train import tiny
from vino_jax.checkpoint import model as model_checkpoint

CONFIG = '''
from configs import common, models
from configs.data import bucket

plain = dict(learning_rate=1e-3, tasks={{"t2i": 1.0}}, texts={{"long": 1.0}}, buckets=("picture",))
edits = dict(plain, tasks={{"t2i": 0.5, "ti2i": 0.5}}, texts={{"long": 0.5, "instruction": 0.5}}, buckets=("picture", "edit"))

def get_config():
    return common.config(
        model={{"queries": 4, "connector_ratio": 2}}, init={{"checkpoint": {init!r}}}, runtime={{"dtype": "float32", "remat": "nothing"}},
        mesh={{"fsdp": 2}}, data={{"threads": 2}},
        buckets={{"picture": bucket(4, 1, 32, 32, 72), "edit": bucket(4, 1, 32, 32, 80, patches=32, images=2)}},
        stages={{
            "stage1": dict(plain, steps=3, rules=common.RULES["stage1"]),
            "stage2": dict(edits, steps=8, rules=common.RULES["stage3"], ema=0.9, accumulate=2)}},
        log={{"every": 1, "checkpoint_every": 2}})
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A config file and the model checkpoint that it starts from."""
    folder = tmp_path_factory.mktemp("files")
    vino = tiny.vino()
    model_checkpoint.save(folder / "init", tiny.params(vino), vino.config, processor_files=sorted(SMALL_VLM.iterdir()))
    (folder / "config.py").write_text(CONFIG.format(init=str(folder / "init")))
    return folder


def start(files, workdir, *flags):
    environment = {**os.environ, "XLA_FLAGS": xla_flags(2),
                   "JAX_COMPILATION_CACHE_DIR": str(files / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2"}
    command = [sys.executable, "-m", "launch.train", "--config", str(files / "config.py"), "--workdir", str(workdir), "--quiet", *flags]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def records(workdir):
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(r["stage"], r["step"]): r["loss"] for r in map(json.loads, lines)}


def kill_after(process, workdir, stage, step, how):
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None:
        if (stage, step) in records(workdir):
            process.send_signal(how)
            return process.wait()
        time.sleep(0.02)
    raise AssertionError(f"step {step} of {stage} never came: {process.communicate()}")


@pytest.fixture(scope="module")
def whole(files, tmp_path_factory):
    """The run that is never killed."""
    workdir = tmp_path_factory.mktemp("whole")
    process = start(files, workdir)
    _, errors = process.communicate()
    assert process.returncode == 0, errors
    return workdir


@pytest.mark.parametrize("how,code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGTERM, 42)])
def test_a_killed_run_goes_on_to_the_same_losses_and_parameters(files, whole, tmp_path, how, code):
    assert kill_after(start(files, tmp_path), tmp_path, "stage2", 3, how) == code
    again = start(files, tmp_path)
    _, errors = again.communicate()
    assert again.returncode == 0, errors
    assert records(tmp_path) == records(whole) and len(records(whole)) == 11
    ours, theirs = (_arrays(folder / "model") for folder in (tmp_path, whole))
    jax.tree.map(np.testing.assert_array_equal, ours, theirs)


def _arrays(directory):
    return jax.device_get(model_checkpoint.restore(directory, tiny.vino().abstract))


@pytest.mark.parametrize("flag,message", [
    ("--config.stages.stage1.stesp=3", "unknown config key 'stages.stage1.stesp', did you mean 'steps'?"),
    ("--config.init.checkpoint=nowhere", "nowhere is no model checkpoint"),
    ("--config.mesh.fsdp=3", "does not fit 2 devices"),
    ("--config.buckets.picture.batch=3", "the 3 rows of bucket 'picture' do not divide by 1 microbatches x 2 data shards"),
    ("--config.stages.stage2.accumulate=4", "the 4 rows of bucket 'picture' do not divide by 4 microbatches x 2 data shards"),
    ("--config.model.queries=7", "queries is 4 there, 7 here"),
    ("--config.data.source=films", "unknown data.source 'films'"),
    ("--confg=x", "unknown flag '--confg=x'"),
])
def test_wrong_input_is_one_line_and_exit_code_2(files, tmp_path, flag, message):
    process = start(files, tmp_path / "run", flag)
    _, errors = process.communicate()
    assert process.returncode == 2 and errors.startswith("error: ") and errors.count("\n") == 1 and message in errors, errors
    assert not (tmp_path / "run" / "model").exists()


def test_a_missing_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: train.main(["--config", "configs/shapes.py"]))
    assert ended.value.code == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --workdir; see --help\n"
