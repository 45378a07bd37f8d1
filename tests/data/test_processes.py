"""Stop anywhere, go on with another number of processes: the next 50 batches hold the same samples in the same order."""
import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image

from data_pipelines.loader import Loader
from data_pipelines.media import MediaSource
from data_pipelines.mixture import Mixture
from data_pipelines.prompts import Prompter
from tests.data.folders import ROOT, SMALL_VLM
from vino_jax.batch import BucketSpec

BUCKETS = (BucketSpec("square", 8, 1, 16, 16, 64), BucketSpec("wide", 4, 1, 16, 32, 64))
STOPPED, BATCHES = 37, 50


def write_pictures(folder):
    """Each of one colour, which names it: (5 times its number, 0, 0)."""
    lines = []
    for i in range(23):
        Image.new("RGB", (32 if i % 3 else 16, 16), (5 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"task": "t2i", "target": f"{i}.png", "long": ["a red circle", "a blue square"], "short": "a circle"}))
    (folder / "m.jsonl").write_text("\n".join(lines))


def loader(folder, start, stop, index, count):
    source, mixture = MediaSource(folder / "m.jsonl", folder, BUCKETS), Mixture({"t2i": 1.0}, {"long": .5, "short": .5})
    return Loader(source, mixture, BUCKETS, Prompter(SMALL_VLM), 4, start, stop, (index,), count)


def names(batch):
    """Which picture each row is, and its text."""
    return [(int(target[0, 0, 0, 0]), row[mask].tolist()) for target, row, mask in zip(*map(np.asarray, (batch.target, batch.tokens,
                                                                                                        batch.prompt_mask)))]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    write_pictures(folder)
    return folder


@pytest.fixture(scope="module")
def never_stopped(folder):
    with loader(folder, 0, STOPPED + BATCHES, 0, 1) as batches:
        return [(step, bucket, names(batch)) for step, bucket, batch in batches]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_next_batches_are_the_same(folder, never_stopped, count):
    parts = []
    for index in range(count):
        with loader(folder, STOPPED, STOPPED + BATCHES, index, count) as batches:
            parts.append([(step, bucket, names(batch)) for step, bucket, batch in batches])
    for (step, bucket, rows), *mine in zip(never_stopped[STOPPED:], *parts, strict=True):
        assert all(part[:2] == (step, bucket) for part in mine) and rows == [row for part in mine for row in part[2]]


def test_two_real_processes(folder, never_stopped, tmp_path):
    """Over loopback: each packs its rows, they become global arrays of one mesh, and are read back whole by both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "tests.data.test_processes", address, str(folder), str(tmp_path)]
    running = [subprocess.Popen([*command, str(index)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
               for index in range(2)]
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]
    for index in range(2):
        seen = json.loads((tmp_path / f"{index}.json").read_text())
        assert seen == json.loads(json.dumps(never_stopped[STOPPED:])) and len(seen) == BATCHES


def one_process(address, folder, output, index):
    import pathlib

    import jax
    from jax.experimental import multihost_utils

    from launch.data import agree
    from vino_jax.errors import UserError
    from vino_jax.sharding.mesh import make_mesh
    from vino_jax.sharding.rules import preset
    from vino_jax.train.loop import place_batch

    jax.distributed.initialize(address, 2, int(index))
    agree("the same text", "this")
    with pytest.raises(UserError, match="do not agree on this"):
        agree(f"the text of {index}", "this")
    assert jax.process_count() == 2 and len(jax.devices()) == 2
    mesh, seen = make_mesh({"data": 1, "fsdp": -1, "seq": 1, "tensor": 1}), []
    with loader(pathlib.Path(folder), STOPPED, STOPPED + BATCHES, jax.process_index(), jax.process_count()) as batches:
        for step, bucket, batch in batches:
            placed = place_batch(batch, mesh, preset("fsdp"))
            assert not placed.target.is_fully_addressable and placed.target.shape[0] == 2 * batch.target.shape[0]
            whole = multihost_utils.process_allgather(placed, tiled=True)
            seen.append((step, bucket, names(whole)))
    (pathlib.Path(output) / f"{index}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    one_process(*sys.argv[1:])
