"""Batches for training: Grain reads steps, a plan says what is in each, threads or processes pack them ahead of time."""
import functools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import grain
import numpy as np
from absl import flags

from data_pipelines.mixture import Mixture, Row, Schedule, choose_text
from data_pipelines.packing import SHIFT, collate, pack_sample
from data_pipelines.processes import end_with_parent
from data_pipelines.prompts import Prompter
from vino_jax.batch import Batch, BucketSpec
from vino_jax.errors import UserError

ENDLESS = 1 << 40  # steps


_first_batch = functools.cache(end_with_parent)  # once a process


@dataclass(frozen=True)
class Packer:
    """batch(step) -> (step, bucket name, this process's rows as numpy). Picklable, so that other processes can do the work."""

    source: Any
    schedule: Schedule
    prompter: Prompter
    shards: tuple[int, ...]
    shard_count: int
    shift: tuple[float, float]

    def batch(self, step: int) -> tuple[int, str, Batch]:
        _first_batch()
        plan = self.schedule.plan(int(step))
        size = plan.bucket.batch // self.shard_count
        rows = [row for shard in self.shards for row in plan.rows[shard * size:(shard + 1) * size]]
        return plan.step, plan.bucket.name, collate([self._pack(row, plan.bucket) for row in rows])

    def _pack(self, row: Row, bucket: BucketSpec) -> dict[str, np.ndarray]:
        sample = self.source.sample(row.task, bucket, row.index)
        text = "" if row.drop_text else choose_text(sample.texts, self.schedule.mixture.texts, row.text_draw)
        return pack_sample(sample, text, bucket, self.prompter, drop_images=row.drop_images, shift=self.shift, index=row.serial)


class Loader:
    """Iterates over (step, bucket name, Batch) from `start_step` up to, not including, `stop_step` (None: endless).

    Every process computes the same plan and packs the rows that its devices hold (vino_jax.sharding.resolve.data_shards): of the
    `shard_count` equal parts of a bucket's rows those of `shards`. Resuming is starting at the next step: no other state.

    Args:
      source: data_pipelines.sources.Source. mixture, buckets, seed: see Schedule.
      prompter: data_pipelines.prompts.Prompter.
      threads: batches packed at a time, in each of `workers` processes, or in this one where there are none.
      prefetch: batches kept ready. shift: of the flow time, for pictures and clips.
    Attributes: `waited`, the seconds that next() has taken so far; `schedule`.
    Raises UserError where the rows do not divide by the shards, or a task has no bucket.
    """

    def __init__(self, source, mixture: Mixture, buckets: Sequence[BucketSpec], prompter, seed: int, start_step: int = 0,
                 stop_step: int | None = None, shards: Sequence[int] = (0,), shard_count: int = 1, threads: int = 1, workers: int = 0,
                 prefetch: int = 8, shift: tuple[float, float] = SHIFT):
        for bucket in buckets:
            if bucket.batch % shard_count:
                raise UserError(f"bucket {bucket.name!r} has {bucket.batch} rows, which do not divide by {shard_count} data shards")
        self.schedule = Schedule(seed, mixture, buckets, source)
        self.waited = 0.0
        packer = Packer(source, self.schedule, prompter, tuple(shards), shard_count, shift)
        steps = grain.MapDataset.range(start_step, ENDLESS if stop_step is None else stop_step)
        ahead = max(-(-prefetch // max(workers, 1)), threads)  # a process
        batches = steps.map(packer.batch).to_iter_dataset(grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead))
        if workers:
            if not flags.FLAGS.is_parsed():
                flags.FLAGS.mark_as_parsed()  # Grain hands absl's flags to its processes and insists that there be some
            batches = batches.mp_prefetch(grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead))
        self._batches = iter(batches)

    def __iter__(self) -> Iterator[tuple[int, str, Batch]]:
        return self

    def __next__(self) -> tuple[int, str, Batch]:
        before = time.perf_counter()
        try:
            return next(self._batches)
        except RuntimeError as error:
            if "terminated unexpectedly" not in str(error):  # Grain's word for a process that is gone
                raise
            raise UserError("a process that packs batches was killed, perhaps for want of memory: start again, with fewer "
                            "data.workers or a smaller data.prefetch") from None
        finally:
            self.waited += time.perf_counter() - before

    def close(self):
        """Stops the threads. A closed loader gives nothing more."""
        self._batches.close()

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_):
        self.close()

