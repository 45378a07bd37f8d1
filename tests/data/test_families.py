"""Families of buckets: sizes, token budgets, room for the prompts that they promise, and how little of them is padding."""
import math

import numpy as np
import pytest

from configs.data import ASPECTS, families, family
from data_pipelines.buckets import assign, padding_shares
from data_pipelines.pixels import PixelLimits
from data_pipelines.prompts import Prompter
from tests.benchmarks.padding import BUDGET, FAMILIES, Placed, buckets, log_normal_items, measure
from tests.data.folders import SHARED, SMALL_VLM, needs_shared
from vino_jax.batch import BucketSpec


def test_sizes_and_budgets():
    specs = [BucketSpec(name, **values) for name, values in family("x", 640, (128, 512), 40_000, frames=5, images=2, rows=4).items()]
    assert len(specs) == 2 * len(ASPECTS) and specs[0].name == "x_912x448_128"
    for spec, aspect in zip(specs[::2], ASPECTS):
        assert spec.width / spec.height == pytest.approx(aspect, rel=.04) and math.sqrt(spec.width * spec.height) == pytest.approx(640, rel=.03)
        assert spec.batch % 4 == 0 and spec.batch * spec.tokens <= 40_000 < (spec.batch + 4) * spec.tokens
    assert family("x", 640, (128,), 10, rows=4).popitem()[1]["batch"] == 4  # never less than the mesh needs


@pytest.mark.parametrize("folder, limits", [(SMALL_VLM, None), (SMALL_VLM, PixelLimits()),
                                             pytest.param(SHARED / "qwen3vl_processor", None, marks=needs_shared)])
def test_prompts_have_the_room_that_is_promised(folder, limits):
    prompter = Prompter(folder, limits)
    text = "a red circle " * 8
    words = prompter.length(text) - prompter.length("")
    for count, clip in ((0, 0), (3, 0), (1, 9), (0, 9)):
        table = family("x", 96, (words,), 1000, frames=9 if clip else 1, images=count, video_frames=clip, limits=prompter.limits)
        for spec in (BucketSpec(name, **values) for name, values in table.items()):
            grids = [prompter.limits.image_grid(spec.height, spec.width)] * count
            video = prompter.limits.video_grid(spec.height, spec.width) if clip else None
            assert spec.patches == sum(map(math.prod, [*grids, *([video] if clip else [])]))
            assert spec.prompt_tokens - 70 <= prompter.length(text, grids, video) <= spec.prompt_tokens


def test_every_task_has_a_bucket():
    specs = [BucketSpec(name, **values) for name, values in families(96, (64,), 1000, frames=(9,), images=(1, 3)).items()]
    assert len({spec.name for spec in specs}) == len(specs) == 9 * len(ASPECTS)
    items = log_normal_items(200)
    assigned = assign({item.task: 1.0 for item in items}, specs, Placed(items, specs, None))
    assert {task for entry in assigned for task in entry.shares} == {item.task for item in items} and len(assigned) == len(specs)


def test_padding_is_what_no_sample_fills():
    """By hand, over the rows of the plan; and small for sizes of every kind."""
    prompter = Prompter(SMALL_VLM, PixelLimits())
    items, specs = log_normal_items(600), buckets("few")
    source = Placed(items, specs, prompter)
    assigned = assign({task: 1.0 for task in source.tasks()}, specs, source)
    padding, single = padding_shares(assigned, source)
    used = [entry for entry in assigned if entry.shares]
    rows = [(share, entry.bucket.tokens, np.mean(source.tokens[task, entry.bucket.name])) for entry in used for task, share in entry.shares.items()]
    share, room, filled = map(np.array, zip(*rows))
    assert padding == pytest.approx(1 - (share * filled).sum() / (share * room).sum()) and share.sum() == pytest.approx(1)
    assert 0 < padding < 0.15 < single and all(0 < f <= r for f, r in zip(filled, room))
    assert measure(source, specs)[3] < 2 and set(FAMILIES) == {"few", "many"} and max(e.bucket.tokens for e in used) < BUDGET
