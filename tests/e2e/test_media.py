"""configs/media.py on real pictures and clips, from a manifest: 20 steps of each stage, every task."""
import json
import os
import subprocess
import sys

import pytest

from tests.data.test_media import PICTURES, write_clip

TEXTS = {"long": "A photograph of a face, a cup or a cat, seen from near.", "short": "a photograph"}
MANIFEST = [
    {"task": "t2i", "target": "astronaut.png"}, {"task": "t2i", "target": "coffee.png"}, {"task": "t2v", "target": "clip.mp4"},
    {"task": "i2v", "target": "clip.mp4"}, {"task": "ti2v", "target": "clip.mp4", "images": ["chelsea.png"]},
    {"task": "ti2i", "target": "coffee.png", "images": ["chelsea.png"], "instruction": "Turn the cat into a cup."},
    {"task": "ti2i_baseimg", "target": "coffee.png", "images": ["astronaut.png", "chelsea.png"], "instruction": "Make it a cup."},
    {"task": "tv2v", "target": "clip.mp4", "video": "other.mp4", "instruction": "Make it a face."},
    {"task": "tiv2v", "target": "clip.mp4", "video": "other.mp4", "images": ["astronaut.png"], "instruction": "Put the face in."},
]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    import numpy as np
    from PIL import Image

    root = tmp_path_factory.mktemp("media")
    for name in ("astronaut", "coffee", "chelsea"):
        (root / f"{name}.png").write_bytes((PICTURES / f"{name}.png").read_bytes())
    for clip, picture in (("clip.mp4", "astronaut"), ("other.mp4", "coffee")):
        write_clip(root / clip, np.asarray(Image.open(root / f"{picture}.png").convert("RGB")), 12)
    (root / "manifest.jsonl").write_text("".join(json.dumps({**TEXTS, **row, "id": str(i)}) + "\n" for i, row in enumerate(MANIFEST)))
    workdir = root / "run"
    environment = {**os.environ, "XLA_FLAGS": "--xla_backend_optimization_level=0"}
    done = subprocess.run(
        [sys.executable, "-m", "launch.train", "--config", "configs/media.py", "--workdir", str(workdir), f"--config.data.root={root}",
         f"--config.data.manifest={root / 'manifest.jsonl'}", "--config.log.preview_every=0"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return workdir, done.stdout


def test_each_stage_takes_its_20_steps_and_stays_finite(run):
    records = [json.loads(line) for line in (run[0] / "metrics.jsonl").read_text().splitlines()]
    assert {r["stage"]: r["step"] for r in records} == {"stage1": 20, "stage2": 20, "stage3": 20}
    assert all(0 < r["loss"] < 100 and r["gradient_norm"] < 1e4 for r in records)


def test_every_item_finds_a_bucket_and_a_model_is_written(run):
    assert "fit no bucket" not in run[1] and (run[0] / "model" / "model.json").exists()
