"""From logical axes to NamedShardings: refuses unknown names and, on TPU, shards that break its tiles; tells bytes a device.

A small leaf that a mesh axis does not divide (a 3-channel kernel) is left whole; a large one is refused. `describe` tells
what is replicated because of it.
"""
import math
from collections.abc import Container
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.errors import UserError
from vino_jax.settings import nearest
from vino_jax.sharding.constrain import mesh_axes, weight_spec

SMALL = 1 << 18  # values: below it a leaf may stay whole
# Not held to the tile: frozen weights, which have no gradients; XLA gathers them as they are. queries and connectors have little of them.
UNALIGNED = ("vlm_width", "vlm_mlp", "vocab", "conv_out")
TPU_TILE = 128  # a sharded weight dim off this multiple makes XLA all-reduce zero-padded full weights (libtpu 0.0.42)


def _spec(shape: tuple[int, ...], axes: tuple[str | None, ...], mesh: Mesh, rules: dict, tpu: bool) -> PartitionSpec:
    """`weight_spec`, and what it must not give."""
    for name in axes:
        if name is not None and name not in rules:
            raise UserError(f"unknown logical axis {name!r}{nearest(name, rules)}")
    spec, used = weight_spec(shape, axes, mesh, rules), set()
    for size, name, entry in zip(shape, axes, spec):
        wanted = [a for a in mesh_axes(entry or rules.get(name)) if mesh.shape[a] > 1 and a not in used]
        used.update(mesh_axes(entry))
        ways = math.prod(mesh.shape[a] for a in wanted)
        if size % ways and math.prod(shape) >= SMALL:
            raise UserError(f"axis {name!r} of size {size} does not divide over {ways} shards ({','.join(wanted)}); choose other mesh sizes")
        if tpu and entry and name not in UNALIGNED and len(shape) > 1 and (size // ways) % TPU_TILE and size > TPU_TILE:
            raise UserError(f"axis {name!r} of size {size} over {ways} shards gives {size // ways} a shard, no multiple of {TPU_TILE}; "
                            f"choose another size for mesh axes {','.join(wanted)}")
    return spec


def shardings(abstract: Any, axes: Any, mesh: Mesh, rules: dict) -> Any:
    """Tree of NamedSharding for a tree of ShapeDtypeStructs (or arrays) and its tree of logical axis names.

    Raises UserError for a name that the rules do not hold, or for shards off the TPU tile on a TPU mesh.
    """
    tpu = mesh.devices.flat[0].platform == "tpu"
    return jax.tree.map(lambda leaf, names: NamedSharding(mesh, _spec(leaf.shape, names, mesh, rules, tpu)), abstract, axes)


def batch_shardings(batch: Any, mesh: Mesh, rules: dict) -> Any:
    """Rows over the mesh axes of "batch", all else whole. Raises UserError when the rows do not divide."""
    ways = math.prod(mesh.shape[a] for a in mesh_axes(rules["batch"]))
    rows = jax.tree.leaves(batch)[0].shape[0]
    if rows % ways:
        raise UserError(f"a batch of {rows} rows does not divide over {ways} data shards "
                        f"({', '.join(f'{a}={mesh.shape[a]}' for a in mesh_axes(rules['batch']))}); change the bucket's batch or the mesh")
    return jax.tree.map(lambda x: NamedSharding(mesh, PartitionSpec(mesh_axes(rules["batch"]), *[None] * (len(x.shape) - 1))), batch)


def data_shards(mesh: Mesh, rules: dict, devices: Container[jax.Device] | None = None) -> tuple[tuple[int, ...], int]:
    """(which of the equal parts of a batch's rows `devices` hold, in order; how many parts there are). devices: by default this process's.

    Processes may hold the same parts (where a mesh axis that does not split rows spans them), or parts that are no neighbours.
    """
    devices = jax.local_devices() if devices is None else devices
    axes = mesh_axes(rules["batch"])
    count = math.prod(mesh.shape[a] for a in axes)
    placed = NamedSharding(mesh, PartitionSpec(axes)).devices_indices_map((count,))
    return tuple(sorted({rows.start or 0 for device, (rows,) in placed.items() if device in devices})), count


def describe(abstract: Any, sharding_tree: Any) -> dict[str, float]:
    """Bytes of a tree: total, a device, and the share that is replicated on every device."""
    total = device = replicated = 0
    for leaf, sharding in zip(jax.tree.leaves(abstract), jax.tree.leaves(sharding_tree), strict=True):
        size = math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize
        shard = math.prod(sharding.shard_shape(leaf.shape)) * np.dtype(leaf.dtype).itemsize
        total, device = total + size, device + shard
        replicated += size if shard == size and sharding.num_devices > 1 else 0
    return {"bytes": total, "bytes_a_device": device, "replicated_share": replicated / max(total, 1)}
