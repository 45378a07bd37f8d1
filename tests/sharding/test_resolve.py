"""Presets, meshes and the resolver."""
import jax
import jax.numpy as jnp
import pytest
from jax.sharding import PartitionSpec

from vino_jax.batch import BucketSpec
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig
from vino_jax.sharding.axes import ACTIVATION_AXES, PARAM_AXES
from vino_jax.sharding.constrain import constrain, use_sharding
from vino_jax.sharding.mesh import make_mesh, parse_mesh
from vino_jax.sharding.resolve import batch_shardings, data_shards, describe, shardings
from vino_jax.sharding.rules import PRESETS, for_rows, preset


def leaf(*shape):
    return jax.ShapeDtypeStruct(shape, jnp.float32)


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_covers_the_vocabulary(name):
    assert set(preset(name)) == {*PARAM_AXES, *ACTIVATION_AXES}


def test_specs_follow_the_rules_and_skip_axes_of_size_one():
    mesh = make_mesh({"fsdp": 4, "tensor": 2})
    placed = shardings({"a": leaf(8, 16), "b": leaf(3, 8)}, {"a": ("embed", "mlp"), "b": (None, "embed")}, mesh, preset("fsdp_seq"))
    assert placed["a"].spec == PartitionSpec("fsdp", "tensor") and placed["b"].spec == PartitionSpec(None, "fsdp")


def test_a_mesh_axis_is_used_once_in_a_leaf():
    placed = shardings({"a": leaf(8, 8)}, {"a": ("embed", "embed")}, make_mesh({"fsdp": 8}), preset("fsdp"))
    assert placed["a"].spec == PartitionSpec("fsdp", None)


def test_unknown_names_are_refused():
    mesh = make_mesh({"fsdp": 8})
    with pytest.raises(UserError, match="embd.*embed"):
        shardings({"a": leaf(8)}, {"a": ("embd",)}, mesh, preset("fsdp"))
    with pytest.raises(UserError, match="fsdp2.*fsdp"):
        preset("fsdp2")
    with pytest.raises(UserError, match="fdsp"):
        parse_mesh("fdsp=2")
    with pytest.raises(UserError, match="3 does not fit 8|does not fit 8 devices"):
        make_mesh({"fsdp": 3})


def test_sizes_that_do_not_divide():
    mesh, rules = make_mesh({"fsdp": 8}), preset("fsdp")
    small = shardings({"a": leaf(3, 3)}, {"a": ("embed", None)}, mesh, rules)
    assert small["a"].spec == PartitionSpec(None, None)  # a few bytes stay whole
    with pytest.raises(UserError, match="size 1028 does not divide over 8"):
        shardings({"a": leaf(1028, 1024)}, {"a": ("embed", None)}, mesh, rules)
    batch = BucketSpec("b", 12, 1, 32, 32, 8).spec()
    with pytest.raises(UserError, match="12 rows does not divide over 8"):
        batch_shardings(batch, mesh, rules)


def test_mesh_sizes_fill_in_what_is_left():
    assert dict(make_mesh({"data": 2, "fsdp": -1}).shape) == {"data": 2, "fsdp": 4, "seq": 1, "tensor": 1}
    assert parse_mesh("data=1,seq=8") == {"data": 1, "seq": 8}


@pytest.mark.parametrize("name,sizes", [("fsdp", {"fsdp": 8}), ("fsdp", {"fsdp": 4, "tensor": 2}), ("fsdp_seq", {"fsdp": 4, "seq": 2}),
                                        ("fsdp_seq", {"fsdp": 2, "seq": 2, "tensor": 2}), ("fsdp_all", {"data": 2, "fsdp": 4})])
def test_at_full_size_no_more_than_2_percent_is_replicated(name, sizes):
    vino = Vino(VinoConfig(), Runtime())
    state, axes = ({**tree, "moments": [tree["mmdit"]] * 2} for tree in (vino.abstract, vino.axes))
    report = describe(state, shardings(state, axes, make_mesh(sizes), preset(name)))
    assert report["replicated_share"] < 0.02
    # the VAE and the embedders lie over "fsdp" alone
    assert report["bytes_a_device"] < (1.04 if len(sizes) > 2 else 1.03) * report["bytes"] / 8


def test_constrain_places_and_leaves_whole_what_does_not_divide():
    mesh = make_mesh({"fsdp": 2, "seq": 4})

    def place(x):
        with use_sharding(mesh, preset("fsdp")):
            return constrain(x, "batch", "tokens", None)

    assert jax.jit(place)(jnp.ones((2, 8, 4))).sharding.shard_shape((2, 8, 4)) == (1, 2, 4)
    assert jax.jit(place)(jnp.ones((2, 6, 4))).sharding.shard_shape((2, 6, 4)) == (1, 6, 4)
    assert constrain(jnp.ones(3), "batch").shape == (3,)  # without a mesh a hint is nothing


def test_rows_are_shared_only_where_there_are_too_few():
    mesh, rules = make_mesh({"fsdp": 2, "seq": 4}), preset("fsdp_seq")

    def place(x):
        with use_sharding(mesh, for_rows(rules, mesh, len(x))):
            return constrain(x, "batch", "tokens", None)

    assert jax.jit(place)(jnp.ones((8, 8, 4))).sharding.shard_shape((8, 8, 4)) == (1, 8, 4)
    assert jax.jit(place)(jnp.ones((4, 8, 4))).sharding.shard_shape((4, 8, 4)) == (2, 2, 4)
    whole = for_rows(rules, mesh, 16)
    assert {name: axis for name, axis in whole.items() if axis != rules[name]} == {"batch": ("data", "fsdp", "seq"), "tokens": None}


# mesh -> which parts of the rows the first four of eight devices hold, which the last four, which every second one; of how many
@pytest.mark.parametrize("sizes, first, last, odd, count", [
    ({"data": 2, "fsdp": 4}, (0, 1, 2, 3), (4, 5, 6, 7), (1, 3, 5, 7), 8),
    ({"fsdp": 8}, (0, 1, 2, 3), (4, 5, 6, 7), (1, 3, 5, 7), 8),
    ({"fsdp": 2, "seq": 4}, (0,), (1,), (0, 1), 2),
    ({"data": 2, "seq": 2, "tensor": 2}, (0,), (1,), (0, 1), 2),
    ({"seq": 8}, (0,), (0,), (0,), 1),
])
def test_devices_hold_the_rows_that_a_batch_s_sharding_gives_them(sizes, first, last, odd, count):
    devices, mesh, rules = jax.devices(), make_mesh(sizes), preset("fsdp")
    for held, some in ((first, devices[:4]), (last, devices[4:]), (odd, devices[1::2]), (tuple(range(count)), None)):
        assert data_shards(mesh, rules, some) == (held, count)
    rows = 16 // count
    spread = batch_shardings(leaf(16, 3), mesh, rules).devices_indices_map((16, 3))
    for device, (index, _) in spread.items():
        (shard,), _ = data_shards(mesh, rules, [device])
        assert range(16)[index] == range(shard * rows, (shard + 1) * rows)
