"""The plan: pure, with the shares, the epochs and the dropout that the mixture asks for; and which bucket serves what."""
import collections
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data_pipelines import mixture as mixture_module
from data_pipelines.buckets import assign, fitting, serves, spoils, table, tightest
from data_pipelines.mixture import Mixture, Schedule, choose_text
from data_pipelines.sources import Usage
from vino_jax.batch import TASKS, BucketSpec
from vino_jax.errors import UserError

WEIGHTS = {"t2i": .1, "t2v": .1, "i2v": .1, "ti2v": .15, "ti2i": .25, "ti2i_baseimg": .05, "tv2v": .15, "tiv2v": .1}  # stage 3 of the paper


def bucket(name, batch, frames, height=64, width=64, images=0, video=0):
    still, clip = bool(images), bool(video)
    return BucketSpec(name, batch, frames, height, width, 96, images=images, image_height=height * still, image_width=width * still,
                      video_frames=video, video_height=height * clip, video_width=width * clip)


BUCKETS = (bucket("picture", 32, 1), bucket("wide", 12, 1, 48, 80), bucket("clip", 16, 9), bucket("edit", 24, 1, images=2),
           bucket("animate", 7, 9, images=1), bucket("clip_edit", 5, 9, images=1, video=9))


class Endless:
    def tasks(self):
        return TASKS

    def count(self, task, bucket):
        return None if serves(bucket, task) else 0

    def unplaced(self):
        return []

    def usage(self, task, bucket):
        return None


class Finite(Endless):
    def __init__(self, counts, unplaced=(), usages=None):
        self.counts, self.listed, self.usages = counts, list(unplaced), usages or {}  # counts, usages by (task, bucket name)

    def tasks(self):
        return tuple({task for task, _ in self.counts})

    def count(self, task, bucket):
        return self.counts.get((task, bucket.name), 0)

    def unplaced(self):
        return self.listed

    def usage(self, task, bucket):
        return self.usages.get((task, bucket.name))


def clear_caches():
    mixture_module._shuffled.cache_clear()
    mixture_module._permutation.cache_clear()


def test_plan_is_pure():
    forward = [Schedule(3, Mixture(WEIGHTS, {"long": 1.0}), BUCKETS, Endless()).plan(s) for s in range(20)]
    clear_caches()
    schedule = Schedule(3, Mixture(WEIGHTS, {"long": 1.0}), BUCKETS, Endless())
    assert [schedule.plan(s) for s in reversed(range(20))] == forward[::-1]
    assert [Schedule(4, Mixture(WEIGHTS, {"long": 1.0}), BUCKETS, Endless()).plan(s) for s in range(20)] != forward


def test_plan_is_the_same_in_another_process():
    """Python's hash is salted by process: a plan that used it would differ between hosts and deadlock them."""
    code = ("from tests.data.test_mixture import *; s = Schedule(3, Mixture(WEIGHTS, {'long': 1.0}), BUCKETS, Endless()); "
            "print([(p.bucket.name, [(r.task, r.index, r.text_draw) for r in p.rows]) for p in map(s.plan, range(5))])")
    root = Path(__file__).resolve().parents[2]
    runs = {subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True,
                           env={"PYTHONHASHSEED": seed, "JAX_PLATFORMS": "cpu", "PATH": "/usr/bin:/bin"}).stdout for seed in "12"}
    assert len(runs) == 1 and "clip_edit" in runs.pop()


@pytest.mark.parametrize("steps", [300, 10_000])
def test_shares_of_rows(steps):
    """Tasks have their weights of all rows although batches differ, over 10,000 draws and in a short run."""
    schedule = Schedule(0, Mixture(WEIGHTS, {"long": 1.0}), BUCKETS, Endless())
    rows, used = collections.Counter(), collections.Counter()
    for step in range(steps):
        plan = schedule.plan(step)
        rows.update((plan.bucket.name, r.task) for r in plan.rows)
        used[plan.bucket.name] += len(plan.rows)
    total = sum(rows.values())
    for task, weight in WEIGHTS.items():
        share = sum(n for (_, t), n in rows.items() if t == task) / total
        assert abs(share - weight) < 0.01 * (1 if steps < 10_000 else weight), (task, share)  # 1 % of the share itself in the long run
    for entry in schedule.assigned:
        assert abs(used[entry.bucket.name] / total - entry.share) < 0.01
    assert sum(a.share for a in schedule.assigned) == pytest.approx(1)


def test_indices_of_an_endless_source_are_unique():
    schedule = Schedule(1, Mixture(WEIGHTS, {"long": 1.0}), BUCKETS, Endless())
    rows = [r for s in range(500) for r in schedule.plan(s).rows]
    assert len({r.index for r in rows}) == len({r.serial for r in rows}) == len(rows)
    other = {r.index for s in range(500) for r in Schedule(2, schedule.mixture, BUCKETS, Endless()).plan(s).rows}
    assert not other & {r.index for r in rows}


def test_every_sample_once_an_epoch():
    counts = {("t2i", "picture"): 100, ("t2i", "wide"): 50, ("t2v", "clip"): 3}  # clip: fewer samples than rows
    schedule = Schedule(0, Mixture({"t2i": .5, "t2v": .5}, {"long": 1.0}), BUCKETS, Finite(counts))
    visits = collections.defaultdict(list)
    for step in range(400):
        plan = schedule.plan(step)
        for row in plan.rows:
            visits[row.task, plan.bucket.name].append(row.index)
    assert set(visits) == set(counts)
    for group, count in counts.items():
        seen = np.array(visits[group])
        epochs = len(seen) // count
        assert epochs > 10
        for epoch in seen[:epochs * count].reshape(epochs, count):
            assert sorted(epoch) == list(range(count)), group
        assert count == 3 or not np.array_equal(seen[:count], seen[count:2 * count])  # each epoch has an order of its own
    assert len(visits["t2i", "picture"]) / len(visits["t2i", "wide"]) == pytest.approx(2, rel=0.05)  # by their numbers


def test_plan_far_ahead_needs_no_replay(monkeypatch):
    """An epoch's position after millions of steps comes from the cycle that the step lies in."""
    schedule = Schedule(0, Mixture({"t2i": .5, "t2v": .5}, {"long": 1.0}), BUCKETS, Finite({("t2i", "picture"): 7, ("t2v", "clip"): 5}))
    clear_caches()
    calls = []
    monkeypatch.setattr(mixture_module, "_shuffled", lambda *a, real=mixture_module._shuffled: calls.append(a) or real(*a))
    schedule.plan(123_456_789)
    assert len(set(calls)) <= 2 and schedule.plan(123_456_789) == schedule.plan(123_456_789)


def test_dropout_shares():
    schedule = Schedule(0, Mixture(WEIGHTS, {"long": 1.0}, text_dropout=.1, image_dropout=.15), BUCKETS, Endless())
    rows = [r for s in range(2000) for r in schedule.plan(s).rows]
    assert np.mean([r.drop_images for r in rows]) == pytest.approx(.15, abs=.01)
    assert np.mean([r.drop_text and not r.drop_images for r in rows]) == pytest.approx(.1, abs=.01)
    assert all(r.drop_text for r in rows if r.drop_images)
    none = Schedule(0, Mixture(WEIGHTS, {"long": 1.0}, 0.0, 0.0), BUCKETS, Endless())
    assert not any(r.drop_text or r.drop_images for s in range(50) for r in none.plan(s).rows)


def test_text_of_a_row_is_one_that_it_has():
    draws = np.linspace(0, 1, 1000, endpoint=False)
    weights = {"long": .25, "short": .25, "instruction": .5}
    full = collections.Counter(choose_text({"long": "l", "short": "s", "instruction": "i"}, weights, d) for d in draws)
    assert full == {"l": 250, "s": 250, "i": 500}
    assert collections.Counter(choose_text({"long": "l", "instruction": "i"}, weights, d) for d in draws)["i"] in (666, 667)
    assert collections.Counter(choose_text({"long": "l", "short": "s"}, {"instruction": 1.0}, d) for d in draws) == {"l": 500, "s": 500}
    assert choose_text({"long": "l", "short": "s"}, {"long": 1.0, "short": 0.0}, 0.999) == "l"
    assert choose_text({}, weights, 0.5) == ""
    counted = collections.Counter(choose_text({"long": ("a", "b", "c"), "short": ("d",), "instruction": "i"}, weights, d) for d in draws)
    assert counted["d"] == 250 and counted["i"] == 500 and {counted[x] for x in "abc"} == {83, 84}  # a kind's share is its texts' together


def test_tasks_go_to_the_tightest_bucket_that_serves_them():
    names = lambda task, buckets=BUCKETS: [b.name for b in tightest(buckets, task)]  # noqa: E731
    assert names("t2i") == ["picture", "wide"] and names("t2v") == ["clip"] and names("i2v") == names("ti2v") == ["animate"]
    assert names("ti2i") == names("ti2i_baseimg") == ["edit"] and names("tv2v") == names("tiv2v") == ["clip_edit"]
    assert names("t2i", BUCKETS[3:]) == ["edit"] and names("t2v", BUCKETS[5:]) == ["clip_edit"]  # spare slots where nothing is tighter
    assert names("tv2v", BUCKETS[:5]) == []


def test_an_item_goes_to_the_bucket_that_suits_it():
    buckets = (bucket("s", 8, 1), bucket("l", 8, 1, 128, 128), bucket("w", 8, 1, 48, 80), bucket("e", 8, 1, images=2), bucket("c9", 8, 9),
               bucket("c17", 8, 17), bucket("v", 8, 9, images=1, video=9))
    name = lambda *a: getattr(fitting(buckets, *a), "name", None)  # noqa: E731
    assert name("t2i", 0, 1, 600, 1000) == "w" and name("t2i", 0, 1, 500, 500) == "l" and name("t2i", 0, 1, 100, 100) == "s"
    assert name("t2i", 0, 1, 20, 20) == "s" and name("ti2i", 1, 1, 90, 90) == "e" and name("ti2i", 3, 1, 90, 90) is None
    assert name("t2v", 0, 40, 90, 90) == "c17" and name("t2v", 0, 16, 90, 90) == "c9" and name("t2v", 0, 8, 90, 90) is None
    assert name("tv2v", 0, 9, 90, 90, 9) == "v" and name("tv2v", 0, 9, 90, 90, 8) is None and name("tiv2v", 2, 9, 90, 90, 9) is None


def test_table_names_buckets_shares_and_what_fits_nowhere():
    # a picture has 16 + 96 tokens, a clip 48 + 96
    usages = {("t2i", "picture"): Usage(16 + 40), ("t2v", "clip"): Usage(48 + 72, (0.8, 1.6))}
    counts = {("t2i", "picture"): 5, ("t2v", "clip"): 2}
    source = Finite(counts, ["a.mp4 (t2v, 3x64x64)"] + [f"b{i}" for i in range(150)], usages)
    assigned = assign({"t2i": 1.0, "t2v": 3.0}, BUCKETS, source)
    lines = table(assigned, source).splitlines()
    assert lines[0].startswith("bucket")
    picture, clip = (next(line for line in lines if line.startswith(name)) for name in ("picture", "clip "))
    assert "25.0 %" in picture and "t2i (5)" in picture and "1x64x64" in picture and "50.0 %" in picture and " - " in picture
    assert f"{16 * 144}" in clip and "16.7 %" in clip and "0.80-1.60 x" in clip
    assert "never drawn" in next(line for line in lines if line.startswith("edit"))
    alone = 1 - (.25 * 56 + .75 * 120) / 144
    assert lines[7] == f"padding {100 * (1 - 104 / 136):.1f} % of all tokens; in a single bucket for all it would be {100 * alone:.1f} %"
    assert "151 items fit no bucket" in lines[8] and "a.mp4" in lines[9] and lines[-1].strip() == "and 51 more"
    assert "padding" not in "".join(table(assigned, Finite(counts)).splitlines()[1:])  # where it is unknown


def test_what_would_be_spoiled_fits_no_bucket():
    assert "would lose 98 %" in spoils(1, 250, 64, 256) and not spoils(300, 450, 96, 96) and not spoils(100, 200, 64, 64)
    assert "enlarged 64.0 times" in spoils(1, 1, 64, 64) and not spoils(16, 16, 64, 64) and not spoils(1, 250, 64, 256, cut=False)
    assert [fitting(BUCKETS, "t2i", 0, 1, *size) for size in ((1, 1), (1, 250), (200, 64))] == [None] * 3


def test_the_least_room_for_the_prompt_comes_first():
    short, long = (BucketSpec(name, 8, 1, 64, 64, tokens) for name, tokens in (("s", 64), ("l", 512)))
    assert fitting([long, short], "t2i", 0, 1, 90, 90) is short
    larger = BucketSpec("a", 8, 1, 128, 112, 512)  # the aspect ratio of 128x112 is further off, and its area is larger
    assert fitting([larger, short], "t2i", 0, 1, 900, 900) is short
    assert fitting([BucketSpec("a", 8, 1, 336, 320, 512), short], "t2i", 0, 1, 900, 900).name == "a"  # 5 % are the same aspect ratio


@pytest.mark.parametrize("tasks, source, message", [
    ({"t2x": 1.0}, Endless(), "unknown task 't2x'"), ({"t2i": 0.0}, Endless(), "no task a weight"),
    ({"t2i": -1.0}, Endless(), "weight -1.0"),
    ({"t2v": 1.0}, Finite({("t2i", "picture"): 5}), "task 't2v' has a weight, but the data has no sample"),
])
def test_a_wrong_mixture_is_told(tasks, source, message):
    with pytest.raises(UserError, match=message):
        assign(tasks, BUCKETS, source)


def test_a_task_without_a_bucket_is_told():
    with pytest.raises(UserError, match="no bucket takes task 'tv2v': it needs one with frames > 1, video_frames > 0; there are picture"):
        assign({"tv2v": 1.0}, BUCKETS[:1], Endless())
    with pytest.raises(UserError, match="two buckets have the same name: picture"):
        assign({"t2i": 1.0}, BUCKETS[:1] * 2, Endless())
    with pytest.raises(UserError, match="unknown kind of text 'lang'"):
        Mixture(WEIGHTS, {"lang": 1.0})
    with pytest.raises(UserError, match="their sum must be in 0..1"):
        Mixture(WEIGHTS, {"long": 1.0}, 0.6, 0.6)
