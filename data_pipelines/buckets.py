"""Which bucket serves which task, which one an item goes to, and the table printed before step 0."""
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from vino_jax.batch import TASKS, BucketSpec
from vino_jax.errors import UserError

LISTED = 100  # items without a bucket that the table names; the others are counted
NEAR_ASPECT = 0.05  # by how much aspect ratios may differ, relatively, that count as the same: sizes are multiples of 16
MAX_CUT = 0.5  # of a picture's area that may be cut away to give it a bucket's aspect ratio
MAX_ENLARGED = 4.0  # times its own height or width


@dataclass(frozen=True)
class Needs:
    """What a bucket must have for a task: a clip or a picture as target, slots for reference images, one for a reference clip."""

    clip: bool
    images: int = 0
    video: bool = False


NEEDS = {
    "t2i": Needs(clip=False), "t2v": Needs(clip=True),
    "i2v": Needs(clip=True, images=1), "ti2v": Needs(clip=True, images=1),
    "ti2i": Needs(clip=False, images=1), "ti2i_baseimg": Needs(clip=False, images=2),  # a reference, and last the base image
    "tv2v": Needs(clip=True, video=True), "tiv2v": Needs(clip=True, images=1, video=True),
}


@dataclass(frozen=True)
class Assigned:
    """A bucket with the tasks that it serves: their shares of all rows, and how many samples each has (None: endless)."""

    bucket: BucketSpec
    shares: dict[str, float]
    counts: dict[str, int | None]

    @property
    def share(self) -> float:
        return sum(self.shares.values())


def serves(bucket: BucketSpec, task: str, images: int | None = None) -> bool:
    """Whether the bucket has the target and the slots of `task` with that many reference images (None: as few as it needs)."""
    needs = NEEDS[task]
    images = needs.images if images is None else images
    return (bucket.frames > 1) == needs.clip and bucket.images >= images and bool(bucket.video_frames) >= needs.video


def spare(bucket: BucketSpec, task: str, images: int | None = None) -> int:
    """Reference slots that stay empty: compute spent on padding."""
    needs = NEEDS[task]
    images = needs.images if images is None else images
    return bucket.images - images + (bool(bucket.video_frames) and not needs.video)


def tightest(buckets: Sequence[BucketSpec], task: str) -> tuple[BucketSpec, ...]:
    """The buckets that serve `task` with the fewest empty slots."""
    able = [b for b in buckets if serves(b, task)]
    least = min((spare(b, task) for b in able), default=0)
    return tuple(b for b in able if spare(b, task) == least)


def fitting(buckets: Sequence[BucketSpec], task: str, images: int, frames: int, height: int, width: int,
            video_frames: int = 0) -> BucketSpec | None:
    """The bucket for an item: of those that are nearest to its aspect ratio, the one with the most frames that it fills, the fewest
    empty slots, the largest area that it fills (else the smallest), and the least room for prompt and patches.

    None where no bucket has its kind, its slots, or so few frames, or every such bucket `spoils` it.
    Args: images and video_frames of the references, frames, height, width of the target in pixels.
    """
    able = [b for b in buckets if serves(b, task, images) and b.frames <= frames
            and (not NEEDS[task].video or b.video_frames <= video_frames) and not spoils(height, width, b.height, b.width)]
    aspects = {b.name: abs(math.log(b.height / b.width * width / height)) for b in able}

    def rank(bucket):
        area = bucket.height * bucket.width
        return (-bucket.frames, -bucket.video_frames if NEEDS[task].video else 0, spare(bucket, task, images),
                -area if area <= height * width else area, round(aspects[bucket.name], 3), bucket.prompt_tokens, bucket.patches)

    nearest = min(aspects.values(), default=0)
    return min((b for b in able if aspects[b.name] <= nearest + math.log(1 + NEAR_ASPECT)), key=rank, default=None)


def spoils(height: int, width: int, to_height: int, to_width: int, *, cut: bool = True) -> str:
    """What is wrong with a picture of height x width brought to another size, "" for nothing. cut: it is made to cover that size, and
    not letterboxed into it."""
    scales = to_height / height, to_width / width
    if cut and min(scales) / max(scales) < 1 - MAX_CUT:
        return f"{width}x{height} cut to {to_width}x{to_height} would lose {100 * (1 - min(scales) / max(scales)):.0f} % of the picture"
    if (max if cut else min)(scales) > MAX_ENLARGED:
        return f"{width}x{height} would be enlarged {(max if cut else min)(scales):.1f} times to {to_width}x{to_height}"
    return ""


def assign(weights: Mapping[str, float], buckets: Sequence[BucketSpec], source) -> tuple[Assigned, ...]:
    """Spreads each task's share of the rows over the buckets that hold samples of it: by their numbers, evenly where endless.

    Args: weights by task (any positive scale); source: see data_pipelines.sources.Source. Result: one entry a bucket, in the
    order given; a bucket that no task uses has no shares. Raises UserError for a task that has weight and nowhere to go.
    """
    names = [b.name for b in buckets]
    if len(set(names)) != len(names):
        raise UserError(f"two buckets have the same name: {', '.join(sorted({n for n in names if names.count(n) > 1}))}")
    for task, weight in weights.items():
        if task not in TASKS:
            raise UserError(f"unknown task {task!r} in the mixture; known: {', '.join(TASKS)}")
        if weight < 0:
            raise UserError(f"task {task!r} has the weight {weight}; weights are 0 or more")
    total = sum(weights.values())
    if not total > 0:
        raise UserError("the mixture gives no task a weight: set the weight of at least one task")
    shares: dict[str, dict[str, float]] = {n: {} for n in names}
    counts: dict[str, dict[str, int | None]] = {n: {} for n in names}
    for task, weight in weights.items():
        if not weight:
            continue
        held = {b: source.count(task, b) for b in buckets}
        held = {b: count for b, count in held.items() if count is None or count > 0}
        close = tightest([b for b, count in held.items() if count is None], task)  # an endless source fills any bucket that serves
        held = {b.name: count for b, count in held.items() if count is not None or b in close}
        if not held:
            raise UserError(_homeless(task, buckets, source))
        parts = {name: 1 if None in held.values() else count for name, count in held.items()}
        for name, part in parts.items():
            shares[name][task] = weight / total * part / sum(parts.values())
            counts[name][task] = held[name]
    return tuple(Assigned(b, shares[b.name], counts[b.name]) for b in buckets)


def _homeless(task: str, buckets: Sequence[BucketSpec], source) -> str:
    needs = NEEDS[task]
    if task not in source.tasks():
        return f"task {task!r} has a weight, but the data has no sample of it: set its weight to 0 or add data"
    want = [f"frames {'> 1' if needs.clip else '== 1'}"]
    want += [f"images >= {needs.images}"] if needs.images else []
    want += ["video_frames > 0"] if needs.video else []
    return (f"no bucket takes task {task!r}: it needs one with {', '.join(want)}; "
            f"there are {', '.join(b.name for b in buckets) or 'none'}" + "".join(f"; unplaced: {x}" for x in source.unplaced()[:3]))


def table(assigned: Sequence[Assigned], source) -> str:
    """What is printed before step 0: a line a bucket, what is padding in all, and every item that has no bucket.

    Tokens are those of one row: target and references in the MMDiT's sequence, prompt in the VLM's. Padding is the share of them that
    no sample fills; speed is how much faster than filmed a clip is seen, whose frames count as 1/24 s each.
    """
    heads = ("bucket", "target", "target tokens", "reference tokens", "prompt tokens", "VLM patches", "batch", "tokens a batch",
             "share of rows", "padding", "speed", "tasks (samples)")
    lines = [heads]
    for entry in assigned:
        b = entry.bucket
        tasks = ", ".join(f"{t} ({'endless' if n is None else n})" for t, n in entry.counts.items())
        lines.append((b.name, f"{b.frames}x{b.height}x{b.width}", b.target_tokens, b.reference_tokens, b.prompt_tokens, b.patches,
                      b.batch, b.batch * b.tokens, f"{100 * entry.share:.1f} %", _percent(_padding([entry], source)),
                      _speeds(entry, source), tasks or "none: never drawn"))
    cells = [[str(c) for c in line] for line in lines]
    widths = [max(len(line[i]) for line in cells) for i in range(len(heads) - 1)]
    text = ["  ".join([c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths))] + [line[-1]])
            for line in cells]
    padding, single = padding_shares(assigned, source)
    if padding is not None:
        text.append(f"padding {_percent(padding)} of all tokens; in a single bucket for all it would be {_percent(single)}")
    unplaced = source.unplaced()
    if unplaced:
        text.append(f"{len(unplaced)} items fit no bucket and are left out:")
        text += [f"  {item}" for item in unplaced[:LISTED]]
        if len(unplaced) > LISTED:
            text.append(f"  and {len(unplaced) - LISTED} more")
    return "\n".join(text)


def padding_shares(assigned: Sequence[Assigned], source) -> tuple[float | None, float | None]:
    """Share of tokens that no sample fills, with these buckets and with one that has room for all of them; None where it is unknown,
    as of an endless source."""
    used = [entry for entry in assigned if entry.shares]
    largest = sum(max(getattr(entry.bucket, kind) for entry in used) for kind in ("target_tokens", "reference_tokens", "prompt_tokens"))
    return _padding(used, source), _padding(used, source, largest)


def _padding(entries: Sequence[Assigned], source, room: int | None = None) -> float | None:
    """room: tokens of a row, by default its bucket's."""
    groups = [(share, entry.bucket, source.usage(task, entry.bucket)) for entry in entries for task, share in entry.shares.items()]
    if not groups or any(usage is None for _, _, usage in groups):
        return None
    return 1 - sum(share * usage.tokens for share, _, usage in groups) / sum(share * (room or bucket.tokens) for share, bucket, _ in groups)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f} %"


def _speeds(entry: Assigned, source) -> str:
    usages = [source.usage(task, entry.bucket) for task in entry.shares]
    ends = [end for usage in usages if usage and usage.speeds for end in usage.speeds]
    low, high = (f"{end:.2f}" for end in (min(ends, default=1), max(ends, default=1)))
    return "-" if not ends else f"{low} x" if low == high else f"{low}-{high} x"
