"""launch.precompute and then launch.train, as a user types them: the losses are those of a run on pixels, to the bit.

A batch has one row: on some CPUs (seen on one with AVX2 and no AVX-512) XLA computes the last row of a batch in another order than the others,
and precompute fills its batches in an order of its own. Larger batches: tests/data/test_latents.py.
"""
import json
import os
import subprocess
import sys

import numpy as np
import pytest

from configs import common
from tests.compiling import xla_flags
from tests.data.latents import config_values, make_checkpoint, make_media

CONFIG = '''
import json
import ml_collections

def get_config():
    return ml_collections.ConfigDict(json.loads({text!r}), convert_dict=True)
'''


# in one process of one device, as compilation is most of it
RUN = """
import sys
from data_pipelines import media
from launch import cli, precompute, train

cli.common_setup()
root = sys.argv[1]
flags = ["--config", root + "/config.py", "--quiet"]
precompute.main([*flags, "--output", root + "/store"])
train.main([*flags, "--workdir", root + "/pixels"])
media.read_window = None  # nobody may read pixels any more
train.main([*flags, "--workdir", root + "/latents", f"--config.data.precomputed={root}/store"])
"""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folder of the runs "pixels" and "latents"."""
    root = make_media(tmp_path_factory.mktemp("latents_e2e"))
    values = config_values(root, make_checkpoint(root / "init"))
    values["mesh"] |= {"fsdp": -1, "tensor": 1}
    values["buckets"]["clip"]["batch"] = 1
    values["stages"]["only"] |= {"rules": common.RULES["stage1"], "buckets": ("clip",),
                                 "tasks": {"i2v": 0.2, "ti2v": 0.3, "tv2v": 0.2, "tiv2v": 0.3}}
    (root / "config.py").write_text(CONFIG.format(text=json.dumps(values)))
    environment = {**os.environ, "XLA_FLAGS": xla_flags(1)}
    done = subprocess.run([sys.executable, "-c", RUN, str(root)], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


def losses(workdir):
    return [(r["step"], r["loss"], r["gradient_norm"]) for r in map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())]


def test_training_from_latents_is_training_from_pixels(runs):
    ours, theirs = losses(runs / "latents"), losses(runs / "pixels")
    assert len(ours) == 6 and ours == theirs and np.isfinite(ours).all()
