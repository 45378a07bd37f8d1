"""Buckets: sets of static shapes."""
import math
from collections.abc import Sequence

from data_pipelines.pixels import PixelLimits
from vino_jax.batch import PIXELS_A_TOKEN, BucketSpec

ASPECTS = tuple(2 ** (k / 3) for k in range(-3, 4))  # width over height, 0.5 to 2
TEMPLATE_TOKENS = 32  # of the chat template around a prompt
# beside their visual tokens, in the words of the small tokenizer, which spells most of them: "Image 1: ", "<0.5 seconds>" and markers
IMAGE_TOKENS, GROUP_TOKENS = 12, 20
PUBLISHED = PixelLimits()  # how large the published VLM sees things


def bucket(batch: int, frames: int, height: int, width: int, prompt_tokens: int, *, patches: int = 0, images: int = 0,
           video_frames: int = 0) -> dict:
    """One bucket; reference images and clips share the target's height and width."""
    return {
        "batch": batch, "frames": frames, "height": height, "width": width, "prompt_tokens": prompt_tokens, "patches": patches,
        "images": images, "image_height": height if images else 0, "image_width": width if images else 0,
        "video_frames": video_frames, "video_height": height if video_frames else 0, "video_width": width if video_frames else 0,
    }


def family(name: str, side: int, text_tokens: Sequence[int], budget: int, *, frames: int = 1, images: int = 0, video_frames: int = 0,
           rows: int = 1, aspects: Sequence[float] = ASPECTS, limits: PixelLimits = PUBLISHED) -> dict[str, dict]:
    """Buckets of one kind and one area, `side` squared: one an aspect ratio (width over height) and class of text length.

    text_tokens: the longest text of each class; what template and references take of the prompt comes on top. budget: tokens of a batch
    (BucketSpec.tokens times its rows), so that every step costs about the same; rows: what a batch must be a multiple of, the product of
    the mesh's data axes. limits: how large the VLM sees references. Names: NAME_<height>x<width>_<text tokens>.
    """
    buckets = {}
    for aspect in aspects:
        height, width = (max(1, round(side * scale / PIXELS_A_TOKEN)) * PIXELS_A_TOKEN for scale in (aspect ** -0.5, aspect ** 0.5))
        grids = [limits.image_grid(height, width)] * images + [limits.video_grid(height, width)] * bool(video_frames)
        patches = sum(map(math.prod, grids))
        around = TEMPLATE_TOKENS + patches // limits.merge**2 + IMAGE_TOKENS * images + GROUP_TOKENS * sum(g[0] for g in grids[images:])
        for text in text_tokens:
            one = bucket(1, frames, height, width, around + text, patches=patches, images=images, video_frames=video_frames)
            one["batch"] = max(rows, budget // BucketSpec("", **one).tokens // rows * rows)
            buckets[f"{name}_{height}x{width}_{text}"] = one
    return buckets


def families(side: int, text_tokens: Sequence[int], budget: int, *, frames: Sequence[int] = (), images: Sequence[int] = (),
             **options) -> dict[str, dict]:
    """Buckets for all tasks: pictures and clips of each of `frames`, plain and with each number of reference `images`; and with a
    reference clip of as many frames as the target, with none of them or with each number. The rest as in `family`."""
    buckets = {}
    for count in (0, *images):
        kind = f"_{count}image" * bool(count)
        buckets |= family(f"picture{kind}", side, text_tokens, budget, images=count, **options)
        for length in frames:
            for clip, name in ((0, ""), (length, "_clip")):
                buckets |= family(f"clip{length}{kind}{name}", side, text_tokens, budget, frames=length, images=count, video_frames=clip,
                                  **options)
    return buckets
