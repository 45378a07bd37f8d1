"""launch.precompute and then launch.train, as a user types them: the losses are those of a run on pixels, to the bit."""
import json

import numpy as np
import pytest

from data_pipelines import media
from launch import precompute, train
from tests.data.latents import config_values, make_checkpoint, make_media

CONFIG = '''
import json
import ml_collections

def get_config():
    return ml_collections.ConfigDict(json.loads({text!r}), convert_dict=True)
'''


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs "pixels" and "latents"."""
    root = make_media(tmp_path_factory.mktemp("latents_e2e"))
    values = config_values(root, make_checkpoint(root / "init"))
    values["mesh"] |= {"fsdp": -1, "tensor": 1}
    values["buckets"]["clip"]["batch"] = 8
    values["stages"]["only"] |= {"buckets": ("clip",), "tasks": {"i2v": 0.2, "ti2v": 0.3, "tv2v": 0.2, "tiv2v": 0.3}}
    (root / "config.py").write_text(CONFIG.format(text=json.dumps(values)))
    flags = ["--config", str(root / "config.py"), "--quiet"]
    precompute.main([*flags, "--output", str(root / "store")])
    train.main([*flags, "--workdir", str(root / "pixels")])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(media, "read_window", lambda *_: pytest.fail("pixels are read"))
        train.main([*flags, "--workdir", str(root / "latents"), f"--config.data.precomputed={root / 'store'}"])
    return root


def losses(workdir):
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


def test_training_from_latents_is_training_from_pixels(runs):
    ours, theirs = losses(runs / "latents"), losses(runs / "pixels")
    assert len(ours) == 6 and ours == theirs and np.isfinite(ours).all()
