"""The ways to turn the pairs of RoPE: what the TPU compiler estimates of each, and how long each takes here.

    python -m tests.benchmarks.rope [--topology v6e:2x4] [--tokens 6144]

On a chip: queries of 24 heads with their product, norm and layout for attention, forward and with the backward pass. Here: RoPE alone in
float32 of 2 x 2,304 tokens of 6 heads, the fastest of 20 calls, by turns.
"""
import argparse
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.aot.chips import chip_of, topology_devices
from vino_jax.aot.measure import measure
from vino_jax.nn import rope
from vino_jax.nn.layers import Linear, RMSNorm
from vino_jax.nn.module import Definition

HEADS, WIDTH = 24, 128


def by_shifts(x: jax.Array) -> jax.Array:
    """What apply_rope had before 2026-11-27: each pair (x0, x1) as (-x1, x0), float32."""
    x = x.astype(jnp.float32)
    still = [(0, 0, 0)] * (x.ndim - 1)
    after, before = jax.lax.pad(x[..., 1:], 0.0, [*still, (0, 1, 0)]), jax.lax.pad(x[..., :-1], 0.0, [*still, (1, 0, 0)])
    return jnp.where(jnp.arange(x.shape[-1]) % 2 == 0, -after, before)


TURNS = {"shifts": by_shifts, "reversal": rope.turned_by_reversal, "product": rope.turned_by_product}


def rotated(turn: Callable, x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    return (x.astype(jnp.float32) * cos[:, :, None] + turn(x) * sin[:, :, None]).astype(x.dtype)


def estimate(topology: str, tokens: int) -> None:
    here = NamedSharding(Mesh(topology_devices(topology)[:1], ("x",)), PartitionSpec())
    linear = Definition(lambda rngs: Linear(HEADS * WIDTH, HEADS * WIDTH, ("embed", "heads"), rngs=rngs))
    norm = Definition(lambda rngs: RMSNorm(WIDTH, rngs=rngs))

    def struct(*shape: int, dtype=jnp.bfloat16) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=here)

    x, table, grad = struct(1, tokens, HEADS * WIDTH), struct(1, tokens, WIDTH, dtype=jnp.float32), struct(1, HEADS, tokens, WIDTH)
    params = jax.tree.map(lambda p: struct(*p.shape, dtype=p.dtype), (linear.abstract, norm.abstract))
    for name, turn in TURNS.items():
        def forward(params, x, cos, sin, turn=turn):
            q = norm(params[1])(linear(params[0])(x).reshape(1, tokens, HEADS, WIDTH))
            return jnp.swapaxes(rotated(turn, q, cos, sin), 1, 2)

        def both(params, x, cos, sin, grad, forward=forward):
            y, back = jax.vjp(lambda params, x: forward(params, x, cos, sin), params, x)
            return y, back(grad)

        for kind, call, inputs in (("forward", forward, (params, x, table, table)), ("with backward", both, (params, x, table, table, grad))):
            found = measure(jax.jit(call).lower(*inputs), chip_of(topology))
            print(f"{topology}, {name}, {kind}: {found.cost.cycles / 1e6:.2f} million cycles, "
                  f"{found.memory.temporaries / 2**20:.0f} MiB of temporaries", flush=True)


def clock() -> None:
    keys, tokens, heads = jax.random.split(jax.random.key(0), 4), (2, 2304), 6
    shapes = ((*tokens, heads, WIDTH), (*tokens, heads, WIDTH), (*tokens, WIDTH), (*tokens, WIDTH))
    inputs = [jax.random.normal(key, shape) for key, shape in zip(keys, shapes)]  # x, the gradient of what comes out, cos, sin
    calls = {name: (jax.jit(lambda x, grad, cos, sin, turn=turn: rotated(turn, x, cos, sin)),
                    jax.jit(lambda x, grad, cos, sin, turn=turn: jax.vjp(lambda x: rotated(turn, x, cos, sin), x)[1](grad)))
             for name, turn in TURNS.items()}
    best = {name: [float("inf")] * 2 for name in calls}
    for _ in range(21):  # the first compiles
        for name, both in calls.items():
            for i, call in enumerate(both):
                start = time.perf_counter()
                jax.block_until_ready(call(*inputs))
                best[name][i] = min(best[name][i], time.perf_counter() - start)
    for name, (forward, backward) in best.items():
        print(f"{jax.default_backend()}, {name}: forward {forward * 1e3:.1f} ms, backward {backward * 1e3:.1f} ms")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v6e:2x4", help="one chip of it")
    parser.add_argument("--tokens", type=int, default=6144)
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    estimate(flags.topology, flags.tokens)
    clock()


if __name__ == "__main__":
    main()
