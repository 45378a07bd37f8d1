"""Adapters: nothing at first, the same as changed kernels later, alone in checkpoints, and never a gradient of a kernel's size."""
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import common
from tests import tolerances
from tests.train import tiny
from vino_jax.checkpoint.model import nested
from vino_jax.checkpoint.run import RunCheckpoints, read_leaves
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.lora import kernel_of, low_ranks, merged
from vino_jax.nn.module import by_path
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import LogConfig
from vino_jax.train.initial import training_model
from vino_jax.train.logging import MetricWriter
from vino_jax.train.loop import Hook, run_stage
from vino_jax.train.stage import adapters, merge, rates, split

EVERY = (("mmdit/(refiner/blocks|double)/.*/kernel", 3), ("mmdit/single/(?!out).*/kernel", 2))


def stage(steps=4, lora=EVERY, **entries):
    return tiny.stage(steps, "lora", lora=lora, lora_alpha=6.0, **entries)


@pytest.fixture(scope="module")
def model():
    base = tiny.vino()
    return training_model(base.config, base.runtime, [stage()])


def filled(model, seed=0, b=0.05):
    """Random parameters, those of tiny.params where it has them; b: size of adapters' B."""
    rng = np.random.default_rng(seed)
    added = {path: (rng.standard_normal(leaf.shape) * (b if path.endswith("b") else 0.2)).astype(np.float32)
             for path, leaf in by_path(model.abstract).items() if kernel_of(path)}
    return merge(tiny.params(tiny.vino()), nested(added))


def loss(model, params):
    width = model.config.mmdit.text_width
    return jnp.mean(jnp.square(tiny.velocity(model.parts["mmdit"](params["mmdit"]), width) - 1.0))


def test_fresh_adapters_change_nothing_to_the_bit(model):
    pairs = (model, filled(model, b=0.0)), (tiny.vino(), tiny.params(tiny.vino()))
    ours, base = (jax.jit(lambda p, m=m: tiny.velocity(m.parts["mmdit"](p["mmdit"]), m.config.mmdit.text_width))(params) for m, params in pairs)
    np.testing.assert_array_equal(ours, base)
    leaves = by_path(jax.jit(lambda key: model.init(key, ("mmdit",)))(jax.random.key(0)))
    assert not any(np.any(leaf) for path, leaf in leaves.items() if path.endswith("lora_b"))
    for path in model.adapters:
        a = leaves[path.replace("kernel", "lora_a")]
        assert 0.7 < np.std(a) * a.shape[-2] ** 0.5 < 1.3


def test_adapters_are_what_changed_kernels_are_and_every_one_learns(model):
    params = filled(model)
    leaves = by_path(params)
    own = low_ranks({path: leaf for path, leaf in leaves.items() if kernel_of(path)}, model.adapters)
    assert len(own) == len(model.adapters) == 26
    base = nested(dict(merged(leaves.items(), own)))
    trainable, frozen = split(params, rates(stage(), params))
    grad = jax.jit(jax.value_and_grad(lambda p: loss(model, merge(frozen, p))))
    value, gradients = grad(trainable)
    plain = jax.jit(lambda p: loss(tiny.vino(), p))
    np.testing.assert_allclose(value, plain(base), rtol=tolerances.ADAPTER_LOSS_REL)
    assert abs(value - plain(tiny.params(tiny.vino()))) > 100 * tolerances.ADAPTER_LOSS_REL * value
    assert all(np.abs(gradient).max() > 0 for gradient in by_path(gradients).values())
    assert set(by_path(gradients)) == {path for path in leaves if kernel_of(path)}


def products(jaxpr):
    """Shapes of all products of a program, those in its scans and checkpoints too."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation.outvars[0].aval.shape
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products(getattr(inner, "jaxpr", inner))


@pytest.mark.parametrize("rules,kernels", [("lora", False), ("stage3", True)])
def test_no_gradient_of_a_kernel_s_size_is_made(model, rules, kernels):
    params = model.abstract
    entry = dataclasses.replace(stage(), rules=common.RULES[rules], lora=EVERY if rules == "lora" else ())
    trainable, frozen = split(params, rates(entry, params))
    program = jax.make_jaxpr(jax.grad(lambda p, f: loss(model, merge(f, p))))(trainable, frozen)
    shape = by_path(params)["mmdit/double/visual/mlp/up/kernel"].shape[1:]
    assert ({shape, shape[::-1]} & set(products(program.jaxpr)) != set()) == kernels


def run(folder, model, loader=tiny.Batches):
    mesh = make_mesh({"fsdp": 2, "tensor": 2}, jax.devices()[:4])
    plan = tiny.plan(model, stage(), mesh, preset("fsdp"))
    seen = []
    with RunCheckpoints(folder / "checkpoints", keep=1) as checkpoints:
        with MetricWriter(folder, {"stage": 4}, resume_at={"stage": checkpoints.latest() or 0}) as writer:
            out, _ = run_stage(plan, filled(model, b=0.0), loader, checkpoints, writer, LogConfig(every=1, checkpoint_every=2), quiet=True,
                               hooks=[Hook("preview", 4, lambda params, name, step: seen.append(by_path(params).keys()))], say=lambda text: None)
    assert all(keys == by_path(model.abstract).keys() for keys in seen)
    return by_path(jax.device_get(out))


def test_adapters_train_alone_and_resume_to_the_bit(model, tmp_path):
    whole, start = run(tmp_path / "whole", model), by_path(filled(model, b=0.0))
    assert {path for path in start if not np.array_equal(start[path], whole[path])} == {path for path in start if kernel_of(path)}

    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", model, tiny.Dies)
    again = run(tmp_path / "killed", model)
    for path, leaf in whole.items():
        np.testing.assert_array_equal(again[path], leaf, err_msg=path)
    paths = [f"{kind}.{path.replace('/', '.')}" for kind in ("trainable", "ema") for path in start if kernel_of(path)]
    assert len(list(read_leaves(tmp_path / "whole/checkpoints", 4, paths))) == len(paths)
    # step, random state, Adam's count; parameters, two moments and the average of adapters; nothing else
    with RunCheckpoints(tmp_path / "whole/checkpoints", keep=1) as checkpoints:
        stored = checkpoints._steps.checkpointables_metadata(4).metadata["state"]
    assert len(stored) == 3 + 2 * len(paths)


@pytest.mark.parametrize("entries,message", [
    ({"lora": (("mmdit/doubel/.*/kernel", 4),)}, "nothing matches lora entry mmdit/doubel"),
    ({"lora": (("mmdit/single/out/kernel", 4),)}, "mmdit/single/out/kernel can have no adapter"),
    ({"lora": (("mmdit/double/.*", 4),)}, "mmdit/double/context/attention/key/bias can have no adapter"),
    ({"lora": (("vlm/.*kernel", 4),)}, "vlm/.* can have no adapter"),
    ({"lora": (("mmdit/(", 4),)}, "is no regex"),
    ({"lora": (("mmdit/double/.*/kernel", 0),)}, "has the rank 0; ranks are 1 or more"),
    ({"lora_alpha": 0.0}, "lora_alpha is 0.0; it must be more than 0"),
])
def test_what_cannot_have_an_adapter_is_told(entries, message):
    with pytest.raises(UserError, match=message):
        adapters([dataclasses.replace(tiny.stage(), **entries)], tiny.vino().abstract)


def test_stages_agree_on_an_adapter_and_freeze_those_of_others(model):
    other = dataclasses.replace(stage(), name="other", lora=(("mmdit/double/visual/out/kernel", 5),))
    with pytest.raises(UserError, match="'other' gives mmdit/double/visual/out/kernel an adapter of rank 5 .* a stage before it one of rank 3"):
        adapters([stage(), other], tiny.vino().abstract)
    found = rates(tiny.stage(rules="stage3"), model.abstract)
    assert not any(found[path] for path in found if kernel_of(path)) and found["mmdit/double/visual/out/kernel"] == 1.0
    found = rates(dataclasses.replace(tiny.stage(rules="stage3"), lora=EVERY[:1]), model.abstract)
    assert (found["mmdit/double/visual/out/kernel"], found["mmdit/double/visual/out/bias"], found["mmdit/double/visual/out/lora_a"]) == (0, 1, 1)


def test_attention_adapters_of_13b():
    abstract = Vino(VinoConfig(), Runtime()).abstract
    found = adapters([tiny.stage(rules="lora", lora=common.ATTENTION_LORA)], abstract)
    assert len(found) == 2 * 4 + 3 and {adapter.rank for adapter in found.values()} == {16}
