"""Parameters with logical axes, and the border between NNX modules and pure trees.

NNX builds, pure trees run: modules declare parameters here; outside of a module's own methods parameters are plain nested
dicts of arrays (`Params`), so that jit, optimizer, checkpoint and conversion never see a framework type.
"""
import contextvars
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

Params = dict[str, Any]
Initializer = Callable[[jax.Array, tuple[int, ...], Any], jax.Array]
# While only shapes are asked for: to trace how values are drawn would take three quarters of the time in which they are found.
_shapes_alone = contextvars.ContextVar("shapes_alone", default=False)


def by_path(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{slash-joined path: leaf} of a nested dict, in the order of jax.tree.leaves; a leaf is whatever is no mapping."""
    flat: dict[str, Any] = {}
    for key in sorted(tree):
        flat |= by_path(tree[key], f"{prefix}{key}/") if isinstance(tree[key], Mapping) else {prefix + key: tree[key]}
    return flat


def param(rngs: nnx.Rngs, shape: tuple[int, ...], axes: tuple[str | None, ...], init: Initializer) -> nnx.Param:
    """A float32 parameter of `shape` whose dims carry the logical names `axes` (see sharding/axes.py)."""
    if len(shape) != len(axes):
        raise ValueError(f"parameter of shape {shape} has {len(axes)} axis names {axes}")
    value = jnp.zeros(shape, jnp.float32) if _shapes_alone.get() else init(rngs.params(), shape, jnp.float32)
    return nnx.Param(value, axes=axes)


class Definition:
    """What a module is without its values: builds abstract trees, initialises them, and binds them for a call.

    >>> mmdit = Definition(lambda rngs: MMDiT(config, runtime, rngs=rngs))
    >>> params = mmdit.init(jax.random.key(0))        # nested dict of float32 arrays
    >>> velocity = mmdit(params)(target, ...)         # a module, usable inside jit
    """

    def __init__(self, build: Callable[[nnx.Rngs], nnx.Module]):
        self._build = build
        self._graphdef, state = nnx.split(_of_shapes(build), nnx.Param)
        self.abstract: Params = nnx.to_pure_dict(state)
        self.axes: Params = _axes(state)

    def __call__(self, params: Params) -> Any:
        return nnx.merge(self._graphdef, params)

    def init(self, key: jax.Array) -> Params:
        """Fresh float32 parameters; the same key gives the same values under any sharding."""
        return nnx.to_pure_dict(nnx.state(self._build(nnx.Rngs(params=key)), nnx.Param))


def _of_shapes(build: Callable[[nnx.Rngs], nnx.Module]) -> nnx.Module:
    """The module with ShapeDtypeStructs in the place of values."""
    token = _shapes_alone.set(True)
    try:
        return nnx.eval_shape(lambda: build(nnx.Rngs(0)))
    finally:
        _shapes_alone.reset(token)


def _axes(state: nnx.State) -> Params:
    """Tree of axis-name tuples, one a parameter; dims that stacking put in front are named "layers"."""
    names = {}
    for path, variable in nnx.to_flat_state(state):
        axes = variable.get_metadata()["axes"]
        names[path] = ("layers",) * (len(variable.shape) - len(axes)) + tuple(axes)
    return nnx.traversals.unflatten_mapping(names)
