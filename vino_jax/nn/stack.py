"""Equal blocks as one stacked block: the only user of vmap, scan and remat, so compile time does not grow with depth."""
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from vino_jax.errors import UserError

# Name -> policy of jax.checkpoint; None runs the block without it.
REMAT_POLICIES: dict[str, Callable | None] = {
    "nothing": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


def stacked(build: Callable[[nnx.Rngs], nnx.Module], count: int, rngs: nnx.Rngs) -> nnx.Module:
    """`count` modules as one whose parameters carry a leading "layers" dim; count 0 gives arrays with no rows."""

    @nnx.split_rngs(splits=count)
    @nnx.vmap(in_axes=0, out_axes=0)
    def create(layer_rngs):
        return build(layer_rngs)

    return create(rngs)


def run_stack(layers: nnx.Module, call: Callable, carry: Any, xs: Any = None, *, remat: str, frozen: bool = False) -> tuple[Any, Any]:
    """Scan `call(block, carry, x) -> (carry, y)` over the layers of a module from `stacked`.

    xs: tree with a leading layer dim, one slice a block. Returns the last carry and the ys, stacked.
    frozen: parameters are constants that each step picks its layer from, so that xs may be shorter than the stack (only its first
    blocks run) without a copy of the weights; only for stacks without gradient, whose transpose would be dense at every step.
    Raises UserError for a remat policy that is not in REMAT_POLICIES.
    """
    if remat not in REMAT_POLICIES:
        raise UserError(f"remat policy {remat!r} is unknown; choose one of {', '.join(REMAT_POLICIES)}")
    graphdef, params = nnx.split(layers)

    def body(carry, layer):
        i_or_params, x = layer
        block = jax.tree.map(lambda p: jax.lax.dynamic_index_in_dim(p, i_or_params, keepdims=False), params) if frozen else i_or_params
        return call(nnx.merge(graphdef, block), carry, x)

    policy = REMAT_POLICIES[remat]
    if policy is not None:
        body = jax.checkpoint(body, policy=policy)
    return jax.lax.scan(body, carry, (jnp.arange(len(jax.tree.leaves(xs)[0])) if frozen else params, xs))
