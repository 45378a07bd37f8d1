"""What every entry point shares: how errors of the user end, and the setup before the first use of a device."""
import argparse
import logging
import os
import sys
from collections.abc import Callable

from vino_jax.errors import UserError


class Parser(argparse.ArgumentParser):
    """An ArgumentParser that ends on a wrong flag as on any other error of the user: a UserError, one line, exit code 2."""

    def error(self, message: str):
        raise UserError(f"{message}; see --help")


def common_setup() -> None:
    """Settings that hold for every command; call it first in main(). It imports no JAX and starts no accelerator.

    TPU pods are joined by `jax.distributed.initialize()` in the commands that run on several hosts, not here.
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
