"""Files and folders that are whole or absent: filled under another name, renamed at the end."""
import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import jax
from jax.experimental import multihost_utils

from vino_jax.checkpoint.storage import refusal
from vino_jax.errors import UserError


def write_text(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the former one or this one, never half of it."""
    unfinished = path.with_name(path.name + ".incomplete")
    unfinished.write_text(text)
    os.replace(unfinished, path)


def check_empty(directory: str | Path) -> None:
    """Raises UserError where `directory` exists and is not an empty folder."""
    directory = Path(directory)
    if directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
        raise UserError(f"{directory} already holds something; choose another output or remove it")


@contextlib.contextmanager
def atomic_folder(directory: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """A folder to fill that becomes `directory` when the block ends well and is removed when it does not; on every host.

    replace: what `directory` held before is removed, once the new folder is whole. Raises UserError where `directory` already holds
    something that is not to be replaced, or the disk does not take what is written.
    """
    if not replace:
        check_empty(directory)
    directory = Path(directory).absolute()
    folder, former = (directory.with_name(directory.name + ending) for ending in (".incomplete", ".former"))
    first = jax.process_index() == 0
    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)  # of a run that was killed
            folder.mkdir(parents=True)
        barrier("atomic folder folder")
        yield folder
        barrier("atomic folder written")
        if first:
            shutil.rmtree(former, ignore_errors=True)
            if directory.exists():
                directory.rename(former)  # a folder that holds something cannot be renamed over
            folder.rename(directory)
            shutil.rmtree(former, ignore_errors=True)
        barrier("atomic folder renamed")
    except BaseException as error:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
        if reason := refusal(error):
            raise UserError(f"cannot write {directory}: {reason}") from error
        raise


def barrier(name: str) -> None:
    """Returns when all processes of the run have come here."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)
