"""The text model against transformers: right-padded rows of different lengths, each also alone."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from tests.parity import qwen_reference as reference
from tests.tolerances import BATCH_ROW_ABS, PARITY_ABS
from vino_jax.models.qwen_text import mrope_tables
from vino_jax.models.qwen_vl import query_positions

PROMPTS = [reference.text_prompt(19, 1), reference.text_prompt(7, 2)]


@pytest.fixture(scope="module")
def run():
    def both(batch, queries):
        model = reference.DEFINITION(reference.params())
        return model.logits(batch), *model.conditioning(batch, queries)
    return jax.jit(both)


def test_padded_rows(run):
    queries = np.random.default_rng(3).standard_normal((5, 32)).astype(np.float32)
    with jax.numpy_dtype_promotion("strict"):
        together = run(reference.pack(PROMPTS, length=24, patches=0), queries)
        alone = [run(reference.pack([p], length=len(p.tokens), patches=0), queries) for p in PROMPTS]
    for row, prompt in enumerate(PROMPTS):
        size = len(prompt.tokens)
        theirs = reference.torch_model()(**prompt.torch_inputs()).logits[0], *reference.torch_conditioning(prompt, torch.tensor(queries))
        for ours, single, expected in zip(together, alone[row], theirs):
            row_of_ours = ours[row, :5 if expected.shape[0] == 5 else size]
            np.testing.assert_allclose(row_of_ours, expected.numpy(), rtol=0, atol=PARITY_ABS)
            np.testing.assert_allclose(row_of_ours, single[0], rtol=0, atol=BATCH_ROW_ABS)


def test_mrope_tables_of_three_axes():
    position = np.random.default_rng(5).integers(0, 300, (2, 3, 11)).astype(np.int32)
    rotary = reference.torch_model().model.language_model.rotary_emb
    theirs = rotary(torch.zeros(1), torch.tensor(position).permute(1, 0, 2))
    for ours, expected in zip(mrope_tables(jnp.asarray(position), reference.CONFIG.text), theirs):
        np.testing.assert_allclose(ours, expected.numpy(), rtol=0, atol=PARITY_ABS)


def test_queries_start_at_the_last_tokens_position():
    mrope = np.stack([np.arange(6)] * 3)[None] + np.asarray([0, 10, 20])[None, :, None]
    mask = np.arange(6)[None] < 4
    positions = query_positions(jnp.asarray(mrope, jnp.int32), jnp.asarray(mask), 3)
    np.testing.assert_array_equal(positions[0], [[3, 4, 5], [13, 14, 15], [23, 24, 25]])
