"""What a resumed run leaves of the records of the run before."""
import json
import struct

import numpy as np
import pytest
from tensorboardX.proto.event_pb2 import Event

from vino_jax.train.logging import MetricWriter

STEPS = {"stage1": 3, "stage2": 8}


def events(folder):
    """Of the one TensorBoard file: (length, crc, message, crc) records."""
    (path,) = folder.glob("events.*")
    data = path.read_bytes()
    while data:
        size = struct.unpack("<Q", data[:8])[0]
        yield Event.FromString(data[12:12 + size])
        data = data[16 + size:]


def write(folder, resume_at, records):
    with MetricWriter(folder, STEPS, resume_at=resume_at) as writer:
        for stage, step in records:
            writer.write(stage, step, {"loss": float(step), "loss_t2v": None})
            writer.write(stage, step, {"loss": -float(step)}, file="held_out")
            writer.picture(stage, step, "picture", np.zeros((2, 2, 3), np.uint8))


def test_no_step_stands_twice(tmp_path):
    write(tmp_path, {"stage1": 0, "stage2": 0}, [("stage1", 3), ("stage2", 2), ("stage2", 4), ("stage2", 5)])
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"stage": "stage2", "st')  # a kill cut it
    for path in (tmp_path / "tensorboard").iterdir():
        path.unlink()  # the next file could have its name, which is of the second
    write(tmp_path, {"stage1": 3, "stage2": 4}, [("stage2", 5)])
    for name in ("metrics", "held_out"):
        records = [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]
        assert [(r["stage"], r["step"], r["total_step"]) for r in records] == [
            ("stage1", 3, 3), ("stage2", 2, 5), ("stage2", 4, 7), ("stage2", 5, 8)]
    found = list(events(tmp_path / "tensorboard"))
    assert [e.step for e in found if e.HasField("session_log")] == [8]  # TensorBoard forgets what was written from that step on
    tags = [(value.tag, e.step) for e in found for value in e.summary.value]
    assert tags == [("stage2/loss", 8), ("stage2/held_out/loss", 8), ("stage2/picture", 8)]


def test_a_stage_that_begins_again_measures_its_start_again(tmp_path):
    for _ in range(2):  # killed before the first checkpoint
        write(tmp_path, {"stage1": 0, "stage2": 0}, [("stage1", 0), ("stage1", 1)])
    for name in ("metrics", "held_out"):
        assert [json.loads(line)["step"] for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()] == [0, 1]


def test_a_kill_while_records_are_dropped_loses_none(tmp_path, monkeypatch):
    write(tmp_path, {}, [("stage1", 1), ("stage1", 2)])
    before = (tmp_path / "metrics.jsonl").read_text()

    def killed(*paths):
        raise KeyboardInterrupt

    monkeypatch.setattr("vino_jax.checkpoint.atomic.os.replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path, {"stage1": 1}, [])
    assert (tmp_path / "metrics.jsonl").read_text() == before
