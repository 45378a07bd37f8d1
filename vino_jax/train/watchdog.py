"""The end of a run that hangs: a collective whose partner is gone, or a disk that does not answer, would wait for ever."""
import contextlib
import faulthandler
import os
import sys
import threading
import time
from collections.abc import Iterator

EXIT_HUNG = 43  # job sets restart on it


class Watchdog:
    """A thread that ends this process with EXIT_HUNG, after it has written what every thread does to stderr, where `beat` does not come
    for `seconds`. 0: never. Time in `paused` does not count."""

    def __init__(self, seconds: float):
        self._seconds, self._last, self._pauses = seconds, time.monotonic(), 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True) if seconds else None

    def beat(self) -> None:
        """A step came to its end."""
        self._last = time.monotonic()

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What takes its time in this block hangs not."""
        self._pauses += 1
        try:
            yield
        finally:
            self.beat()
            self._pauses -= 1

    def _watch(self) -> None:
        while not self._closed.wait(min(self._seconds / 4, 10)):
            quiet = time.monotonic() - self._last
            if not self._pauses and quiet > self._seconds:
                print(f"error: no step came to its end for {quiet:.0f} s (config key log.hang_minutes): every thread's stack follows",
                      file=sys.stderr, flush=True)
                faulthandler.dump_traceback(sys.__stderr__, all_threads=True)
                os._exit(EXIT_HUNG)  # the main thread may hang where no exception reaches it

    def __enter__(self) -> "Watchdog":
        self.beat()
        if self._thread:
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        if self._thread:
            self._thread.join()
