"""Stages as tables."""
import dataclasses

import jax
import pytest

from configs import common
from tests.train import tiny
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig
from vino_jax.train.optim import learning_rate, optimizer
from vino_jax.train.stage import by_path, merge, rates, split

TRAINED = {
    "stage1": {"connector"},
    "stage2": {"connector", "mmdit", "queries"},
    "stage3": {"connector", "mmdit", "queries", "vae_connector"},
}


@pytest.mark.parametrize("name", TRAINED)
def test_every_parameter_of_13b_is_matched_and_the_right_parts_train(name):
    abstract = Vino(VinoConfig(), Runtime()).abstract
    found = rates(tiny.stage(rules=name), abstract)
    assert set(found) == set(by_path(abstract))
    trained = {path for path, rate in found.items() if rate}
    assert {path.split("/")[0] for path in trained} == TRAINED[name]
    assert not any(path.startswith("mmdit/pooled/") for path in trained)  # published weights that nothing reads


def test_rules_that_miss_are_told():
    stage = tiny.stage()
    abstract = tiny.vino().abstract
    with pytest.raises(UserError, match="no rule matches.*vlm/"):
        rates(dataclasses.replace(stage, rules=common.RULES["stage3"][:2] + (("vae/.*", 0.0),)), abstract)
    with pytest.raises(UserError, match="nothing matches rule conector"):
        rates(dataclasses.replace(stage, rules=(("conector/.*", 1.0), *common.RULES["stage3"])), abstract)


def test_split_and_merge_are_inverse():
    abstract = tiny.vino().abstract
    trainable, frozen = split(abstract, rates(tiny.stage(), abstract))
    assert not set(by_path(trainable)) & set(by_path(frozen))
    assert jax.tree.structure(merge(frozen, trainable)) == jax.tree.structure(abstract)


def test_frozen_parameters_have_no_optimizer_state():
    abstract = tiny.vino().abstract
    found = rates(tiny.stage(rules="stage1"), abstract)
    trainable, _ = split(abstract, found)
    state = jax.eval_shape(optimizer(tiny.stage(rules="stage1"), found).init, trainable)
    moments = sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim)
    assert moments == 2 * sum(leaf.size for leaf in jax.tree.leaves(abstract["connector"]))


def test_the_rate_warms_up_stays_and_falls():
    stage = tiny.stage(steps=100, warmup_steps=10, decay_steps=20, learning_rate=2.0)
    assert [round(learning_rate(stage, i), 3) for i in (0, 5, 10, 80, 90, 100)] == [0.0, 1.0, 2.0, 2.0, 1.1, 0.2]
    assert learning_rate(tiny.stage(warmup_steps=0, learning_rate=2.0), 0) == 2.0
