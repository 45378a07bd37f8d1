"""Real pictures and clips, from a manifest to previews: launch.ingest, then configs/media.py for a few steps of each stage, every task."""
import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest

from tests.compiling import xla_flags
from tests.data import real
from vino_jax.batch import TASKS

STEPS = 6
# A program is compiled for each bucket: of every kind of configs/media.py one of its three aspect ratios, but two of plain pictures, so that
# none is cut too much.
PLAIN = ("picture_64x96_384", "picture_80x80_384", "clip9_64x96_384")
ALL = (*PLAIN, "picture_3image_80x80_384", "clip9_3image_64x96_384", "clip9_clip_64x96_384", "clip9_3image_clip_64x96_384")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    manifest, data, workdir = real.write_manifest(root), root / "ingested", root / "run"
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1)}

    def command(*words):
        done = subprocess.run([sys.executable, "-m", *map(str, words)], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    ingested = command("launch.ingest", "--manifest", manifest, "--root", root, "--output", data, "--quiet")
    steps = [f"--config.stages.stage{i}.steps={STEPS}" for i in (1, 2, 3)]
    buckets = [f"--config.stages.stage{i}.buckets={drawn}" for i, drawn in ((1, PLAIN), (2, PLAIN), (3, ALL))]
    told = command("launch.train", "--config", "configs/media.py", "--workdir", workdir, f"--config.data.manifest={data}", *steps, *buckets,
                   "--config.log.every=2", "--config.log.preview_every=100", "--config.log.preview_count=4",
                   "--config.log.preview_sampling_steps=2")
    return SimpleNamespace(items=len(manifest.read_text().splitlines()), ingested=ingested, told=told, workdir=workdir)


def test_every_item_is_ingested(run):
    assert f"{run.items} items written" in run.ingested and "0 dropped" in run.ingested


def test_each_stage_takes_its_steps_and_stays_finite(run):
    records = [json.loads(line) for line in (run.workdir / "metrics.jsonl").read_text().splitlines()]
    assert {r["stage"]: r["step"] for r in records} == {"stage1": STEPS, "stage2": STEPS, "stage3": STEPS}
    assert all(0 < r["loss"] < 100 and r["gradient_norm"] < 1e4 and 0 <= r["data_wait_share"] <= 1 for r in records)


def test_every_item_finds_a_bucket_and_its_speed_is_told(run):
    stage3 = run.told.split("stage3: ")[1]
    assert "fit no bucket" not in run.told and "padding" in stage3 and all(f"{task} (" in stage3 for task in TASKS)
    assert "0.80-0.96 x" in stage3 or "-1.60 x" in stage3  # of 29.97 and 25 frames a second; with ../shared of 15 too


def test_previews_and_a_model_are_written(run):
    previews = {path.name: sorted(file.suffix for file in path.iterdir()) for path in (run.workdir / "previews").iterdir()}
    assert set(previews) == {f"stage{i}_{step:06d}" for i in (1, 2, 3) for step in (0, STEPS)}
    assert all(".png" in suffixes and ".mp4" in suffixes for suffixes in previews.values())
    assert (run.workdir / "model" / "model.json").exists()
