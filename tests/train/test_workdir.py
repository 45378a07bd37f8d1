"""A workdir belongs to its config."""
import json

import pytest

from launch.config import load_config
from vino_jax.errors import UserError
from vino_jax.train.config import run_config
from vino_jax.train.workdir import claim, steps_done


def config(**overrides):
    settings = {"stages__stage1__steps": 150, "stages__stage2__steps": 150, "stages__stage3__learning_rate": 0.25, **overrides}
    return run_config(load_config("configs/shapes.py", {key.replace("__", "."): str(value) for key, value in settings.items()}))


def make(workdir, **done):
    """A workdir of the config, with steps done by stage."""
    claim(workdir, config())
    for stage, step in done.items():
        folder = workdir / "checkpoints" / stage / str(step)
        folder.mkdir(parents=True)
        (folder / "_CHECKPOINT_METADATA").touch()


@pytest.mark.parametrize("changes", [
    {}, {"log__every": 3, "log__checkpoint_every": 7}, {"mesh__fsdp": 2, "mesh__preset": "replicated"},
    {"data__threads": 3, "data__prefetch": 2}, {"stages__stage2__steps": 900}, {"stages__stage3__steps": 45},
    {"runtime__remat": "full", "stages__stage1__remat": {"picture": "full"}}])
def test_what_changes_no_number_may_differ(tmp_path, changes):
    make(tmp_path, stage1=150, stage2=40)
    claim(tmp_path, config(**changes))
    assert json.loads((tmp_path / "config.json").read_text())["stages"]["stage2"]["steps"] == changes.get("stages__stage2__steps", 150)
    assert steps_done(tmp_path, ("stage1", "stage2", "stage3")) == {"stage1": 150, "stage2": 40, "stage3": 0}


@pytest.mark.parametrize("changes,words", [
    ({"seed": 9}, "seed was 0, is 9"),
    ({"stages__stage1__steps": 900}, "stages.stage1.steps was 150, is 900"),  # stage 2 has begun from its end
    ({"stages__stage2__steps": 100}, "stages.stage2.steps was 150, is 100"),
    ({"stages__stage3__learning_rate": 0.5}, "stages.stage3.learning_rate was 0.25, is 0.5"),
    ({"init__vae": "elsewhere"}, "init.vae was '.*hunyuan', is 'elsewhere'"),
    ({"buckets__edit__batch": 64, "data__threads": 3, "runtime__dtype": "bfloat16"}, "buckets.edit.batch was 32, is 64; runtime.dtype was"),
])
def test_another_difference_is_told_and_nothing_written(tmp_path, changes, words):
    make(tmp_path, stage1=150, stage2=40)
    before = (tmp_path / "config.json").read_text()
    with pytest.raises(UserError, match=f"begun with another config: {words}.*; choose another workdir"):
        claim(tmp_path, config(**changes))
    assert (tmp_path / "config.json").read_text() == before


def test_stages_of_other_names_are_another_config(tmp_path):
    make(tmp_path, stage1=150, stage2=40)
    other = run_config(load_config("configs/shapes_base.py", {}))
    with pytest.raises(UserError, match="and [0-9]+ more; choose another workdir"):
        claim(tmp_path, other)


def test_a_stage_whose_checkpoint_is_gone_is_told(tmp_path):
    make(tmp_path, stage1=150, stage3=40)
    with pytest.raises(UserError, match="checkpoints/stage2 has no complete checkpoint, though stage 'stage3' has begun.*: put it back"):
        claim(tmp_path, config())


def test_before_the_first_checkpoint_only_imported_parts_bind(tmp_path):
    make(tmp_path)
    claim(tmp_path, config(seed=9, init__vae="elsewhere"))
    (tmp_path / "init").mkdir()
    claim(tmp_path, config(seed=7, init__vae="elsewhere"))
    with pytest.raises(UserError, match="init.vae was 'elsewhere', is"):
        claim(tmp_path, config())


def test_a_workdir_that_cannot_be_made_is_told(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot write .*file/config.json"):
        claim(tmp_path / "file", config())
