"""Samples whose media were encoded beforehand: what launch.precompute does with each, and the source that training reads them from."""
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import grain

from data_pipelines.latents import Keys, Latents, cut_of
from data_pipelines.media import Clips, MediaSource, Window, read_window
from data_pipelines.packing import see
from data_pipelines.problems import Problems
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample, check_finite
from data_pipelines.sources import Usage
from vino_jax.batch import BucketSpec
from vino_jax.errors import UserError

AHEAD = 2  # batches that are read while one is encoded


@dataclass(frozen=True)
class Job:
    """A sample to encode."""

    window: Window
    bucket: BucketSpec


def windows(source: MediaSource, buckets: Sequence[BucketSpec]) -> Iterator[tuple[str, BucketSpec, int, Window]]:
    """(task, bucket, index, what it is made of) of every sample of a source."""
    for task in source.tasks():
        for bucket in buckets:
            for index in range(source.count(task, bucket)):
                yield task, bucket, index, source.window(task, bucket, index)


def jobs_of(sources: Iterable[tuple[MediaSource, Sequence[BucketSpec]]]) -> list[Job]:
    """The samples of several sources, in their order, each once however often it comes: told apart without reading media."""
    found: dict[object, Job] = {}
    for source, buckets in sources:
        for _, bucket, _, window in windows(source, buckets):
            item = window.item
            found.setdefault((item.target, item.images, item.video, cut_of(window, bucket, source.clips)), Job(window, bucket))
    return list(found.values())


def read_jobs(batches: Sequence[list[tuple[str, Job]]], prompter: Prompter, clips: Clips, problems: Problems,
              threads: int) -> Iterator[tuple[int, list[tuple[str, Job, Sample]]]]:
    """Of each batch of (key, job) its length and (key, job, sample with pixels and patches) of those that can be read, by so many threads,
    ahead of time. Raises UserError for the first that cannot where `problems` must not go on."""

    def read(number: int) -> tuple[int, list[tuple[str, Job, Sample]]]:
        found = []
        for key, job in batches[int(number)]:
            with problems.of(job.window.where):
                found.append((key, job, see(read_window(job.window, job.bucket, clips), job.bucket, prompter)))
        return len(batches[int(number)]), found

    options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(AHEAD, threads))
    yield from grain.MapDataset.range(len(batches)).map(read).to_iter_dataset(options)


class LatentSource:
    """The samples of `source` with moments and patches in the place of pixels; texts are the manifest's own.

    buckets: those of `source`. Where samples cannot be found or read, it does as `source` does with media that cannot be read: it
    stops with a UserError or, where source.problems go to a list, takes the next sample of the group. What is not there is told at once.
    """

    def __init__(self, source: MediaSource, buckets: Sequence[BucketSpec], latents: Latents, keys: Keys):
        self._source, self._latents, self.problems = source, latents, source.problems
        self._keys: dict[tuple[str, str], list[str]] = {}
        total, missing = 0, []
        for task, bucket, _, window in windows(source, buckets):
            key = ""
            with self.problems.of(window.where):
                key = keys.of(window, bucket)
            self._keys.setdefault((task, bucket.name), []).append(key)
            total += 1
            if key and key not in latents:
                missing.append(window.where)
        if missing and self.problems.file is None:
            raise UserError(f"{len(missing)} of {total} samples have no latents in {latents.folder} that were made of these media, buckets "
                            f"and VAE, {missing[0]} first: run launch.precompute with this config")
        for where in missing:
            self.problems.add(where, f"it has no latents in {latents.folder}: run launch.precompute")

    def tasks(self) -> tuple[str, ...]:
        return self._source.tasks()

    def count(self, task: str, bucket: BucketSpec) -> int:
        return self._source.count(task, bucket)

    def usage(self, task: str, bucket: BucketSpec) -> Usage | None:
        return self._source.usage(task, bucket)

    def unplaced(self) -> list[str]:
        return self._source.unplaced()

    def undrawn(self) -> dict[str, int]:
        return self._source.undrawn()

    def fingerprint(self) -> str:
        return self._source.fingerprint()

    def sample(self, task: str, bucket: BucketSpec, index: int) -> Sample:
        """Sample `index` of the group, or the next that can be read where the run goes on. Raises UserError otherwise."""
        keys = self._keys[task, bucket.name]
        for number in range(len(keys)):
            at = (index + number) % len(keys)
            window = self._source.window(task, bucket, at)
            with self.problems.of(window.where):
                item = window.item
                sample = Sample(item.id, item.task, texts=dict(item.texts), base_image=item.base_image, **self._latents.read(keys[at]))
                check_finite(sample)
                return sample
        raise UserError(f"none of the {len(keys)} samples of task {task} in bucket {bucket.name} has latents that can be read")
