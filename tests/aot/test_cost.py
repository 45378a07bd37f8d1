"""What a compiled TPU program costs, against numbers worked out by hand: exactly."""
import jax
import jax.numpy as jnp
import pytest
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_kernel as kernels
from jax.experimental.pallas.ops.tpu.splash_attention import splash_attention_mask as masks

from tests.aot.programs import compiled, on_shards, struct
from vino_jax.aot.chips import CHIPS, GIB
from vino_jax.aot.cost import program_cost
from vino_jax.aot.measure import measure, needed_bytes
from vino_jax.aot.roofline import KERNEL_EFFICIENCY, estimate

ROWS, WIDTH = 256, 512
ONE = 2 * ROWS * WIDTH * WIDTH  # a product of (ROWS, WIDTH) and (WIDTH, WIDTH)
BOTH = ("data", "fsdp")


def layers(count):
    return struct((count, WIDTH, WIDTH))


def chain(x, weights):
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, weights)[0]


def test_a_scanned_product_counts_once_a_turn():
    cost = compiled(chain, struct((ROWS, WIDTH)), layers(6))
    assert cost.matmul == 6 * ONE and cost.executed == 6 * ONE
    assert not cost.unknown_loops and not cost.collectives and not cost.kernels


def test_nested_loops_multiply():
    def twice(x, weights):
        return jax.lax.fori_loop(0, 5, lambda _, x: chain(x, weights), x)

    assert compiled(twice, struct((ROWS, WIDTH)), layers(3)).matmul == 5 * 3 * ONE


@pytest.mark.parametrize("policy, products", [(None, 3), (jax.checkpoint_policies.nothing_saveable, 4)])
def test_remat_recomputes_the_forward_product(policy, products):
    def loss(weights, x):
        body = lambda x, w: (jnp.tanh(x @ w), None)  # noqa: E731
        body = jax.checkpoint(body, policy=policy) if policy else body
        return jnp.sum(jax.lax.scan(body, x, weights)[0].astype(jnp.float32) ** 2)

    assert compiled(jax.grad(loss), layers(6), struct((ROWS, WIDTH))).matmul == 6 * products * ONE


def test_rows_over_four_chips_leave_each_a_quarter_and_stored_weights_are_gathered():
    cost = compiled(lambda x, w: jnp.tanh(x @ w), struct((4 * ROWS, WIDTH), jnp.bfloat16, BOTH), struct((WIDTH, WIDTH), jnp.bfloat16, "fsdp"),
                    out_shardings=struct((4 * ROWS, WIDTH), jnp.bfloat16, BOTH).sharding)
    assert cost.matmul == ONE
    (gather,) = cost.collectives
    assert (gather.kind, gather.group, gather.count, gather.bytes) == ("all-gather", 2, 1, WIDTH * WIDTH * 2)
    assert gather.wire == gather.bytes / 2


def test_the_gradient_of_stored_weights_is_scattered_and_its_shard_summed():
    """XLA writes the first as a fusion that sums whole arrays and keeps a part."""
    weights, x = struct((WIDTH, WIDTH), jnp.bfloat16, "fsdp"), struct((4 * ROWS, WIDTH), jnp.bfloat16, BOTH)
    loss = lambda w, x: jnp.sum(jnp.tanh(x @ w).astype(jnp.float32))  # noqa: E731
    cost = compiled(jax.grad(loss), weights, x, out_shardings=weights.sharding)
    whole = WIDTH * WIDTH * 2
    assert {one.kind: (one.group, one.count, one.bytes, one.wire) for one in cost.collectives} == {
        "all-gather": (2, 1, whole, whole / 2), "reduce-scatter": (2, 1, whole, whole / 2), "all-reduce": (2, 1, whole / 2, whole / 2)}
    assert cost.matmul == 2 * ONE


SIZE = 1024 * 256 * 2  # bytes of a chip's bfloat16 shard
COLLECTIVES = {  # kind -> (call on a shard over an axis, whole array over the shard, bytes on the wire over the whole)
    "all-gather": (lambda x, axis: jax.lax.all_gather(x, axis, tiled=True), None, lambda n: (n - 1) / n),
    "all-reduce": (lambda x, axis: jax.lax.psum(x, axis), 1, lambda n: 2 * (n - 1) / n),
    "reduce-scatter": (lambda x, axis: jax.lax.psum_scatter(x, axis, tiled=True), 1, lambda n: (n - 1) / n),
    "all-to-all": (lambda x, axis: jax.lax.all_to_all(x, axis, 0, 1, tiled=True), 1, lambda n: (n - 1) / n),
}


@pytest.mark.parametrize("axis, group", [("fsdp", 2), (BOTH, 4)])
@pytest.mark.parametrize("kind", COLLECTIVES)
def test_collectives_by_kind_group_and_bytes(kind, axis, group):
    call, whole, wire = COLLECTIVES[kind]
    cost = compiled(on_shards(lambda x: call(x * 2, axis), (BOTH,), (BOTH,)), struct((4096, 256), jnp.bfloat16, BOTH))
    (one,) = cost.collectives
    whole = SIZE * (whole or group)
    assert (one.kind, one.group, one.count, one.bytes, one.wire) == (kind, group, 1, whole, whole * wire(group))


def test_a_collective_in_a_loop_counts_once_a_turn():
    shift = lambda x: jax.lax.ppermute(jnp.tanh(x), "fsdp", [(0, 1), (1, 0)])  # noqa: E731
    cost = compiled(on_shards(lambda x: jax.lax.fori_loop(0, 7, lambda _, x: shift(x), x), (BOTH,), (BOTH,)),
                    struct((4096, 256), jnp.bfloat16, BOTH))
    assert [(one.kind, one.count, one.wire, one.overlapped) for one in cost.collectives] == [("collective-permute", 7, 7 * SIZE, True)]


@pytest.mark.parametrize("length", [512, 1024])  # of one block, and of two
@pytest.mark.parametrize("fused, products", [(True, {"fwd": 2, "dkv": 5}), (False, {"fwd": 2, "dq": 3, "dkv": 4})])
def test_splash_attention_counts_by_shape(fused, products, length):
    rows, heads, width, names = 2, 3, 128, ("block_q", "block_kv", "block_kv_compute", "block_q_dkv", "block_kv_dkv", "block_kv_dkv_compute")
    sizes = kernels.BlockSizes(**dict.fromkeys(names if fused else (*names, "block_q_dq", "block_kv_dq"), 512), use_fused_bwd_kernel=fused)
    mask = masks.MultiHeadMask([masks.FullMask((length, length))] * heads)
    splash = kernels.make_splash_mha(mask, block_sizes=sizes, head_shards=1, q_seq_shards=1)
    loss = lambda q, k, v: jnp.sum(jax.vmap(splash)(q, k, v).astype(jnp.float32) ** 2)  # noqa: E731
    cost = compiled(on_shards(jax.grad(loss, (0, 1, 2)), (BOTH,), (BOTH,)), *[struct((4 * rows, heads, length, width), jnp.bfloat16, BOTH)] * 3)
    found = {kernel.name.removeprefix("splash_mha_").split("_")[0]: kernel for kernel in cost.kernels}
    assert {name: kernel.flops for name, kernel in found.items()} == {
        name: n * 2 * rows * heads * length * length * width for name, n in products.items()}
    assert all(kernel.known and kernel.count == 1 for kernel in cost.kernels)
    assert cost.executed == cost.matmul + sum(products.values()) * 2 * rows * heads * length * length * width


def test_traffic_with_the_host_counts_both_ways():
    def there_and_back(x):
        away = jax.device_put(jnp.tanh(x), jax.memory.Space.Host)
        return jnp.sin(jax.device_put(away, jax.memory.Space.Device))

    cost = compiled(there_and_back, struct((4096, 1024), jnp.float32, BOTH))
    assert (cost.to_host, cost.from_host) == (1024 * 1024 * 4, 1024 * 1024 * 4)


HLO = """HloModule test, num_partitions=8

%cond (p: (s32[], s32[])) -> pred[] {
  %p = (s32[], s32[]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %lt = pred[] compare(%i, %n), direction=LT
}

%body (p.1: (s32[], s32[])) -> (s32[], s32[]) {
  %p.1 = (s32[], s32[]) parameter(0)
  %x = f32[2,9,9,3]{3,2,1,0} constant({...})
  %k = f32[3,3,3,4]{3,2,1,0} constant({...})
  %c = f32[2,5,5,4]{3,2,1,0} convolution(%x, %k), window={size=3x3 stride=2x2 pad=1_1x1_1}, dim_labels=b01f_01io->b01f, \
      backend_config={"estimated_cycles":"9223372036854775807"}
  ROOT %t = (s32[], s32[]) tuple(%p.1)
}

ENTRY %main (a: f32[4,6]) -> f32[4,5] {
  %a = f32[4,6]{1,0} parameter(0)
  %b = f32[6,5]{1,0} constant({...})
  %start = (s32[], s32[]) tuple()
  %while.1 = (s32[], s32[]) while(%start), condition=%cond, body=%body
  %sum = f32[4,6]{1,0} all-reduce(%a), channel_id=1, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
  %more = f32[4,6]{1,0} all-reduce(%a), channel_id=2, replica_groups=[4,2]<=[8], to_apply=%add
  ROOT %d = f32[4,5]{1,0} dot(%sum, %b), lhs_contracting_dims={1}, rhs_contracting_dims={0}, backend_config={"estimated_cycles":"70"}
}
"""


def test_padding_of_a_convolution_is_no_work_and_what_is_unknown_is_told():
    cost = program_cost(HLO)
    pairs = 5 * 3 - 2  # of an output and a tap along each dim; the first and the last output have one in the padding
    assert cost.matmul == 2 * (2 * pairs**2 * 3 * 4) + 2 * 4 * 6 * 5
    assert cost.unknown_loops == ["while.1"] and cost.cycles == 70 and cost.unknown_cycles == ["c"]
    assert sorted((one.group, one.bytes, one.wire) for one in cost.collectives) == [(2, 96, 96), (4, 96, 144)]


def test_a_program_that_lacks_memory_is_a_finding():
    side = 200_000
    found = measure(jax.jit(lambda x: (x @ x) @ x).lower(struct((side, side))), CHIPS["v5e"])
    assert not found.fits and found.memory.needed > 2 * side * side * 2 * 1.4 and found.memory.limit == 15.75 * GIB


@pytest.mark.parametrize("message, gib", [
    ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.20G of 31.25G hbm. Exceeded hbm capacity by 1.95G.", 33.2),
    ("Ran out of memory on HBM, the total memory required for HLO temporaries (512.00M) exceeds available HBM (15.75G).", 0.5),
    ("Ran out of memory", None),
])
def test_how_much_a_program_would_need(message, gib):
    assert needed_bytes(message) == (None if gib is None else gib * GIB)


def test_the_estimate_adds_what_nothing_hides():
    chip = CHIPS["v5p"]
    cost = compiled(on_shards(lambda x: jax.lax.psum(jnp.tanh(x @ x.T), "fsdp"), (BOTH,), (BOTH,)), struct((4096, 512), jnp.bfloat16, BOTH))
    guess = estimate(cost, chip, model_flops=1e9)
    assert guess.compute == cost.cycles / chip.clock > 0 and guess.kernels == 0 and KERNEL_EFFICIENCY < 1
    assert guess.step == guess.compute + guess.collectives and guess.mfu == 1e9 / (guess.step * chip.peak)
    assert guess.collectives == cost.collectives[0].wire / chip.ring
