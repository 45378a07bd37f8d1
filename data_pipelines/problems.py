"""What becomes of items that cannot be used: the run ends with the first, or goes on and lists them in a file."""
import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from vino_jax.errors import UserError


class Problems:
    """Items that are wrong. A run that must not lose any stops (`file` None); else each goes to `file`, one JSON object
    {"item", "problem"} a line, once however often it is met, by however many processes and runs.
    """

    def __init__(self, file: Path | None = None):
        self.file = file
        self._known: set[str] = set()

    @contextlib.contextmanager
    def of(self, item: str) -> Iterator[None]:
        """What is raised as a UserError inside is a problem of `item`: listed, and the block is left; or raised, with its name."""
        try:
            yield
        except UserError as error:
            self.add(item, str(error))

    def add(self, item: str, problem: str) -> None:
        """Raises UserError, naming the item, where the run must stop."""
        if self.file is None:
            raise UserError(f"{item}: {problem}") from None
        line = json.dumps({"item": item, "problem": problem}, ensure_ascii=True)
        if line not in self._known and line not in self.listed():
            with self.file.open("a") as stream:
                stream.write(line + "\n")  # one write of a short line: lines of several processes do not mix
        self._known.add(line)

    def listed(self) -> list[str]:
        """The lines of the file."""
        return self.file.read_text().splitlines() if self.file is not None and os.path.exists(self.file) else []
