"""Small programs compiled for four chips that are not there."""
import functools

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from vino_jax.aot.chips import topology_devices
from vino_jax.aot.cost import Cost, program_cost
from vino_jax.sharding.mesh import make_mesh


@functools.cache
def mesh():
    return make_mesh({"data": 2, "fsdp": 2}, topology_devices("v5e:2x2"))


def struct(shape, dtype=jnp.bfloat16, *axes):
    """A ShapeDtypeStruct whose dims lie over the mesh axes."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh(), PartitionSpec(*axes)))


def compiled(call, *structs, **options) -> Cost:
    return program_cost(jax.jit(call, **options).lower(*structs).compile().as_text())


def on_shards(call, in_axes, out_axes):
    """The call on every chip's shard."""
    return jax.shard_map(call, mesh=mesh(), in_specs=PartitionSpec(*in_axes), out_specs=PartitionSpec(*out_axes), check_vma=False)
