"""How long a step should take, from what its program does: an estimate with its assumptions, not a measurement."""
from dataclasses import dataclass

from vino_jax.aot.chips import Chip
from vino_jax.aot.cost import Cost

KERNEL_EFFICIENCY = 0.5  # of peak: what tuned splash attention kernels are known to reach is between 0.4 and 0.7

ASSUMPTIONS = (
    "all but kernels and collectives takes the cycles that the compiler estimates",
    f"Pallas kernels reach {KERNEL_EFFICIENCY:.0%} of the chip's peak",
    "a collective that nothing overlaps goes round one ring of the torus, one after another, at the links' full rate; links between slices "
    "count as fast",
    "collectives that computation may overlap cost nothing until they take longer than it",
    "traffic with the host, the loader and the encoder (a program of its own) cost nothing",
)


@dataclass(frozen=True)
class Estimate:
    """Seconds of a step and of its parts; mfu: model FLOPs over what the chip could have done in that time, None without a formula."""

    compute: float
    kernels: float
    collectives: float  # that nothing overlaps
    overlapped: float
    step: float
    mfu: float | None


def estimate(cost: Cost, chip: Chip, model_flops: float | None) -> Estimate:
    """Of a program on a chip. model_flops: of one chip."""
    compute, kernels = cost.cycles / chip.clock, cost.kernel / (chip.peak * KERNEL_EFFICIENCY)
    alone, beside = (sum(one.wire for one in cost.collectives if one.overlapped == which) / chip.ring for which in (False, True))
    step = max(compute + kernels, beside) + alone
    return Estimate(compute, kernels, alone, beside, step, model_flops / (step * chip.peak) if model_flops and step else None)
