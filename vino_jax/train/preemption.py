"""Stopping on SIGTERM, at one step on all processes of a run, whichever of them got it.

JAX has such a service (multihost_utils.reached_preemption_sync_point), but it wants numbers that only grow, and Orbax hands it the
steps of a stage at every save: in the second stage the two would be at odds and the stop would be missed.
"""
import signal
import threading

import jax

from vino_jax import processes

EXIT_PREEMPTED = 42  # job sets restart on it
_POLL_MS = 500
_ANSWER_MS = 60_000


class Preempted(SystemExit):
    """SIGTERM arrived and the step was saved; exits with EXIT_PREEMPTED."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


class Stop:
    """Whether to stop now: asked once after every step, with the same answer on all processes. Restores the former handler afterwards.

    No step waits for other processes. Where one was asked to stop, all tell how many steps they have begun, held at their next question
    for as long as that takes, and stop after the first step that none has begun. stage: its name, of which a run has one.
    """

    def __init__(self, stage: str):
        self._stage, self._asked, self._count, self._last = stage, False, 0, None
        self._deciding, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._agree, name="stop", daemon=True) if jax.process_count() > 1 else None

    def __enter__(self) -> "Stop":
        self._former = signal.signal(signal.SIGTERM, self._ask)
        if self._thread:
            self._thread.start()
        return self

    def _ask(self, *_: object) -> None:
        self._asked = True

    def now(self) -> bool:
        """Whether the step that was just begun is the last one."""
        with self._deciding:
            self._count += 1
            return self._count == self._last if self._thread else self._asked

    def _agree(self) -> None:
        key, store = f"vino_jax/stop/{self._stage}", processes.store()
        while not self._closed.is_set():
            if self._asked:
                store.key_value_set(f"{key}/asked", "", allow_overwrite=True)
            try:
                store.blocking_key_value_get(f"{key}/asked", _POLL_MS)
            except jax.errors.JaxRuntimeError:  # nobody was asked
                self._closed.wait(0.05)
                continue
            with self._deciding:
                store.key_value_set(f"{key}/count/{jax.process_index()}", str(self._count))
                if processes.is_first():
                    counts = [int(store.blocking_key_value_get(f"{key}/count/{i}", _ANSWER_MS)) for i in range(jax.process_count())]
                    store.key_value_set(f"{key}/last", str(max(counts) + 1))
                self._last = int(store.blocking_key_value_get(f"{key}/last", _ANSWER_MS))
            return

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGTERM, self._former)
        self._closed.set()
        if self._thread:
            self._thread.join()
