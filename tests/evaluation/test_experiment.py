"""Experiments: intervals and differences over seeds, how gradient norms jump, and the table; the arms are configs that exist."""
import math

import numpy as np
import pytest
from scipy import stats

from configs import shapes, shapes_stage3
from launch import experiment
from launch.config import load_config
from vino_jax.errors import UserError
from vino_jax.evaluation.statistics import difference, interval, roughness
from vino_jax.settings import VinoConfig
from vino_jax.train.config import run_config
from vino_jax.train.initial import with_model


def test_interval_is_students():
    values = [1.0, 2.0, 4.0]
    mean, width = interval(values)
    low, high = stats.t.interval(0.95, 2, loc=np.mean(values), scale=stats.sem(values))
    assert mean == pytest.approx(7 / 3) and (mean - width, mean + width) == pytest.approx((low, high))
    assert interval([3.0])[0] == 3.0 and math.isnan(interval([3.0])[1])


def test_what_the_runs_of_a_seed_share_cancels():
    ours, theirs = {0: 1.1, 1: 5.1, 2: 9.1}, {0: 1.0, 1: 5.0, 2: 9.0, 3: 100.0}
    mean, width = difference(ours, theirs)
    assert mean == pytest.approx(0.1) and width < 1e-9
    with pytest.raises(ValueError, match="no seed"):
        difference({0: 1.0}, {1: 1.0})


def test_roughness_is_the_relative_deviation_of_a_norm_whatever_its_level():
    rng = np.random.default_rng(0)
    noise = rng.normal(size=4000)
    falling = np.exp(-np.arange(4000) / 500)
    assert roughness((falling * np.exp(0.2 * noise)).tolist()) == pytest.approx(0.2, rel=0.05)
    assert roughness([1.0, 1.0, 1.0, 1.0]) == 0.0 and math.isnan(roughness([1.0, 2.0]))


def results():
    return {"with": {0: {"loss": 1.0, "t2i/colour": 0.5, "i2v/motion": 0.1}, 1: {"loss": 1.2, "t2i/colour": 0.7, "i2v/motion": 0.2}},
            "without": {0: {"loss": 1.5, "t2i/colour": 0.5}, 1: {"loss": 1.7, "t2i/colour": math.nan}}}


def test_arms_are_set_against_the_first_seed_by_seed():
    result = experiment.summarise("queries", results())
    apart = result["arms"]["without"]["loss"]
    assert apart["mean"] == pytest.approx(1.6) and apart["against"] == pytest.approx([0.5, 0.0])
    assert result["arms"]["without"]["t2i/colour"] == {"mean": 0.5, "interval": None, "against": [0.0, None]}
    assert result["arms"]["with"]["loss"]["against"] is None
    text = experiment.table(result, ("loss", "t2i/*"))
    assert "| loss | 1.100 ± 1.271 | 1.600 ± 1.271 | +0.500 ± 0.000* |" in text
    assert "| t2i/colour | 0.600 ± 1.271 | 0.500 | +0.000 |" in text and "i2v" not in text and "Seeds 0, 1;" in text
    alone = experiment.summarise("queries", {arm: {0: seeds[0]} for arm, seeds in results().items()})
    assert "| loss | 1.000 | 1.500 | +0.500 |" in experiment.table(alone, ("loss",))


def test_scores_are_told_by_name():
    scores = {"tasks": {"t2i": {"attributes": {"colour": {"mean": 0.5}}}}, "loss": {"loss": 1.0, "tasks": {"t2i": {"loss": 2.0}}}}
    assert experiment.flat(scores) == {"t2i/colour": 0.5, "loss": 1.0, "loss/t2i": 2.0}


def test_edits_are_told_by_their_kind():
    edits = [{"followed": 1.0, "preserved": 20.0, "edit": "remove"}, {"followed": 0.0, "edit": "add"}, {"followed": 0.0, "edit": "remove"}]
    found = experiment.by_kind({"tasks": {"ti2i": {"samples": edits}, "t2i": {"samples": [{"colour": 1.0}]}}})
    assert found == {"ti2i/followed add": 0.0, "ti2i/followed remove": 0.5}


@pytest.mark.parametrize("name", experiment.EXPERIMENTS)
def test_arms_are_trainings_of_configs_that_exist(name):
    chosen = experiment.EXPERIMENTS[name]
    for arm in chosen.arms.values():
        config, *overrides = [flag for flag in experiment.TRAININGS[arm.training] if flag != "--config"]
        given = dict(flag.removeprefix("--config.").split("=") for flag in (*overrides, *arm.evaluation) if flag.startswith("--config."))
        loaded = run_config(load_config(str(experiment.ROOT / config), given))
        assert loaded.stages["stage3"].steps and with_model(VinoConfig(), loaded.model).queries == loaded.model["queries"]


def test_stage_3_alone_draws_as_many_tokens():
    whole, alone = shapes.get_config(), shapes_stage3.get_config()
    tokens = {name: shapes_stage3.tokens_a_step(whole, name) for name in whole.stages}
    spent = sum(tokens[name] * whole.stages[name].steps for name in whole.stages)
    assert list(alone.stages) == ["stage3"] and abs(alone.stages.stage3.steps * tokens["stage3"] / spent - 1) < 0.01
    assert tokens["stage1"] == 32 * 72 and alone.stages.stage3.steps > whole.stages.stage3.steps


@pytest.mark.parametrize("flags, words", [
    (("--name", "querys"), "unknown experiment 'querys', did you mean 'queries'"), (("--name", "queries", "--seeds", "0,0"), "--seeds '0,0'"),
    (("--name", "queries", "--seeds", "a"), "--seeds 'a' must be"),
])
def test_wrong_flags(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        experiment.main([*flags, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
