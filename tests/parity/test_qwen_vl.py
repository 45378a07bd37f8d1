"""Qwen3-VL as a whole against transformers: logits of mixed prompts, conditioning with queries, and the queries' gradient."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity import qwen_reference as reference
from tests.tolerances import GRADIENT_REL, PARITY_ABS


@pytest.fixture(scope="module")
def prompts():
    return [reference.picture_prompt(), reference.small_picture_prompt()]


@pytest.fixture(scope="module")
def batch(prompts):
    return reference.pack(prompts, length=40, patches=64)


def test_logits(prompts, batch):
    with jax.numpy_dtype_promotion("strict"):
        ours = jax.jit(lambda p, b: reference.DEFINITION(p).logits(b))(reference.params(), batch)
    assert ours.shape == (2, 40, 64) and ours.dtype == jnp.float32
    for row, prompt in enumerate(prompts):
        theirs = reference.torch_model()(**prompt.torch_inputs()).logits[0].numpy()
        assert np.abs(theirs).max() > 1
        np.testing.assert_allclose(ours[row, :len(theirs)], theirs, rtol=0, atol=PARITY_ABS)


def test_conditioning_and_gradient(prompts, batch):
    rng = np.random.default_rng(4)
    queries = rng.standard_normal((6, 32)).astype(np.float32)
    probe = rng.standard_normal((2, 6, 32)).astype(np.float32)

    @jax.jit
    def ours(queries, batch):
        prompt_BLW, queries_BQW = reference.DEFINITION(reference.params()).conditioning(batch, queries)
        return jnp.sum(queries_BQW * probe) + jnp.sum(prompt_BLW), (prompt_BLW, queries_BQW)

    with jax.numpy_dtype_promotion("strict"):
        gradient, (prompt_BLW, queries_BQW) = jax.grad(ours, has_aux=True)(jnp.asarray(queries), batch)
    their_queries = torch.tensor(queries, requires_grad=True)
    for row, prompt in enumerate(prompts):
        their_prompt, their_output = reference.torch_conditioning(prompt, their_queries)
        (their_output * torch.tensor(probe[row])).sum().backward()
        np.testing.assert_allclose(prompt_BLW[row, :len(prompt.tokens)], their_prompt.detach().numpy(), rtol=0, atol=PARITY_ABS)
        np.testing.assert_allclose(queries_BQW[row], their_output.detach().numpy(), rtol=0, atol=PARITY_ABS)
    theirs = their_queries.grad.numpy()
    assert np.abs(gradient - theirs).max() / np.abs(theirs).max() < GRADIENT_REL
