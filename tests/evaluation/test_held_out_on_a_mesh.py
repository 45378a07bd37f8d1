"""The held-out loss of a whole model on real samples: the same on one device and on eight, however they are laid out."""
import math

import jax
import numpy as np
import pytest

from configs import common
from configs.data import bucket
from data_pipelines.held_out import HeldOutRows
from data_pipelines.loader import Packer
from data_pipelines.prompts import Prompter
from launch.data import held_out_source
from launch.held_out import HeldOutLoss, record
from tests import tolerances
from tests.data import real
from tests.data.folders import SMALL_VLM
from tests.train import tiny
from vino_jax.errors import UserError
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset
from vino_jax.train.config import run_config
from vino_jax.train.loop import make_encoder

TASKS = ("ti2i", "ti2i_baseimg")
ONE = {"data": 1}
MESHES = {"fsdp": {"data": 2, "fsdp": 2, "tensor": 2}, "fsdp_seq": {"fsdp": 2, "seq": 4}}


def config(**data):
    buckets = {"edit": bucket(8, 1, 32, 32, 96, patches=32, images=2)}
    stage = dict(steps=1, learning_rate=1e-3, rules=common.RULES["stage1"], tasks={"ti2i": 1.0}, texts={"long": 1.0}, buckets=("edit",))
    return run_config(common.config(buckets=buckets, stages={"stage1": stage}, data=data).to_dict())


def losses(sizes, name, count=5):
    """(task, index) -> losses of the row."""
    mesh, rules, model = make_mesh(sizes, jax.devices()[:math.prod(sizes.values())]), preset(name), tiny.vino()
    params = jax.device_put(tiny.params(model), shardings(model.abstract, model.axes, mesh, rules))
    held_out = HeldOutLoss(config(), model, mesh, rules, make_encoder(model, mesh, rules))
    return held_out.of(Prompter(SMALL_VLM), TASKS, ("edit",), count)(params)


@pytest.fixture(scope="module")
def one_device():
    return losses(ONE, "fsdp")


@pytest.mark.parametrize("name", MESHES)
def test_eight_devices_give_what_one_gives(name, one_device):
    found = losses(MESHES[name], name)
    assert [(r["task"], r["index"]) for r in found["rows"]] == [(r["task"], r["index"]) for r in one_device["rows"]]
    assert len(found["rows"]) == 10
    for ours, theirs in zip(found["rows"], one_device["rows"], strict=True):
        np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=0, atol=tolerances.MESH_LOSS_ABS)


def test_the_record_of_a_run(one_device):
    values = record(one_device)
    assert values["loss"] == one_device["loss"] and values["loss_t0.3"] == one_device["by_bin"]["t0.3"]
    assert values["loss_ti2i"] == one_device["tasks"]["ti2i"]["loss"] and len(values) == 1 + 10 + 2


def test_your_own_held_out_items_are_packed_as_training_s_are(tmp_path):
    manifest = real.write_manifest(tmp_path)
    given = config(source="media", manifest="training.jsonl", held_out=str(manifest), root=str(tmp_path))
    specs, prompter = list(given.buckets.values()), Prompter(SMALL_VLM)
    source = held_out_source(given, specs, ("ti2i",), prompter)
    rows = HeldOutRows(("ti2i",), specs, source, 2)
    (step, name, batch), = (Packer(source, rows, prompter, (0,), 1, (2.0, 3.0)).batch(step) for step in range(len(rows)))
    assert name == "edit" and batch.target.shape == (2, 1, 32, 32, 3) and batch.tokens.shape == (2, 96)
    assert len(list(rows.rows(0))) == min(2, source.count("ti2i", specs[0]))


def test_a_source_without_held_out_samples_is_told():
    mesh, rules, model = make_mesh(ONE, jax.devices()[:1]), preset("fsdp"), tiny.vino()
    held_out = HeldOutLoss(config(source="media", manifest="training.jsonl"), model, mesh, rules, None)
    with pytest.raises(UserError, match="name a manifest of some in config.data.held_out"):
        held_out.of(Prompter(SMALL_VLM), TASKS, ("edit",), 2)
