"""Pictures and clips listed in a JSONL manifest.

One JSON object a line; paths are relative to `root`:
  task         one of vino_jax.batch.TASKS
  target       what is to be generated: a picture, or a clip for the video tasks
  images       reference images in their order (i2v without any: the target's first frame)
  video        reference clip of tv2v and tiv2v
  long, short, instruction    texts, at least one
  base_image   whether the last reference image is what is edited (default: true for ti2i_baseimg)
  id           name in messages (default: the target's path)

Each item goes to the bucket that suits it (data_pipelines.buckets.fitting). Target and reference clip, and reference images of
the target's own aspect ratio, are scaled to cover the bucket's size and cut evenly at both sides, so that what matches before
still matches; other reference images are letterboxed on white. Of a clip the first frames are taken, at the clip's own rate.
"""
import functools
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
from PIL import Image

from data_pipelines.buckets import NEEDS, fitting
from data_pipelines.mixture import TEXTS
from data_pipelines.pixels import Patches, letterbox, read_image
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample
from vino_jax.batch import TASKS, BucketSpec
from vino_jax.errors import UserError

KEYS = {"task": str, "target": str, "images": list, "video": str, "base_image": bool, "id": str, **{kind: str for kind in TEXTS}}
SAME_ASPECT = 0.02  # relative difference of two aspect ratios that counts as none


@dataclass(frozen=True)
class Item:
    """A line of the manifest."""

    id: str
    task: str
    target: Path
    images: tuple[Path, ...]
    video: Path | None
    texts: dict[str, str]
    base_image: bool


class MediaSource:
    """Samples from a manifest; finite.

    Args: manifest: JSONL file; root: what its paths start from; buckets: those that items may go to; prompter: see Prompter; given,
    an item whose texts are too long for a bucket is not put there, instead of ending the run when its turn comes. tasks: items of
    other tasks are no concern of this stage.
    Raises UserError naming file:line for a line that is wrong or names a file that cannot be read.
    """

    def __init__(self, manifest: str | Path, root: str | Path, buckets: Sequence[BucketSpec], prompter: Prompter | None = None,
                 tasks: Collection[str] = TASKS):
        self._groups: dict[tuple[str, str], list[Item]] = {}
        self._unplaced: list[str] = []
        items = [(where, item) for where, item in read_manifest(manifest, root) if item.task in tasks]
        self._tasks = tuple(t for t in TASKS if any(item.task == t for _, item in items))
        for where, item in items:
            try:
                bucket, reason = place(item, buckets, prompter)
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
            if bucket:
                self._groups.setdefault((item.task, bucket.name), []).append(item)
            else:
                self._unplaced.append(f"{item.id} ({where}): {reason}")

    def tasks(self) -> tuple[str, ...]:
        return self._tasks

    def count(self, task: str, bucket: BucketSpec) -> int | None:
        return len(self._groups.get((task, bucket.name), ()))

    def unplaced(self) -> list[str]:
        return self._unplaced

    def sample(self, task: str, bucket: BucketSpec, index: int) -> Sample:
        """Item `index` of the group, decoded and cut to the bucket. Raises UserError for a clip that gives fewer frames than
        its header promised."""
        item = self._groups[task, bucket.name][index]
        if NEEDS[task].clip:
            target = read_cut_clip(item.target, bucket.frames, bucket.height, bucket.width)
        else:
            target = cover(read_image(item.target), bucket.height, bucket.width)[None]
        _, height, width, _ = item_size(item)

        def reference(path):
            image = read_image(path)
            same = abs(image.shape[0] / image.shape[1] / (height / width) - 1) < SAME_ASPECT
            return (cover if same else letterbox)(image, bucket.image_height, bucket.image_width)

        images = tuple(reference(path) for path in item.images)
        if task == "i2v" and not images:
            images = (cover(target[0], bucket.image_height, bucket.image_width),)
        video = item.video and read_cut_clip(item.video, bucket.video_frames, bucket.video_height, bucket.video_width)
        return Sample(item.id, task, target, dict(item.texts), images=images, video=video, base_image=item.base_image)


def read_manifest(manifest: str | Path, root: str | Path) -> list[tuple[str, Item]]:
    """("file:line", item) of every line; empty lines are skipped. Raises UserError naming file:line for the first bad one."""
    manifest, found = Path(manifest), []
    try:
        lines = manifest.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the manifest {manifest}: {error}") from None
    for number, line in enumerate(lines, 1):
        if line.strip():
            where = f"{manifest}:{number}"
            try:
                found.append((where, _item(json.loads(line), Path(root))))
            except json.JSONDecodeError as error:
                raise UserError(f"{where}: not JSON ({error.msg}, column {error.colno}); one object a line is expected") from None
            except UserError as error:
                raise UserError(f"{where}: {error}") from None
    if not found:
        raise UserError(f"the manifest {manifest} has no items")
    return found


def _item(entry, root: Path) -> Item:
    if not isinstance(entry, dict):
        raise UserError("not a JSON object")
    for key, value in entry.items():
        if key not in KEYS:
            raise UserError(f"unknown key {key!r}; known: {', '.join(KEYS)}")
        if not isinstance(value, KEYS[key]) or (key == "images" and not all(isinstance(v, str) for v in value)):
            raise UserError(f"{key!r} must be {'a list of paths' if key == 'images' else KEYS[key].__name__}, not {value!r}")
    for key in ("task", "target"):
        if not entry.get(key):
            raise UserError(f"{key!r} is missing")
    task, images, video = entry["task"], entry.get("images", []), entry.get("video")
    if task not in TASKS:
        raise UserError(f"unknown task {task!r}; known: {', '.join(TASKS)}")
    needs = NEEDS[task]
    if images and not needs.images:
        raise UserError(f"task {task} takes no 'images'")
    if needs.images and not images and task != "i2v":
        raise UserError(f"task {task} needs 'images'")
    if bool(video) != needs.video:
        raise UserError(f"task {task} {'needs a' if needs.video else 'takes no'} 'video'")
    texts = {kind: entry[kind] for kind in TEXTS if entry.get(kind)}
    if not texts:
        raise UserError(f"no text: give at least one of {', '.join(TEXTS)}")
    files = [root / name for name in (entry["target"], *images, *([video] if video else []))]
    for file in files:
        if not file.is_file():
            raise UserError(f"there is no file {file}")
    return Item(entry.get("id") or entry["target"], task, files[0], tuple(files[1:1 + len(images)]), files[-1] if video else None, texts,
                entry.get("base_image", task == "ti2i_baseimg"))


def place(item: Item, buckets: Sequence[BucketSpec], prompter: Prompter | None) -> tuple[BucketSpec | None, str]:
    """The bucket for an item, or None and why. Raises UserError when a file of it cannot be read."""
    frames, height, width, video_frames = item_size(item)
    images = len(item.images) or NEEDS[item.task].images
    able, reason = list(buckets), (f"no bucket for {item.task} of {frames}x{height}x{width} with {images} reference images"
                                   + (f" and a reference clip of {video_frames} frames" if item.video else ""))
    while bucket := fitting(able, item.task, images, frames, height, width, video_frames):
        problem = prompter and _prompt_problem(item, images, bucket, prompter)
        if not problem:
            return bucket, ""
        able.remove(bucket)
        reason = problem
    return None, reason


def _prompt_problem(item: Item, images: int, bucket: BucketSpec, prompter: Prompter) -> str:
    """What of the item's prompts is too long for the bucket; "" when all fit."""
    seen = [_blank(prompter, 0, bucket.image_height, bucket.image_width) for _ in range(images)]
    clip = _blank(prompter, bucket.video_frames, bucket.video_height, bucket.video_width) if item.video else None
    for kind, text in item.texts.items():
        prompt = prompter.encode(text, seen, clip)
        for have, room, what in ((len(prompt.ids), bucket.prompt_tokens, "prompt tokens"),
                                 (len(prompt.patches), bucket.patches, "VLM patches")):
            if have > room:
                return f"with its {kind} text it needs {have} {what}, bucket {bucket.name} has {room}"
    return ""


@functools.lru_cache(maxsize=64)
def _blank(prompter: Prompter, frames: int, height: int, width: int) -> Patches:
    """Patches of an empty picture (frames 0) or clip of that size."""
    if frames:
        return prompter.see_clip(np.zeros((frames, height, width, 3), np.uint8))
    return prompter.see_image(np.zeros((height, width, 3), np.uint8))


def item_size(item: Item) -> tuple[int, int, int, int]:
    """Frames, height and width of the target, frames of the reference clip (0: none)."""
    target = clip_size(item.target) if NEEDS[item.task].clip else (1, *image_size(item.target))
    return *target, clip_size(item.video)[0] if item.video else 0


@functools.cache
def image_size(path: Path) -> tuple[int, int]:
    """Height and width of a picture, from its header. Raises UserError."""
    try:
        with Image.open(path) as image:
            return image.height, image.width
    except (OSError, ValueError, SyntaxError) as error:
        raise UserError(f"cannot read the image {path}: {error}") from None


@functools.cache
def clip_size(path: Path) -> tuple[int, int, int]:
    """Frames, height and width of a clip; its frames are counted packet by packet, never as duration times rate. Raises UserError."""
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UserError(f"{path} has no video stream")
            codec = container.streams.video[0].codec_context
            return sum(1 for packet in container.demux(video=0) if packet.size), codec.height, codec.width
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {path}: {error}") from None


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


def read_cut_clip(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    """The first `frames` frames, scaled to cover height x width and cut evenly: uint8 (frames, height, width, 3). Raises UserError."""
    kept = []
    try:
        with av.open(str(path)) as container:
            for frame in container.decode(video=0):
                high, wide = cover_size((frame.height, frame.width), height, width)
                kept.append(_centre(frame.to_ndarray(format="rgb24", height=high, width=wide, interpolation="LANCZOS"), height, width))
                if len(kept) == frames:
                    return np.stack(kept)
    except (av.FFmpegError, OSError) as error:
        raise UserError(f"cannot read the video {path}: {error}") from None
    raise UserError(f"the video {path} decodes to {len(kept)} frames, {frames} are needed: repair it or take it out of the manifest")


def _centre(image: np.ndarray, height: int, width: int) -> np.ndarray:
    top, left = (image.shape[0] - height) // 2, (image.shape[1] - width) // 2
    return image[top:top + height, left:left + width]
