"""launch.evaluate as two processes of four devices: the loss that one device gives, written by the first."""
import json

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
                         buckets={"picture": bucket(8, 1, 32, 32, 72)}, stages={"stage1": stage})
"""


def test_two_processes_measure_what_one_device_does(tmp_path):
    vino = tiny.vino()
    checkpoint.save(tmp_path / "model", tiny.params(vino), vino.config, processor_files=sorted(SMALL_VLM.iterdir()))
    (tmp_path / "config.py").write_text(CONFIG)
    flags = [str(flag) for flag in ("--checkpoint", tmp_path / "model", "--config", tmp_path / "config.py", "--measures", "loss", "--tasks", "t2i",
                                    "--loss_rows", 5)]
    evaluate.main([*flags, "--output", str(tmp_path / "alone")])
    codes, said = ended(start(["launch.evaluate", *flags, "--output", tmp_path / "both", "--mesh", "fsdp=8"], 2, 8))
    assert codes == [0, 0], said
    assert "trained t2i: loss" in said[0] and "loss" not in said[1]  # one tells for both
    alone, both = (json.loads((tmp_path / name / "scores.json").read_text())["checkpoints"]["trained"]["loss"] for name in ("alone", "both"))
    assert len(both["rows"]) == 5 and [r["index"] for r in both["rows"]] == [r["index"] for r in alone["rows"]]
    assert max(abs(a - b) for x, y in zip(alone["rows"], both["rows"]) for a, b in zip(x["losses"], y["losses"])) < tolerances.MESH_LOSS_ABS
