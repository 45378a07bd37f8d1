"""What a chip of each kind can do, for estimates; and the devices of a topology that need not be there."""
import os
from dataclasses import dataclass

import jax
from jax.experimental import topologies

from vino_jax.errors import UserError

GIB = 1 << 30
# What libtpu otherwise asks a metadata server for, and complains of on a machine that is no TPU host; several processes may load it.
_QUIET = {"ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "TPU_MIN_LOG_LEVEL": "3",
          "TPU_STDERR_LOG_LEVEL": "3"}


@dataclass(frozen=True)
class Chip:
    """peak: dense bfloat16 FLOP/s. hbm: bytes that the compiler lets a program use. ring: bytes/s of a collective around one axis of the
    torus, both ways together. clock: Hz behind the compiler's `estimated_cycles`. accelerator: a name that libtpu takes for its host."""

    peak: float
    hbm: float
    ring: float
    clock: float
    accelerator: str
    examples: tuple[str, ...]  # of topologies


CHIPS = {
    "v5e": Chip(197e12, 15.75 * GIB, 100e9, 1.5e9, "v5litepod-4", ("v5e:2x2", "v5e:8x8", "v5e:16x16")),
    "v5p": Chip(459e12, 95.74 * GIB, 200e9, 1.75e9, "v5p-8", ("v5p:2x2x1", "v5p:4x4x4", "v5p:8x8x8")),
    "v6e": Chip(918e12, 31.25 * GIB, 224e9, 1.75e9, "v6e-4", ("v6e:2x2", "v6e:8x8", "v6e:16x16")),
}


def chip_of(topology: str) -> Chip:
    """Of a topology's name, such as "v5p:4x4x4" or, for two slices of it, "2xv5p:4x4x4". Raises UserError for a chip that is not in CHIPS."""
    name = _slices(topology)[1].partition(":")[0]
    if name not in CHIPS:
        raise _unknown(topology)
    return CHIPS[name]


def topology_devices(topology: str) -> list[jax.Device]:
    """The devices of a topology, to compile for; none of them is there. Raises UserError for a name that libtpu does not know, or where
    libtpu is not installed."""
    chip = chip_of(topology)
    for name, value in {**_QUIET, "TPU_ACCELERATOR_TYPE": chip.accelerator}.items():
        os.environ.setdefault(name, value)
    try:
        slices, shape = _slices(topology)
        return list(topologies.get_topology_desc(shape, "tpu", **({"num_slices": slices} if slices > 1 else {})).devices)
    except jax.errors.JaxRuntimeError as error:
        if "INVALID_ARGUMENT" in str(error):
            raise _unknown(topology) from None
        raise UserError(f"the TPU compiler does not start ({str(error).splitlines()[0]}); install it: pip install libtpu") from None


def _slices(topology: str) -> tuple[int, str]:
    """How many slices, and the topology of each."""
    count, found, shape = topology.partition("xv")
    return (int(count), "v" + shape) if found and count.isdigit() and int(count) else (1, topology)


def _unknown(topology: str) -> UserError:
    known = ", ".join(example for chip in CHIPS.values() for example in chip.examples)
    return UserError(f"unknown topology {topology!r}; it must be a chip and a shape of whole hosts, such as {known}")
