"""Folders that are whole or absent: filled under another name, renamed at the end."""
import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from vino_jax.errors import UserError


def check_empty(directory: str | Path) -> None:
    """Raises UserError where `directory` exists and is not an empty folder."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already holds something; choose another output or remove it")


@contextlib.contextmanager
def atomic_folder(directory: str | Path) -> Iterator[Path]:
    """A folder to fill that becomes `directory` when the block ends well and is removed when it does not; on every host.

    Raises UserError where `directory` already holds something or the disk does not take what is written.
    """
    check_empty(directory)
    directory = Path(directory).absolute()
    folder = directory.with_name(directory.name + ".incomplete")
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
        _barrier("folder")
        yield folder
        _barrier("written")
        if first:
            if directory.exists():
                directory.rmdir()
            folder.rename(directory)
        _barrier("renamed")
    except BaseException as error:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, OSError):
            raise UserError(f"cannot write {directory}: {error.strerror or error}") from error
        if "No space left on device" in str(error):  # how tensorstore says it
            raise UserError(f"cannot write {directory}: No space left on device") from error
        raise


def _barrier(name: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"atomic folder {name}")
