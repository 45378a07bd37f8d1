"""Samples from real pictures and clips: which bucket an item goes to, which clips are taken of it, and their pixels.

Each item goes to the bucket that suits it (data_pipelines.buckets.fitting). Target and reference clip, and reference images of
the target's own aspect ratio where the bucket's have it too, are scaled to cover the bucket's size and cut evenly at both sides, so that
what matches before still matches; other reference images are letterboxed on white.

Of a clip that is longer than its bucket one or several windows are taken (`Clips`), each a sample of its own; reference clips
by the same windows.
"""
import collections
import functools
import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data_pipelines.buckets import NEEDS, fitting, serves, spoils
from data_pipelines.files import Facts, Media, clip_facts, decoded_frames, frame_pixels, picture_facts, read_image, shown_size
from data_pipelines.manifest import Item, read_items
from data_pipelines.pixels import MAX_ASPECT, letterbox
from data_pipelines.problems import Problems
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample
from data_pipelines.sources import Usage
from vino_jax.batch import TASKS, BucketSpec, visual_tokens
from vino_jax.errors import UserError

SAME_ASPECT = 0.02  # relative difference of two aspect ratios that counts as none
FPS = 24.0  # at which VINO sees clips, whatever their own rate
WINDOWS = ("head", "middle", "uniform", "sliding")
COMPAT = ("reference", "true_rate")


@dataclass(frozen=True)
class Clips:
    """Which frames of a clip are taken.

    windows: "head" the first, "middle" those around its middle, "uniform" `count` windows spread evenly from its first frame to its last,
    "sliding" one every `stride` frames (0: as many as the bucket has, so that none is taken twice).
    compat: "reference" one frame after another, each seen for 1/24 s whatever the clip's own rate, as VINO's reference does; "true_rate"
    at every 1/24 s the frame that is nearest in time. Raises UserError for other values.
    """

    windows: str = "head"
    count: int = 1
    stride: int = 0
    compat: str = "reference"

    def __post_init__(self):
        for key, value, known in (("windows", self.windows, WINDOWS), ("compat", self.compat, COMPAT)):
            if value not in known:
                raise UserError(f"data.clips.{key} is {value!r}; known: {', '.join(known)}")
        if self.count < 1 or self.stride < 0:
            raise UserError(f"data.clips.count is {self.count} and must be at least 1, stride is {self.stride} and must not be negative")

    def length(self, facts: Facts) -> int:
        """Frames that there are to choose from."""
        return facts.at_rate(FPS) if self.compat == "true_rate" else facts.frames

    def speed(self, facts: Facts) -> float | None:
        """How much faster than filmed the clip is seen; None where it says nothing of its time."""
        return None if not facts.rate else 1.0 if self.compat == "true_rate" else FPS / facts.rate

    def starts(self, last: int, frames: int) -> list[int]:
        """First frame of every window of `frames` frames; `last` is the last that one may have."""
        return {"head": lambda: [0], "middle": lambda: [last // 2],
                "uniform": lambda: sorted(set(np.linspace(0, last, self.count).round().astype(int).tolist())) if self.count > 1 else [0],
                "sliding": lambda: list(range(0, last + 1, self.stride or frames))}[self.windows]()


@dataclass(frozen=True)
class Window:
    """A sample: an item, and where in its clips it begins."""

    where: str  # in the manifest
    item: Item
    start: int


class MediaSource:
    """Samples from a manifest; finite.

    Args: manifest, root: see data_pipelines/manifest.py; buckets: those that items may go to; prompter: see Prompter; given, an item
    whose texts are too long for a bucket is not put there, instead of ending the run when its turn comes. tasks: items of other tasks
    are no concern of this stage. clips: which frames are taken. problems: what becomes of items that are wrong or cannot be read.
    Raises UserError for a manifest that cannot be read, and for an item where `problems` must not go on.
    """

    def __init__(self, manifest: str | Path, root: str | Path, buckets: Sequence[BucketSpec], prompter: Prompter | None = None,
                 tasks: Collection[str] = TASKS, clips: Clips = Clips(), problems: Problems | None = None):
        self.problems, self.clips = problems or Problems(), clips
        self._groups: dict[tuple[str, str], list[Window]] = collections.defaultdict(list)
        self._tokens: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
        self._unplaced: list[str] = []
        found = read_items(manifest, root, self.problems)
        items = [(where, item) for where, item in found if item.task in tasks]
        self._undrawn = collections.Counter(item.task for _, item in found if item.task not in tasks)
        serving = functools.cache(lambda task, images: tuple(bucket for bucket in buckets if serves(bucket, task, images)))
        self._tasks = tuple(t for t in TASKS if any(item.task == t for _, item in items))
        for where, item in items:
            with self.problems.of(where):
                bucket, tokens, reason = place(item, serving(item.task, _images(item)), prompter, clips)
                if not bucket:
                    self._unplaced.append(f"{item.id} ({where}): {reason}")
                    continue
                starts = clips.starts(_last_start(item, bucket, clips), bucket.frames) if NEEDS[item.task].clip else [0]
                self._groups[item.task, bucket.name] += [Window(where, item, start) for start in starts]
                self._tokens[item.task, bucket.name] += [tokens] * len(starts)

    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    def count(self, task: str, bucket: BucketSpec) -> int | None:
        return len(self._groups.get((task, bucket.name), ()))

    def usage(self, task: str, bucket: BucketSpec) -> Usage | None:
        windows, tokens = self._groups.get((task, bucket.name)), self._tokens.get((task, bucket.name))
        if not windows:
            return None
        clips = [m for w in windows for m in (w.item.target, w.item.video) if m] if NEEDS[task].clip else []
        speeds = [speed for speed in (self.clips.speed(facts_of(m, clip=True)) for m in clips) if speed]
        return Usage(float(np.mean(tokens)), (min(speeds), max(speeds)) if speeds else None)

    def unplaced(self) -> list[str]:
        return self._unplaced

    def undrawn(self) -> dict[str, int]:
        return dict(self._undrawn)

    def fingerprint(self) -> str:
        digest = hashlib.sha256()
        for group, windows in sorted(self._groups.items()):
            digest.update(json.dumps([group, [[*_told(w.item), w.start] for w in windows]]).encode())
        return digest.hexdigest()

    def window(self, task: str, bucket: BucketSpec, index: int) -> Window:
        """What sample `index` of the group is made of."""
        return self._groups[task, bucket.name][index]

    def sample(self, task: str, bucket: BucketSpec, index: int) -> Sample:
        """Sample `index` of the group, decoded and cut to the bucket; where it cannot be read and the run goes on, the next that can.
        Raises UserError otherwise."""
        group = self._groups[task, bucket.name]
        for number in range(len(group)):
            window = group[(index + number) % len(group)]
            with self.problems.of(window.where):
                return read_window(window, bucket, self.clips)
        raise UserError(f"none of the {len(group)} samples of task {task} in bucket {bucket.name} can be read")


def _told(item: Item) -> list[Any]:
    """All that makes an item but what its files hold and where they lie."""
    files = [media.name for media in (item.target, *item.images, *([item.video] if item.video else []))]
    return [item.id, files, item.texts, item.base_image]


def read_window(window: Window, bucket: BucketSpec, clips: Clips) -> Sample:
    """The pixels of a sample, at the sizes of its bucket. Raises UserError for a clip that gives fewer frames than its header promised."""
    item, rate = window.item, FPS if clips.compat == "true_rate" else None
    if NEEDS[item.task].clip:
        target = read_cut_clip(item.target, bucket.frames, bucket.height, bucket.width, window.start, rate)
    else:
        target = cover(read_image(item.target), bucket.height, bucket.width)[None]

    slot = (bucket.image_height, bucket.image_width)
    alike = bool(bucket.images) and _same_aspect(slot, (bucket.height, bucket.width))

    def reference(media):
        image = read_image(media)
        if alike:
            facts = facts_of(item.target, NEEDS[item.task].clip)
            if _same_aspect(image.shape, (facts.height, facts.width)):
                return cover(image, *slot)
        return letterbox(image, *slot)

    images = tuple(reference(media) for media in item.images)
    if item.task == "i2v" and not images:
        images = ((cover if alike else letterbox)(target[0], *slot),)
    video = item.video and read_cut_clip(item.video, bucket.video_frames, bucket.video_height, bucket.video_width, window.start, rate)
    return Sample(item.id, item.task, target, dict(item.texts), images=images, video=video, base_image=item.base_image)


def _same_aspect(size: Sequence[int], other: Sequence[int]) -> bool:
    """Of two sizes (height, width, ...)."""
    return abs(size[0] / size[1] / (other[0] / other[1]) - 1) < SAME_ASPECT


def facts_of(media: Media, clip: bool) -> Facts:
    """What ingest wrote down of it, else what its header says. Raises UserError."""
    return getattr(media, "facts", None) or (clip_facts if clip else picture_facts)(media)


def place(item: Item, buckets: Sequence[BucketSpec], prompter: Prompter | None,
          clips: Clips = Clips()) -> tuple[BucketSpec | None, float, str]:
    """The bucket for an item and how many of its tokens a row of it fills (counting all of the prompt's without a prompter), or None and
    why. Raises UserError when a file of it cannot be read."""
    facts = facts_of(item.target, NEEDS[item.task].clip)
    frames, images = clips.length(facts) if NEEDS[item.task].clip else 1, _images(item)
    video_frames = clips.length(facts_of(item.video, clip=True)) if item.video else 0
    references = [facts_of(media, clip=False) for media in item.images]
    able, reason = list(buckets), (f"no bucket for {item.task} of {frames}x{facts.height}x{facts.width} with {images} reference images"
                                   + (f" and a reference clip of {video_frames} frames" if item.video else ""))
    while bucket := fitting(able, item.task, images, frames, facts.height, facts.width, video_frames):
        problem = next(filter(None, (_spoiled_reference(f, bucket) for f in references)), "")
        used = 0.0
        if prompter and not problem:
            used, problem = _prompt_tokens(item, images, bucket, prompter)
        if not problem:
            return bucket, bucket.target_tokens + _reference_tokens(item, images, bucket) + (used or bucket.prompt_tokens), ""
        able.remove(bucket)
        reason = problem
    if len(able) == len(buckets):
        spoiled = [spoils(facts.height, facts.width, b.height, b.width) for b in able if serves(b, item.task, images) and b.frames <= frames]
        reason = next(filter(None, spoiled), reason)
    return None, 0.0, reason


def _images(item: Item) -> int:
    """Reference images of its row: i2v may have none of its own."""
    return len(item.images) or NEEDS[item.task].images


def _last_start(item: Item, bucket: BucketSpec, clips: Clips) -> int:
    """The last frame at which target and reference clip can both begin."""
    wanted = ((item.target, bucket.frames), (item.video, bucket.video_frames))
    return min(clips.length(facts_of(media, clip=True)) - frames for media, frames in wanted if media)


def _spoiled_reference(facts: Facts, bucket: BucketSpec) -> str:
    """What is wrong with a reference image of that size in this bucket; "" for nothing."""
    if max(facts.height, facts.width) > MAX_ASPECT * min(facts.height, facts.width):
        return f"its reference image of {facts.width}x{facts.height} has an aspect ratio above {MAX_ASPECT:.0f}"
    spoiled = spoils(facts.height, facts.width, bucket.image_height, bucket.image_width, cut=False)
    return spoiled and f"its reference image of {spoiled}"


def _reference_tokens(item: Item, images: int, bucket: BucketSpec) -> int:
    clip = visual_tokens(bucket.video_frames, bucket.video_height, bucket.video_width) + 2 if item.video else 0
    return images * (visual_tokens(1, bucket.image_height, bucket.image_width) + 2) + clip  # 2: the boundary tokens


def _prompt_tokens(item: Item, images: int, bucket: BucketSpec, prompter: Prompter) -> tuple[float, str]:
    """Mean length of the item's prompts, and what of them is too long for the bucket, "" when all fit."""
    limits, lengths = prompter.limits, []
    seen = [limits.image_grid(bucket.image_height, bucket.image_width) for _ in range(images)]
    clip = limits.video_grid(bucket.video_height, bucket.video_width) if item.video else None
    patches = int(sum(np.prod(grid) for grid in [*seen, *([clip] if clip else [])]))
    if patches > bucket.patches:
        return 0.0, f"it needs {patches} VLM patches, bucket {bucket.name} has {bucket.patches}"
    for kind, texts in item.texts.items():
        for text in texts:
            lengths.append(prompter.length(text, seen, clip))
            if lengths[-1] > bucket.prompt_tokens:
                return 0.0, f"with its {kind} text it needs {lengths[-1]} prompt tokens, bucket {bucket.name} has {bucket.prompt_tokens}"
    return float(np.mean(lengths)), ""


def cover_size(size: tuple[int, int], height: int, width: int) -> tuple[int, int]:
    """The smallest size of the aspect ratio of `size` that covers height x width."""
    scale = max(height / size[0], width / size[1])
    return max(height, round(size[0] * scale)), max(width, round(size[1] * scale))


def cover(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image (H, W, 3) uint8 scaled to cover height x width (LANCZOS) and cut evenly at both sides."""
    if image.shape[:2] == (height, width):
        return image
    high, wide = cover_size(image.shape[:2], height, width)
    return _centre(np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.LANCZOS)), height, width)


def read_cut_clip(media: Media, count: int, height: int, width: int, start: int = 0, rate: float | None = None) -> np.ndarray:
    """`count` frames from frame `start` on, scaled to cover height x width and cut evenly: uint8 (count, height, width, 3).

    rate: frames a second that are counted, each the one of the file that is nearest in time; None: the file's own frames.
    Raises UserError.
    """
    clip, filled = np.empty((count, height, width, 3), np.uint8), 0
    for frame, times in _picked(media, start, start + count, rate):
        image = frame_pixels(frame, *cover_size(shown_size(frame), height, width), interpolation="LANCZOS")
        clip[filled:filled + times] = _centre(image, height, width)
        filled += times
        if filled == count:
            return clip
    raise UserError(f"the video {media} decodes to {start + filled} frames, {start + count} are needed: "
                    "repair it or take it out of the manifest")


def _picked(media: Media, start: int, stop: int, rate: float | None):
    """(frame of the file, how often it is taken) for the frames start..stop-1 of the clip as it is counted."""
    if rate is None:
        for number, frame in enumerate(decoded_frames(media)):
            if start <= number < stop:
                yield frame, 1
        return
    held, at, first = None, start, 0.0  # the frame whose time is up when the next is nearer; the next frame that is wanted
    for frame in decoded_frames(media):
        if held is None:
            first = _time(frame)
        else:
            until = int(np.ceil(((_time(held) + _time(frame)) / 2 - first) * rate - 1e-6))
            if until > at:
                yield held, min(until, stop) - at
                at = min(until, stop)
        held = frame
    if at < stop and at <= (_time(held) - first) * rate + 1e-3:
        yield held, min(stop, int((_time(held) - first) * rate + 1e-3) + 1) - at


def _time(frame) -> float:
    return frame.time or 0.0


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top:top + height, left:left + width]
