"""The MMDiT against the reference implementation's own outputs (../shared/golden/mmdit.npz)."""
import importlib.util
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.parity.conversion import to_params
from tests.tolerances import GOLDEN_MMDIT_ABS
from vino_jax.batch import ROLE_LATENT, ROLE_MARKER
from vino_jax.convert.tables.mmdit import MMDIT
from vino_jax.models.context import References, patchify
from vino_jax.models.mmdit import MMDiT
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import MMDiTConfig

GOLDEN = Path(__file__).resolve().parents[2].parent / "shared" / "golden"
CASES = ("t2v", "t2i", "multi", "edit", "padded")
pytestmark = pytest.mark.skipif(not GOLDEN.is_dir(), reason="../shared/golden is not here")


@pytest.fixture(scope="module")
def golden():
    meta = json.loads((GOLDEN / "mmdit.json").read_text())
    spec = importlib.util.spec_from_file_location("golden_weights", GOLDEN / "weights.py")
    weights = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(weights)
    c = meta["config"]
    config = MMDiTConfig(
        in_channels=c["in_channels"], out_channels=c["out_channels"], heads=c["num_attention_heads"], head_dim=c["attention_head_dim"],
        double_blocks=c["num_layers"], single_blocks=c["num_single_layers"], refiner_blocks=c["num_refiner_layers"],
        mlp_ratio=c["mlp_ratio"], patch=(c["patch_size_t"], c["patch_size"], c["patch_size"]), text_width=c["text_embed_dim"],
        pooled_width=c["pooled_projection_dim"], rope_theta=c["rope_theta"], rope_axes=tuple(c["rope_axes_dim"]))
    definition = Definition(lambda rngs: MMDiT(config, Runtime(), rngs=rngs))
    state = {k.removeprefix("transformer."): weights.weight(k, tuple(s)) for k, s in meta["params"].items()}
    return config, definition, to_params(MMDIT, state, definition.abstract), meta["cases"], np.load(GOLDEN / "mmdit.npz")


def channels_last(x_bcfhw):
    return jnp.asarray(np.moveaxis(x_bcfhw, 1, -1))


def references(config, case, arrays):
    """Interleaved as in the reference; also the time step at which the target starts."""
    embeds, values = arrays["boundary_embeds"], config.in_channels * int(np.prod(config.patch))
    tokens, markers, role, position, time = [], [], [], [], 0
    for n, (start, end) in enumerate(zip(case["pos_vs"], case["pos_ve"])):
        cond = arrays[f"cond{n}"]
        frames, height, width = (s // p for s, p in zip(cond.shape[2:], config.patch))
        latent = np.asarray(patchify(channels_last(cond), config.patch))[0]
        tokens += [np.zeros((1, values)), latent, np.zeros((1, values))]
        markers += [embeds[0, start][None], np.zeros((len(latent), config.width)), embeds[0, end][None]]
        role += [ROLE_MARKER] + [ROLE_LATENT] * len(latent) + [ROLE_MARKER]
        grid = np.stack(np.meshgrid(np.arange(frames) + time + 1, np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 3)
        position += [[time, 0, 0], *grid.tolist(), [time + frames + 1, 0, 0]]
        time += frames + 2
    flat = lambda parts, width: np.concatenate(parts or [np.zeros((0, width))])[None].astype(np.float32)  # noqa: E731
    return References(jnp.asarray(flat(tokens, values)), jnp.asarray(flat(markers, config.width)), jnp.asarray([role], jnp.int32),
                      jnp.asarray(position, jnp.int32).reshape(1, -1, 3)), time


@pytest.mark.parametrize("name", CASES)
def test_velocity(golden, name):
    config, definition, params, cases, stored = golden
    case = cases[name]
    arrays = {k.split("/")[1]: stored[k] for k in stored.files if k.startswith(name + "/")}
    refs, start = references(config, case, arrays)
    mask = jnp.asarray(arrays["mask"] == 1)
    # the reference masks padding in the refiner, not in the joint attention
    run = jax.jit(lambda p, *args: definition(p)(*args, joint_mask_BL=jnp.ones_like(mask)))
    with jax.numpy_dtype_promotion("strict"):
        velocity = run(params, channels_last(arrays["x"]), jnp.asarray([case["t"] / 999.0], jnp.float32), refs,
                       jnp.asarray([start], jnp.int32), jnp.asarray(arrays["vlm_embeds"]), mask)
    assert velocity.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(velocity), np.moveaxis(arrays["velocity"], 1, -1), rtol=0, atol=GOLDEN_MMDIT_ABS)
