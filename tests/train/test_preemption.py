"""One stop for all processes: by a store of keys in this process, with threads in the place of processes."""
import random
import signal
import threading
import time
from types import SimpleNamespace

import jax
import pytest

from vino_jax.train import preemption

STEPS, COUNT, ANSWER_MS = 12, 3, 3


class Store:
    """What `Stop` uses of JAX's store of keys."""

    def __init__(self):
        self._changed, self._values = threading.Condition(), {}

    def key_value_set(self, key, value, allow_overwrite=False):
        with self._changed:
            assert allow_overwrite or key not in self._values
            self._values[key] = value
            self._changed.notify_all()

    def blocking_key_value_get(self, key, milliseconds):
        """As over a network: nothing is answered at once, and one who does not wait for the answer is told that there is none."""
        time.sleep(min(milliseconds, ANSWER_MS) / 1000)
        with self._changed:
            if milliseconds < ANSWER_MS or not self._changed.wait_for(lambda: key in self._values, min(milliseconds / 1000, 20)):
                raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")
            return self._values[key]


def run(monkeypatch, asked, at, seed):
    """The step after which each process stops, None where it comes to the end of the stage; process `asked` gets the signal at step `at`.
    Like XLA's, a process's steps are begun before those of others, but no more than two."""
    monkeypatch.setattr(preemption, "_POLL_MS", 5)
    store, rng = Store(), random.Random(seed)
    monkeypatch.setattr(preemption, "processes", SimpleNamespace(store=lambda: store, WAIT_MS=20_000))
    stopped, begun, pauses = [None] * COUNT, [0] * COUNT, [[rng.uniform(0, 0.05) for _ in range(STEPS)] for _ in range(COUNT)]

    def process(index, stop):
        for step in range(1, STEPS + 1):
            while step > min(begun) + 2:
                time.sleep(0.001)
            begun[index] = step
            time.sleep(pauses[index][step - 1])
            if (index, step) == (asked, at):
                stop._ask()
            if stop.now():
                stopped[index] = step
                stop.__exit__(SystemExit)
                return
        stop.__exit__(None)

    stops = []
    for index in range(COUNT):
        monkeypatch.setattr(preemption, "jax", SimpleNamespace(process_index=lambda index=index: index, process_count=lambda: COUNT,
                                                               errors=jax.errors))
        stops.append(preemption.Stop("stage"))
    monkeypatch.setattr(preemption.signal, "signal", lambda *_: None)
    threads = [threading.Thread(target=process, args=(index, stop.__enter__()), daemon=True) for index, stop in enumerate(stops)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
        assert not thread.is_alive()
    return stopped, [stop.late for stop in stops]


@pytest.mark.parametrize("at", [1, 5, STEPS - 2, STEPS - 1, STEPS, None])
def test_all_stop_after_one_step_or_none(at, monkeypatch):
    for seed in range(4):
        stopped, late = run(monkeypatch, seed % COUNT, at, seed)
        assert len(set(stopped)) == 1, stopped
        assert late == [at is not None and stopped[0] is None] * COUNT  # asked too late for a step: all are told at the stage's end
        assert stopped[0] is None if at is None else stopped[0] is None or stopped[0] >= at
        assert stopped[0] is not None or at not in (1, 5)


@pytest.mark.parametrize("kind", [None, ValueError])
def test_asked_while_the_others_answer(kind, monkeypatch):
    """Too late to tell them: as if it came afterwards. Where the stage has failed, its error is what ends the process."""
    raised, store = [], Store()
    monkeypatch.setattr(preemption, "processes", SimpleNamespace(store=lambda: store, WAIT_MS=20_000))
    monkeypatch.setattr(preemption, "jax", SimpleNamespace(process_index=lambda: 0, process_count=lambda: 2, errors=jax.errors))
    monkeypatch.setattr(preemption.signal, "raise_signal", raised.append)
    stop = preemption.Stop("stage").__enter__()
    store.key_value_set("vino_jax/stop/stage/late/1", "0")
    join = stop._thread.join
    stop._thread.join = lambda seconds: (stop._ask(), join(seconds))
    stop.__exit__(kind)
    assert not stop.late and raised == ([signal.SIGTERM] if kind is None else [])
