"""The weights of a training run, finished or not, as an export reads them: a leaf at a time, without the run's mesh."""
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.model import Leaf, ModelInfo, PartInfo, Weights
from vino_jax.checkpoint.run import read_leaves
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.module import by_path
from vino_jax.settings import read_json
from vino_jax.train.config import run_config
from vino_jax.train.initial import fresh_key, held_paths, resolve_model, trained_parts
from vino_jax.train.workdir import checkpoints_folder, initial_folder, steps_done


def run_weights(workdir: Path, *, average: bool) -> Weights:
    """What `workdir`/model would hold if the run ended at its newest checkpoint: what its stages have trained, of the last one that has
    begun the average where it keeps one (`average`), else the raw parameters; for the rest what the run started from.

    Raises UserError where the directory holds no run, or no checkpoint yet.
    """
    config = run_config(read_json(workdir / "config.json"))
    done = steps_done(workdir, config.stages)
    begun = [stage for stage in config.stages.values() if done[stage.name]]
    if not begun:
        raise UserError(f"{workdir} has no complete checkpoint yet; wait for the first, or export what it starts from")
    initial = initial_folder(workdir, config)
    vino, start = Vino(resolve_model(initial, config.model), config.runtime), model_checkpoint.read_info(initial)
    trained, held = trained_parts(vino, list(config.stages.values())), held_paths(vino, begun)
    averaged = average and begun[-1].ema > 0

    def read(part: str, paths: list[str]) -> Iterator[tuple[str, np.ndarray]]:
        for stage in sorted({held[f"{part}/{path}"] for path in paths}):
            kind = "ema" if averaged and stage == begun[-1].name else "trainable"
            names = {".".join((kind, part, *path.split("/"))): path for path in paths if held[f"{part}/{path}"] == stage}
            for name, array in read_leaves(checkpoints_folder(workdir, stage), done[stage], list(names)):
                yield names[name], array

    def arrays(part: str) -> Iterator[tuple[str, np.ndarray]]:
        leaves = by_path(vino.abstract[part])
        ours = [path for path, leaf in leaves.items() if f"{part}/{path}" in held and leaf.size]
        yield from read(part, ours)
        if part in start.parts:
            rest = model_checkpoint.iter_arrays(initial, part, start, skip=ours)
            yield from ((path, array.astype(np.float32) if part in trained else array) for path, array in rest)
        elif len(ours) < len(leaves):
            fresh = by_path(jax.jit(lambda key: vino.init(key, (part,)))(fresh_key(config.seed))[part])
            yield from ((path, np.asarray(fresh[path])) for path in leaves if path not in ours)

    parts = {}
    for part, tree in vino.abstract.items():
        known = start.parts.get(part)
        if part not in trained and known:
            parts[part] = known
            continue
        leaves = {path: Leaf(tuple(leaf.shape), "float32", -1) for path, leaf in by_path(tree).items()}
        parts[part] = PartInfo(str(workdir), "", sum(leaf.size for leaf in jax.tree.leaves(tree)), "float32", leaves)
    info = ModelInfo(vino.config, parts, config.sampling, done)
    processor = Path(config.data.processor) if config.data.processor else initial / "processor"
    return Weights(info, arrays, lambda part: model_checkpoint.read_left_out(initial, part), processor)
