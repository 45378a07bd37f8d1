"""The fixed rows that a model's loss is measured on: the same for every checkpoint, mesh and number of processes."""
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace

from data_pipelines.buckets import Assigned, assign
from data_pipelines.mixture import Mixture, Plan, Row
from vino_jax.batch import BucketSpec

_TEXTS = {"instruction": 1.0, "long": 1e-6}  # the instruction of an edit, else the long caption
_MIDDLE = 0.5  # the draw that picks it, and of several texts of a kind the one in the middle


class HeldOutRows:
    """`count` rows of each task, or as many as there are: of a source that ends evenly through its samples, of an endless one the first.

    A task that lies in several buckets has rows in each, by its share there, one at least. plan(step) and `mixture` are what Packer
    (data_pipelines/loader.py) reads of a Schedule; len() is the number of plans. Their batches are no larger than `count`, and divide by
    `shards`: the last of a bucket is filled up with a row once more (see `rows`). Raises UserError where a task has no samples or no bucket.
    """

    def __init__(self, tasks: Sequence[str], buckets: Sequence[BucketSpec], source, count: int, shards: int = 1):
        self.mixture = Mixture({}, _TEXTS)
        self._plans: list[Plan] = []
        self._wanted: list[int] = []  # rows of a plan that are not there to fill it
        for entry in assign(dict.fromkeys(tasks, 1.0), buckets, source):
            rows = [row for task in entry.shares for row in _rows(entry, task, round(count * entry.shares[task] * len(tasks)))]
            size = -(-min(entry.bucket.batch, count) // shards) * shards
            bucket = replace(entry.bucket, batch=size)
            for start in range(0, len(rows), size):
                part = rows[start:start + size]
                self._wanted.append(len(part))
                self._plans.append(Plan(len(self._plans), bucket, tuple(part + part[-1:] * (size - len(part)))))

    def __len__(self) -> int:
        return len(self._plans)

    def plan(self, step: int) -> Plan:
        return self._plans[step]

    def rows(self, step: int) -> Iterator[tuple[str, str, int]]:
        """(task, bucket name, index of the sample) of a plan's first rows, without those that only fill it."""
        plan = self._plans[step]
        yield from ((row.task, plan.bucket.name, row.index) for row in plan.rows[:self._wanted[step]])


def _rows(entry: Assigned, task: str, wanted: int) -> list[Row]:
    there = entry.counts[task]
    wanted = max(1, wanted if there is None else min(wanted, there))
    indices = range(wanted) if there is None else [i * there // wanted for i in range(wanted)]
    # a row's number, from which its noise comes, stands for the sample alone: other rows and tasks do not change it
    return [Row(task, i, zlib.crc32(f"{task}/{entry.bucket.name}/{i}".encode()) & 0x7FFFFFFF, _MIDDLE, False, False) for i in indices]
