"""Files that one process at a time may write beside."""
import contextlib
import fcntl
from collections.abc import Iterator
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
