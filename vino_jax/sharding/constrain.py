"""Where values lie on the mesh, said inside models by logical axis names. A model knows nothing of meshes: without an active mesh none of
this does anything."""
import contextlib
import contextvars
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_active: contextvars.ContextVar = contextvars.ContextVar("sharding", default=None)
COMPUTE_AXES = ("tensor",)  # mesh axes over which a weight stays split in a product; over the others it is gathered for it


@contextlib.contextmanager
def use_sharding(mesh: Mesh, rules: dict) -> Iterator[None]:
    """Within this context logical axes lie on `mesh` as `rules` say (logical name -> mesh axis, tuple of them, or None)."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def mesh_axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
    """The mesh axes that an entry of the rules names."""
    return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)


def weight_spec(shape: Sequence[int], axes: Sequence[str | None], mesh: Mesh, rules: dict) -> PartitionSpec:
    """How a parameter is stored. A mesh axis is used once a parameter; dims that theirs do not divide stay whole. Raises KeyError for a
    name that the rules do not hold."""
    used: set[str] = set()
    entries = []
    for size, name in zip(shape, axes, strict=True):
        wanted = tuple(a for a in mesh_axes(rules[name] if name else None) if mesh.shape[a] > 1 and a not in used)
        if not wanted or size % math.prod(mesh.shape[a] for a in wanted):
            entries.append(None)
            continue
        used.update(wanted)
        entries.append(wanted if len(wanted) > 1 else wanted[0])
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Hint that the dims of `x` lie on the mesh as the logical `axes` say; None leaves a dim whole.

    A dim that its mesh axes do not divide is left whole too: token counts are whatever a batch needs.
    """
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    fits = _fitting([x], [axes], mesh, rules)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*(fits[name] for name in axes))))


def shards(name: str) -> int:
    """Over how many shards the logical axis `name` lies; 1 without a mesh."""
    active = _active.get()
    return 1 if active is None else math.prod(active[0].shape[a] for a in mesh_axes(active[1][name]))


def active_platform() -> str:
    """Of the devices that a value under way will lie on: "cpu", "gpu" or "tpu"."""
    active = _active.get()
    return jax.default_backend() if active is None else active[0].devices.flat[0].platform


def join(first_BLD: jax.Array, second_BMD: jax.Array) -> jax.Array:
    """Both along dim 1, which lies over "tokens": each shard keeps its own of both, so that nothing travels. Attention and products do not
    care about the order; `part` gives the two back. Raises ValueError where the shards do not divide them."""
    ways = shards("tokens")
    if ways == 1:
        return jnp.concatenate([first_BLD, second_BMD], axis=1)
    split = [x.reshape(x.shape[0], ways, x.shape[1] // ways, *x.shape[2:]) for x in (first_BLD, second_BMD)]
    joined = jnp.concatenate(split, axis=2)
    return joined.reshape(joined.shape[0], -1, *joined.shape[3:])


def part(joined_BSD: jax.Array, length: int) -> tuple[jax.Array, jax.Array]:
    """The two that `join` joined, of which the first had `length` tokens."""
    ways = shards("tokens")
    x = joined_BSD.reshape(joined_BSD.shape[0], ways, -1, *joined_BSD.shape[2:])
    parts = jnp.split(x, [length // ways], axis=2)
    first, second = (p.reshape(p.shape[0], -1, *p.shape[3:]) for p in parts)
    return first, second


def map_shards(call: Callable, arrays: Sequence[jax.Array], axes: Sequence[Sequence[str | None]], out_axes: Sequence[str | None], *,
               over: str) -> Any:
    """call(*shards of arrays, seq=(mesh axis of the logical axis `over`, its size)) on every device; the whole arrays and size 1 without a
    mesh. An axis lies whole where some array does not divide; dims of size 1 beside larger ones are broadcast."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return call(*arrays, seq=("", 1))
    mesh, rules = active
    fits = _fitting(arrays, axes, mesh, rules)
    specs = tuple(PartitionSpec(*(None if size == 1 else fits[name] for size, name in zip(x.shape, names))) for x, names in zip(arrays, axes))
    lies = mesh_axes(fits[over])
    seq = (lies[0], mesh.shape[lies[0]]) if lies else ("", 1)
    return jax.shard_map(functools.partial(call, seq=seq), mesh=mesh, in_specs=specs, out_specs=PartitionSpec(*(fits[n] for n in out_axes)),
                         check_vma=False)(*arrays)


def _tile_spec(rows: int) -> PartitionSpec:
    """Of (tiles, rows, ...): rows as ever, tiles over those mesh axes of theirs over which no rows lie."""
    mesh, rules = _active.get()
    taken = mesh_axes(rules["batch"])
    if rows % math.prod(mesh.shape[a] for a in taken):
        taken = ()
    return PartitionSpec(tuple(a for a in mesh_axes(rules["tiles"]) if a not in taken), taken or None)


def tile_shards(rows: int) -> int:
    """Over how many shards `map_tiles` spreads tiles of so many rows; 1 without a mesh."""
    active = _active.get()
    return 1 if active is None else math.prod(active[0].shape[a] for a in _tile_spec(rows)[0])


def map_tiles(call: Callable, weights: Any, tiles_NBx: jax.Array) -> jax.Array:
    """call(weights, tiles) of arrays (N, B, ...) to their like, each device with its own tiles and rows and with all weights, gathered once;
    N must be a multiple of tile_shards(B). What comes back lies over rows alone. With nothing to spread over, call(weights, tiles_NBx)."""
    if tile_shards(tiles_NBx.shape[1]) == 1:
        return call(weights, tiles_NBx)
    mesh, rules = _active.get()
    spec = _tile_spec(tiles_NBx.shape[1])

    def alone(weights, tiles):
        token = _active.set(None)  # within, nothing lies on the mesh
        try:
            return call(weights, tiles)
        finally:
            _active.reset(token)

    done = jax.shard_map(alone, mesh=mesh, in_specs=(PartitionSpec(), spec), out_specs=spec, check_vma=False)(weights, tiles_NBx)
    return jax.lax.with_sharding_constraint(done, NamedSharding(mesh, PartitionSpec(None, spec[1])))


def _fitting(arrays: Sequence[jax.Array], axes: Sequence[Sequence[str | None]], mesh: Mesh, rules: dict) -> dict[str | None, Any]:
    """The rules of the named axes, None for those that some array does not divide, or that have size 1 in all of them."""
    sizes: dict[str | None, set[int]] = {}
    for x, names in zip(arrays, axes, strict=True):
        for size, name in zip(x.shape, names, strict=True):
            sizes.setdefault(name, set()).add(size)

    def entry(name: str | None) -> Any:
        large = sizes[name] - {1}
        ways = math.prod(mesh.shape[a] for a in mesh_axes(rules[name])) if name else 1
        return rules[name] if name and large and not any(size % ways for size in large) else None

    return {None: None, **{name: entry(name) for name in sizes}}


def weight(stored: jax.Array, axes: Sequence[str | None], dtype: jnp.dtype) -> jax.Array:
    """A parameter as a product takes it: in `dtype`, gathered over the mesh axes that only store it. Its gradient is scattered to where it
    is stored: without that XLA sums whole gradients on every device."""
    active = _active.get()
    if active is None or active[0].size == 1:
        return stored.astype(dtype)
    mesh, rules = active
    specs = _from_storage(weight_spec(stored.shape, axes, mesh, rules))
    return _gather(stored, jnp.dtype(dtype).name, stored.dtype.name, tuple(NamedSharding(mesh, spec) for spec in specs))


def _from_storage(spec: PartitionSpec) -> list[PartitionSpec]:
    """Specs from the stored one to that of a product, one mesh axis less at a time: XLA turns the gathering and scattering of two at once
    into sums over all devices of whole weights, zero-padded."""
    entries = [mesh_axes(entry) for entry in spec]
    specs = [spec]
    for dim in reversed(range(len(entries))):
        for axis in reversed(entries[dim]):
            if axis not in COMPUTE_AXES:
                entries[dim] = tuple(a for a in entries[dim] if a != axis)
                specs.append(PartitionSpec(*(entry or None for entry in entries)))
    return specs


def _through(x: jax.Array, shardings: Sequence[NamedSharding]) -> jax.Array:
    for sharding in shardings:
        x = jax.lax.with_sharding_constraint(x, sharding)
    return x


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def _gather(stored, dtype, stored_dtype, shardings):
    return _through(stored.astype(dtype), shardings)  # the first says where it is stored, so that it is the cast values that travel


def _gather_fwd(stored, dtype, stored_dtype, shardings):
    return _gather(stored, dtype, stored_dtype, shardings), None


def _gather_bwd(dtype, stored_dtype, shardings, _, grad):
    return (_through(grad, shardings[-2::-1]).astype(stored_dtype),)


_gather.defvjp(_gather_fwd, _gather_bwd)
