"""`shapes`: the embedded data set, endless and procedural: a pure function of (seed, index, task).

Training uses a seed s, evaluation `held_out(s)`. The two sides never share a scene: one discrete scene in five (colours,
shapes, textures, background; `shapes_scene.is_held_out`) is drawn only for held-out seeds, as target or as the source of an edit.
"""
import numpy as np

from data_pipelines import shapes_tasks
from data_pipelines.samples import Sample
from vino_jax.batch import TASKS
from vino_jax.errors import UserError

HELD_OUT = 1 << 62  # seeds from here on draw from the held-out scenes


def held_out(seed: int) -> int:
    """The seed of the evaluation stream that belongs to a training seed."""
    return seed if seed >= HELD_OUT else HELD_OUT + seed


def sample(seed: int, index: int, task: str, frames: int, height: int, width: int) -> Sample:
    """Sample `index` of the stream of `seed` for a task (one of vino_jax.batch.TASKS).

    frames: 4k+1 of the target (1 for the picture tasks t2i, ti2i, ti2i_baseimg); height, width: pixels, multiples of 16, at
    least 32. Reference images and clips have the target's size. Raises UserError for anything else.
    """
    if task not in TASKS:
        raise UserError(f"shapes: unknown task '{task}'; choose one of {', '.join(TASKS)}")
    if height % 16 or width % 16 or min(height, width) < 32:
        raise UserError(f"shapes: size {height}x{width} must be multiples of 16, at least 32")
    if frames < 1 or frames % 4 != 1 or (frames > 1 and task in shapes_tasks.PICTURE_TASKS):
        raise UserError(f"shapes: {frames} frames do not suit {task}; give 1 for pictures, 4k+1 for clips")
    rng = np.random.Generator(np.random.PCG64(np.random.SeedSequence((seed, index, TASKS.index(task)))))
    side = "held" if seed >= HELD_OUT else "train"
    name = f"shapes-{side}-{seed % HELD_OUT}-{task}-{index}"
    return shapes_tasks.BUILD[task](name, task, rng, seed >= HELD_OUT, (frames, height, width))
