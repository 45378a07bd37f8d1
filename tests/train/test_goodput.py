"""Goodput: every second has a kind, over restarts too."""
import json
from types import SimpleNamespace

import pytest

from vino_jax.train import goodput
from vino_jax.train.goodput import Goodput, process_start


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0, time=lambda: clock.now, perf_counter=lambda: clock.now)
    monkeypatch.setattr(goodput, "time", clock)
    return clock


def spend(clock, run, **kinds):
    for kind, seconds in kinds.items():
        with run.spend(kind):
            clock.now += seconds


def test_blocks_within_blocks_and_what_is_between_them(clock):
    run = Goodput(begun=clock.now - 5)
    clock.now += 2
    with run.spend("step"):
        clock.now += 10
        spend(clock, run, save=3, preview=4)
        clock.now += 10
        for _ in run.waiting(iter("ab")):
            clock.now += 1
    clock.now += 1
    assert run.summary() == "goodput 59.5 % of 37 s: start 8 s, save 3 s, preview 4 s"
    assert run.total["step"] == 22 and run.total["data"] == 0


def test_waiting_for_items_is_data(clock):
    def slow():
        for item in range(3):
            clock.now += 7
            yield item

    run = Goodput()
    with run.spend("step"):
        assert list(run.waiting(slow())) == [0, 1, 2]
    assert run.total["data"] == 21 and run.total["step"] == 0


def test_steps_that_a_restart_lost_are_no_goodput(clock, tmp_path):
    path = tmp_path / "goodput.jsonl"
    run = Goodput(path, begun=clock.now, resume_at={"a": 0})
    for step in (10, 20, 30):
        spend(clock, run, step=100, save=1)
        run.write("a", step)
    path.write_text(path.read_text() + '{"time": 13')  # the kill cut a line
    clock.now += 50
    run = Goodput(path, begun=clock.now, resume_at={"a": 20, "b": 0})
    assert {kind: seconds for kind, seconds in run.total.items() if seconds} == {"restart": 50, "step": 200, "redone": 100, "save": 3}
    spend(clock, run, start=5, step=100)
    run.write("a", 30)
    spend(clock, run, step=40)
    run.write("b", 5)
    run.finish()
    assert run.summary() == "goodput 68.3 % of 498 s: restart 50 s, start 5 s, save 3 s, redone 100 s"
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert records[-2] == {"time": 1498.0, "stage": "b", "step_done": 5, "step": 40.0}
    clock.now += 1e6
    again = Goodput(path, begun=clock.now, resume_at={"a": 30, "b": 5})
    assert again.total == run.total  # what passed after the end is no loss, and nothing is redone twice


def test_the_start_of_this_process():
    now = goodput.time.time()
    assert now - 24 * 3600 < process_start() <= now
