"""Processes of one machine that work together: locks between them, and children that end with their parent."""
import contextlib
import fcntl
import multiprocessing
import os
import threading
from collections.abc import Iterator
from multiprocessing.connection import wait
from pathlib import Path

from vino_jax.errors import UserError


@contextlib.contextmanager
def locked(file: Path, taken: str = "") -> Iterator[None]:
    """Holds a lock on `file`, which is made. taken: what is raised, as a UserError, where another process holds it; "": wait for it.

    The system lets go of it when the process ends, however it ends. Some network disks know no locks between machines.
    """
    with file.open("a") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (fcntl.LOCK_NB if taken else 0))
        except BlockingIOError:
            raise UserError(taken) from None
        yield


def end_with_parent() -> None:
    """Called in a child of multiprocessing: it ends when its parent does, however that ends. Elsewhere it does nothing."""
    parent = multiprocessing.parent_process()
    if parent:
        threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()
