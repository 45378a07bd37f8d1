"""The parameters that a run starts from: parts of a model checkpoint, straight onto the mesh, fresh ones for the rest, and of a run
that goes on what its finished stages left."""
import dataclasses
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.lora import kernel_of
from vino_jax.nn.module import Params, by_path
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig, build
from vino_jax.sharding.resolve import shardings
from vino_jax.train.stage import StageConfig, adapters, merge, rates, split

_FRESH = np.uint32(2**32 - 1)  # folded into the seed's key for fresh parameters; its folds by step, which none reaches, are stage 1's


def resolve_model(directory: str | Path, given: Mapping[str, Any]) -> VinoConfig:
    """The architecture of a checkpoint, with what a config's `model` table gives for parts that the checkpoint lacks.

    Raises UserError where the table contradicts a part that the checkpoint holds, or has an unknown key.
    """
    info = model_checkpoint.read_info(directory)
    held = {"mmdit": "mmdit", "vae": "vae", "vlm": "vlm", "queries": "queries", "connector_ratio": "connector",
            "boundary_tokens": "vae_connector"}
    config = with_model(info.config, given)
    fixed = {field: getattr(config, field) for field, part in held.items() if part in info.parts}
    model_checkpoint.check_config(directory, info, dataclasses.replace(info.config, **fixed))
    return config


def with_model(config: VinoConfig, given: Mapping[str, Any]) -> VinoConfig:
    """The architecture with what a config's `model` table gives. Raises UserError for an unknown key."""
    return build(VinoConfig, _overlay(dataclasses.asdict(config), given), "model.")


def _overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, **{k: _overlay(base[k], v) if isinstance(v, Mapping) and isinstance(base.get(k), Mapping) else v for k, v in over.items()}}


def training_model(config: VinoConfig, runtime: Runtime, stages: Iterable[StageConfig]) -> Vino:
    """The model with the adapters of all `stages`. Raises UserError for adapters that it cannot have."""
    return Vino(config, runtime, adapters=adapters(stages, Vino(config, runtime).abstract))


def trained_parts(vino: Vino, stages: list[StageConfig]) -> set[str]:
    """Parts of which some stage trains something other than adapters."""
    return {path.split("/")[0] for path in held_paths(vino, stages) if kernel_of(path) is None}


def param_structs(vino: Vino, stages: list[StageConfig], mesh: Mesh, rules: dict) -> Params:
    """ShapeDtypeStructs of all parameters, sharded: float32 in parts that some stage trains and in adapters, else in the compute dtype."""
    trained, placed = trained_parts(vino, stages), by_path(shardings(vino.abstract, vino.axes, mesh, rules))

    def struct(path: str, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
        dtype = jnp.float32 if path.split("/")[0] in trained or kernel_of(path) else vino.runtime.compute_dtype
        return jax.ShapeDtypeStruct(shape, dtype, sharding=placed[path])

    structs = model_checkpoint.nested({path: struct(path, leaf.shape) for path, leaf in by_path(vino.abstract).items()})
    return {name: structs[name] for name in vino.parts}


def initial_params(vino: Vino, directory: str | Path, stages: list[StageConfig], mesh: Mesh, rules: dict, seed: int,
                   require: tuple[str, ...], *, skip: Collection[str] = ()) -> Params:
    """All parameters as `param_structs` says, but float32 where they are fresh; without those at the paths of `skip`.

    Raises UserError where the checkpoint lacks a part of `require`.
    """
    info = model_checkpoint.read_info(directory)
    missing = [name for name in require if name not in info.parts]
    if missing:
        raise UserError(f"{directory} has no {', '.join(missing)}, which config key 'init.require' asks for")
    structs = param_structs(vino, stages, mesh, rules)
    leaves = by_path(structs)
    fresh = {path for path in leaves if path.split("/")[0] not in info.parts or kernel_of(path)}
    stored = split(structs, {path: path not in fresh for path in leaves})[0]
    params = model_checkpoint.restore(directory, stored, skip=skip)
    fresh = fresh.difference(skip)
    made = tuple(name for name in vino.parts if any(path.startswith(f"{name}/") for path in fresh))

    def kept(tree: Params) -> Params:
        return split(tree, {path: path in fresh for path in by_path(tree)})[0]

    placed = kept({name: jax.tree.map(lambda struct: struct.sharding, structs[name]) for name in made})
    if placed:
        params = merge(params, jax.jit(lambda key: kept(vino.init(key, made)), out_shardings=placed)(fresh_key(seed)))
    return {name: params[name] for name in vino.parts if name in params}


def fresh_key(seed: int) -> jax.Array:
    """The key of the parameters that no checkpoint gives."""
    return jax.random.fold_in(jax.random.key(seed), _FRESH)


def held_paths(vino: Vino, stages: list[StageConfig]) -> dict[str, str]:
    """{path of a parameter: name of the last of `stages` that trains it}; those that none trains are absent."""
    return {path: stage.name for stage in stages for path, rate in rates(stage, vino.abstract).items() if rate}


def finished_params(params: Params, structs: Params, held: Mapping[str, str], checkpoints: Mapping[str, RunCheckpoints]) -> Params:
    """`params`, and from the checkpoints of finished stages the paths that `held` gives to them. structs: see `param_structs`."""
    wanted: dict[str, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, struct in by_path(structs).items():
        if held.get(path) in checkpoints:
            wanted.setdefault(held[path], {})[path] = struct
    for name, leaves in wanted.items():
        abstract = {"trainable": model_checkpoint.nested(leaves)}
        state, _ = checkpoints[name].restore(checkpoints[name].latest(), abstract, partial=True)
        params = merge(params, state["trainable"])
    return params
