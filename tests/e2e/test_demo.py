"""The demo's own parts; the whole of it runs in CI (`make demo DEMO_FLAGS=--short`)."""
import json
import signal

import pytest

from configs import shapes, shapes_no_stage1
from data_pipelines.tasks import read_tasks
from launch import demo
from launch.config import load_config
from vino_jax.batch import TASKS
from vino_jax.errors import UserError
from vino_jax.train.config import run_config


def test_task_file_is_read_without_a_problem(tmp_path):
    path = demo.write_task_file(tmp_path)
    tasks, problems = read_tasks(path, tmp_path)
    assert not problems and [t.task for t in tasks] == list(TASKS)


def test_run_without_stage1_has_as_many_steps():
    full, without = (c.get_config().stages for c in (shapes, shapes_no_stage1))
    assert "stage1" not in without and sum(s.steps for s in without.values()) == sum(s.steps for s in full.values())
    run_config(load_config(str(demo.ROOT / demo.WITHOUT_STAGE1), {}))


def test_run_is_stopped_once_a_little_after_a_checkpoint(tmp_path, capsys):
    signals = []
    process = type("Process", (), {"send_signal": staticmethod(signals.append)})

    def record(stage, step):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"stage": stage, "step": step, "loss": 1.0, "samples_a_second": 5.0}) + "\n")

    watch = demo.Watch(tmp_path, stop=True)
    watch(process)
    for stage, step in (("stage1", 110), ("stage2", 90)):
        record(stage, step)
        watch(process)
    saved = tmp_path / "checkpoints" / demo.STOPPED_IN / "100"
    saved.mkdir(parents=True)
    record("stage2", 110)
    watch(process)
    assert not signals  # that checkpoint is not complete yet
    (saved / "_CHECKPOINT_METADATA").touch()
    watch(process)
    watch(process)
    assert signals == [signal.SIGTERM] and "after the checkpoint of step 100" in capsys.readouterr().out


def test_failing_command_is_told_with_the_end_of_its_log(tmp_path, monkeypatch):
    (tmp_path / "failing.py").write_text("import sys; print('the reason'); sys.exit(3)")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    made = demo.Demo(tmp_path, demo.SHORT)
    code = made.command("failing", log="sample")
    with pytest.raises(UserError, match="launch.sample ended with 3; .*: the reason"):
        made.done(code, "sample")
    (tmp_path / "endless.py").write_text("import time; time.sleep(600)")
    with pytest.raises(UserError, match="launch.sample ended with 3; .*: the reason"):  # what runs beside it ends too
        made.command("endless", log="evaluate")


def test_short_and_full_demo_do_not_mix(tmp_path):
    demo.same_as_before(tmp_path / "out", short=True)
    demo.same_as_before(tmp_path / "out", short=True)
    with pytest.raises(UserError, match="holds a short demo"):
        demo.same_as_before(tmp_path / "out", short=False)
