"""Sharding hints inside models, by logical axis names. A model knows nothing of meshes: without an active mesh a hint is nothing."""
import contextlib
import contextvars
import math
from collections.abc import Iterator

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

_active: contextvars.ContextVar = contextvars.ContextVar("sharding", default=None)


@contextlib.contextmanager
def use_sharding(mesh: Mesh, rules: dict) -> Iterator[None]:
    """Within this context `constrain` maps logical axes to `mesh` by `rules` (logical name -> mesh axis, tuple of them, or None)."""
    token = _active.set((mesh, rules))
    try:
        yield
    finally:
        _active.reset(token)


def partition_spec(axes: tuple[str | None, ...], rules: dict) -> PartitionSpec:
    """PartitionSpec of dims named `axes`. Raises KeyError for a name that the rules do not hold."""
    return PartitionSpec(*(None if name is None else rules[name] for name in axes))


def constrain(x: jax.Array, *axes: str | None) -> jax.Array:
    """Hint that the dims of `x` lie on the mesh as the logical `axes` say; None leaves a dim whole.

    A dim that its mesh axes do not divide is left whole too: token counts are whatever a batch needs.
    """
    active = _active.get()
    if active is None:
        return x
    mesh, rules = active
    spec = partition_spec(axes, rules)
    fits = (None if entry is None or size % math.prod(mesh.shape[a] for a in ((entry,) if isinstance(entry, str) else entry)) else entry
            for size, entry in zip(x.shape, spec, strict=True))
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, PartitionSpec(*fits)))
