"""The contract between data and model: what one batch holds, with static shapes from one place.

The interleaved context is data, not code: how many references there are, of what kind and size, and which task it is, is
decided on the host when a row is packed. The model sees flat tokens with positions, roles and masks.

Dims: B rows, L prompt tokens, P VLM patches, R visual reference tokens (latent and boundary tokens), N reference images,
F H W frames, height, width in pixels, f h w in latents (f = (F-1)/4+1, h = H/8, w = W/8), C latent channels.

A row's *pool* is where its reference latent tokens come from: image 0's tokens (row-major over h/2 x w/2), image 1's, ...,
then the video's (frame, row, column). `source` picks from it, so any subset in any order costs no other program.
"""
import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vino_jax.errors import UserError

Array = Any  # numpy on the host, jax on the device, ShapeDtypeStruct in a spec

ROLE_PAD, ROLE_LATENT, ROLE_MARKER = 0, 1, 2

TASKS = ("t2i", "t2v", "i2v", "ti2v", "ti2i", "ti2i_baseimg", "tv2v", "tiv2v")

PIXELS_A_TOKEN = 16  # 8x of the VAE, 2x of the patch
FRAMES_A_LATENT = 4
LATENT_COMPRESSION = 8
MAX_FRAMES = 89  # of a clip that is sampled

# What a bucket's fields may hold: the least value, the step to the next, and the same in words.
_COUNT, _CLIP = (1, 1, "at least 1"), (1, FRAMES_A_LATENT, f"{FRAMES_A_LATENT}k+1")
_SIDE, _PATCHES = (PIXELS_A_TOKEN, PIXELS_A_TOKEN, f"a multiple of {PIXELS_A_TOKEN}"), (0, 4, "a multiple of 4")
_TARGET = {"batch": _COUNT, "frames": _CLIP, "height": _SIDE, "width": _SIDE, "prompt_tokens": _COUNT, "patches": _PATCHES}
_REFERENCES = ({"images": _COUNT, "image_height": _SIDE, "image_width": _SIDE},
               {"video_frames": _CLIP, "video_height": _SIDE, "video_width": _SIDE})


def latent_frames(frames: int) -> int:
    """Latent frames of `frames` pixel frames (4k+1)."""
    return (frames - 1) // FRAMES_A_LATENT + 1


def check_sampled(num_frames: int, height: int, width: int, where: str = "") -> None:
    """Raises UserError, beginning with `where`, for a size in pixels that nothing is sampled at."""
    if height % PIXELS_A_TOKEN or width % PIXELS_A_TOKEN or min(height, width) < PIXELS_A_TOKEN:
        raise UserError(f"{where}height {height} and width {width} must be multiples of {PIXELS_A_TOKEN}")
    if not 1 <= num_frames <= MAX_FRAMES or (num_frames - 1) % FRAMES_A_LATENT:
        raise UserError(f"{where}num_frames {num_frames} must be {FRAMES_A_LATENT}k+1 and at most {MAX_FRAMES}")


def visual_tokens(frames: int, height: int, width: int) -> int:
    """MMDiT tokens of a clip of that size in pixels; 0 frames give 0."""
    return (latent_frames(frames) if frames else 0) * (height // PIXELS_A_TOKEN) * (width // PIXELS_A_TOKEN)


@jax.tree_util.register_dataclass
@dataclass
class Batch:
    """One batch; every leaf has the leading dim B. `target`, `images` and `video` hold either uint8 pixels (last dim 3) or
    float32 VAE moments (last dim 2C: mean, log-variance); they are None where the bucket has none (target: in sampling)."""

    # what the VLM reads
    tokens: Array  # (B, L) int32, right-padded
    prompt_mask: Array  # (B, L) bool, True for the prompt's tokens
    mrope: Array  # (B, 3, L) int32, time/row/column positions of the prompt
    visual_index: Array  # (B, L) int32, merged patch (0..P/4-1) that stands in for the token's embedding; -1 for text
    patches: Array  # (B, P, 1536) float32, normalised pixels in 2x2 merge order
    patch_coords: Array  # (B, P, 4) int32: row, column, grid height, grid width, in patches
    patch_segment: Array  # (B, P) int32: which frame of which reference, from 1; 0 is padding
    # the references in the MMDiT's sequence
    role: Array  # (B, R) int32: ROLE_*
    source: Array  # (B, R) int32: pool index of a latent token, prompt position of a boundary token
    position: Array  # (B, R, 3) int32: time, row, column for RoPE
    # the target
    target_start: Array  # (B,) int32: the time step of the target's first latent frame
    shift: Array  # (B,) float32: shift of the flow time
    task: Array  # (B,) int32: index into TASKS
    weight: Array  # (B,) float32: weight in the loss
    sample: Array  # (B,) int32: which sample of the plan this is
    target: Array | None = None  # (B, F, H, W, 3) uint8 or (B, f, h, w, 2C) float32
    images: Array | None = None  # (B, N, H, W, 3) uint8 or (B, N, h, w, 2C) float32
    video: Array | None = None  # (B, F, H, W, 3) uint8 or (B, f, h, w, 2C) float32

    def replace(self, **changes) -> "Batch":
        return dataclasses.replace(self, **changes)


@dataclass(frozen=True)
class BucketSpec:
    """One set of static shapes: one executable a (stage, bucket). Sizes in pixels, multiples of 16; frames 4k+1; patches in cells of 4.

    A kind of reference that a bucket has no slot for has zeros in all its fields. Raises UserError for other values.
    """

    name: str
    batch: int  # rows over all processes
    frames: int
    height: int
    width: int
    prompt_tokens: int
    patches: int = 0  # VLM patches a row
    images: int = 0
    image_height: int = 0
    image_width: int = 0
    video_frames: int = 0
    video_height: int = 0
    video_width: int = 0

    def __post_init__(self):
        for fields in (_TARGET, *_REFERENCES):
            values = {name: getattr(self, name) for name in fields}
            if fields is not _TARGET and not any(values.values()):
                continue  # no slot for this kind of reference
            for name, (least, step, words) in fields.items():
                if values[name] < least or (values[name] - least) % step:
                    absent = "" if fields is _TARGET else f" (or 0, with {', '.join(other for other in fields if other != name)})"
                    raise UserError(f"bucket {self.name!r}: {name} is {values[name]}; it must be {words}{absent}")

    @property
    def target_tokens(self) -> int:
        return visual_tokens(self.frames, self.height, self.width)

    @property
    def pool_tokens(self) -> int:
        """Latent tokens of all references."""
        return self.images * visual_tokens(1, self.image_height, self.image_width) + visual_tokens(
            self.video_frames, self.video_height, self.video_width)

    @property
    def reference_tokens(self) -> int:
        """R: the pool and two boundary tokens a reference."""
        return self.pool_tokens + 2 * (self.images + bool(self.video_frames))

    @property
    def tokens(self) -> int:
        """Of a row: target and references in the MMDiT's sequence, and the prompt."""
        return self.target_tokens + self.reference_tokens + self.prompt_tokens

    def spec(self, moments: int = 0) -> Batch:
        """The batch as ShapeDtypeStructs; moments: 0 for pixels, else 2C for precomputed VAE moments."""
        b, n, p, r = self.batch, self.prompt_tokens, self.patches, self.reference_tokens

        def shape(*dims, dtype=jnp.int32):
            return jax.ShapeDtypeStruct((b, *dims), dtype)

        def clip(*dims_fhw):
            *lead, frames, height, width = dims_fhw
            if not moments:
                return shape(*lead, *([frames] if frames else []), height, width, 3, dtype=jnp.uint8)
            small = (height // LATENT_COMPRESSION, width // LATENT_COMPRESSION, moments)
            return shape(*lead, *([latent_frames(frames)] if frames else []), *small, dtype=jnp.float32)

        return Batch(
            tokens=shape(n), prompt_mask=shape(n, dtype=jnp.bool_), mrope=shape(3, n), visual_index=shape(n),
            patches=shape(p, 1536, dtype=jnp.float32), patch_coords=shape(p, 4), patch_segment=shape(p),
            role=shape(r), source=shape(r), position=shape(r, 3),
            target_start=shape(), shift=shape(dtype=jnp.float32), task=shape(), weight=shape(dtype=jnp.float32), sample=shape(),
            target=clip(self.frames, self.height, self.width),
            images=clip(self.images, 0, self.image_height, self.image_width) if self.images else None,
            video=clip(self.video_frames, self.video_height, self.video_width) if self.video_frames else None)

    def fake(self, seed: int = 0, moments: int = 0, vocab: int = 256) -> Batch:
        """A random batch that a model takes: text-only prompts of random lengths, every reference present."""
        rng = np.random.default_rng(seed)
        spec = self.spec(moments)

        def fill(s):
            if s.dtype == jnp.uint8:
                return rng.integers(0, 256, s.shape, np.uint8)
            return rng.standard_normal(s.shape).astype(np.float32) if s.dtype == jnp.float32 else np.zeros(s.shape, s.dtype)

        batch = jax.tree.map(fill, spec)
        b, n = batch.tokens.shape
        lengths = rng.integers(max(1, n // 2), n + 1, b)
        role, source, position, start = self._fake_references()
        return batch.replace(
            tokens=rng.integers(0, vocab, (b, n)).astype(np.int32),
            prompt_mask=np.arange(n)[None, :] < lengths[:, None],
            mrope=np.broadcast_to(np.arange(n, dtype=np.int32), (b, 3, n)).copy(),
            visual_index=np.full((b, n), -1, np.int32),
            role=np.tile(role, (b, 1)), source=np.tile(source, (b, 1)), position=np.tile(position, (b, 1, 1)),
            target_start=np.full((b,), start, np.int32), shift=np.full((b,), 5.0, np.float32),
            weight=np.ones((b,), np.float32), sample=np.arange(b, dtype=np.int32))

    def _fake_references(self):
        """role, source, position, target start of a row with all references in the order of the context."""
        role, source, position, time, pool = [], [], [], 0, 0
        grids = [(1, self.image_height, self.image_width)] * self.images
        if self.video_frames:
            grids.append((latent_frames(self.video_frames), self.video_height, self.video_width))
        for frames, height, width in grids:
            grid = np.stack(np.meshgrid(np.arange(frames) + time + 1, np.arange(height // PIXELS_A_TOKEN), np.arange(width // PIXELS_A_TOKEN),
                                        indexing="ij"), -1).reshape(-1, 3)
            role += [ROLE_MARKER] + [ROLE_LATENT] * len(grid) + [ROLE_MARKER]
            source += [0, *range(pool, pool + len(grid)), 1]
            position += [[time, 0, 0], *grid.tolist(), [time + frames + 1, 0, 0]]
            time, pool = time + frames + 2, pool + len(grid)
        as_int = lambda x, *shape: np.asarray(x, np.int32).reshape(shape)  # noqa: E731
        return as_int(role, -1), as_int(source, -1), as_int(position, -1, 3), time


@dataclass(frozen=True)
class PackedTask:
    """One thing to generate, packed on the host: what launch.sample and the previews of a training run hand to sampling."""

    index: str  # name of the output file, without its ending
    task: str  # one of TASKS
    frames: int  # 1 gives a picture
    height: int
    width: int
    branches: tuple[Batch, ...]  # B = 1: positive, negative, and with image guidance the negative without images, padded each
    references: tuple[np.ndarray, ...]  # uint8 (F, H, W, 3) in pool order: images (F = 1), then the video
    shift: float
    guidance: float  # of the text
    image_guidance: float  # 1.0: two branches only
    seed: int
    prompt: str = ""
