"""Config files and their command line."""
import argparse
import math

import pytest

from configs.data import GROUP_TOKENS, IMAGE_TOKENS, TEMPLATE_TOKENS
from configs.meshes import PLACEMENTS
from data_pipelines.buckets import serves
from data_pipelines.pixels import PixelLimits
from launch.config import load_config, parse
from vino_jax.errors import UserError
from vino_jax.settings import VinoConfig
from vino_jax.train.config import run_config


def load(**overrides):
    return run_config(load_config("configs/shapes.py", {k.replace("__", "."): v for k, v in overrides.items()}))


@pytest.mark.parametrize("path", ["configs/shapes.py", "configs/shapes_base.py", "configs/media.py",
                                  *(f"configs/vino_13b.py:{name}" for name in PLACEMENTS)])
def test_the_config_files_are_whole(path):
    config = run_config(load_config(path, {}))
    assert config.stages and all(stage.buckets for stage in config.stages.values())
    for stage in config.stages.values():
        for task in (task for task, share in stage.tasks.items() if share):
            assert any(serves(config.buckets[name], task) for name in stage.buckets), (stage.name, task)


def test_overrides_reach_their_key():
    config = load(stages__stage1__steps="70", mesh__fsdp="4", stages__stage2__learning_rate="1")
    assert config.stages["stage1"].steps == 70 and config.mesh.fsdp == 4 and config.stages["stage2"].learning_rate == 1.0


@pytest.mark.parametrize("key,value,message", [
    ("stages.stage1.step", "7", "unknown config key 'stages.stage1.step', did you mean 'steps'"),
    ("sead", "7", "unknown config key 'sead', did you mean 'seed'"),
    ("seed", "{[]: 1}", "config key 'seed' takes int, not '{"),
    ("seed", "many", "config key 'seed' takes int, not 'many'"),
    ("seed.x", "1", "unknown config key 'seed.x'"),
])
def test_wrong_overrides_are_told(key, value, message):
    with pytest.raises(UserError, match=message):
        load_config("configs/shapes.py", {key: value})


@pytest.mark.parametrize("key, value, words", [
    ("seed", -1, "'seed' is -1; it must be at least 0"), ("seed", 10**20, "'seed' is 1.*; it must be below 4294967296"),
    ("data.workers", -1, "'data.workers' is -1"), ("data.shift_image", 0.0, "'data.shift_image' is 0.0"),
    ("data.shift_video", math.nan, "'data.shift_video' is nan"), ("log.checkpoint_every", -1, "'log.checkpoint_every' is -1"),
    ("log.keep", 0, "'log.keep' is 0; it must be at least 1"), ("log.profile_port", -5, "'log.profile_port' is -5")])
def test_numbers_that_no_run_can_have_are_told(key, value, words):
    values = load_config("configs/shapes.py", {})
    *tables, name = key.split(".")
    (values[tables[0]] if tables else values)[name] = value
    with pytest.raises(UserError, match=f"config key {words}"):
        run_config(values)


def test_a_model_may_have_no_queries_but_not_fewer():
    assert VinoConfig(queries=0).queries == 0  # an experiment
    for name, value, least in (("queries", -1, 0), ("connector_ratio", 0, 1)):
        with pytest.raises(UserError, match=f"{name} is {value}; it must be at least {least}"):
            VinoConfig(**{name: value})


def test_unknown_keys_of_a_config_file_are_told_with_the_nearest_name(tmp_path):
    (tmp_path / "config.py").write_text(
        "from configs import shapes\ndef get_config():\n    c = shapes.get_config()\n    c.log.evry = 3\n    return c\n")
    with pytest.raises(UserError, match="unknown config key 'log.evry', did you mean 'every'"):
        run_config(load_config(str(tmp_path / "config.py"), {}))


def test_a_stage_that_names_no_bucket_is_told():
    values = load_config("configs/shapes.py", {})
    values["stages"]["stage1"]["buckets"] = ("pictures",)
    with pytest.raises(UserError, match="stage 'stage1' uses unknown bucket 'pictures', did you mean 'picture'"):
        run_config(values)


def test_flags_that_nobody_knows_are_told():
    with pytest.raises(UserError, match="unknown flag '--confg.seed=1'"):
        parse(argparse.ArgumentParser(), ["--config", "configs/shapes.py", "--confg.seed=1"])
    with pytest.raises(UserError, match="config file nowhere.py does not exist"):
        parse(argparse.ArgumentParser(), ["--config", "nowhere.py"])


def test_a_config_s_argument():
    assert load_config("configs/vino_13b.py:v6e:8x8", {}, "v5p:8x8x8")["mesh"]["seq"] == 8
    assert load_config("configs/vino_13b.py", {}, "v5p:8x8x8")["mesh"]["data"] == 64
    assert load_config("configs/vino_13b.py", {})["mesh"]["data"] == 8
    assert load_config("configs/shapes.py", {}, "v5p:8x8x8") == load_config("configs/shapes.py", {})
    with pytest.raises(UserError, match="configs/shapes.py takes no argument: leave out ':x'"):
        load_config("configs/shapes.py:x", {})
    with pytest.raises(UserError, match="no placement for 'v6e:8x9', did you mean 'v6e:8x8'"):
        load_config("configs/vino_13b.py:v6e:8x9", {})


def test_the_13_b_buckets_hold_the_pictures_that_the_vlm_sees():
    limits = PixelLimits()
    for bucket in run_config(load_config("configs/vino_13b.py", {})).buckets.values():
        grids = [limits.image_grid(bucket.image_height, bucket.image_width) for _ in range(bucket.images)]
        clip = limits.video_grid(bucket.video_height, bucket.video_width) if bucket.video_frames else (0, 0, 0)
        assert sum(map(math.prod, [*grids, clip])) == bucket.patches
        assert bucket.prompt_tokens - bucket.patches // 4 - TEMPLATE_TOKENS - IMAGE_TOKENS * bucket.images - GROUP_TOKENS * clip[0] > 170
