"""launch.evaluate as two processes of four devices: the loss and the pictures that one device gives, written by the first."""
import json

import numpy as np
from PIL import Image

from launch import evaluate
from tests import tolerances
from tests.data.folders import SMALL_VLM
from tests.e2e.processes import ended, start
from tests.train import tiny
from vino_jax.checkpoint import model as checkpoint

CONFIG = """
from configs import common
from configs.data import bucket
def get_config():
    stage = dict(learning_rate=1e-3, steps=1, rules=common.RULES["stage1"], tasks={"t2i": 1.0}, texts={"long": 1.0}, buckets=("picture",))
    return common.config(model={"queries": 4, "connector_ratio": 2}, runtime={"dtype": "float32"},
                         sampling={"height": 32, "width": 32, "num_frames": 5, "steps": 2, "guidance_image": 3.0},
                         buckets={"picture": bucket(8, 1, 32, 32, 72)}, stages={"stage1": stage})
"""


def test_two_processes_measure_what_one_device_does(tmp_path):
    vino = tiny.vino()
    params = tiny.params(vino)
    last = params["vae"]["decoder"]["conv_out"]
    last["kernel"] = 0.02 * last["kernel"]  # pictures of untrained weights would be white all over
    checkpoint.save(tmp_path / "model", params, vino.config, processor_files=sorted(SMALL_VLM.iterdir()))
    (tmp_path / "config.py").write_text(CONFIG)
    flags = [str(flag) for flag in ("--checkpoint", tmp_path / "model", "--config", tmp_path / "config.py", "--tasks", "t2i", "--loss_rows", 5,
                                    "--prompts", 2, "--batch", 2, "--show", 1)]
    evaluate.main([*flags, "--output", str(tmp_path / "alone")])
    codes, said = ended(start(["launch.evaluate", *flags, "--output", tmp_path / "both", "--mesh", "fsdp=8"], 2, 8))
    assert codes == [0, 0], said
    assert "trained t2i: loss" in said[0] and "loss" not in said[1]  # one tells for both
    alone, both = (json.loads((tmp_path / name / "scores.json").read_text())["checkpoints"]["trained"] for name in ("alone", "both"))
    rows, expected = both["loss"]["rows"], alone["loss"]["rows"]
    assert len(rows) == 5 and [row["index"] for row in rows] == [row["index"] for row in expected]
    assert max(abs(a - b) for x, y in zip(rows, expected) for a, b in zip(x["losses"], y["losses"])) < tolerances.MESH_LOSS_ABS
    assert both["tasks"]["t2i"]["count"] == 2 and both["tasks"]["t2i"]["attributes"].keys() == alone["tasks"]["t2i"]["attributes"].keys()
    files = {name: sorted(str(f.relative_to(tmp_path / name)) for f in (tmp_path / name).rglob("*") if f.is_file()) for name in ("alone", "both")}
    assert files["alone"] == files["both"] and "outputs/trained/t2i/001.png" in files["both"]
    for index in ("000", "001"):
        one, two = (np.asarray(Image.open(tmp_path / name / f"outputs/trained/t2i/{index}.png"), np.int16) for name in ("alone", "both"))
        assert one.std() > 1 and np.abs(one - two).max() <= 1  # rounding to 8 bits
