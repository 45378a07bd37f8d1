"""The published model, trained on a TPU slice: the three stages and rates of the curriculum, shapes and mesh by the slice.

    python -m launch.train --config configs/vino_13b.py:v5p:4x4x4 --workdir DIR --config.init.checkpoint=DIR --config.data.manifest=FILE
    python -m launch.aot_compile --config configs/vino_13b.py --topology v5p:4x4x4

Slices: configs/meshes.py. Prompts take 768 tokens, with 256 queries 1,024 of the VLM. Where there are references the pictures that the VLM
sees come on top: one of 512x512 is 256 tokens (1,024 patches) of the prompt and 1,024 of the MMDiT's sequence, one of 1136x1136 is 1,296
(5,184) and 5,041; so "clip_edit", with four of the first, has a prompt of 1,280 tokens, 176 of them left for words, and "edit" has 1,536.
A reference clip is as long as its target, and 1,560 tokens (6,240 patches) of the prompt: with targets of 49 frames, 2 seconds, a row of
"video_edit" has 15 % more tokens than one of "clip_edit". The reference and the base image of "edit_two" have 768x768, so that a row is as
long as one of "edit".
"""
from configs import common, models
from configs.data import bucket
from configs.meshes import PLACEMENTS
from vino_jax.errors import UserError
from vino_jax.settings import nearest

# Shapes of one row: 81 frames of 480x832 are 32,760 tokens of the MMDiT, a picture of 1136x1136 is 5,041.
_PICTURE, _CLIP = {"frames": 1, "height": 1136, "width": 1136}, {"frames": 81, "height": 480, "width": 832}
SHAPES = {
    "picture": {**_PICTURE, "prompt_tokens": 768},
    "clip": {**_CLIP, "prompt_tokens": 768},
    "edit": {**_PICTURE, "prompt_tokens": 1536, "patches": 5184, "images": 1},
    "edit_two": {**_PICTURE, "prompt_tokens": 1408, "patches": 4608, "images": 2, "reference": (768, 768)},
    "clip_edit": {**_CLIP, "prompt_tokens": 1280, "patches": 4096, "images": 4, "reference": (512, 512)},
    "video_edit": {**_CLIP, "frames": 49, "prompt_tokens": 2176, "patches": 7264, "images": 1, "video_frames": 49, "reference": (512, 512)},
}


def buckets(rows: dict[str, int]) -> dict:
    """The shapes with their rows; reference images are as large as the target unless `reference` gives their height and width."""
    made = {}
    for name, shape in SHAPES.items():
        reference = shape.get("reference")
        made[name] = bucket(rows[name], **{key: value for key, value in shape.items() if key != "reference"})
        if reference:
            made[name] |= dict(zip(("image_height", "image_width"), reference))
    return made


def get_config(topology: str = "v5p:4x4x4"):
    """The experiment on that slice. Raises UserError for one that configs/meshes.py does not know."""
    if topology not in PLACEMENTS:
        raise UserError(f"configs/meshes.py has no placement for {topology!r}{nearest(topology, PLACEMENTS)}")
    place = PLACEMENTS[topology]
    return common.config(
        model=models.vino_13b(),
        runtime={"dtype": "bfloat16"},
        mesh=place.mesh,
        data={"source": "media", "workers": 8},
        buckets=buckets({name: rows * place.data_shards for name, rows in place.rows.items()}),
        stages=common.curriculum((15000, 5000, 15000), (1e-4, 2e-5, 2e-5), ("picture", "clip"),
                                 ("picture", "edit", "edit_two", "clip_edit", "video_edit"), remat=place.remat),
        log={"every": 10, "checkpoint_every": 500, "preview_every": 1000, "preview_sampling_steps": 50, "preview_guidance": 5.0},
    )
