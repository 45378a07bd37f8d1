"""A run's directory: how far its stages have come, and which configs may go on there."""
import dataclasses
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from vino_jax.checkpoint.atomic import write_text
from vino_jax.checkpoint.run import complete_steps
from vino_jax.errors import UserError
from vino_jax.nn.module import by_path
from vino_jax.settings import read_json
from vino_jax.train.config import RunConfig

# keys, and starts of keys, that change no number of a run
FREE = ("log/", "mesh/", "runtime/remat", "runtime/attention", "data/threads", "data/workers", "data/prefetch", "data/precomputed",
        "data/held_out")
IMPORTED = ("init/", "model/")  # those that init/ was made by
TOLD = 5  # differences that a message names


def checkpoints_folder(workdir: Path, stage: str) -> Path:
    return workdir / "checkpoints" / stage


def is_run(directory: Path) -> bool:
    """Whether it is a training run's directory."""
    return (directory / "config.json").is_file() and "stages" in read_json(directory / "config.json")


def initial_folder(workdir: Path, config: RunConfig) -> Path:
    """The model checkpoint that the run starts from: the config's, or that of its imported parts."""
    return Path(config.init.checkpoint) if config.init.checkpoint else workdir / "init"


def steps_done(workdir: Path, stages: Iterable[str]) -> dict[str, int]:
    """Steps of the newest complete checkpoint by stage, 0 where a stage has none."""
    return {name: max(complete_steps(checkpoints_folder(workdir, name)), default=0) for name in stages}


def claim(workdir: Path, config: RunConfig) -> None:
    """Make the directory and write config.json, or go on in a directory of the same config.

    Keys of FREE may differ, and the steps of the last stage that has begun may grow, those of later ones change. Nothing binds what
    has not been made: before the first checkpoint only init/ does. Raises UserError naming what differs, or the stage whose checkpoint is
    gone though a later one has begun, and then changes nothing.
    """
    path, new = workdir / "config.json", json.loads(json.dumps(dataclasses.asdict(config)))
    if path.exists():
        old = read_json(path)
        done, imported = steps_done(workdir, sorted({*old.get("stages", {}), *new["stages"]})), (workdir / "init").exists()
        before, now = by_path(old), by_path(new)
        keys = [key for key in sorted(before.keys() | now.keys()) if before.get(key) != now.get(key)]
        different = [f"{key.replace('/', '.')} was {before.get(key)!r}, is {now.get(key)!r}" for key in keys
                     if not _may_differ(key, before.get(key), now.get(key), done, imported)]
        if different:
            more = f" and {len(different) - TOLD} more" if len(different) > TOLD else ""
            raise UserError(f"{workdir} was begun with another config: {'; '.join(different[:TOLD])}{more}; choose another workdir")
        begun = [name for name, step in done.items() if step]
        for name in list(done)[:len(begun)]:
            if not done[name]:  # its records would be dropped, and what it trained be missing
                raise UserError(f"{checkpoints_folder(workdir, name)} has no complete checkpoint, though stage {begun[-1]!r} has begun, which goes "
                                "on from it: put it back, or choose another workdir")
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(new, indent=1))
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None


def _may_differ(key: str, old: Any, new: Any, done: Mapping[str, int], imported: bool) -> bool:
    begun = [name for name, step in done.items() if step]
    if not begun:
        return not (imported and key.startswith(IMPORTED))
    if key == f"stages/{begun[-1]}/steps":
        return None not in (old, new) and new > old
    return bool(key.startswith(FREE) or re.fullmatch("stages/[^/]+/remat/.*", key)
                or key in {f"stages/{name}/steps" for name, step in done.items() if not step})
