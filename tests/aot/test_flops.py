"""Model FLOPs by formula, against what XLA and JAX count of the model itself."""
import math

import jax
import pytest

from configs import common
from tests import tolerances
from vino_jax.aot.flops import row_work, step_flops
from vino_jax.batch import BucketSpec
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.nn.stack import REMAT_POLICIES
from vino_jax.settings import VinoConfig, build
from vino_jax.train.stage import StageConfig, merge, rates, split
from vino_jax.train.step import row_losses

# Wide enough for elementwise work to be little, and one layer of each stack, as XLA counts a scanned one once.
MODEL = {
    "mmdit": {"heads": 8, "head_dim": 128, "double_blocks": 1, "single_blocks": 1, "refiner_blocks": 1, "text_width": 1024, "pooled_width": 64},
    "vae": {"block_widths": (8, 8, 8, 8), "layers_per_block": 1, "norm_groups": 4},
    "vlm": {"text": {"vocab": 1024, "width": 1024, "layers": 2, "heads": 8, "kv_heads": 4, "head_dim": 128, "mlp": 2048},
            "vision": {"layers": 1, "width": 512, "heads": 4, "mlp": 2048, "out_width": 1024, "positions": 64, "deepstack": (0,)}},
    "queries": 64,
}
BUCKET = BucketSpec("edit", 1, 5, 128, 128, 192, patches=256, images=1, image_height=128, image_width=128)
DEEPER = {**MODEL, "mmdit": {**MODEL["mmdit"], "double_blocks": 3, "single_blocks": 2, "refiner_blocks": 2},
          "vlm": {"text": {**MODEL["vlm"]["text"], "layers": 4}, "vision": {**MODEL["vlm"]["vision"], "layers": 3, "deepstack": (0, 1)}}}


def vino(model):
    return Vino(build(VinoConfig, model), Runtime(dtype="bfloat16", remat="nothing", attention="xla"))


def inputs(vino):
    return BUCKET.spec(2 * vino.config.vae.latent_channels), jax.eval_shape(lambda: jax.random.split(jax.random.key(0), BUCKET.batch))


def products(jaxpr) -> float:
    """FLOPs of all matrix products of a traced function, loops by their length."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            total += 2 * math.prod(equation.outvars[0].aval.shape) * math.prod(left[d] for d in contracted)
        turns = equation.params["length"] if equation.primitive.name == "scan" else 1
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            total += turns * products(inner) if hasattr(inner, "eqns") else 0
    return total


def test_the_forward_pass_is_what_xla_counts():
    model = vino(MODEL)
    lowered = jax.jit(lambda p, b, k: row_losses(model, p, b, k)[0]).lower(model.abstract, *inputs(model))
    formula = sum(work.forward for work in row_work(model.config, BUCKET, {}))
    assert lowered.cost_analysis()["flops"] == pytest.approx(formula, rel=tolerances.MODEL_FLOPS_REL)


@pytest.mark.parametrize("rules", common.RULES)
def test_a_step_s_products_are_those_of_the_formula(rules, monkeypatch):
    """Forward and backward of what each stage trains, with several layers of each stack and nothing recomputed."""
    for name in REMAT_POLICIES:
        monkeypatch.setitem(REMAT_POLICIES, name, None)
    model = vino(DEEPER)
    stage = StageConfig(name=rules, steps=1, rules=common.RULES[rules], learning_rate=1.0, tasks={"t2i": 1.0}, texts={"long": 1.0}, buckets=())
    found = rates(stage, model.abstract)
    trainable, frozen = split(model.abstract, found)
    gradient = jax.grad(lambda t, f, b, k: row_losses(model, merge(f, t), b, k)[0].sum())
    traced = jax.make_jaxpr(gradient)(trainable, frozen, *inputs(model))
    assert products(traced.jaxpr) == pytest.approx(step_flops(model.config, BUCKET, found), rel=tolerances.PRODUCT_FLOPS_REL)


def test_rows_multiply_and_a_frozen_model_runs_forward_alone():
    model = build(VinoConfig, MODEL)
    several = BucketSpec(**{**vars(BUCKET), "batch": 3})
    assert step_flops(model, several, {}) == 3 * sum(work.forward for work in row_work(model, BUCKET, {}))


def test_the_published_model_s_step():
    """The arithmetic of the largest terms by hand: 60 blocks' attention over all tokens, and the weights that every token meets."""
    bucket = BucketSpec("clip", 1, 81, 480, 832, 768)
    tokens = 21 * 30 * 52 + 768 + 256
    attention, weights = 60 * 4 * tokens**2 * 3072, 60 * 2 * tokens * 12 * 3072**2
    whole = step_flops(VinoConfig(), bucket, dict.fromkeys(("mmdit/double/x", "mmdit/single/x", "mmdit/latent_in/x", "mmdit/out/x"), 1.0))
    assert 3 * (attention + weights) < whole < 1.01 * 3 * (attention + weights)


def test_an_adapter_lets_gradients_flow_and_leaves_its_kernel_without_one():
    bucket = BucketSpec("b", 1, 1, 64, 64, 32)
    path_rates = {"mmdit/double/visual/out/kernel": 0.0, "mmdit/double/visual/out/lora_a": 1.0}
    work = {one.name: one for one in row_work(VinoConfig(), bucket, path_rates)}
    double, single = work["mmdit/double/"], work["mmdit/single/"]
    assert (double.weights, double.inputs) == (single.weights, single.inputs) == (False, True) and double.total == 2 * double.forward
