"""The embedded default: VINO's three stages on `shapes`, from three small parts that stand in for the published checkpoints."""
import pathlib

from configs import common
from configs.data import bucket

PARTS = pathlib.Path(__file__).resolve().parent.parent / "data_pipelines" / "shapes_parts"


def buckets() -> dict:
    """Pictures of two shapes and clips, plain; pictures and clips with references."""
    return {
        "picture": bucket(32, 1, 64, 64, 56),
        "wide": bucket(32, 1, 48, 80, 56),
        "clip": bucket(16, 9, 64, 64, 72),
        "edit": bucket(32, 1, 64, 64, 80, patches=32, images=2),
        "clip_edit": bucket(16, 9, 64, 64, 136, patches=96, images=2, video_frames=9),
    }


def get_config():
    return common.config(
        model={"queries": 8, "connector_ratio": 4},
        init={"mmdit": str(PARTS / "hunyuan"), "vae": str(PARTS / "hunyuan"), "vlm": str(PARTS / "qwen3vl")},
        runtime={"dtype": "float32", "remat": "nothing"},
        mesh={"preset": "fsdp", "data": 1, "fsdp": -1},
        data={"shift_image": 2.0, "shift_video": 3.0},  # few tokens need less shift than the 13 B model's thousands
        buckets=buckets(),
        stages=common.curriculum((150, 150, 300), (2e-3, 1e-3, 1e-3), ("picture", "clip"), ("picture", "clip", "edit", "clip_edit"),
                                 ema=0.98),
        log={"every": 10, "checkpoint_every": 100, "preview_every": 100},
        sampling={"height": 64, "width": 64, "num_frames": 9, "steps": 20, "guidance_image": 3.0, "guidance_video": 3.0,
                  "shift_image": 2.0, "shift_video": 3.0},
    )
