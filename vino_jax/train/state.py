"""The state of a run: what a step changes, and nothing that it does not."""
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.nn.module import Params


@jax.tree_util.register_dataclass
@dataclass
class TrainState:
    """step: int32, steps done in this stage. rng: uint32 data of the stage's random key, from which every step draws.
    ema: as trainable, or empty. All float32 except the counters, and moments where the optimizer says so."""

    step: jax.Array
    rng: jax.Array
    trainable: Params
    opt_state: Any
    ema: Params


def new_state(trainable: Params, tx: optax.GradientTransformation, rng: jax.Array, *, ema: bool) -> TrainState:
    """Step 0 of a stage; the average starts at the parameters. rng: uint32 key data."""
    average = jax.tree.map(jnp.copy, trainable) if ema else {}
    return TrainState(jnp.zeros((), jnp.int32), rng, trainable, tx.init(trainable), average)


def state_shardings(abstract: TrainState, trainable_shardings: Params, tx: optax.GradientTransformation, mesh: Mesh) -> TrainState:
    """Moments and average lie as their parameters do, counters everywhere; a dim of 1, over which a moment is a mean, lies whole."""
    whole = NamedSharding(mesh, PartitionSpec())

    def of_moment(leaf, sharding):
        return NamedSharding(mesh, PartitionSpec(*(None if size == 1 else axes for size, axes in zip(leaf.shape, sharding.spec))))

    opt_state = optax.tree_utils.tree_map_params(
        tx, of_moment, abstract.opt_state, trainable_shardings, transform_non_params=lambda _: whole)
    return TrainState(whole, whole, trainable_shardings, opt_state, trainable_shardings if abstract.ema else {})


def with_shardings(abstract: Any, sharding_tree: Any) -> Any:
    """ShapeDtypeStructs that carry their sharding, as restore and ahead-of-time compilation want them."""
    return jax.tree.map(lambda a, s: jax.ShapeDtypeStruct(a.shape, a.dtype, sharding=s), abstract, sharding_tree)
