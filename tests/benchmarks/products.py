"""The products of tests/benchmarks/denoise.py on this CPU: YNNPACK's, XLA's own (Eigen's contractions), oneDNN's and PyTorch's, in GFLOP/s.

    python -m tests.benchmarks.products [--rounds N]

Float32, with as many threads as there are cores; medians of the rounds, by turns, each of some 10 GFLOP. It is what nn/runtime.py chooses by.
"""
import os
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import torch

from launch import cli
from vino_jax.nn.runtime import compiler_options

WORK = 1e10
# name -> rows, summed, columns; does the right side lie (columns, summed), as keys do?
SHAPES = {
    "queries": (4608, 768, 768, False), "MLP up": (4608, 768, 3072, False), "MLP down": (4608, 3072, 768, False),
    "scores": (768, 128, 2304, True), "weighted values": (768, 2304, 128, False),
}
# who multiplies -> what is changed of compiler_options()
OPTIONS = {
    "YNNPACK": {"xla_cpu_use_onednn": False,
                "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT,LIBRARY_FUSION_TYPE_REDUCE"},
    "XLA": {"xla_cpu_use_onednn": False},
    "oneDNN": {},
}


def rates(rows: int, summed: int, columns: int, transposed: bool, rounds: int) -> dict[str, float]:
    """GFLOP/s by who multiplies."""
    rng = np.random.default_rng(0)
    left, right = rng.standard_normal((rows, summed), np.float32), rng.standard_normal((columns, summed), np.float32)
    here = [jnp.asarray(left), jnp.asarray(right if transposed else right.T)]
    theirs = [torch.from_numpy(left), torch.from_numpy(right).T]  # PyTorch keeps every right side (columns, summed)

    def compiled(options):
        product = jax.jit(lambda a, b: jnp.einsum("lk,nk->ln" if transposed else "lk,kn->ln", a, b), compiler_options=options)
        return lambda: product(*here).block_until_ready()

    calls = {name: compiled({**compiler_options(), **changed}) for name, changed in OPTIONS.items()} | {"PyTorch": lambda: theirs[0] @ theirs[1]}
    flops, took = 2 * rows * summed * columns, {name: [] for name in calls}
    repeats = max(1, round(WORK / flops))
    for name, call in calls.items():
        np.testing.assert_allclose(np.asarray(call()), left @ right.T, atol=1e-2, err_msg=name)
    for _ in range(rounds):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats):
                call()
            took[name].append((time.perf_counter() - start) / repeats)
    return {name: flops / statistics.median(seconds) / 1e9 for name, seconds in took.items()}


def main() -> int:
    parser = cli.Parser(prog="tests.benchmarks.products", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=15)
    rounds = parser.parse_args().rounds
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_compilation_cache_dir", None)  # with one, no program takes oneDNN
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    for name, shape in SHAPES.items():
        print(f"{name} {shape[:3]}: " + ", ".join(f"{who} {rate:.0f}" for who, rate in rates(*shape, rounds).items()), flush=True)
    return 0


if __name__ == "__main__":
    cli.run(main)
