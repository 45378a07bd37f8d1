"""The watchdog: it ends what hangs and says where, and leaves alone what is slow for a reason."""
import subprocess
import sys
import threading

import pytest

from tests.data.folders import ROOT
from tests.train import tiny
from tests.train.test_training import run
from vino_jax.train import watchdog

PROGRAM = '''
import time
from vino_jax.train.watchdog import Watchdog

def stuck_in_a_collective():
    time.sleep(20)

def beating(dog):
    for _ in range(25):
        time.sleep(0.1)
        dog.beat()

def compiling(dog):
    with dog.paused():
        with dog.paused():
            time.sleep(1.2)
        time.sleep(1.2)

with Watchdog({seconds}) as dog:
    {what}
'''


@pytest.mark.parametrize("seconds, what, code", [
    (1.5, "stuck_in_a_collective()", 43), (1.5, "beating(dog)", 0), (1.5, "compiling(dog)", 0), (0, "time.sleep(1.0)", 0)])
def test_only_what_hangs_is_ended(seconds, what, code):
    program = PROGRAM.format(seconds=seconds, what=what)
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == code, done.stderr
    if code:
        assert done.stderr.startswith("error: no step came to its end for ") and "in stuck_in_a_collective" in done.stderr
    else:
        assert done.stderr == ""


def test_a_stage_whose_loader_hangs_is_ended(tmp_path, monkeypatch):
    """Compiling takes longer than is allowed for a step, and does not count."""
    ended, codes = threading.Event(), []

    class Hangs(tiny.Batches):
        def __next__(self):
            step, name, batch = super().__next__()
            if step == 2:
                assert not codes
                assert ended.wait(60)
            return step, name, batch

    monkeypatch.setattr(watchdog.os, "_exit", lambda code: (codes.append(code), ended.set()))
    monkeypatch.setattr(watchdog.faulthandler, "dump_traceback", lambda *_, **__: None)
    run(tmp_path, loader=Hangs, hang_minutes=4 / 60)
    assert codes[0] == 43
