"""launch.sample as two processes of four devices: what one process gives, written by the first."""
import json

import numpy as np
from PIL import Image

from launch import sample
from tests.data.folders import SMALL_VLM
from tests.e2e.processes import ended, start
from tests.tolerances import SAMPLE_MESH_ABS
from tests.train import tiny
from vino_jax.checkpoint import model as checkpoint


def test_two_processes_give_what_one_gives(tmp_path):
    vino = tiny.vino()
    checkpoint.save(tmp_path / "model", tiny.params(vino), vino.config, processor_files=sorted(SMALL_VLM.iterdir()),
                    sampling={"height": 32, "width": 32, "num_frames": 5, "steps": 2})
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 48, 3), np.uint8)).save(tmp_path / "seen.png")
    tasks = [{"index": "edit", "task": "ti2i", "caption": "make it blue", "ref_image_paths": ["seen.png"]},
             {"index": "lost", "task": "ti2i", "caption": "make it blue", "ref_image_paths": ["nothing.png"]},
             {"index": "kept", "task": "t2i", "caption": "a red circle"}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    flags = ["--checkpoint", tmp_path / "model", "--tasks", tmp_path / "tasks.json", "--root", tmp_path, "--image_guidance", 2, "--save_latents"]
    assert sample.main([str(flag) for flag in (*flags, "--output", tmp_path / "alone")]) == 1

    out = tmp_path / "both"
    out.mkdir()
    for ending in ("png", "npz"):
        (out / f"kept.{ending}").write_bytes((tmp_path / "alone" / f"kept.{ending}").read_bytes())
    codes, said = ended(start(["launch.sample", *flags, "--output", out, "--mesh", "fsdp=2,seq=4"], 2, 8))
    assert codes == [1, 1], said
    assert "kept: kept" in said[0] and "nothing.png" in said[0] and "3 tasks: 1 written, 1 kept, 1 failed" in said[0]
    assert "tasks:" not in said[1] and "FAILED" not in said[1]  # one tells for both
    assert sorted(path.name for path in out.iterdir()) == ["edit.npz", "edit.png", "kept.npz", "kept.png"]
    alone, both = (np.load(tmp_path / name / "edit.npz")["latents"] for name in ("alone", "both"))
    assert np.abs(alone - both).max() < SAMPLE_MESH_ABS * max(1.0, np.abs(alone).max())
