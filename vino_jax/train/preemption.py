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


class Preempted(SystemExit):
    """SIGTERM arrived and the step was saved; exits with EXIT_PREEMPTED."""

    def __init__(self):
        super().__init__(EXIT_PREEMPTED)


class Stop:
    """Whether to stop now: asked once after every step, with the same answer on all processes. Restores the former handler afterwards.

    No step waits for other processes. Where one was asked to stop, all tell how many steps they have begun, held at their next question
    for as long as that takes, and stop after the first step that none has begun. Where the stage ends before, `late` says, once this context
    is left, that somebody was asked; a process that is asked later than it could tell the others is ended as by a signal that comes
    afterwards. stage: its name.
    """

    def __init__(self, stage: str):
        self._key, self._asked, self._count, self._last = f"vino_jax/stop/{stage}", False, 0, None
        self._index, self._processes, self._store = jax.process_index(), jax.process_count(), processes.store()
        self.late = False
        self._deciding, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._agree, name="stop", daemon=True) if self._processes > 1 else None

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
        while not self._closed.is_set():
            if self._asked:
                self._set("asked", "")
            if not self._is_asked():
                self._closed.wait(0.05)
                continue
            with self._deciding:
                self._store.key_value_set(f"{self._key}/count/{self._index}", str(self._count))
                if self._index == 0:
                    counts = [self._answer(f"count/{i}") for i in range(self._processes)]
                    self._store.key_value_set(f"{self._key}/last", str(max(counts) + 1))
                self._last = self._answer("last")
            return

    def _set(self, name: str, value: str) -> None:
        self._store.key_value_set(f"{self._key}/{name}", value, allow_overwrite=True)

    def _is_asked(self) -> bool:
        """Whether a process has told that it was asked; "no" may mean that the answer took too long, so it has to be asked again."""
        try:
            self._store.blocking_key_value_get(f"{self._key}/asked", _POLL_MS)
        except jax.errors.JaxRuntimeError:
            return False
        return True

    def _answer(self, name: str) -> int:
        return int(self._store.blocking_key_value_get(f"{self._key}/{name}", processes.WAIT_MS))

    def __exit__(self, kind: type | None, *_: object) -> None:
        told = self._asked
        if self._thread:
            if kind is None:  # one that is held at its last step waits for the answers of all, so nobody leaves before all are here
                self._set(f"late/{self._index}", str(int(told)))
                self.late = any([self._answer(f"late/{i}") for i in range(self._processes)])
            self._closed.set()
            self._thread.join(10 * _POLL_MS / 1000)
        else:
            self.late = told
        signal.signal(signal.SIGTERM, self._former)
        if kind is None and self._asked and not told:  # while the others answered
            signal.raise_signal(signal.SIGTERM)
