"""One training example, before it is packed into a batch."""
from dataclasses import dataclass, field, replace

import numpy as np

from data_pipelines.pixels import Patches
from vino_jax.errors import UserError


@dataclass(frozen=True)
class Sample:
    """Pixels and texts of one example. Pixels are uint8 RGB; where they were encoded beforehand, float32 VAE moments stand in their place:
    target and video (f, h, w, 2C), images (h, w, 2C), with f = (F-1)/4+1, h = H/8, w = W/8."""

    id: str
    task: str  # one of vino_jax.batch.TASKS
    target: np.ndarray  # (F, H, W, 3), F = 4k+1
    texts: dict[str, str | tuple[str, ...]]  # by kind: "long", "short", "instruction"; one or several; what a task lacks is absent
    images: tuple[np.ndarray, ...] = ()  # references, each (H, W, 3)
    video: np.ndarray | None = None  # reference clip (F, H, W, 3)
    base_image: bool = False  # the last reference image is what is edited
    expected: dict = field(default_factory=dict)  # what a scorer checks (shapes only)
    seen: tuple[Patches, ...] | None = None  # what the VLM sees of images, then of the video; None: not made yet

    @property
    def moments(self) -> int:
        """2C where it holds moments, 0 where it holds pixels."""
        return 0 if self.target.dtype == np.uint8 else self.target.shape[-1]

    @property
    def references(self) -> int:
        return len(self.images) + (self.video is not None)

    def without_images(self) -> "Sample":
        """The same without reference images, but for a base image."""
        gone = len(self.images) - (self.base_image and bool(self.images))
        return replace(self, images=self.images[gone:], seen=None if self.seen is None else self.seen[gone:])


def check_finite(sample: Sample) -> None:
    """Raises UserError where moments of the sample are not finite, naming it."""
    for name, moments in (("target", [sample.target]), ("images", sample.images), ("video", [sample.video])):
        if sample.moments and not all(np.isfinite(x).all() for x in moments if x is not None):
            raise UserError(f"the VAE moments of sample {sample.id!r} are not finite ({name})")
