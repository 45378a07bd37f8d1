"""Equal blocks as one stacked block: the only user of vmap, scan and remat, so compile time does not grow with depth."""
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vino_jax.errors import UserError
from vino_jax.sharding.constrain import shards

# What blocks have names for (models/mmdit.py, nn/attention.py), by the products that a saved byte spares: outputs of attention; outputs of
# a branch, which its gate's gradient reads; what goes into attention; what goes into the MLP's activation.
SAVED = ("attention", "branch", "qkv", "mlp")
# budget:G saves as many of SAVED, in their order, as G gigabytes a device hold beside the blocks' inputs; splits by "tensor" are not counted
BUDGET = "budget:"

_policies, _named = jax.checkpoint_policies, jax.checkpoint_policies.save_only_these_names
# Name -> policy of jax.checkpoint, from the least recomputing to the most; None runs the block without it.
REMAT_POLICIES: dict[str, Callable | None] = {
    "nothing": None,
    "save_products": _named(*SAVED),
    "offload_mlp": _policies.save_and_offload_only_these_names(
        names_which_can_be_saved=list(SAVED[:3]), names_which_can_be_offloaded=["mlp"], offload_src="device", offload_dst="pinned_host"),
    "dots": _policies.dots_with_no_batch_dims_saveable,
    "save_qkv": _named(*SAVED[:3]),
    "save_branches": _named(*SAVED[:2]),
    "save_attention": _named(*SAVED[:1]),
    "full": _policies.nothing_saveable,
}


def check_remat(key: str, name: str) -> None:
    """Raises UserError, naming the config key, for a remat policy that is neither in REMAT_POLICIES nor a budget."""
    if name not in REMAT_POLICIES and not (name.startswith(BUDGET) and name[len(BUDGET):].replace(".", "", 1).isdigit()):
        raise UserError(f"{key} {name!r} is unknown; choose one of {', '.join(REMAT_POLICIES)} or {BUDGET}GIGABYTES")


def stacked(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one whose parameters carry a leading "layers" dim; count 0 gives arrays with no rows."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(layer_rngs):
        return build(layer_rngs)

    return create(rngs)


def run_stack(layers: nnx.Module, call: Callable, carry: Any, xs: Any = None, *, remat: str | tuple[str, ...],
              frozen: bool = False) -> tuple[Any, Any]:
    """Scan `call(block, carry, x) -> (carry, y)` over the layers of a module from `stacked`.

    xs: tree with a leading layer dim, one slice a block. Returns the last carry and the ys, stacked.
    remat: a name of REMAT_POLICIES, or the names that are saved (see `within_budget`).
    frozen: parameters are constants that each step picks its layer from, so that xs may be shorter than the stack (only its first
    blocks run) without a copy of the weights; only for stacks without gradient, whose transpose would be dense at every step.
    """
    graphdef, params = nnx.split(layers)

    def body(carry, layer):
        i_or_params, x = layer
        block = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i_or_params, keepdims=False), params) if frozen else i_or_params
        return call(nnx.merge(graphdef, block), carry, x)

    policy = _named(*remat) if isinstance(remat, tuple) else REMAT_POLICIES[remat]
    if policy is not None:
        body = jax.checkpoint(body, policy=policy)
    return jax.lax.scan(body, carry, (jnp.arange(len(jax.tree.leaves(xs)[0])) if frozen else params, xs))


def within_budget(remat: str, stacks: Sequence[tuple[nnx.Module, Callable, Any]]) -> list[str | tuple[str, ...]]:
    """What `run_stack` takes as remat for each of some stacks (layers, call, carry) that share a policy, or a budget of bytes."""
    if not remat.startswith(BUDGET):
        return [remat] * len(stacks)
    left, chosen, sizes = float(remat[len(BUDGET):]) * 1e9, [() for _ in stacks], [_saved_bytes(*stack) for stack in stacks]
    for name in SAVED:
        for i, size in enumerate(sizes):
            if size.get(name, 0) <= left:
                left -= size.get(name, 0)
                chosen[i] += (name,)
    return chosen


def _saved_bytes(layers: nnx.Module, call: Callable, carry: Any) -> dict[str, float]:
    """Bytes a device that all blocks of a stack would save, by name."""
    graphdef, params = nnx.split(layers)
    count = len(jax.tree.leaves(params)[0])
    block = jax.tree.map(lambda p: jax.ShapeDtypeStruct(p.shape[1:], p.dtype), params)
    jaxpr = jax.make_jaxpr(lambda block, carry: call(nnx.merge(graphdef, block), carry, None))(block, carry)
    total: dict[str, float] = {}
    for name, size in _names(jaxpr.jaxpr, 1.0 / (shards("batch") * shards("tokens"))):
        total[name] = total.get(name, 0.0) + count * size
    return total


def _names(jaxpr: Any, share: float) -> Iterator[tuple[str, float]]:
    """(name, bytes a device) of every named value; share: of a value outside of a shard_map that lies on one device."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "name":
            value = equation.outvars[0].aval
            yield equation.params["name"], share * math.prod(value.shape) * value.dtype.itemsize
        for inner in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                yield from _names(inner, 1.0 if equation.primitive.name == "shard_map" else share)
