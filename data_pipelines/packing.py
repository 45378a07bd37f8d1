"""From a prompt and its references to the rows of a Batch: padding, reference tokens, the time line, and the guidance branches.

The visual sequence is, for each reference (images, then the video), [START, its latent tokens, END], and then the target: one
time line, on which a boundary token takes one step and a block of latent frames one step each, as in the reference.
"""
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from data_pipelines.files import read_image
from data_pipelines.pixels import Patches, crop_to_tokens, letterbox, letterbox_size, read_clip, read_sampled
from data_pipelines.prompts import REWRITE_SYSTEM, EncodedPrompt, Prompter
from data_pipelines.samples import Sample, check_finite
from data_pipelines.tasks import IMAGE_SIZED, MAX_SEED, NEGATIVE_IMAGE, NEGATIVE_VIDEO, VIDEO_SIZED, Task
from vino_jax.batch import (
    LATENT_COMPRESSION,
    PIXELS_A_TOKEN,
    ROLE_LATENT,
    ROLE_MARKER,
    TASKS,
    Batch,
    BucketSpec,
    PackedTask,
    check_sampled,
    latent_frames,
    visual_tokens,
)
from vino_jax.errors import UserError

Grid = tuple[int, int, int]  # latent frames, rows, columns of tokens

SHIFT = (5.0, 7.0)  # of the flow time: pictures, clips
GUIDANCE = (5.0, 7.0)  # of the text: pictures, clips


def token_grid(frames: int, height: int, width: int) -> Grid:
    """Tokens of a clip of that size in pixels, by dim; its product is `visual_tokens`."""
    return latent_frames(frames), height // PIXELS_A_TOKEN, width // PIXELS_A_TOKEN


def reference_sequence(grids: Sequence[Grid], offsets: Sequence[int], starts: Sequence[int],
                       ends: Sequence[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray, int]:
    """The references' part of the context, in its order, and the target's first time step.

    Args: by reference: token grid, place of its first token in the pool, prompt positions of its two boundary tokens.
    Returns role (R,), source (R,), position (R, 3) int32, and target_start.
    """
    role, source, position, time = [], [], [], 0
    for grid, offset, start, end in zip(grids, offsets, starts, ends, strict=True):
        count = int(np.prod(grid))
        inner = np.indices(grid).reshape(3, -1).T + [time + 1, 0, 0]
        role.append(np.r_[ROLE_MARKER, np.full(count, ROLE_LATENT), ROLE_MARKER])
        source.append(np.r_[start, np.arange(offset, offset + count), end])
        position.append(np.concatenate([[[time, 0, 0]], inner, [[time + grid[0] + 1, 0, 0]]]))
        time += grid[0] + 2
    if not grids:
        return np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros((0, 3), np.int32), 0
    return *(np.concatenate(x).astype(np.int32) for x in (role, source, position)), time


def pack_row(prompt: EncodedPrompt, grids: Sequence[Grid], offsets: Sequence[int], sizes: tuple[int, int, int], *, task: str, shift: float,
             sample: int = 0) -> dict[str, np.ndarray]:
    """One row of a Batch by field, without pixels, padded to `sizes` = (L prompt tokens, P patches, R reference tokens).

    `grids` and `offsets` (into the pool) belong to the prompt's references, in its order. Raises UserError when the row does
    not fit.
    """
    role, source, position, start = reference_sequence(grids, offsets, prompt.starts, prompt.ends)
    needs, kinds = (len(prompt.ids), len(prompt.patches), len(role)), ("prompt tokens", "VLM patches", "reference tokens")
    for need, room, what in zip(needs, sizes, kinds):
        if need > room:
            raise UserError(f"it needs {need} {what}, there is room for {room}")
    length, patches, references = sizes
    return {
        "tokens": _padded(prompt.ids, length), "prompt_mask": np.arange(length) < len(prompt.ids),
        "mrope": _padded(prompt.mrope, length, axis=1), "visual_index": _padded(prompt.visual_index, length, value=-1),
        "patches": _padded(prompt.patches, patches), "patch_coords": _padded(prompt.coords, patches),
        "patch_segment": _padded(prompt.segments, patches),
        "role": _padded(role, references), "source": _padded(source, references), "position": _padded(position, references),
        "target_start": np.int32(start), "shift": np.float32(shift), "task": np.int32(TASKS.index(task)), "weight": np.float32(1),
        "sample": np.int32(sample),
    }


def collate(rows: Sequence[dict[str, np.ndarray]]) -> Batch:
    """A Batch of rows that were packed to the same sizes; `target`, `images`, `video` are None where the rows have none."""
    return Batch(**{name: _stacked([row[name] for row in rows]) for name in rows[0]})


def _stacked(arrays: list[np.ndarray]) -> np.ndarray:
    return np.stack(arrays) if len(arrays) > 1 else np.asarray(arrays[0])[None]


# --- training ---


def pack_sample(sample: Sample, text: str, bucket: BucketSpec, prompter: Prompter, *, drop_images: bool = False,
                shift: tuple[float, float] = SHIFT, index: int = 0) -> dict[str, np.ndarray]:
    """A training row: the fields of `pack_row` and of `pack_visuals`.

    With `drop_images` (condition dropout) reference images are absent from prompt and context, all but a base image, and leave zeros in
    their slots, as do slots that the sample does not fill. `shift` is for pictures and clips. Raises UserError, naming the sample and
    the bucket, when it does not fit, and for moments that are not finite.
    """
    check_finite(sample)
    sample = sample.without_images() if drop_images else sample
    try:
        _check_fit(sample, bucket)
        sample = see(sample, bucket, prompter)
        count, image_tokens = len(sample.images), visual_tokens(1, bucket.image_height, bucket.image_width)
        grids, offsets = [token_grid(1, bucket.image_height, bucket.image_width)] * count, [i * image_tokens for i in range(count)]
        if sample.video is not None:
            grids.append(token_grid(bucket.video_frames, bucket.video_height, bucket.video_width))
            offsets.append(bucket.images * image_tokens)
        prompt = prompter.encode(text, sample.seen[:count], None if sample.video is None else sample.seen[count])
        row = pack_row(prompt, grids, offsets, (bucket.prompt_tokens, bucket.patches, bucket.reference_tokens),
                       task=sample.task, shift=shift[bucket.frames > 1], sample=index)
    except UserError as error:
        raise UserError(f"sample {sample.id!r} does not fit bucket {bucket.name!r}: {error}") from None
    return row | pack_visuals(sample, bucket)


def see(sample: Sample, bucket: BucketSpec, prompter: Prompter) -> Sample:
    """The sample with its reference images letterboxed onto the bucket's canvas, and what the VLM sees of its references, made of that."""
    if sample.seen is not None:
        return sample
    images = tuple(letterbox(np.asarray(image), bucket.image_height, bucket.image_width) for image in sample.images)
    clips = () if sample.video is None else (prompter.see_clip(sample.video),)
    return replace(sample, images=images, seen=(*map(prompter.see_image, images), *clips))


def pack_visuals(sample: Sample, bucket: BucketSpec) -> dict[str, np.ndarray]:
    """target (F, H, W, 3), images (N, H, W, 3) and video (F, H, W, 3) of a row, uint8; of a sample of moments (f, h, w, 2C),
    (N, h, w, 2C) and (f, h, w, 2C), float32. Zeros where the sample leaves a slot of the bucket empty."""
    row, dtype = {"target": np.ascontiguousarray(sample.target)}, sample.target.dtype
    if bucket.images:
        row["images"] = np.zeros((bucket.images, *_stored(1, bucket.image_height, bucket.image_width, sample.moments)[1:]), dtype)
        row["images"][:len(sample.images)] = sample.images or 0
    if bucket.video_frames:
        row["video"] = (np.zeros(_stored(bucket.video_frames, bucket.video_height, bucket.video_width, sample.moments), dtype)
                        if sample.video is None else np.ascontiguousarray(sample.video))
    return row


def _stored(frames: int, height: int, width: int, moments: int) -> tuple[int, int, int, int]:
    """Shape of a clip of that size in pixels: of its pixels, or of its moments (2C of them)."""
    if not moments:
        return frames, height, width, 3
    return latent_frames(frames), height // LATENT_COMPRESSION, width // LATENT_COMPRESSION, moments


def _check_fit(sample: Sample, bucket: BucketSpec) -> None:
    want = _stored(bucket.frames, bucket.height, bucket.width, sample.moments)
    if sample.target.shape != want:
        raise UserError(f"its target is {sample.target.shape}, the bucket takes {want}")
    if len(sample.images) > bucket.images:
        raise UserError(f"it has {len(sample.images)} reference images, there are {bucket.images} slots")
    want = _stored(bucket.video_frames, bucket.video_height, bucket.video_width, sample.moments)
    if sample.video is not None and sample.video.shape != want:
        raise UserError(f"its reference video is {sample.video.shape}, the bucket takes {want if bucket.video_frames else 'none'}")
    if sample.moments:
        _check_moments(sample, bucket)


def _check_moments(sample: Sample, bucket: BucketSpec) -> None:
    """What pixels are not asked: they are brought to the bucket's size, and what the VLM sees is made of them."""
    want = _stored(1, bucket.image_height, bucket.image_width, sample.moments)[1:]
    for image in sample.images:
        if image.shape != want:
            raise UserError(f"its reference image is {image.shape}, the bucket takes {want}")
    kinds = {x.dtype.name for x in (sample.target, *sample.images, sample.video) if x is not None}
    if kinds != {"float32"}:
        raise UserError(f"its moments are {' and '.join(sorted(kinds))}, not float32")
    if len(sample.seen or ()) != sample.references:
        raise UserError(f"it has moments of {sample.references} references and VLM patches of {len(sample.seen or ())}")


# --- sampling ---


@dataclass(frozen=True)
class SamplingOptions:
    """What is asked of the sampler beside the tasks. None: the reference's value for a picture or a clip."""

    height: int = 480  # pixel budget of every reference, size of the target where no reference sets it
    width: int = 848
    num_frames: int = 85
    seed: int = 0
    guidance: float | None = None
    image_guidance: float = 1.0
    shift: float | None = None
    negative_prompt: str | None = None
    round_to: int = 64  # token counts are padded to multiples of this, so that few programs compile


def pack_task(task: Task, prompter: Prompter, options: SamplingOptions) -> PackedTask:
    """A task of a task file, its references read and letterboxed. Raises UserError, naming the task, for what cannot be read,
    sizes that do not fit, or image guidance where the only image is the one that it keeps."""
    own = {name: getattr(task, name) for name in ("seed", "negative_prompt") if getattr(task, name) is not None}
    options = replace(options, **own)
    try:
        check_options(options)
        if options.image_guidance > 1.0 and task.base_image and len(task.images) == 1:
            raise UserError(f"image guidance {options.image_guidance:g} has no image to leave out: the only one is the base image "
                            "(ref_image_have_base), which it keeps")
        images, clip = _references(task, prompter, options)
        video = None if task.video is None else read_clip(task.video, options.num_frames, options.height * options.width)
        return _pack_branches(task.index, task.task, task.caption, images, video, clip, task.base_image, prompter, options)
    except UserError as error:
        raise UserError(f"task {task.index}: {error}") from None


def pack_rewrite(task: Task, prompter: Prompter, options: SamplingOptions) -> Batch:
    """What the VLM reads to rewrite the caption of a task, with the references as `pack_task` shows them to it: one row (B = 1) without
    references for the MMDiT. Raises UserError, naming the task, for what cannot be read.
    """
    try:
        images, clip = _references(task, prompter, options)
        prompt = prompter.encode(task.caption, [prompter.see_image(image) for image in images], clip, REWRITE_SYSTEM)
    except UserError as error:
        raise UserError(f"task {task.index}: {error}") from None
    return prompt_row(prompt, task.task)


def prompt_row(prompt: EncodedPrompt, task: str) -> Batch:
    """A prompt for the VLM alone (B = 1), tokens and patches padded to sizes of which there are few, so that few programs compile."""
    sizes = padded_size(len(prompt.ids)), padded_size(len(prompt.patches)), 0
    nowhere = np.zeros(0, np.int32)  # the boundary tokens lead to no latents here
    return collate([pack_row(replace(prompt, starts=nowhere, ends=nowhere), (), (), sizes, task=task, shift=0.0)])


def padded_size(count: int) -> int:
    """The least of 0, 64, 96, 128, 192, 256, 384, ... that holds `count`."""
    power = 1 << max(6, (count - 1).bit_length())
    return 0 if not count else power * 3 // 4 if 64 < count <= power * 3 // 4 else power


def _references(task: Task, prompter: Prompter, options: SamplingOptions) -> tuple[list[np.ndarray], Patches | None]:
    """The images of a task, letterboxed, and what the VLM sees of its clip."""
    images = []
    for path in task.images:
        image = read_image(path)
        images.append(letterbox(image, *letterbox_size(*image.shape[:2], options.height * options.width)))
    return images, None if task.video is None else prompter.see_sampled(read_sampled(task.video, prompter.limits.video_frames))


def pack_example(sample: Sample, text: str, prompter: Prompter, options: SamplingOptions,
                 image_size: tuple[int, int] | None = None) -> PackedTask:
    """The task that a data sample poses (its target is not used, but sets the size): for previews and evaluation.

    Reference images are letterboxed onto `image_size` (height, width; as a bucket does), by default onto a size of their own.
    """
    frames, height, width = sample.target.shape[:3]
    options = replace(options, height=height, width=width, num_frames=frames)
    images = [letterbox(np.asarray(i), *(image_size or letterbox_size(*i.shape[:2], height * width))) for i in sample.images]
    video = None if sample.video is None else crop_to_tokens(np.asarray(sample.video))
    seen = None if video is None else prompter.see_clip(video)
    return _pack_branches(sample.id, sample.task, text, images, video, seen, sample.base_image, prompter, options, (frames, height, width))


def check_options(options: SamplingOptions) -> None:
    """Raises UserError for sizes that no task can have, and for guidance that is no number."""
    check_sampled(options.num_frames, options.height, options.width)
    for name in ("guidance", "image_guidance"):
        if not math.isfinite(getattr(options, name) or 0.0):
            raise UserError(f"{name} {getattr(options, name)} must be a finite number")
    if not 0 <= options.seed < MAX_SEED:
        raise UserError(f"seed {options.seed} must be a whole number from 0 to {MAX_SEED - 1}")


def output_size(task: str, images: Sequence[np.ndarray], video: np.ndarray | None, options: SamplingOptions) -> tuple[int, int, int]:
    """Frames, height, width of what `task` generates, as in the reference, its references being letterboxed already."""
    if task in VIDEO_SIZED:
        return video.shape[:3]
    frames = 1 if task.endswith("2i") or task == "ti2i_baseimg" else options.num_frames
    height, width = images[-1].shape[:2] if task in IMAGE_SIZED else (options.height, options.width)
    return frames, height, width


def _pack_branches(index: str, task: str, text: str, images: list[np.ndarray], video: np.ndarray | None, clip: Patches | None, base: bool,
                   prompter: Prompter, options: SamplingOptions, size: tuple[int, int, int] | None = None) -> PackedTask:
    """Branches positive, negative and, where image guidance has images to drop, negative without them."""
    frames, height, width = size or output_size(task, images, video, options)
    is_clip = frames > 1
    negative = options.negative_prompt if options.negative_prompt is not None else (NEGATIVE_IMAGE, NEGATIVE_VIDEO)[is_clip]
    references = [image[None] for image in images] + ([video] if video is not None else [])
    grids = [token_grid(*reference.shape[:3]) for reference in references]
    offsets = np.cumsum([0, *(int(np.prod(grid)) for grid in grids)]).tolist()
    seen = [prompter.see_image(image) for image in images]
    every = list(range(len(references)))
    plans = [(text, every), (negative, every)]
    dropped = every[:len(images) - base] if images else []
    image_guidance = options.image_guidance if dropped else 1.0
    if image_guidance > 1.0:
        plans.append((negative, every[len(dropped):]))
    prompts = [prompter.encode(words, [seen[i] for i in kept if i < len(images)], clip) for words, kept in plans]
    shift = options.shift if options.shift is not None else SHIFT[is_clip]
    branches = []
    for prompt, (_, kept) in zip(prompts, plans):
        counts = len(prompt.ids), len(prompt.patches), sum(int(np.prod(grids[i])) + 2 for i in kept)
        sizes = tuple(-(-count // options.round_to) * options.round_to for count in counts)
        branches.append(collate([pack_row(prompt, [grids[i] for i in kept], [offsets[i] for i in kept], sizes, task=task, shift=shift)]))
    return PackedTask(
        index=index, task=task, frames=frames, height=height, width=width, branches=tuple(branches), references=tuple(references), shift=shift,
        guidance=options.guidance if options.guidance is not None else GUIDANCE[is_clip], image_guidance=image_guidance, seed=options.seed,
        prompt=text)


def _padded(x: np.ndarray, size: int, axis: int = 0, value: int = 0) -> np.ndarray:
    if x.shape[axis] == size:
        return x  # patches are large, and copies of them cost more than their making
    width = [(0, 0)] * x.ndim
    width[axis] = (0, size - x.shape[axis])
    return np.pad(x, width, constant_values=value)
