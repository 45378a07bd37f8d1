"""What becomes of items that cannot be used: the run ends with the first, or goes on and lists them in a file."""
import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

from data_pipelines.processes import locked
from vino_jax.errors import UserError


class Problems:
    """Items that are wrong. A run that must not lose any stops (`file` None); else each goes to `file`, one JSON object
    {"item", "problem"} a line, once however often it is met, by however many processes and runs of this machine.

    Attribute `met`: items that this process has met.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self.met: set[str] = set()
        self._known: set[str] = set()
        self._read = 0  # bytes of the file that are in _known

    @contextlib.contextmanager
    def of(self, item: str) -> Iterator[None]:
        """What is raised as a UserError inside is a problem of `item`: listed, and the block is left; or raised, with its name."""
        try:
            yield
        except UserError as error:
            self.add(item, str(error))

    def add(self, item: str, problem: str) -> None:
        """Raises UserError, naming the item, where the run must stop, and where the list cannot be written."""
        if self.file is None:
            raise UserError(f"{item}: {problem}") from None
        self.met.add(item)
        line = json.dumps({"item": item, "problem": problem})
        if line in self._known:
            return
        try:
            with locked(self.file):  # between reading and writing no other process writes
                with self.file.open("r+b") as stream:
                    stream.seek(self._read)
                    self._known.update(stream.read().decode().splitlines())
                    if line not in self._known:
                        stream.write(line.encode() + b"\n")
                    self._read = stream.tell()
        except OSError as error:
            raise UserError(f"cannot list {item} ({problem}) in {self.file}: {error}") from None
        self._known.add(line)

    def listed(self) -> list[str]:
        """The lines of the file."""
        return self.file.read_text().splitlines() if self.file is not None and self.file.exists() else []
