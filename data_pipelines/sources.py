"""Where samples come from. A source holds groups of samples, one a (task, bucket)."""
from dataclasses import dataclass
from typing import Protocol

from data_pipelines import shapes
from data_pipelines.buckets import serves
from data_pipelines.samples import Sample
from vino_jax.batch import TASKS, BucketSpec

AGAIN = 1 << 64  # further than any index of a run


@dataclass(frozen=True)
class Usage:
    """What the samples of a (task, bucket) use of it."""

    tokens: float  # of a row, as BucketSpec.tokens counts them, on average
    speeds: tuple[float, float] | None = None  # least and most that a clip is seen faster than it was filmed; None for pictures


class Source(Protocol):
    """What the loader needs of a data set. Samples are the same for the same arguments, on every process."""

    def tasks(self) -> tuple[str, ...]:
        """Tasks that it has samples of."""

    def count(self, task: str, bucket: BucketSpec) -> int | None:
        """Samples of `task` that belong in `bucket`; None where they never end."""

    def sample(self, task: str, bucket: BucketSpec, index: int) -> Sample:
        """Sample `index` (0..count-1) of the group: target of the bucket's size, references that fit its slots."""

    def usage(self, task: str, bucket: BucketSpec) -> Usage | None:
        """None where it is not known before samples are drawn."""

    def unplaced(self) -> list[str]:
        """Names of items that fit no bucket, with the reason."""

    def undrawn(self) -> dict[str, int]:
        """How many items there are of tasks that this stage does not draw, by task."""

    def fingerprint(self) -> str:
        """Stands for the samples and their order: what a step draws is the same only where this is."""


class ShapesSource:
    """The procedural data set (data_pipelines/shapes.py): all eight tasks, endless, drawn at the bucket's own size.

    A sample with more reference images than the bucket has slots is drawn again.
    """

    def __init__(self, seed: int):
        self.seed = seed

    def tasks(self) -> tuple[str, ...]:
        return TASKS

    def count(self, task: str, bucket: BucketSpec) -> int | None:
        return None if serves(bucket, task) else 0

    def sample(self, task: str, bucket: BucketSpec, index: int) -> Sample:
        while True:
            sample = shapes.sample(self.seed, index, task, bucket.frames, bucket.height, bucket.width)
            if len(sample.images) <= bucket.images:
                return sample
            index += AGAIN

    def usage(self, task: str, bucket: BucketSpec) -> None:
        return None

    def unplaced(self) -> list[str]:
        return []

    def undrawn(self) -> dict[str, int]:
        return {}

    def fingerprint(self) -> str:
        return f"shapes {self.seed}"
