"""The weights of a training run, finished or not, as an export reads them: a leaf at a time, without the run's mesh."""
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import jax
import numpy as np

from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.model import Leaf, ModelInfo, PartInfo, Weights
from vino_jax.checkpoint.run import read_leaves
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.lora import LowRank, kernel_of, low_ranks, merged, within
from vino_jax.nn.module import by_path
from vino_jax.settings import read_json
from vino_jax.train.config import run_config
from vino_jax.train.initial import fresh_key, held_paths, resolve_model, trained_parts, training_model
from vino_jax.train.workdir import checkpoints_folder, initial_folder, steps_done


class _Run:
    """A run and the newest checkpoint of the last stage that has begun."""

    def __init__(self, workdir: Path, *, average: bool, done: Mapping[str, int] | None = None):
        """average, done: see `run_weights`. Raises UserError where the directory holds no run, or no checkpoint yet."""
        self.config = run_config(read_json(workdir / "config.json"))
        self.done = steps_done(workdir, self.config.stages) if done is None else dict(done)
        begun = [stage for stage in self.config.stages.values() if self.done[stage.name]]
        if not begun:
            raise UserError(f"{workdir} has no complete checkpoint yet; wait for the first, or export what it starts from")
        self.initial = initial_folder(workdir, self.config)
        stages = list(self.config.stages.values())
        self.vino = training_model(resolve_model(self.initial, self.config.model), self.config.runtime, stages)
        self.trained, self.held = trained_parts(self.vino, stages), held_paths(self.vino, begun)
        self._workdir, self._averaged = workdir, begun[-1].name if average and begun[-1].ema > 0 else ""

    def read(self, paths: Iterable[str]) -> Iterator[tuple[str, np.ndarray]]:
        """(path, array) of parameters that a stage that has begun trains."""
        paths = list(paths)
        for stage in sorted({self.held[path] for path in paths}):
            kind = "ema" if stage == self._averaged else "trainable"
            names = {".".join((kind, *path.split("/"))): path for path in paths if self.held[path] == stage}
            for name, array in read_leaves(checkpoints_folder(self._workdir, stage), self.done[stage], list(names)):
                yield names[name], array

    def adapters(self) -> dict[str, LowRank]:
        """{path of a kernel: adapter} of those that are trained so far."""
        leaves = by_path(self.vino.abstract)
        return low_ranks(dict(self.read(path for path in self.held if kernel_of(path) and leaves[path].size)), self.vino.adapters)


def run_adapters(workdir: Path, *, average: bool) -> dict[str, LowRank]:
    """{path of a kernel: adapter} of a run, finished or not; average: see `run_weights`. Raises UserError where there are none."""
    found = _Run(workdir, average=average).adapters()
    if not found:
        raise UserError(f"{workdir} has trained no adapters: none of its stages that have begun has 'lora'")
    return found


def run_weights(workdir: Path, *, average: bool, done: Mapping[str, int] | None = None) -> Weights:
    """What `workdir`/model would hold if the run ended at its newest checkpoint: what its stages have trained, of the last one that has
    begun the average where it keeps one (`average`), else the raw parameters; for the rest what the run started from.

    done: steps by stage of checkpoints that were the newest before, for a run that goes on. Raises UserError where the directory holds no
    run, or no checkpoint yet, and, when they are read, where weights are gone or damaged.
    """
    run = _Run(workdir, average=average, done=done)
    vino, initial, start = Vino(run.vino.config, run.config.runtime), run.initial, model_checkpoint.read_info(run.initial)
    low_rank = run.adapters()
    adapted = {path.split("/")[0] for path in run.vino.adapters}

    def unmerged(part: str) -> Iterator[tuple[str, np.ndarray]]:
        leaves = by_path(vino.abstract[part])
        ours = [path for path, leaf in leaves.items() if f"{part}/{path}" in run.held and leaf.size]
        yield from ((path.removeprefix(f"{part}/"), array) for path, array in run.read(f"{part}/{path}" for path in ours))
        if part in start.parts:
            rest = model_checkpoint.iter_arrays(initial, part, start, skip=ours)
            yield from ((path, array.astype(np.float32) if part in run.trained | adapted else array) for path, array in rest)
        elif len(ours) < len(leaves):
            fresh = by_path(jax.jit(lambda key: vino.init(key, (part,)))(fresh_key(run.config.seed))[part])
            yield from ((path, np.asarray(fresh[path])) for path in leaves if path not in ours)

    parts = {}
    for part, tree in vino.abstract.items():
        known = start.parts.get(part)
        if part not in run.trained | adapted and known:
            parts[part] = known
            continue
        leaves = {path: Leaf(tuple(leaf.shape), "float32", -1) for path, leaf in by_path(tree).items()}
        parts[part] = PartInfo(str(workdir), "", sum(leaf.size for leaf in jax.tree.leaves(tree)), "float32", leaves)
    info = ModelInfo(vino.config, parts, run.config.sampling, run.done)
    processor = Path(run.config.data.processor) if run.config.data.processor else initial / "processor"
    return Weights(info, lambda part: merged(unmerged(part), within(part, low_rank)),
                   lambda part: model_checkpoint.read_left_out(initial, part), processor)
