"""Steps of a training run: saved in the background by Orbax, the last few kept, restored onto any mesh to the bit.

A step is stored as a flat table {path of the leaf in the state's tree: array}, so that what holds the leaves (optax's
NamedTuples, dataclasses, dicts) is taken from the abstract state at restore and need not be readable from disk.
"""
import functools
import gc
import json
import math
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp

from vino_jax.checkpoint.atomic import barrier
from vino_jax.checkpoint.model import GROUP_BYTES
from vino_jax.checkpoint.storage import reading, writing
from vino_jax.errors import UserError

_STATE = "state"
_DONE = "_CHECKPOINT_METADATA"  # the file that a complete step holds


def complete_steps(directory: str | Path) -> list[int]:
    """All complete steps of a run's checkpoints, oldest first, without opening them; none where there is no such directory."""
    return sorted(int(file.parent.name) for file in Path(directory).glob(f"*/{_DONE}") if file.parent.name.isdigit())


def read_leaves(directory: str | Path, step: int, paths: Sequence[str]) -> Iterator[tuple[str, np.ndarray]]:
    """(dotted path in the state, array on the host) of some arrays of a complete step, about GROUP_BYTES at a time.

    Raises UserError where the step is damaged, or gone, as the run that writes it keeps its last few alone.
    """
    folder = Path(directory).absolute() / str(step)
    whole = functools.partial(reading, str(folder), "a run removes its older steps, so begin again where it is going on")
    with whole():
        stored = ocp.checkpointables_metadata(folder).metadata[_STATE]
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    targets = {path: jax.ShapeDtypeStruct(stored[path].shape, stored[path].dtype, sharding=cpu) for path in paths}
    ends = np.cumsum([math.prod(target.shape) * target.dtype.itemsize for target in targets.values()]) // GROUP_BYTES
    for group in np.unique(ends):
        wanted = {path: target for (path, target), end in zip(targets.items(), ends) if end == group}
        with whole():
            read = ocp.load_checkpointables(folder, {_STATE: dict.fromkeys(stored, ocp.PLACEHOLDER) | wanted})
        yield from ((path, np.asarray(read[_STATE].pop(path))) for path in wanted)
        gc.collect()  # see iter_arrays of checkpoint/model.py


class RunCheckpoints:
    """The step checkpoints of one run, for the run that writes them: on opening, what a killed save left behind is removed.

    keep: how many of the last steps stay on disk. When to save is the caller's to say.
    """

    def __init__(self, directory: str | Path, keep: int):
        if keep < 1:
            raise UserError(f"checkpoints: keep ({keep}) must be at least 1")
        self.directory = Path(directory).absolute()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the checkpoint directory {self.directory}: {error.strerror}") from None
        self._remove_unfinished()
        barrier(f"unfinished steps of {self.directory.name} are removed")  # the others would take them for steps
        context = ocp.Context()
        context.array.saving.use_compression = False  # moments and weights hardly shrink, and zstd is slower than the disk
        self._steps = ocp.training.Checkpointer(
            self.directory,
            context=context,
            preservation_policy=ocp.training.preservation_policies.LatestN(keep),
            cleanup_tmp_directories=True,
        )

    def save(self, step: int, state: Any, meta: Mapping[str, Any]) -> bool:
        """Start saving `state` (tree of jax arrays) as `step`, on every host; nothing where that step or a later one is there.

        Returns whether a save was started. The arrays may be donated as soon as this returns. meta: JSON values.
        An error of the save before comes out here, in wait() or in close(); where the disk did not take it, a UserError.
        """
        newest = self.latest()
        if newest is not None and step <= newest:
            return False
        meta = json.loads(json.dumps(dict(meta)))  # refuse what is no JSON now, not in the background
        with writing(str(self.directory)):
            self._steps.save_checkpointables_async(step, {_STATE: _filled(_flat(state))}, force=True, custom_metadata={"meta": meta})
        return True

    def latest(self) -> int | None:
        """The newest complete step, or None."""
        steps = self.steps()
        return steps[-1] if steps else None

    def steps(self) -> list[int]:
        """All complete steps, oldest first."""
        return [checkpoint.step for checkpoint in self._steps.checkpoints]

    def meta(self, step: int) -> dict[str, Any]:
        """What save() was given as meta."""
        self._check(step)
        return self._steps.metadata(step).custom_metadata["meta"]

    def restore(self, step: int, abstract: Any, *, partial: bool = False) -> tuple[Any, dict[str, Any]]:
        """(state, meta) of `step`; the state has the structure of `abstract`, a tree of ShapeDtypeStructs whose shardings say
        where each array goes (the default device where there is none).

        partial: `abstract` is part of the state; the other arrays are not read. Raises UserError where the step is absent or its
        arrays are not those of `abstract`, naming the first difference, or is damaged.
        """
        self._check(step)
        wanted = _flat(abstract)
        whole = functools.partial(reading, f"step {step} of {self.directory}",
                                  "put it back, or, where no later stage has begun, remove its folder to go on from the step before")
        with whole():
            stored = self._steps.checkpointables_metadata(step).metadata[_STATE]
        rest = [path for path in stored if partial and path not in wanted]
        self._compare(step, _filled(wanted), {path: leaf for path, leaf in stored.items() if path not in rest})
        targets = {path: _target(leaf) for path, leaf in _filled(wanted).items()} | dict.fromkeys(rest, ocp.PLACEHOLDER)
        with whole():
            arrays = self._steps.load_checkpointables(step, {_STATE: targets})[_STATE] if targets else {}
        leaves = [arrays[path] if path in arrays else jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in wanted.items()]
        return jax.tree.unflatten(jax.tree.structure(abstract), leaves), self.meta(step)

    def wait(self) -> None:
        """Return when nothing is being saved any more; raises what the save raised."""
        with writing(str(self.directory)):
            self._steps.wait()

    def close(self) -> None:
        """Finish the save under way and release the directory."""
        with writing(str(self.directory)):
            self._steps.close()

    def __enter__(self) -> "RunCheckpoints":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, *_: object) -> None:
        try:
            self.close()
        except Exception as later:
            if error is None:
                raise
            error.add_note(f"and the last save failed: {later}")  # it may be why, but it is not what ended the run

    def _remove_unfinished(self) -> None:
        """Steps that were cut off while they were deleted; Orbax itself removes those cut off while they were written."""
        if jax.process_index() == 0:
            for folder in self.directory.iterdir():
                if folder.name.isdigit() and not (folder / _DONE).exists():
                    shutil.rmtree(folder, ignore_errors=True)

    def _check(self, step: int) -> None:
        if step not in self.steps():
            raise UserError(f"{self.directory} has no complete step {step}; complete: {self.steps() or 'none'}")

    def _compare(self, step: int, wanted: Mapping[str, Any], stored: Mapping[str, Any]) -> None:
        where = f"step {step} of {self.directory} was written by another setup: "
        for path in [*wanted, *stored]:
            if path not in stored:
                raise UserError(f"{where}it lacks {path}")
            if path not in wanted:
                raise UserError(f"{where}it holds {path}, which this run does not have")
            ours, theirs = wanted[path], stored[path]
            if tuple(ours.shape) != tuple(theirs.shape) or ours.dtype != theirs.dtype:
                raise UserError(f"{where}{path} is {theirs.dtype}{list(theirs.shape)} there, {ours.dtype}{list(ours.shape)} here")


def _flat(tree: Any) -> dict[str, Any]:
    """{dotted path: leaf} in the order of jax.tree.leaves."""
    leaves = jax.tree.leaves_with_path(tree)
    flat = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(flat) != len(leaves):
        raise ValueError("two leaves of the state have the same path")
    return flat


def _filled(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Without the arrays that have no elements, which Orbax cannot store and which need no storing."""
    return {path: leaf for path, leaf in flat.items() if leaf.size}


def _target(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)
