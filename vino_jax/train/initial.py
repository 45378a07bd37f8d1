"""The parameters that a run starts from: parts of a model checkpoint, straight onto the mesh, and fresh ones for the rest."""
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params
from vino_jax.settings import VinoConfig, build
from vino_jax.sharding.resolve import shardings
from vino_jax.train.stage import StageConfig, rates


def resolve_model(directory: str | Path, given: Mapping[str, Any]) -> VinoConfig:
    """The architecture of a checkpoint, with what a config's `model` table gives for parts that the checkpoint lacks.

    Raises UserError where the table contradicts a part that the checkpoint holds, or has an unknown key.
    """
    info = model_checkpoint.read_info(directory)
    held = {"mmdit": "mmdit", "vae": "vae", "vlm": "vlm", "queries": "queries", "connector_ratio": "connector"}
    config = build(VinoConfig, _overlay(dataclasses.asdict(info.config), given), "model.")
    fixed = {field: getattr(config, field) for field, part in held.items() if part in info.parts}
    model_checkpoint.check_config(directory, info, dataclasses.replace(info.config, **fixed))
    return config


def _overlay(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    return {**base, **{k: _overlay(base[k], v) if isinstance(v, Mapping) and isinstance(base.get(k), Mapping) else v for k, v in over.items()}}


def initial_params(vino: Vino, directory: str | Path, stages: list[StageConfig], mesh: Mesh, rules: dict, seed: int,
                   require: tuple[str, ...]) -> Params:
    """All parameters, sharded: float32 in parts that some stage trains, else in the compute dtype.

    Raises UserError where the checkpoint lacks a part of `require`.
    """
    trained = {path.split("/")[0] for stage in stages for path, rate in rates(stage, vino.abstract).items() if rate}
    info = model_checkpoint.read_info(directory)
    missing = [name for name in require if name not in info.parts]
    if missing:
        raise UserError(f"{directory} has no {', '.join(missing)}, which config key 'init.require' asks for")
    held = [name for name in vino.parts if name in info.parts]
    fresh = [name for name in vino.parts if name not in info.parts]
    placed = shardings(vino.abstract, vino.axes, mesh, rules)

    wanted = {}
    for name in held:
        dtype = jnp.dtype(jnp.float32) if name in trained else vino.runtime.compute_dtype
        wanted[name] = jax.tree.map(lambda x, s, d=dtype: jax.ShapeDtypeStruct(x.shape, d, sharding=s), vino.abstract[name], placed[name])
    params = model_checkpoint.restore(directory, wanted)
    if fresh:
        init = jax.jit(lambda key: vino.init(key, tuple(fresh)), out_shardings={name: placed[name] for name in fresh})
        params |= init(jax.random.key(seed))
    return {name: params[name] for name in vino.parts}
