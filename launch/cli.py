"""What every entry point shares: how errors of the user end, and the setup before the first use of a device."""
import argparse
import logging
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from vino_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends on a wrong flag as on any other error of the user: a UserError, one line, exit code 2.

    Its flags of type Path are read by `local_path`; so are those of its subcommands.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.register("type", Path, local_path)

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def local_path(text: str) -> Path:
    """The path. Raises UserError for an address such as gs://bucket/run, of which pathlib would make the local folder gs:/bucket/run."""
    if "://" in text:
        raise UserError(f"{text} is no local path: files are read and written on this machine's disks alone; mount or copy what lies elsewhere")
    return Path(text)


def make_output(folder: Path) -> None:
    """Make the folder of a command's results. Raises UserError, before hours of work are lost, where nothing can be written to it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise UserError(f"cannot write to the folder {folder}: {error.strerror}") from None


def common_setup() -> None:
    """Settings that hold for every command; call it first in main(). It imports no JAX and starts no accelerator.

    Every command runs as one process: none calls `jax.distributed.initialize()` yet.
    """
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # XLA's C++ notes would drown the one line that matters
    logging.getLogger("absl").setLevel(logging.WARNING)  # Orbax tells of every array it writes at INFO


def run(main: Callable[[], int | None]) -> None:
    """Run an entry point and exit: 0 (or what main returns), 2 with one line `error: ...` for a UserError, 130 for Ctrl-C.

    Anything else is a bug and keeps its traceback.
    """
    common_setup()
    try:
        code = main() or 0
    except UserError as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        code = 130
    sys.exit(code)
