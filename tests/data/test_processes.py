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
from tests.compiling import xla_flags
from tests.data.folders import ROOT, SMALL_VLM
from vino_jax.batch import BucketSpec

BUCKETS = (BucketSpec("square", 16, 1, 16, 16, 64), BucketSpec("wide", 8, 1, 16, 32, 64))
STOPPED, BATCHES = 37, 50
# of two processes with four devices each: rows over all devices, over both processes alone, over neither
MESHES = ({"data": 2, "fsdp": 4}, {"fsdp": 8}, {"fsdp": 2, "seq": 4}, {"seq": 8})


def write_pictures(folder):
    """Each of one colour, which names it: (5 times its number, 0, 0)."""
    lines = []
    for i in range(23):
        Image.new("RGB", (32 if i % 3 else 16, 16), (5 * i, 0, 0)).save(folder / f"{i}.png")
        lines.append(json.dumps({"task": "t2i", "target": f"{i}.png", "long": ["a red circle", "a blue square"], "short": "a circle"}))
    (folder / "m.jsonl").write_text("\n".join(lines))


def loader(folder, start, stop, shards, count):
    source, mixture = MediaSource(folder / "m.jsonl", folder, BUCKETS), Mixture({"t2i": 1.0}, {"long": .5, "short": .5})
    return Loader(source, mixture, BUCKETS, Prompter(SMALL_VLM), 4, start, stop, shards, count)


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
    with loader(folder, 0, STOPPED + BATCHES, (0,), 1) as batches:
        return [(step, bucket, names(batch)) for step, bucket, batch in batches]


@pytest.mark.parametrize("count", [1, 2, 4])
def test_the_next_batches_are_the_same(folder, never_stopped, count):
    parts = []
    for index in range(count):
        with loader(folder, STOPPED, STOPPED + BATCHES, (index,), count) as batches:
            parts.append([(step, bucket, names(batch)) for step, bucket, batch in batches])
    for (step, bucket, rows), *mine in zip(never_stopped[STOPPED:], *parts, strict=True):
        assert all(part[:2] == (step, bucket) for part in mine) and rows == [row for part in mine for row in part[2]]


def test_two_real_processes(folder, never_stopped, tmp_path):
    """Over loopback: on each mesh, each packs the rows of its devices, they become global arrays, and are read back whole by both."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    command = [sys.executable, "-m", "tests.data.test_processes", str(folder), str(tmp_path)]
    running = []
    for index in range(2):
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags(4),
                       "PYTHONPATH": str(ROOT), "JAX_COORDINATOR_ADDRESS": address, "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": str(index)}
        running.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True))
    for process in running:
        out, _ = process.communicate(timeout=300)
        assert process.returncode == 0, out[-3000:]
    for index in range(2):
        seen = json.loads((tmp_path / f"{index}.json").read_text())
        assert seen == json.loads(json.dumps(never_stopped[STOPPED:])) and len(seen) == BATCHES


def one_process(folder, output):
    import pathlib

    import jax

    from launch import cli

    cli.join_processes()
    assert jax.process_count() == 2 and len(jax.devices()) == 8
    what_the_first_does_all_know()
    seen = []
    share = -(-BATCHES // len(MESHES))
    for first, sizes in zip(range(STOPPED, STOPPED + BATCHES, share), MESHES, strict=True):
        seen += placed_batches(pathlib.Path(folder), first, min(first + share, STOPPED + BATCHES), sizes)
    (pathlib.Path(output) / f"{jax.process_index()}.json").write_text(json.dumps(seen))


def what_the_first_does_all_know():
    import jax

    from launch.data import agree
    from vino_jax import processes
    from vino_jax.errors import UserError

    def fails():
        raise UserError(f"process {jax.process_index()} cannot")

    agree("the same text", "this")
    with pytest.raises(UserError, match="do not agree on this"):
        agree(f"the text of {jax.process_index()}", "this")
    assert processes.of_first(lambda: {"of": jax.process_index()}) == {"of": 0}
    with pytest.raises(UserError, match="^process 0 cannot$"):
        processes.of_first(fails)
    assert processes.of_first(jax.process_index) == 0


def placed_batches(folder, start, stop, sizes):
    from jax.experimental import multihost_utils

    from vino_jax.sharding.mesh import make_mesh
    from vino_jax.sharding.resolve import data_shards
    from vino_jax.sharding.rules import preset
    from vino_jax.train.loop import place_batch

    mesh, rules = make_mesh(sizes), preset("fsdp")
    with loader(folder, start, stop, *data_shards(mesh, rules)) as batches:
        for step, bucket, batch in batches:
            placed = place_batch(batch, mesh, rules)
            assert not placed.target.is_fully_addressable and placed.target.shape[0] in (16, 8)
            whole = multihost_utils.process_allgather(placed, tiled=True)
            yield step, bucket, names(whole)


if __name__ == "__main__":
    one_process(*sys.argv[1:])
