"""The MMDiT against diffusers' HunyuanVideoTransformer3DModel: blocks, the whole, and the gradients of all its parameters."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from flax import nnx

from tests.parity.conversion import flatten, to_params
from tests.tolerances import GRADIENT_REL, PARITY_ABS
from vino_jax.convert.tables.mmdit import MMDIT
from vino_jax.models.context import References
from vino_jax.models.mmdit import MMDiT
from vino_jax.nn.layers import sinusoid
from vino_jax.nn.module import Definition
from vino_jax.nn.rope import rope_tables
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import MMDiTConfig

torch.set_num_threads(1)
CONFIG = MMDiTConfig(in_channels=4, out_channels=4, heads=2, head_dim=16, double_blocks=2, single_blocks=3, refiner_blocks=2,
                     text_width=24, pooled_width=12, rope_axes=(4, 6, 6))
CONTEXT, TIME = 9, 0.625
GRID = (3, 2, 4)  # tokens by frame, row and column


def fill(module):
    """Random values everywhere, so that no parameter is hidden by a zero or a one."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            scale = np.sqrt(1 / np.prod(p.shape[1:])) if p.ndim > 1 else 0.1
            p.copy_((p if p.ndim == 1 and (p == 1).all() else 0.0) + float(scale) * torch.randn(p.shape, generator=generator))


def numpy_state(tensors):
    return {name: tensor.detach().numpy() for name, tensor in tensors}


@pytest.fixture(scope="module")
def pair():
    """(torch model, our Definition, our parameters) with the same weights."""
    model = HunyuanVideoTransformer3DModel(
        in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16, num_layers=2, num_single_layers=3,
        num_refiner_layers=2, patch_size=2, patch_size_t=1, text_embed_dim=24, pooled_projection_dim=12, rope_axes_dim=(4, 6, 6))
    fill(model)
    with torch.no_grad():  # VINO has no pooled text: take it out of diffusers
        for p in model.time_text_embed.text_embedder.linear_2.parameters():
            p.zero_()
    definition = Definition(lambda rngs: MMDiT(CONFIG, Runtime(), rngs=rngs))
    return model, definition, to_params(MMDIT, numpy_state(model.state_dict().items()), definition.abstract)


def normal(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def no_references(batch=1):
    return References(jnp.zeros((batch, 0, 16)), jnp.zeros((batch, 0, CONFIG.width)), jnp.zeros((batch, 0), jnp.int32),
                      jnp.zeros((batch, 0, 3), jnp.int32))


def mask_of(length):
    return (np.arange(CONTEXT) < length)[None]


def torch_velocity(model, latents, context, mask):
    out = model(torch.tensor(np.moveaxis(latents, -1, 1)), torch.tensor([TIME * 999.0]), torch.tensor(context), torch.tensor(mask).long(),
                torch.zeros(1, 12), guidance=torch.tensor([1000.0]), return_dict=False)[0]
    return out.moveaxis(1, -1)


def our_velocity(definition, params, latents, context, mask):
    return definition(params)(jnp.asarray(latents), jnp.asarray([TIME], jnp.float32), no_references(), jnp.zeros((1,), jnp.int32),
                              jnp.asarray(context), jnp.asarray(mask))


def layer(stack, i):
    """Block i of a stacked module."""
    graphdef, params = nnx.split(stack)
    return nnx.merge(graphdef, jax.tree.map(lambda p: p[i], params))


@pytest.mark.parametrize("length", [CONTEXT, 5])
def test_velocity(pair, length):
    model, definition, params = pair
    latents, context = normal(1, 1, 3, 4, 8, 4), normal(2, 1, CONTEXT, 24)
    with torch.no_grad():
        expected = torch_velocity(model, latents, context, mask_of(length)).numpy()
    with jax.numpy_dtype_promotion("strict"):
        velocity = jax.jit(lambda *a: our_velocity(definition, *a))(params, latents, context, mask_of(length))
    assert velocity.shape == latents.shape and velocity.dtype == jnp.float32
    np.testing.assert_allclose(np.asarray(velocity), expected, rtol=0, atol=PARITY_ABS)


def test_gradients(pair):
    model, definition, params = pair
    latents, context, weight = normal(3, 1, 3, 4, 8, 4), normal(4, 1, CONTEXT, 24), normal(5, 1, 3, 4, 8, 4)
    model.zero_grad()
    (torch_velocity(model, latents, context, mask_of(CONTEXT)) * torch.tensor(weight)).sum().backward()
    expected = flatten(to_params(MMDIT, numpy_state((n, p.grad) for n, p in model.named_parameters()), definition.abstract))
    loss = lambda p: jnp.sum(our_velocity(definition, p, latents, context, mask_of(CONTEXT)) * weight)  # noqa: E731
    gradients = flatten(jax.jit(jax.grad(loss))(params))
    assert gradients.keys() == expected.keys()
    for path, gradient in gradients.items():
        if path.startswith("pooled/"):
            assert not np.any(gradient), f"{path} is unused, yet has a gradient"
            continue
        largest = np.abs(expected[path]).max()
        assert largest > 0, f"{path} is not tested"
        if path == "refiner/blocks/attention/key/bias":  # adds a constant to all scores of a row: its true gradient is 0, the rest rounding
            largest = np.abs(expected["refiner/blocks/attention/query/bias"]).max()
        np.testing.assert_allclose(gradient, expected[path], rtol=0, atol=GRADIENT_REL * largest, err_msg=path)


@pytest.mark.parametrize("length", [CONTEXT, 6])
def test_refiner(pair, length):
    model, definition, params = pair
    context, mask = normal(6, 1, CONTEXT, 24), mask_of(length)
    with torch.no_grad():
        expected = model.context_embedder(torch.tensor(context), torch.tensor([777.0]), torch.tensor(mask).long()).numpy()
    features = sinusoid(jnp.asarray([777.0]), 256)
    refined = definition(params).refiner(jnp.asarray(context), jnp.asarray(mask), features)
    np.testing.assert_allclose(np.asarray(refined), expected, rtol=0, atol=PARITY_ABS)  # rows of padding too


def test_blocks(pair):
    model, definition, params = pair
    bound, tokens = definition(params), int(np.prod(GRID))
    x, context, temb = normal(7, 1, tokens, 32), normal(8, 1, CONTEXT, 32), normal(9, 1, 32)
    mask = np.concatenate([np.ones((1, tokens), bool), mask_of(7)], axis=1)[:, None, None]
    position = np.stack(np.meshgrid(*map(np.arange, GRID), indexing="ij"), -1).reshape(1, -1, 3)
    cos, sin = rope_tables(jnp.asarray(position), CONFIG.rope_axes, CONFIG.rope_theta)
    torch_rope = model.rope(torch.zeros(1, 4, GRID[0], 2 * GRID[1], 2 * GRID[2]))
    for ours, theirs in zip((cos, sin), torch_rope):
        np.testing.assert_allclose(np.asarray(ours)[0], theirs.numpy(), rtol=0, atol=1e-6)
    pad = ((0, 0), (0, CONTEXT), (0, 0))
    rope, signal = (jnp.pad(cos, pad, constant_values=1.0), jnp.pad(sin, pad)), jax.nn.silu(jnp.asarray(temb))
    inputs = [torch.tensor(a) for a in (x, context, temb, mask)]
    with torch.no_grad():
        double = [a.numpy() for a in model.transformer_blocks[1](*inputs, torch_rope)]
        single = [a.numpy() for a in model.single_transformer_blocks[2](*inputs, torch_rope)]
    ours = layer(bound.double, 1)(jnp.asarray(x), jnp.asarray(context), signal, rope, jnp.asarray(mask[:, 0, 0]), "xla")
    for a, b in zip(ours, double):
        np.testing.assert_allclose(np.asarray(a), b, rtol=0, atol=PARITY_ABS)
    ours = layer(bound.single, 2)(jnp.concatenate([jnp.asarray(x), jnp.asarray(context)], axis=1), signal, rope, jnp.asarray(mask[:, 0, 0]), "xla")
    np.testing.assert_allclose(np.asarray(ours), np.concatenate(single, axis=1), rtol=0, atol=PARITY_ABS)
