"""Pixels on the host: letterboxing, clips, and the patches that the VLM reads (numpy, PIL and PyAV; no torch).

Every image goes two ways: to the VAE at a size that is a multiple of 16, and to the VLM as 16x16 patches after two resizes,
as the reference does it. Arrays are uint8 RGB, (H, W, 3) or (F, H, W, 3), unless said otherwise.
"""
import dataclasses
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image

from data_pipelines.files import decoded_frames, frame_pixels, shown_size
from vino_jax.batch import FRAMES_A_LATENT, PIXELS_A_TOKEN
from vino_jax.errors import UserError

MAX_ASPECT = 200.0
WHITE = 255
PATCH_VALUES = 3 * 2 * 16 * 16  # channels, temporal patch, patch, patch: the width of Batch.patches


@dataclass(frozen=True)
class PixelLimits:
    """How large the VLM sees things: limits in pixels, before (`first_*`) and in the processor's own resize.

    Defaults are Qwen3-VL's processor files and the reference's own first resize. A video's processor limits count the pixels
    of all sampled frames together, its first limits those of one frame.
    """

    image_min: int = 65536
    image_max: int = 16777216
    video_min: int = 4096
    video_max: int = 25165824
    first_factor: int = 28
    first_image_min: int = 4 * 28 * 28
    first_image_max: int = 16384 * 28 * 28
    first_video_min: int = 256 * 32 * 32
    first_video_max: int = 768 * 28 * 28
    video_frames: int = 8  # sampled evenly from the whole clip, whatever its length
    video_fps: float = 24.0  # what the timestamps in the prompt assume, whatever the clip's rate
    patch: int = 16
    temporal: int = 2
    merge: int = 2

    @classmethod
    def from_folder(cls, folder: str | Path, **changes) -> "PixelLimits":
        """Limits from a processor folder's preprocessor_config.json and video_preprocessor_config.json.

        Their optional table `first_resize` {factor, shortest_edge, longest_edge} and the video file's `sampled_frames` replace
        the reference's defaults; `changes` replace single fields. Raises UserError when a file is missing or fits no known patch.
        """
        folder, values = Path(folder), {}
        for kind, name in (("image", "preprocessor_config.json"), ("video", "video_preprocessor_config.json")):
            try:
                table = json.loads((folder / name).read_text())
                values[f"{kind}_min"], values[f"{kind}_max"] = table["size"]["shortest_edge"], table["size"]["longest_edge"]
                first = table.get("first_resize", {})
            except FileNotFoundError:
                raise UserError(f"{folder} has no {name}: give a Qwen3-VL folder with its processor files") from None
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{folder / name} is no processor file of Qwen3-VL: "
                                "it needs size.shortest_edge and size.longest_edge") from None
            for key, field in (("factor", "first_factor"), ("shortest_edge", f"first_{kind}_min"), ("longest_edge", f"first_{kind}_max")):
                if key in first:
                    values[field] = first[key]
            if "sampled_frames" in table:
                values["video_frames"] = table["sampled_frames"]
            sizes = tuple(table.get(k) for k in ("patch_size", "temporal_patch_size", "merge_size"))
            if sizes != (16, 2, 2):
                raise UserError(f"{folder / name}: patch, temporal patch and merge size {sizes} are not supported; Qwen3-VL has (16, 2, 2)")
        return dataclasses.replace(cls(**values), **changes)

    def image_sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) after the first and after the processor's resize of an image."""
        first = bounded_size(height, width, self.first_factor, self.first_image_min, self.first_image_max)
        return first, bounded_size(*first, self.patch * self.merge, self.image_min, self.image_max)

    def video_sizes(self, height: int, width: int) -> tuple[tuple[int, int], tuple[int, int]]:
        """(height, width) after the first and after the processor's resize of a clip's sampled frames."""
        first = bounded_size(height, width, self.first_factor, self.first_video_min, self.first_video_max)
        return first, bounded_size(*first, self.patch * self.merge, self.video_min, self.video_max, self.video_frames, self.temporal)

    def image_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Patch grid (1, rows, columns) of an image of that size."""
        return 1, *(size // self.patch for size in self.image_sizes(height, width)[1])

    def video_grid(self, height: int, width: int) -> tuple[int, int, int]:
        """Patch grid (frame groups, rows, columns) of a clip of that size."""
        return -(-self.video_frames // self.temporal), *(size // self.patch for size in self.video_sizes(height, width)[1])


@dataclass(frozen=True)
class Patches:
    """What the VLM sees of one image or clip."""

    values: np.ndarray  # (t*h*w, 1536) float32 in 2x2 merge order; each row (C, 2, 16, 16), normalised to [-1, 1]
    grid: tuple[int, int, int]  # frame groups, rows, columns, in patches


def bounded_size(height: int, width: int, factor: int, low: int, high: int, frames: int = 1, temporal: int = 1) -> tuple[int, int]:
    """Nearest multiples of `factor` whose pixels over all frames lie within low..high (Qwen-VL's smart_resize).

    Raises UserError for an aspect ratio above 200.
    """
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(f"a picture of {width}x{height} has an aspect ratio above {MAX_ASPECT:.0f}: crop it")
    rows, columns = max(factor, round(height / factor) * factor), max(factor, round(width / factor) * factor)
    whole = round(frames / temporal) * temporal
    if whole * rows * columns > high:
        shrink = math.sqrt(frames * height * width / high)
        rows = max(factor, math.floor(height / shrink / factor) * factor)
        columns = max(factor, math.floor(width / shrink / factor) * factor)
    elif whole * rows * columns < low:
        grow = math.sqrt(low / (frames * height * width))
        rows, columns = math.ceil(height * grow / factor) * factor, math.ceil(width * grow / factor) * factor
    return rows, columns


# --- for the VAE ---


@lru_cache(maxsize=4096)
def letterbox_size(height: int, width: int, budget: int) -> tuple[int, int]:
    """Multiples of 16 whose area is nearest to `budget` pixels, ties by the nearest aspect ratio, as in the reference."""
    if max(height, width) / min(height, width) > MAX_ASPECT:
        raise UserError(f"a picture of {width}x{height} has an aspect ratio above {MAX_ASPECT:.0f}: crop it")
    unit, ratio, best = PIXELS_A_TOKEN, width / height, None
    for high in range(unit, 2 * max(budget, unit * unit) // unit + unit, unit):
        exact = ratio * high / unit
        for wide in {max(1, math.floor(exact)) * unit, max(1, math.ceil(exact)) * unit}:
            score = abs(high * wide - budget), abs(wide / high - ratio), high, wide
            best = score if best is None else min(best, score)
        if math.floor(exact) * unit * high > 2 * budget + unit * unit:
            break  # areas only grow from here
    return best[2], best[3]


def letterbox(image: np.ndarray, height: int, width: int) -> np.ndarray:
    """The image (H, W, 3), scaled to fit (LANCZOS) and centred on white: uint8 (height, width, 3)."""
    high, wide = image.shape[:2]
    if (high, wide) == (height, width):
        return image
    scale = min(height / high, width / wide)
    rows, columns = min(height, max(1, round(high * scale))), min(width, max(1, round(wide * scale)))
    canvas = np.full((height, width, 3), WHITE, np.uint8)
    top, left = (height - rows) // 2, (width - columns) // 2
    canvas[top:top + rows, left:left + columns] = np.asarray(Image.fromarray(image).resize((columns, rows), Image.Resampling.LANCZOS))
    return canvas


def clip_length(wanted: int, length: int) -> int:
    """The largest 4k+1 that is at most both."""
    return (min(wanted, length) - 1) // FRAMES_A_LATENT * FRAMES_A_LATENT + 1


def crop_to_tokens(clip: np.ndarray) -> np.ndarray:
    """Cut (..., H, W, 3) at the bottom and right to multiples of 16. Raises UserError when nothing would be left."""
    height, width = (size // PIXELS_A_TOKEN * PIXELS_A_TOKEN for size in clip.shape[-3:-1])
    if not height or not width:
        raise UserError(f"a clip of {clip.shape[-2]}x{clip.shape[-3]} pixels is too small: at least 16x16 are needed")
    return clip[..., :height, :width, :]


def read_clip(path: str | Path, count: int, budget: int) -> np.ndarray:
    """A clip's first frames, scaled to about `budget` pixels a frame: uint8 (4k+1, H, W, 3), H and W multiples of 16.

    The number of frames is counted by decoding, never from duration times rate. Raises UserError when there is no picture in it.
    """
    kept = []
    for frame in decoded_frames(path):
        if len(kept) == count:
            break
        high, wide = shown_size(frame)
        scale = math.sqrt(budget / (wide * high))
        kept.append(frame_pixels(frame, max(1, round(high * scale)), max(1, round(wide * scale))))
    return crop_to_tokens(_stacked(path, kept[:clip_length(count, len(kept))]))


def read_sampled(path: str | Path, count: int) -> np.ndarray:
    """`count` frames evenly spaced over the whole clip, at its own size: uint8 (count, H, W, 3)."""
    wanted = sampled_indices(sum(1 for _ in decoded_frames(path)), count)
    needed = set(wanted.tolist())
    found = {i: frame_pixels(frame) for i, frame in enumerate(decoded_frames(path)) if i in needed}
    return _stacked(path, [found[i] for i in wanted.tolist()])


def _stacked(path: str | Path, frames: Sequence[np.ndarray]) -> np.ndarray:
    """Frames as one array. Raises UserError where they differ in size."""
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"the frames of the video {path} differ in size: bring it to one size first")
    return np.stack(frames)


def sampled_indices(length: int, count: int) -> np.ndarray:
    """Evenly spaced frame indices round(linspace(0, length-1, count)), int64 (count,); a short clip repeats frames."""
    return np.linspace(0, length - 1, count).round().astype(np.int64)


# --- for the VLM ---


def image_patches(image: np.ndarray, limits: PixelLimits) -> Patches:
    """Patches of an image (H, W, 3), usually the letterboxed one: two bicubic resizes on uint8, then normalised."""
    for high, wide in limits.image_sizes(*image.shape[:2]):
        image = np.asarray(Image.fromarray(image).resize((wide, high), Image.Resampling.BICUBIC))
    return _patches([_normalised(_planes(image))] * limits.temporal, limits)


def video_patches(frames: np.ndarray, limits: PixelLimits) -> Patches:
    """Patches of the sampled frames (F, H, W, 3): a resize rounded to uint8, then the processor's in float."""
    first, second = limits.video_sizes(*frames.shape[1:3])
    if len(frames) % limits.temporal:
        frames = np.concatenate([frames, frames[-1:]])

    def seen(frame):
        # the first resize in float, then rounded: what torch does for uint8 frames (PIL's own uint8 path rounds between its two passes)
        rounded = _resize_planes(_planes(frame), *first)
        return _normalised(_resize_planes(np.clip(np.rint(rounded, out=rounded), 0, 255, out=rounded), *second))

    return _patches([seen(frame) for frame in frames], limits)


def clip_patches(clip: np.ndarray, limits: PixelLimits) -> Patches:
    """Patches of a decoded clip (F, H, W, 3) of any length: its evenly spaced frames."""
    return video_patches(clip[sampled_indices(len(clip), limits.video_frames)], limits)


def patch_coordinates(grid: tuple[int, int, int], merge: int = 2) -> np.ndarray:
    """Row, column, rows, columns of every patch of a grid (t, h, w) in merge order: int32 (t*h*w, 4)."""
    groups, high, wide = grid
    row, column = np.meshgrid(np.arange(high), np.arange(wide), indexing="ij")
    ordered = np.stack([row, column, np.full_like(row, high), np.full_like(row, wide)], -1)
    ordered = ordered.reshape(high // merge, merge, wide // merge, merge, 4).transpose(0, 2, 1, 3, 4).reshape(-1, 4)
    return np.tile(ordered, (groups, 1)).astype(np.int32)


def _planes(image: np.ndarray) -> np.ndarray:
    """float32 (3, H, W) of uint8 (H, W, 3); a copy."""
    return np.ascontiguousarray(image.transpose(2, 0, 1), np.float32)


def _resize_planes(planes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bicubic with antialias in float32 (3, H, W), unclipped: PIL's mode F does what torch's antialiased resize does."""
    if planes.shape[1:] == (height, width):
        return planes
    out = np.empty((len(planes), height, width), np.float32)
    for plane, resized in zip(planes, out, strict=True):
        resized[:] = Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC)
    return out


def _normalised(planes: np.ndarray) -> np.ndarray:
    """0..255 to -1..1, in place."""
    for change, by in ((np.divide, 255), (np.subtract, 0.5), (np.divide, 0.5)):
        change(planes, np.float32(by), out=planes)
    return planes


def _patches(frames: Sequence[np.ndarray], limits: PixelLimits) -> Patches:
    """frames: normalised float32 (3, H, W), as many as a multiple of the temporal patch."""
    p, m, t = limits.patch, limits.merge, limits.temporal
    groups, (_, high, wide) = len(frames) // t, frames[0].shape
    cells = (high // p // m, wide // p // m)
    values = np.empty((groups, *cells, m, m, 3, t, p, p), np.float32)  # row and column, row and column in merge, C, t, p, p
    for i, planes in enumerate(frames):
        values[i // t, ..., i % t, :, :] = planes.reshape(3, cells[0], m, p, cells[1], m, p).transpose(1, 4, 2, 5, 0, 3, 6)
    return Patches(values.reshape(-1, PATCH_VALUES), (groups, high // p, wide // p))
