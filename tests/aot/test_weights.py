"""Weights that products gather, and their gradients, as the TPU compiler sends them between chips."""
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from vino_jax.aot.chips import topology_devices
from vino_jax.aot.cost import program_cost
from vino_jax.errors import UserError
from vino_jax.nn.layers import Linear
from vino_jax.nn.module import Definition
from vino_jax.sharding.constrain import use_sharding
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset

WIDTH = 512
BYTES = WIDTH * WIDTH * 2  # of the kernel in bfloat16


@pytest.mark.parametrize("name, sizes", [("fsdp_all", {"data": 2, "fsdp": 2}), ("fsdp_seq", {"fsdp": 2, "seq": 2})])
def test_a_kernel_stored_over_two_axes_is_gathered_and_its_gradient_scattered(name, sizes):
    """In bfloat16 and one axis after the other; both at once would be sums of whole, zero-padded weights over all chips."""
    mesh, rules = make_mesh(sizes, topology_devices("v5e:2x2")), preset(name)
    linear = Definition(lambda r: Linear(WIDTH, WIDTH, ("embed", "mlp"), bias=False, rngs=r))
    stored = shardings(linear.abstract, linear.axes, mesh, rules)
    params = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), linear.abstract, stored)
    x = jax.ShapeDtypeStruct((4, 1024, WIDTH), jnp.bfloat16, sharding=NamedSharding(mesh, PartitionSpec(("data", "fsdp"), "seq")))

    def loss(params, x):
        return jnp.sum(jnp.square(jnp.tanh(linear(params)(x)).astype(jnp.float32)))

    with use_sharding(mesh, rules):
        program = jax.jit(jax.grad(loss), out_shardings=stored).lower(params, x).compile()
    sent = {}
    for collective in program_cost(program.as_text()).collectives:
        sent[collective.kind] = sent.get(collective.kind, 0) + collective.bytes
    assert sent == {"all-gather": BYTES / 2 + BYTES, "reduce-scatter": BYTES + BYTES / 2}


def test_slices_lie_along_data_and_everything_else_inside_of_one():
    devices = topology_devices("2xv5e:2x2")
    mesh = make_mesh({"data": 4, "fsdp": 2}, devices)
    assert [{device.slice_index for device in row.flat} for row in mesh.devices] == [{0}, {0}, {1}, {1}]
    with pytest.raises(UserError, match="mesh axis 'data' of size 1 does not divide over 2 slices"):
        make_mesh({"fsdp": 8}, devices)
