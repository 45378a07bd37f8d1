"""The whole way of the reference: its checkpoint imported, its task files read, text and pictures to latents and pixels.

Runs the code behind `launch.convert import` and `launch.sample` on the goldens of ../shared.
"""
import json

import av
import numpy as np
import pytest
from PIL import Image

from launch import sample
from tests.golden.conftest import SHARED
from tests.tolerances import GOLDEN_IMAGE_REL, GOLDEN_PIXEL_GREY, GOLDEN_VIDEO_REL

GOLDEN = SHARED / "golden"
pytestmark = pytest.mark.skipif(not (GOLDEN / "pipeline.npz").is_file(),
                                reason="needs the goldens and samples of ../shared, which is absent")

TOLERANCE = {"t2i": GOLDEN_IMAGE_REL, "i2v": GOLDEN_IMAGE_REL, "tiv2v": GOLDEN_VIDEO_REL}


@pytest.mark.parametrize("case", TOLERANCE)
def test_latents_are_the_references(case, checkpoint, tmp_path):
    golden = {name.partition("/")[2]: array for name, array in np.load(GOLDEN / "pipeline.npz").items() if name.startswith(case + "/")}
    setup = json.loads((GOLDEN / "pipeline.json").read_text())["cases"][case]
    task = json.loads((SHARED / "samples" / setup["json"]).read_text())[setup["index"]]
    (tmp_path / "tasks.json").write_text(json.dumps([task]))
    np.savez(tmp_path / "noise.npz", **{task["index"]: golden["noise"]})
    height, width = setup["hw"]
    flags = {"checkpoint": checkpoint, "tasks": tmp_path / "tasks.json", "output": tmp_path / "out", "root": SHARED / "samples",
             "height": height, "width": width, "num_frames": setup["frames"] if setup["frames"] > 1 else 9, "steps": setup["steps"],
             "image_guidance": setup["guidance_image"], "dtype": "float32", "posterior": "mode", "initial_noise": tmp_path / "noise.npz"}
    assert sample.main([f"--{name}={value}" for name, value in flags.items()] + ["--save_latents"]) == 0
    latents = np.load(tmp_path / "out" / f"{task['index']}.npz")["latents"]
    assert latents.shape == golden["latents"].shape
    relative = np.abs(latents - golden["latents"]).max() / np.abs(golden["latents"]).max()
    print(f"{case}: latents differ by {relative:.2e} of the largest value")
    assert relative < TOLERANCE[case]
    if setup["frames"] == 1:
        with Image.open(tmp_path / "out" / f"{task['index']}.png") as image:
            assert np.abs(np.asarray(image)[None].astype(int) - golden["pixels"][0]).max() <= GOLDEN_PIXEL_GREY
    else:  # lossy, and noise at this size: only what it holds
        with av.open(str(tmp_path / "out" / f"{task['index']}.mp4")) as container:
            frames = [frame.to_ndarray(format="rgb24").shape for frame in container.decode(video=0)]
        assert frames == [picture.shape for picture in golden["pixels"][0]]
