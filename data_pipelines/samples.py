"""One training example, before it is packed into a batch."""
from dataclasses import dataclass, field

import numpy as np


@dataclass(frozen=True)
class Sample:
    """Pixels and texts of one example. All pixels are uint8 RGB."""

    id: str
    task: str  # one of vino_jax.batch.TASKS
    target: np.ndarray  # (F, H, W, 3), F = 4k+1
    texts: dict[str, str]  # by kind: "long", "short", "instruction"; what a task lacks is absent
    images: tuple[np.ndarray, ...] = ()  # references, each (H, W, 3)
    video: np.ndarray | None = None  # reference clip (F, H, W, 3)
    base_image: bool = False  # the last reference image is what is edited
    expected: dict = field(default_factory=dict)  # what a scorer checks (shapes only)
