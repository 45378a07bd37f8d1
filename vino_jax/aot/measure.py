"""Compile a program for a topology and tell what it takes of a chip, or by how much it does not fit."""
import dataclasses
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import jax

from vino_jax.aot.chips import GIB, Chip
from vino_jax.aot.cost import Cost, program_cost

# Both forms of the compiler's message; the second counts temporaries alone.
_NEEDED = re.compile(r"Used ([\d.]+)([KMGT]?) of |total memory required for HLO temporaries \(([\d.]+)([KMGT]?)\)")
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": GIB, "T": GIB << 10}


@dataclass(frozen=True)
class Memory:
    """Bytes of a chip. Outputs that take the place of donated arguments count as arguments. host: what lies in the host's
    memory. beside: what else lies on the chip while the program runs; it counts in the peak."""

    limit: float
    arguments: int | None = None
    temporaries: int | None = None
    outputs: int | None = None
    peak: int | None = None
    host: int | None = None
    beside: int = 0
    needed: float | None = None  # where it does not fit


@dataclass(frozen=True)
class Measured:
    seconds: float  # of compilation
    memory: Memory
    fits: bool
    cost: Cost | None  # None: does not fit


def measure(lowered: jax.stages.Lowered, chip: Chip, *, beside: int = 0) -> Measured:
    """Compile; a program that lacks memory is a finding, any other error is raised. beside: bytes of a chip that are taken already."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        try:
            # The compiler writes the program's text itself: `as_text()` of jax 0.10.2 cannot read every program of libtpu 0.0.42.
            compiled = lowered.compile(compiler_options={"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error) or "Ran out of memory" not in str(error):
                raise
            needed = needed_bytes(str(error))
            return Measured(time.perf_counter() - start, Memory(chip.hbm, beside=beside, needed=None if needed is None else needed + beside),
                            False, None)
        seconds, stats = time.perf_counter() - start, compiled.memory_analysis()
        memory = Memory(chip.hbm, stats.argument_size_in_bytes, stats.temp_size_in_bytes, stats.output_size_in_bytes - stats.alias_size_in_bytes,
                        stats.peak_memory_in_bytes + beside, stats.host_argument_size_in_bytes + stats.host_temp_size_in_bytes, beside)
        if memory.peak > chip.hbm:
            return Measured(seconds, dataclasses.replace(memory, needed=memory.peak), False, None)
        (text,) = Path(folder).glob("*.after_codegen.txt")
        return Measured(seconds, memory, True, program_cost(text.read_text()))


def needed_bytes(message: str) -> float | None:
    """How much the compiler says that a program would take."""
    found = _NEEDED.search(message)
    if not found:
        return None
    number, unit = (found[1], found[2]) if found[1] else (found[3], found[4])
    return float(number) * _UNITS[unit]
