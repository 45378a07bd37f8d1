"""The loader over shapes: rows by process, resuming, dropout in the batch, threads."""
import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

from data_pipelines.buckets import table
from data_pipelines.loader import Loader
from data_pipelines.mixture import Mixture
from data_pipelines.prompts import Prompter
from data_pipelines.sources import ShapesSource
from tests.data.folders import ROOT, SMALL_VLM
from tests.data.test_mixture import WEIGHTS
from vino_jax.batch import ROLE_LATENT, TASKS, BucketSpec
from vino_jax.errors import UserError

BUCKETS = (
    BucketSpec("picture", 8, 1, 32, 32, 96),
    BucketSpec("clip", 4, 5, 32, 32, 96),
    BucketSpec("edit", 8, 1, 32, 32, 128, 8, images=2, image_height=32, image_width=32),
    BucketSpec("clip_edit", 4, 5, 32, 32, 176, 64, images=1, image_height=32, image_width=32,
               video_frames=5, video_height=32, video_width=32),
)
MIXTURE = Mixture(WEIGHTS, {"long": .25, "short": .25, "instruction": .5})


@pytest.fixture(scope="module")
def prompter():
    return Prompter(SMALL_VLM)


def loader(prompter, mixture=MIXTURE, buckets=BUCKETS, seed=5, stop=12, **more):
    return Loader(ShapesSource(seed), mixture, buckets, prompter, seed, stop_step=stop, **more)


def equal(a, b):
    leaves_a, leaves_b = jax.tree.leaves(a), jax.tree.leaves(b)
    return len(leaves_a) == len(leaves_b) and all(np.array_equal(x, y) for x, y in zip(leaves_a, leaves_b))


@pytest.fixture(scope="module")
def whole(prompter):
    with loader(prompter) as batches:
        return list(batches)


def test_batches_are_as_their_bucket_says(whole):
    specs = {b.name: b.spec() for b in BUCKETS}
    assert [step for step, _, _ in whole] == list(range(12)) and {name for _, name, _ in whole} == set(specs)
    for _, name, batch in whole:
        assert jax.tree.map(lambda x: (x.shape, x.dtype), batch) == jax.tree.map(lambda x: (x.shape, x.dtype), specs[name])
    assert {TASKS[t] for _, _, batch in whole for t in batch.task} == set(TASKS)
    serials = np.concatenate([batch.sample for _, _, batch in whole])
    assert len(set(serials.tolist())) == len(serials)


@pytest.mark.parametrize("count", [2, 4])
def test_processes_concatenate_to_one(prompter, whole, count):
    parts = []
    for index in range(count):
        with loader(prompter, shards=(index,), shard_count=count) as batches:
            parts.append(list(batches))
    for (step, name, batch), *some in zip(whole, *parts, strict=True):
        assert all((s, n) == (step, name) for s, n, _ in some)
        assert equal(batch, jax.tree.map(lambda *x: np.concatenate(x), *(b for _, _, b in some)))


def test_processes_that_pack_give_the_same(prompter, whole):
    with loader(prompter, start_step=3, workers=2, threads=2) as batches:
        rest = list(batches)
    assert [r[:2] for r in rest] == [w[:2] for w in whole[3:]] and all(equal(a[2], b[2]) for a, b in zip(rest, whole[3:], strict=True))


def test_a_killed_process_is_told(prompter):
    with loader(prompter, stop=None, workers=2) as batches:
        next(batches)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
        with pytest.raises(UserError, match="a process that packs batches was killed"):
            for _ in range(200):
                next(batches)


def test_processes_end_with_a_killed_run():
    code = ("import multiprocessing, sys, time\nfrom tests.data.test_loader import *\nif __name__ == '__main__':\n"
            "    batches = loader(Prompter(SMALL_VLM), stop=None, workers=2)\n    next(batches)\n"
            "    print(*(p.pid for p in multiprocessing.active_children()), flush=True)\n    time.sleep(600)\n")
    run = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, cwd=ROOT)
    workers = [int(pid) for pid in run.stdout.readline().split()]
    run.kill()
    run.wait()
    assert len(workers) == 2
    for _ in range(100):
        if not any(os.path.exists(f"/proc/{pid}") for pid in workers):
            return
        time.sleep(0.1)
    raise AssertionError(f"{workers} are still there")


def test_resuming_is_starting_at_the_next_step(prompter, whole):
    with loader(prompter, start_step=7, threads=2, prefetch=3) as batches:
        rest = list(batches)
    assert [r[:2] for r in rest] == [w[:2] for w in whole[7:]]
    assert all(equal(a[2], b[2]) for a, b in zip(rest, whole[7:], strict=True))
    with loader(prompter, seed=6) as other:
        assert not any(equal(a[2], b[2]) for a, b in zip(other, whole))


def test_dropout_reaches_the_batch(prompter):
    """Without images a row has no image's latents, but its base image or clip; without text its prompt is shorter."""
    nothing = dataclasses.replace(MIXTURE, text_dropout=0.0, image_dropout=0.0)
    everything = dataclasses.replace(MIXTURE, text_dropout=0.0, image_dropout=1.0)
    no_text = dataclasses.replace(MIXTURE, text_dropout=1.0, image_dropout=0.0)
    with loader(prompter, nothing) as full, loader(prompter, everything) as bare, loader(prompter, no_text) as mute:
        for (_, name, a), (_, _, b), (_, _, c) in zip(full, bare, mute, strict=True):
            bucket = next(x for x in BUCKETS if x.name == name)
            image, base = 4, np.array([TASKS[t] == "ti2i_baseimg" for t in a.task])  # 32x32 pixels are 2x2 tokens
            pool = np.array([t.startswith("t") and t.endswith("v2v") for t in (TASKS[t] for t in a.task)])
            clip = bucket.pool_tokens - bucket.images * image
            assert ((b.role == ROLE_LATENT).sum(1) == base * image + pool * clip).all()
            assert ((c.role == ROLE_LATENT).sum(1) == (a.role == ROLE_LATENT).sum(1)).all()
            assert (c.prompt_mask.sum(1) < a.prompt_mask.sum(1)).all() and (b.prompt_mask.sum(1) <= c.prompt_mask.sum(1)).all()
            assert np.array_equal(a.target, b.target) and np.array_equal(a.target, c.target)


def test_two_images_find_room_or_are_drawn_again():
    """ti2v of shapes has one or two reference images: with one slot only those with one are drawn."""
    source = ShapesSource(0)
    assert all(len(source.sample("ti2v", BUCKETS[3], i).images) == 1 for i in range(24))
    roomy = dataclasses.replace(BUCKETS[3], images=2)
    assert {len(source.sample("ti2v", roomy, i).images) for i in range(24)} == {1, 2}


def test_waiting_is_measured_and_a_closed_loader_stops(prompter):
    batches = loader(prompter, stop=None)
    assert batches.waited == 0.0 and next(batches)[0] == 0
    first = batches.waited
    assert first > 0 and next(batches)[0] == 1 and batches.waited > first
    batches.close()
    with pytest.raises((StopIteration, RuntimeError, ValueError)):
        for _ in range(50):
            next(batches)


def test_the_table_and_the_rows_of_processes(prompter):
    with loader(prompter, Mixture({"t2i": 1.0}, {"long": 1.0})) as batches:
        assert "picture" in table(batches.schedule.assigned, ShapesSource(5))
        assert [a.bucket.name for a in batches.schedule.used] == ["picture"]
    with pytest.raises(UserError, match="bucket 'clip' has 4 rows, which do not divide by 8 data shards"):
        loader(prompter, shard_count=8)
