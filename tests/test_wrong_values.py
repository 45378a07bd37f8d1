"""Values of a config that would fail late, or never and be wrong, are refused where they are given."""
import dataclasses

import pytest

from configs import media, shapes, shapes_base, shapes_no_stage1
from vino_jax.batch import BucketSpec
from vino_jax.errors import UserError
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import SamplingConfig, build
from vino_jax.train.config import run_config
from vino_jax.train.stage import StageConfig

BUCKET = BucketSpec("edit", 4, 9, 48, 64, 80, patches=32, images=2, image_height=64, image_width=64,
                    video_frames=9, video_height=48, video_width=64)
STAGE = StageConfig("one", 10, (("vae/.*", 0.0), (".*", 1.0)), 1e-3, {"t2i": 1.0}, {"long": 1.0}, ("edit",))


@pytest.mark.parametrize("config", [media, shapes, shapes_base, shapes_no_stage1])
def test_the_configs_pass(config):
    run_config(config.get_config().to_dict())


@pytest.mark.parametrize("name, value", [("dtype", "bf16"), ("dtype", "float16"), ("remat", "all"), ("attention", "flash")])
def test_runtime(name, value):
    with pytest.raises(UserError, match=f"runtime.{name} '{value}' is unknown; choose one of "):
        Runtime(**{name: value})


@pytest.mark.parametrize("changes, words", [
    ({"batch": 0}, "batch is 0; it must be at least 1"),
    ({"frames": 8}, r"frames is 8; it must be 4k\+1"),
    ({"frames": 0}, r"frames is 0; it must be 4k\+1"),
    ({"height": 50}, "height is 50; it must be a multiple of 16"),
    ({"width": -16}, "width is -16; it must be a multiple of 16"),
    ({"prompt_tokens": 0}, "prompt_tokens is 0; it must be at least 1"),
    ({"patches": 30}, "patches is 30; it must be a multiple of 4"),
    ({"images": -1}, "images is -1; it must be at least 1"),
    ({"images": 0}, r"images is 0; it must be at least 1 \(or 0, with image_height, image_width\)"),
    ({"image_width": 40}, "image_width is 40; it must be a multiple of 16"),
    ({"video_frames": 0}, r"video_frames is 0; it must be 4k\+1 \(or 0, with video_height, video_width\)"),
    ({"video_height": 0}, r"video_height is 0; it must be a multiple of 16 \(or 0, with video_frames, video_width\)"),
])
def test_buckets(changes, words):
    with pytest.raises(UserError, match=f"bucket 'edit': {words}"):
        dataclasses.replace(BUCKET, **changes)


def test_a_bucket_without_references():
    dataclasses.replace(BUCKET, images=0, image_height=0, image_width=0, video_frames=0, video_height=0, video_width=0, patches=0)


@pytest.mark.parametrize("changes, words", [
    ({"steps": 0}, "steps is 0; it must be at least 1"),
    ({"accumulate": 0}, "accumulate is 0; it must be at least 1"),
    ({"learning_rate": -1.0}, "learning_rate is -1.0; it must be 0 or more"),
    ({"learning_rate": float("nan")}, "learning_rate is nan; it must be 0 or more"),
    ({"clip": 0.0}, "clip is 0.0; it must be more than 0"),
    ({"b2": 1.0}, "b2 is 1.0; it must be from 0 to less than 1"),
    ({"ema": 1.5}, "ema is 1.5; it must be from 0 to less than 1"),
    ({"decay_steps": 11}, "decay_steps is 11, more than its 10 steps"),
    ({"text_dropout": 1.5}, "text_dropout is 1.5; it must be from 0 to 1"),
    ({"text_dropout": 0.6, "image_dropout": 0.6}, "text_dropout 0.6 and image_dropout 0.6 are more than 1 together"),
    ({"rules": ((".*", -1.0),)}, r"rule '\.\*' has the rate -1.0"),
    ({"rules": (("(mmdit", 1.0),)}, r"rule '\(mmdit' is no regex"),
    ({"steps": 0, "ema": 2.0}, "steps is 0; it must be at least 1; ema is 2.0"),
])
def test_stages(changes, words):
    with pytest.raises(UserError, match=f"stage 'one': .*{words}"):
        dataclasses.replace(STAGE, **changes)


def changed(key, value):
    values = shapes.get_config().to_dict()
    *parents, last = key.split(".")
    node = values
    for name in parents:
        node = node[name]
    node[last] = value
    return values


@pytest.mark.parametrize("key, value, words", [
    ("sampling.heigth", 64, "unknown config key 'sampling.heigth', did you mean 'height'"),
    ("sampling.height", 63, "config table 'sampling': height 63 and width 64 must be multiples of 16"),
    ("sampling.num_frames", 8, r"config table 'sampling': num_frames 8 must be 4k\+1 and at most 89"),
    ("sampling.steps", 0, "config key 'sampling.steps' is 0"),
    ("stages.stage2.ema", 2.0, "stage 'stage2': ema is 2.0"),
    ("buckets.edit", 3, "config key 'buckets.edit' must be a table, not 3"),
    ("stages.stage1", (), "config key 'stages.stage1' must be a table"),
    ("buckets.clip.frames", 8, "bucket 'clip': frames is 8"),
    ("runtime.remat", "dotz", "runtime.remat 'dotz' is unknown"),
])
def test_a_run_is_refused_at_its_start(key, value, words):
    with pytest.raises(UserError, match=words):
        run_config(changed(key, value))


def test_the_sampling_table_of_a_checkpoint():
    assert build(SamplingConfig, {"height": 64}).size(picture=True) == (64, 640)
    with pytest.raises(UserError, match="'sampling.steps' is 0"):
        build(SamplingConfig, {"steps": 0})
