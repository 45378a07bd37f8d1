"""Restoring one host's share of the 13 B model's training state: seconds, and the host's memory at its peak.

    python -m tests.benchmarks.restore --folder DIR

All blocks at full width, as many as make about one host's share of the state on v5p:4x4x4 (156 GB over 16 hosts): a checkpoint of the
right shapes is fabricated in DIR (8 GB), and restored shard by shard by another process onto 4 virtual devices, as many as a host has.
"""
import argparse
import dataclasses
import os
import pathlib
import resource
import subprocess
import sys
import time

import jax
import jax.numpy as jnp

from vino_jax.checkpoint.run import RunCheckpoints
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import describe
from vino_jax.sharding.rules import preset
from vino_jax.train.initial import param_structs
from vino_jax.train.loop import StagePlan
from vino_jax.train.stage import StageConfig

GIGA, STEP, VALUE = 1e9, 7, 0.5
# the MMDiT alone: what else trains is a fiftieth of it
MMDIT = (("mmdit/pooled/.*", 0.0), ("mmdit/.*", 1.0), ("(connector|vae_connector|queries|vlm|vae)/.*", 0.0))


def abstract_state():
    """ShapeDtypeStructs of the state, with the shardings that training gives them."""
    published = VinoConfig()
    few = dataclasses.replace(published, mmdit=dataclasses.replace(published.mmdit, double_blocks=1, single_blocks=1, refiner_blocks=1))
    stage = StageConfig("stage3", 10, MMDIT, 1e-5, {"t2i": 1.0}, {"long": 1.0}, ())
    mesh, rules = make_mesh({"fsdp": 4}), preset("fsdp")
    vino = Vino(few, Runtime(dtype="bfloat16"))
    plan = StagePlan(vino, stage, (), mesh, rules, 0, lambda vae, batch: batch)
    return plan.abstract(param_structs(vino, [stage], mesh, rules))[1]


def write(folder: pathlib.Path) -> None:
    structs = abstract_state()
    fill = jax.jit(lambda: jax.tree.map(lambda s: jnp.full(s.shape, VALUE if s.dtype == jnp.float32 else STEP, s.dtype), structs),
                   out_shardings=jax.tree.map(lambda s: s.sharding, structs))
    with RunCheckpoints(folder, keep=1) as checkpoints:
        checkpoints.save(STEP, fill(), {})


def read(folder: pathlib.Path) -> None:
    structs = abstract_state()
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGA, time.perf_counter()
    with RunCheckpoints(folder, keep=1) as checkpoints:
        state = jax.block_until_ready(checkpoints.restore(STEP, structs)[0])
    seconds, peak = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / GIGA
    right = all(bool(jnp.all(leaf == VALUE)) for leaf in jax.tree.leaves(state.trainable)) and int(state.step) == STEP
    sizes = describe(structs, jax.tree.map(lambda s: s.sharding, structs))
    print(f"state of {sizes['bytes'] / GIGA:.2f} GB, {sizes['bytes_a_device'] / GIGA:.2f} GB a device, "
          f"{100 * sizes['replicated_share']:.2f} % replicated\nrestored in {seconds:.1f} s; peak host memory {peak:.2f} GB, {before:.2f} GB of it "
          f"before, so {(peak - before) / (sizes['bytes'] / GIGA):.2f} times the share\nevery value as it was written: {'yes' if right else 'no'}")
    sys.exit(0 if right else 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", required=True, type=pathlib.Path)
    parser.add_argument("--do", choices=("write", "read"))
    flags = parser.parse_args()
    if flags.do:
        return {"write": write, "read": read}[flags.do](flags.folder)
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "--xla_force_host_platform_device_count=4"}
    for part in ("write", "read"):  # each a process of its own, whose peak is its own
        subprocess.run([sys.executable, "-m", "tests.benchmarks.restore", "--folder", flags.folder, "--do", part], check=True, env=environment)


if __name__ == "__main__":
    main()
