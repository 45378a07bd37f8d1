"""What several seeds of an experiment say: means with confidence intervals, alone and against another arm."""
import math
from collections.abc import Mapping, Sequence

from scipy import stats

CONFIDENCE = 0.95


def standard_error(values: Sequence[float]) -> float:
    """Of the mean of independent values; nan for fewer than two."""
    if len(values) < 2:
        return math.nan
    mean = math.fsum(values) / len(values)
    return math.sqrt(math.fsum((x - mean) ** 2 for x in values) / (len(values) - 1) / len(values))


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean, and half the width of its confidence interval by Student's t over so many independent values; nan for fewer than two."""
    width = float(stats.t.ppf((1 + CONFIDENCE) / 2, len(values) - 1)) * standard_error(values) if len(values) > 1 else math.nan
    return math.fsum(values) / len(values), width


def difference(ours: Mapping[int, float], theirs: Mapping[int, float]) -> tuple[float, float]:
    """The same of ours - theirs over the seeds that both have (seed -> value): what both runs of a seed share cancels.

    Raises ValueError where they share none.
    """
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        raise ValueError("the two arms have no seed in common")
    return interval([ours[seed] - theirs[seed] for seed in shared])


def roughness(norms: Sequence[float]) -> float:
    """How much gradient norms jump from one step to the next: standard deviation of the logarithm of their ratios, over sqrt(2), so that it is
    the relative deviation of a single norm whose level does not move. nan for fewer than three."""
    jumps = [math.log(b / a) for a, b in zip(norms, norms[1:]) if a > 0 and b > 0]
    if len(jumps) < 2:
        return math.nan
    return standard_error(jumps) * math.sqrt(len(jumps) / 2)
