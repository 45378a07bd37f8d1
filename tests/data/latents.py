"""A small set of media, a tiny model checkpoint, the config that goes with them and an encoder that is no VAE, for the tests of
precomputed latents."""
import dataclasses
import json
from pathlib import Path

import numpy as np
from PIL import Image

from configs import common
from configs.data import bucket
from launch.precompute import Encoder
from tests.data.folders import SMALL_VLM
from tests.data.test_media import PICTURES, write_clip
from tests.train import tiny
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.train.config import RunConfig, run_config

TEXTS = {"long": "A photograph.", "short": "a photograph"}
LINES = [
    {"task": "t2i", "target": "astronaut.png"}, {"task": "t2i", "target": "coffee.png"}, {"task": "t2i", "target": "chelsea.png"},
    {"task": "ti2i", "target": "coffee.png", "images": ["chelsea.png"], "instruction": "A cup."},
    {"task": "ti2i_baseimg", "target": "coffee.png", "images": ["astronaut.png", "chelsea.png"], "instruction": "A cup."},
    {"task": "i2v", "target": "clip.mp4"}, {"task": "ti2v", "target": "clip.mp4", "images": ["chelsea.png"]},
    {"task": "tv2v", "target": "clip.mp4", "video": "other.mp4", "instruction": "A face."},
    {"task": "tiv2v", "target": "clip.mp4", "video": "other.mp4", "images": ["astronaut.png"], "instruction": "A face."},
]
TASKS = {"t2i": 0.3, "ti2i": 0.1, "ti2i_baseimg": 0.2, "i2v": 0.1, "ti2v": 0.1, "tv2v": 0.1, "tiv2v": 0.1}


def make_media(root: Path) -> Path:
    """Pictures, clips and their manifest, in `root`."""
    for name in ("astronaut", "coffee", "chelsea"):
        (root / f"{name}.png").write_bytes((PICTURES / f"{name}.png").read_bytes())
    for clip, picture in (("clip.mp4", "astronaut"), ("other.mp4", "coffee")):
        write_clip(root / clip, np.asarray(Image.open(root / f"{picture}.png").convert("RGB")), 12)
    (root / "manifest.jsonl").write_text("".join(json.dumps({**TEXTS, **line, "id": f"item {i}"}) + "\n" for i, line in enumerate(LINES)))
    return root


def make_checkpoint(folder: Path, seed: int = 0) -> Path:
    vino = tiny.vino()
    model_checkpoint.save(folder, tiny.params(vino, seed), vino.config, processor_files=sorted(SMALL_VLM.iterdir()))
    return folder


def config_values(root: Path, init: Path, **data) -> dict:
    """Of a run of one stage on all that `make_media` made, 8 devices; data: keys of the table that differ."""
    return common.config(
        model={"queries": 4, "connector_ratio": 2}, init={"checkpoint": str(init)}, runtime={"dtype": "float32", "remat": "nothing"},
        mesh={"fsdp": 2, "tensor": 4},
        data={"source": "media", "manifest": str(root / "manifest.jsonl"), "root": str(root), **data},
        buckets={"edit": bucket(8, 1, 32, 32, 128, patches=32, images=3), "clip": bucket(4, 5, 32, 32, 160, patches=64, images=1, video_frames=5)},
        stages={"only": dict(steps=6, learning_rate=1e-3, tasks=TASKS, texts={"long": 1.0}, buckets=("edit", "clip"),
                             rules=common.RULES["stage3"], image_dropout=0.2)},
        log={"every": 1}).to_dict()


def config_of(root: Path, init: Path, **data) -> RunConfig:
    return run_config(config_values(root, init, **data))


class FakeEncoder(Encoder):
    """Moments without a model, for tests of what is done with them: `value` everywhere."""

    value = 0.5

    def __init__(self, config, directory, batch=0):
        self._batch, self._shards = batch, 2

    def start(self, samples, bucket):
        assert 0 < len(samples) <= self.rows(bucket)

        def moments(pixels):
            return np.full((*(pixels.shape[:1] if pixels.ndim == 4 else ()), 4, 4, 8), self.value, np.float32)

        return lambda: [dataclasses.replace(s, target=moments(s.target), images=tuple(map(moments, s.images)),
                                            video=s.video if s.video is None else moments(s.video)) for s in samples]
