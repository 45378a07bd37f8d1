"""The data plan: a pure function of (seed, step), the same on every process. Its whole state is the next step.

Bucket of a step, task of a row and sample of a row each come from a `_Cycle`: an endless sequence over a few groups, made of
fixed-length shuffled cycles in which every group occurs as often as its share says, spread evenly. So the realised shares are
right over short runs too, and the number of earlier occurrences of a group (which sample of it is next) needs no replay.
"""
import functools
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data_pipelines.buckets import assign
from vino_jax.batch import BucketSpec
from vino_jax.errors import UserError

PERIOD = 1 << 14  # length of a cycle; shares are exact to half an occurrence in it
SERIAL_BITS = 32
TEXTS = ("long", "short", "instruction")


@dataclass(frozen=True)
class Mixture:
    """What a stage draws. Shares are over rows; the weights have any positive scale."""

    tasks: dict[str, float]  # by task
    texts: dict[str, float]  # by kind: "long", "short", "instruction"
    text_dropout: float = 0.1  # probability of an empty text, references kept
    image_dropout: float = 0.1  # probability of an empty text and no reference images (a base image or a clip stays)

    def __post_init__(self):
        for kind, weight in self.texts.items():
            if kind not in TEXTS:
                raise UserError(f"unknown kind of text {kind!r} in the mixture; known: {', '.join(TEXTS)}")
            if weight < 0:
                raise UserError(f"text kind {kind!r} has the weight {weight}; weights are 0 or more")
        if min(self.text_dropout, self.image_dropout) < 0 or self.text_dropout + self.image_dropout > 1:
            raise UserError(f"text_dropout {self.text_dropout}, image_dropout {self.image_dropout}: they and their sum must be in 0..1")


@dataclass(frozen=True)
class Row:
    """One row of a batch: which sample, and the draws that decide on its text and its references."""

    task: str
    index: int  # of the sample: within its (task, bucket) group, or where the source is endless one that no other row and seed has
    serial: int  # of the row in the run: no other row of the seed has it
    text_draw: float  # in [0, 1): picks among the texts that the sample has, see `choose_text`
    drop_text: bool
    drop_images: bool


@dataclass(frozen=True)
class Plan:
    step: int
    bucket: BucketSpec
    rows: tuple[Row, ...]  # of all processes, in order


class Schedule:
    """The plan of a run.

    Args: seed; mixture; buckets: their `batch` counts the rows of all processes; source: data_pipelines.sources.Source.
    `assigned` says which tasks went to which bucket. Raises UserError where a task has nowhere to go.
    """

    def __init__(self, seed: int, mixture: Mixture, buckets: Sequence[BucketSpec], source):
        self.seed, self.mixture = seed, mixture
        self.assigned = assign(mixture.tasks, buckets, source)
        self.used = tuple(a for a in self.assigned if a.shares)
        self.stride = max(b.batch for b in buckets)
        # a bucket's rows a step differ, so its share of the steps is its share of the rows over its batch
        self._buckets = _Cycle((seed, _key("buckets")), [a.share / a.bucket.batch for a in self.used])
        self._tasks = [_Cycle((seed, _key("tasks", a.bucket.name)), list(a.shares.values())) for a in self.used]

    def plan(self, step: int) -> Plan:
        """Bucket and rows of `step` (from 0); the same for the same arguments, whatever was asked before."""
        which, visits = self._buckets.at(step)
        entry, tasks = self.used[which], list(self.used[which].shares)
        size = entry.bucket.batch
        text, drop = np.random.default_rng((self.seed, _key("row"), step)).random((2, size))
        rows = []
        for i in range(size):
            group, position = self._tasks[which].at(visits * size + i)
            task = tasks[group]
            count = entry.counts[task]
            serial = step * self.stride + i
            index = (self.seed << SERIAL_BITS) + serial if count is None else self._visited(task, entry.bucket.name, count, position)
            no_images = drop[i] < self.mixture.image_dropout
            no_text = drop[i] < self.mixture.image_dropout + self.mixture.text_dropout
            rows.append(Row(task, index, serial, float(text[i]), bool(no_text), bool(no_images)))
        return Plan(step, entry.bucket, tuple(rows))

    def _visited(self, task: str, bucket: str, count: int, position: int) -> int:
        """Every sample of a group once an epoch, in an order of its own in each."""
        epoch, place = divmod(position, count)
        return int(_permutation((self.seed, _key("epoch", task, bucket), epoch), count)[place])


def choose_text(texts: Mapping[str, str | Sequence[str]], weights: Mapping[str, float], draw: float) -> str:
    """The text for a row: one of those that its sample has, by their weights renormalised; where these are all 0 (an edit
    that has only an instruction, in a mixture of captions), any of them with equal chance. Of several texts of a kind each has
    the same chance. draw is in [0, 1)."""
    kinds = [k for k in TEXTS if texts.get(k)]
    if not kinds:
        return ""
    chances = np.array([weights.get(k, 0.0) for k in kinds])
    chances = chances if chances.sum() > 0 else np.ones(len(kinds))
    ends = np.cumsum(chances) / chances.sum()
    kind = int(np.searchsorted(ends, draw, side="right"))
    several = texts[kinds[kind]]
    if isinstance(several, str):
        return several
    share = chances[kind] / chances.sum()
    return several[min(int((draw - ends[kind] + share) / share * len(several)), len(several) - 1)]


def _key(*names: str) -> int:
    """A stable number for names (Python's hash differs from process to process)."""
    return zlib.crc32("/".join(names).encode())


class _Cycle:
    """An endless sequence over groups with given shares; `at(i)` = (group, its earlier occurrences), without replay."""

    def __init__(self, key: tuple[int, ...], shares: Sequence[float]):
        self.key = key
        self.counts = _apportion(np.asarray(shares, np.float64), PERIOD)

    def at(self, i: int) -> tuple[int, int]:
        if len(self.counts) == 1:
            return 0, i
        cycle, offset = divmod(i, PERIOD)
        order, earlier = _shuffled((*self.key, cycle), self.counts)
        group = int(order[offset])
        return group, cycle * self.counts[group] + int(earlier[offset])


def _apportion(shares: np.ndarray, total: int) -> tuple[int, ...]:
    """Integers proportional to shares that sum to total (largest remainder); each at least 1, so that nothing vanishes."""
    exact = shares / shares.sum() * total
    counts = np.maximum(np.floor(exact).astype(int), 1)
    while counts.sum() != total:
        step = 1 if counts.sum() < total else -1
        candidates = np.where((counts > 1) | (step > 0), step * (exact - counts), -np.inf)
        counts[int(np.argmax(candidates))] += step
    return tuple(int(c) for c in counts)


@functools.lru_cache(maxsize=128)
def _shuffled(key: tuple[int, ...], counts: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
    """One cycle: the group at each place, and how often it occurred before in this cycle.

    Occurrence j of a group with n of them lies at a random time in [j/n, (j+1)/n): after any part of the cycle each group
    has had its share to within one.
    """
    rng = np.random.default_rng(key)
    groups = np.repeat(np.arange(len(counts)), counts)
    occurrence = np.concatenate([np.arange(n) for n in counts])
    order = np.argsort((occurrence + rng.random(len(groups))) / np.repeat(counts, counts), kind="stable")
    return groups[order].astype(np.int32), occurrence[order].astype(np.int32)


@functools.lru_cache(maxsize=64)
def _permutation(key: tuple[int, ...], count: int) -> np.ndarray:
    return np.random.default_rng(key).permutation(count).astype(np.int32)
