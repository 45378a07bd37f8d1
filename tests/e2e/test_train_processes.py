"""launch.train as several processes over loopback, as on the hosts of a pod: the losses of one process, one stop for all, and a run that
goes on with another number of processes.

Eight devices in all, however many processes they belong to.
"""
import json
import shutil
import signal
import time

import jax
import numpy as np
import pytest

from launch import convert
from tests import tolerances
from tests.data.folders import SMALL_VLM
from tests.e2e import processes
from tests.e2e.processes import ended
from tests.train import tiny
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.run import complete_steps
from vino_jax.nn.module import by_path

DEVICES, STEPS = 8, 8
CONFIG = '''
from configs import common
from configs.data import bucket

def get_config():
    return common.config(
        model={{"queries": 4, "connector_ratio": 2}}, init={{"checkpoint": {init!r}}}, runtime={{"dtype": "float32", "remat": "nothing"}},
        mesh={{"data": 2, "fsdp": 4}}, buckets={{"picture": bucket(8, 1, 32, 32, 72)}},
        stages={{"stage1": dict(learning_rate=1e-3, steps={steps}, rules=common.RULES["stage1"], ema=0.9, tasks={{"t2i": 1.0}},
                                texts={{"long": 1.0}}, buckets=("picture",))}},
        log={{"every": 1, "checkpoint_every": 0, "preview_count": 1, "preview_sampling_steps": 1, "evaluate_rows": 3}})
'''


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A config file, the model checkpoint that it starts from, and the PyTorch parts of that."""
    folder = tmp_path_factory.mktemp("files")
    vino = tiny.vino()
    model_checkpoint.save(folder / "init", tiny.params(vino), vino.config, processor_files=sorted(SMALL_VLM.iterdir()))
    (folder / "config.py").write_text(CONFIG.format(init=str(folder / "init"), steps=STEPS))
    convert.export_parts(folder / "init", folder / "parts", "diffusers")
    return folder


def start(files, workdir, count, *flags):
    """The processes of one run."""
    cache = f"--config.log.compile_cache={files / 'compiled'}"
    return processes.start(["launch.train", "--config", files / "config.py", "--workdir", workdir, cache, *flags], count, DEVICES)


def losses(workdir, file="metrics"):
    path = workdir / f"{file}.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return {(r["stage"], r["step"]): r["loss"] for r in map(json.loads, lines)}


def asked_to_stop(running, workdir, step):
    """SIGTERM to the last process once `step` is logged."""
    deadline = time.monotonic() + 300
    while ("stage1", step) not in losses(workdir):
        assert time.monotonic() < deadline and all(process.poll() is None for process in running), ended(running)
        time.sleep(0.02)
    running[-1].send_signal(signal.SIGTERM)
    return ended(running)


@pytest.fixture(scope="module")
def one(files, tmp_path_factory):
    """A run of one process, never stopped, with the held-out loss."""
    workdir = tmp_path_factory.mktemp("one")
    codes, said = ended(start(files, workdir, 1, "--config.log.evaluate_every=4"))
    assert codes == [0], said
    return workdir


@pytest.fixture(scope="module")
def two(files, tmp_path_factory):
    """A run of two processes, never stopped, that imports its parts, with previews and the held-out loss."""
    workdir = tmp_path_factory.mktemp("two")
    parts = {"vino": "vino", "mmdit": "transformer", "vae": "vae", "vlm": "vlm"}
    flags = [f"--config.init.{name}={files / 'parts' / folder}" for name, folder in parts.items()]
    flags += ["--config.log.preview_every=100", "--config.log.evaluate_every=4"]
    codes, said = ended(start(files, workdir, 2, "--config.init.checkpoint=", *flags))
    assert codes == [0, 0], said
    return workdir


@pytest.fixture(scope="module")
def stopped(files, tmp_path_factory):
    """A run of two processes after SIGTERM to one of them."""
    workdir = tmp_path_factory.mktemp("stopped")
    codes, said = asked_to_stop(start(files, workdir, 2), workdir, 2)
    assert codes == [42, 42], said
    return workdir


def test_two_processes_have_the_losses_of_one(one, two):
    ours, theirs = losses(two), losses(one)
    assert ours.keys() == theirs.keys() and len(ours) == STEPS
    worst = max(abs(ours[key] - theirs[key]) for key in ours)
    assert worst < tolerances.MESH_LOSS_ABS, worst


def test_two_processes_have_the_held_out_loss_of_one(one, two):
    ours, theirs = losses(two, "held_out"), losses(one, "held_out")
    assert list(ours) == list(theirs) == [("stage1", step) for step in (0, 4, STEPS)]
    assert max(abs(ours[key] - theirs[key]) for key in ours) < tolerances.MESH_LOSS_ABS
    assert len(set(ours.values())) == 3  # training changes it


def test_two_processes_write_one_workdir(two, one):
    def held(folder):
        return {path.relative_to(folder).as_posix() for path in folder.iterdir()}

    assert held(two) == held(one) | {"previews", "init"}
    assert sorted(path.name for path in (two / "previews").iterdir()) == ["stage1_000000", f"stage1_{STEPS:06d}"]
    info = model_checkpoint.read_info(two / "model")
    assert info.trained == {"stage1": STEPS} and info.parts.keys() == tiny.vino().parts.keys()
    abstract = tiny.vino().abstract
    ours, theirs = (by_path(jax.device_get(model_checkpoint.restore(folder / "model", abstract))) for folder in (two, one))
    for path in ours:
        assert np.abs(ours[path] - theirs[path]).max() < tolerances.MESH_LOSS_ABS, path


def test_sigterm_to_one_process_stops_all_at_one_step(stopped, two):
    last = max(step for _, step in losses(stopped))
    assert 2 < last < STEPS and complete_steps(stopped / "checkpoints" / "stage1") == [last]
    assert losses(stopped).items() < losses(two).items()
    assert not (stopped / "model").exists()


@pytest.mark.parametrize("count", [2, 1, 4])
def test_a_stopped_run_goes_on_with_any_number_of_processes(files, stopped, two, tmp_path, count):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    codes, said = ended(start(files, workdir, count))
    assert codes == [0] * count, said
    again, unbroken, before = losses(workdir), losses(two), losses(stopped)
    assert again.keys() == unbroken.keys() and before.items() < again.items()
    if count == 2:
        assert again == unbroken  # to the bit
        assert "stage1: 1 of 1 programs came from the compile cache" in said[0]
    assert max(abs(again[key] - unbroken[key]) for key in again) < tolerances.MESH_LOSS_ABS
    records = [json.loads(line) for line in (workdir / "goodput.jsonl").read_text().splitlines()]
    resumed = next(i for i, record in enumerate(records[1:], 1) if "resume_at" in record)
    assert records[resumed]["resume_at"] == {"stage1": max(step for _, step in before)} and records[resumed]["restart"] > 0
    assert {"start", "compile", "data", "save", "step"} <= {kind for record in records[resumed:] for kind in record}
    assert "goodput " in said[0] and records[-1]["finished"]
    assert all("goodput" not in text for text in said[1:])
