"""The embedded default: VINO's three stages on `shapes`, from three small parts that stand in for the published checkpoints."""
import pathlib

from configs import common
from configs.data import bucket

PARTS = pathlib.Path(__file__).resolve().parent.parent / "data_pipelines" / "shapes_parts"

# Shares of the rows in stages 2 and 3. Pictures first: a clip costs a CPU as much as four of them.
PLAIN_TASKS = {"t2i": 0.85, "t2v": 0.15}
ALL_TASKS = {"t2i": 0.25, "t2v": 0.02, "i2v": 0.02, "ti2v": 0.02, "ti2i": 0.60, "ti2i_baseimg": 0.05, "tv2v": 0.02, "tiv2v": 0.02}


def buckets() -> dict:
    """Pictures and clips, plain; pictures and clips with references."""
    return {
        "picture": bucket(32, 1, 64, 64, 56),
        "clip": bucket(8, 9, 64, 64, 72),
        "edit": bucket(32, 1, 64, 64, 80, patches=32, images=2),
        "clip_edit": bucket(8, 9, 64, 64, 136, patches=96, images=2, video_frames=9),
    }


def stages() -> dict:
    """The curriculum in few steps: so the connector, small and alone in stage 1, learns at a high rate, all rates fall at the end, and
    averages are short. The few t2v rows of stage 3 go into "clip_edit": a program of their own would cost more than their padding."""
    entries = common.curriculum((200, 160, 120), (3e-2, 2e-3, 2e-3), ("picture", "clip"), ("picture", "edit", "clip_edit"), ema=0.9,
                                plain_tasks=PLAIN_TASKS, all_tasks=ALL_TASKS)
    entries["stage1"] |= {"tasks": {"t2i": 1.0}, "buckets": ("picture",)}
    return {name: {**entry, "warmup_steps": 20, "decay_steps": 40} for name, entry in entries.items()}


def get_config():
    return common.config(
        model={"queries": 8, "connector_ratio": 4},
        init={"mmdit": str(PARTS / "hunyuan"), "vae": str(PARTS / "hunyuan"), "vlm": str(PARTS / "qwen3vl")},
        runtime={"dtype": "float32", "remat": "dots"},
        mesh={"preset": "fsdp", "data": 1, "fsdp": -1},
        data={"shift_image": 2.0, "shift_video": 3.0},  # few tokens need less shift than the 13 B model's thousands
        buckets=buckets(),
        stages=stages(),
        log={"every": 10, "checkpoint_every": 40, "preview_every": 100},
        sampling={"height": 64, "width": 64, "num_frames": 9, "steps": 20, "guidance_image": 3.0, "guidance_video": 3.0,
                  "image_guidance": 1.0, "shift_image": 2.0, "shift_video": 3.0},
    )
