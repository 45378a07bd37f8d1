"""The prompt that the VLM reads: chat template, image and video tokens, timestamps, positions, and the boundary positions.

The text is the reference's to the token: one user turn, references first (images, then the video), numbered per kind, then
the instruction. A video becomes one group of tokens per two sampled frames, each with its timestamp and its own pair of vision
markers (the form of transformers 4.57, with which the published weights were used).
"""
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from data_pipelines.pixels import PATCH_VALUES, Patches, PixelLimits, clip_patches, image_patches, patch_coordinates, video_patches
from vino_jax.errors import UserError

SYSTEM = "You are a helpful assistant aimed at generating an output video caption."
REWRITE_SYSTEM = (SYSTEM + " Based on the user's input command, provide a caption describing the video and output it directly. ")
IM_START, IM_END = "<|im_start|>", "<|im_end|>"
END_OF_TEXT = "<|endoftext|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE_PAD, VIDEO_PAD = "<|image_pad|>", "<|video_pad|>"


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt as the VLM takes it. L tokens, P patches, K references (images, then the video)."""

    ids: np.ndarray  # (L,) int32
    mrope: np.ndarray  # (3, L) int32: time, row, column
    visual_index: np.ndarray  # (L,) int32: merged patch that stands in for the token, -1 for text
    patches: np.ndarray  # (P, 1536) float32
    coords: np.ndarray  # (P, 4) int32: row, column, grid height, grid width
    segments: np.ndarray  # (P,) int32: frame group over all references, from 1
    starts: np.ndarray  # (K,) int32: position of each reference's (first) vision_start
    ends: np.ndarray  # (K,) int32: position of each reference's (last) vision_end


class Prompter:
    """Turns a text and its references into an EncodedPrompt, with the tokenizer and limits of a local Qwen3-VL folder."""

    def __init__(self, folder: str | Path, limits: PixelLimits | None = None):
        """Raises UserError when the folder lacks a tokenizer, a special token or (without `limits`) the processor files."""
        from transformers import PreTrainedTokenizerFast

        folder = Path(folder)
        if not (folder / "tokenizer.json").is_file():
            raise UserError(f"{folder} has no tokenizer.json: give a Qwen3-VL folder with its tokenizer files")
        self.folder = folder
        self.limits = limits or PixelLimits.from_folder(folder)
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), clean_up_tokenization_spaces=False)
        self._encoder = self.tokenizer.backend_tokenizer  # loaders encode from several threads, which the wrapper does not allow
        self._special = self.tokenizer.get_added_vocab()
        missing = [t for t in (IM_START, IM_END, END_OF_TEXT, VISION_START, VISION_END, IMAGE_PAD, VIDEO_PAD) if t not in self._special]
        if missing:
            raise UserError(f"the tokenizer of {folder} lacks {', '.join(missing)}: it is not Qwen3-VL's")

    def token_id(self, token: str) -> int:
        """Id of a special token by its text. Raises KeyError for a text that is none."""
        return self._special[token]

    def see_image(self, image: np.ndarray) -> Patches:
        """Patches of an image, uint8 (H, W, 3)."""
        return image_patches(image, self.limits)

    def see_clip(self, clip: np.ndarray) -> Patches:
        """Patches of a whole clip, uint8 (F, H, W, 3): its evenly spaced frames."""
        return clip_patches(clip, self.limits)

    def see_sampled(self, frames: np.ndarray) -> Patches:
        """Patches of frames that were sampled already, uint8 (F, H, W, 3)."""
        return video_patches(frames, self.limits)

    def encode(self, text: str, images: Sequence[Patches] = (), video: Patches | None = None, system: str = SYSTEM) -> EncodedPrompt:
        """The prompt of a text with its references.

        Raises UserError when the text holds a special token, which would be read as structure.
        """
        ids = self._ids(text, [image.grid for image in images], video and video.grid, system)
        references = [*images, *([video] if video is not None else [])]
        starts, ends = self._markers(ids, len(images), video)
        return EncodedPrompt(ids, self.positions(ids, [r.grid for r in references]), self._visual_index(ids),
                             *_joined_patches(references), starts, ends)

    def length(self, text: str, images: Sequence[tuple[int, int, int]] = (), video: tuple[int, int, int] | None = None) -> int:
        """Tokens of the prompt that `encode` would make, its references given by their patch grids. Raises UserError as it does."""
        return len(self._ids(text, images, video, SYSTEM))

    def _ids(self, text: str, images: Sequence[tuple[int, int, int]], video: tuple[int, int, int] | None, system: str) -> np.ndarray:
        for token in self._special:
            if token in text:
                raise UserError(f"the text {text[:60]!r} holds the special token {token}: remove it")
        merged = self.limits.merge**2
        parts = [f"{IM_START}system\n{system}{IM_END}\n{IM_START}user\n"]
        for i, grid in enumerate(images):
            parts.append(f"Image {i + 1}: {VISION_START}{IMAGE_PAD * (np.prod(grid) // merged)}{VISION_END}")
        if video is not None:
            parts.append("Video 1: ")
            for stamp in self._timestamps(video[0]):
                parts.append(f"<{stamp:.1f} seconds>{VISION_START}{VIDEO_PAD * (video[1] * video[2] // merged)}{VISION_END}")
        parts.append(f"{text}{IM_END}\n{IM_START}assistant\n")
        return np.asarray(self._encoder.encode("".join(parts), add_special_tokens=False).ids, np.int32)

    @property
    def stops(self) -> tuple[int, int]:
        """Ids of the tokens with which the VLM ends what it writes."""
        return self.token_id(IM_END), self.token_id(END_OF_TEXT)

    def decode(self, ids: Sequence[int]) -> str:
        """Text of generated ids, without what `encode` would refuse in a text."""
        special = set(self._special.values())
        return self.tokenizer.decode([i for i in ids if i not in special])

    def positions(self, ids: np.ndarray, grids: Sequence[tuple[int, int, int]]) -> np.ndarray:
        """MRoPE positions (3, L) int32 of a prompt whose references have these patch grids, in the order of the prompt.

        Text counts on; a frame group starts at the next position p and takes (p, p+row, p+column); text after it goes on
        behind the largest (Qwen3-VL's get_rope_index: the timestamps carry the time, each group is a picture of its own).
        """
        pads = (self.token_id(IMAGE_PAD), self.token_id(VIDEO_PAD))
        groups = iter([(h // self.limits.merge, w // self.limits.merge) for t, h, w in grids for _ in range(t)])
        is_visual, out, at, following = np.isin(ids, pads), np.empty((3, len(ids)), np.int32), 0, 0
        while at < len(ids):
            if is_visual[at]:
                rows, columns = next(groups)
                n = rows * columns
                out[:, at:at + n] = following + np.stack([np.zeros(n, np.int32), np.arange(n) // columns, np.arange(n) % columns])
                following += max(rows, columns)
            else:
                n = int(np.argmax(is_visual[at:])) or len(ids) - at
                out[:, at:at + n] = np.arange(following, following + n)
                following += n
            at += n
        return out

    def _timestamps(self, groups: int) -> list[float]:
        """Seconds in the middle of each group of two frames, as if the sampled frames ran at `video_fps` (the reference does so)."""
        t = self.limits.temporal
        return [(group * t + (group + 1) * t - 1) / 2 / self.limits.video_fps for group in range(groups)]

    def _visual_index(self, ids: np.ndarray) -> np.ndarray:
        is_visual = np.isin(ids, (self.token_id(IMAGE_PAD), self.token_id(VIDEO_PAD)))
        return np.where(is_visual, np.cumsum(is_visual) - 1, -1).astype(np.int32)

    def _markers(self, ids: np.ndarray, images: int, video: Patches | None) -> tuple[np.ndarray, np.ndarray]:
        """Boundary positions: an image's pair; a video's first vision_start and last vision_end."""
        starts, ends = (np.flatnonzero(ids == self.token_id(token)) for token in (VISION_START, VISION_END))
        if video is not None:
            starts, ends = np.append(starts[:images], starts[images]), np.append(ends[:images], ends[-1])
        return starts.astype(np.int32), ends.astype(np.int32)


def _joined_patches(references: Sequence[Patches]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """patches, coords and segments of all references, in order."""
    if not references:
        return np.zeros((0, PATCH_VALUES), np.float32), np.zeros((0, 4), np.int32), np.zeros((0,), np.int32)
    frames = [h * w for t, h, w in (r.grid for r in references) for _ in range(t)]
    segments = np.repeat(np.arange(1, len(frames) + 1, dtype=np.int32), frames)
    values = references[0].values if len(references) == 1 else np.concatenate([r.values for r in references])
    return values, np.concatenate([patch_coordinates(r.grid) for r in references]), segments
