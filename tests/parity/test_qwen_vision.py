"""The vision tower against transformers: pictures of different grids and a clip side by side in one row, padding behind."""
import jax
import numpy as np
import pytest
import torch

from tests.parity import qwen_reference as reference
from tests.tolerances import PARITY_ABS
from vino_jax.models.qwen_vision import interpolation

GRIDS = ((1, 4, 6), (1, 8, 2), (3, 2, 4))


def test_merged_patches_and_deepstack():
    count, rng = sum(t * h * w for t, h, w in GRIDS), np.random.default_rng(0)
    patches = rng.standard_normal((count, reference.PIXELS)).astype(np.float32)
    coords = np.concatenate([reference.merge_order(h, w) for t, h, w in GRIDS for _ in range(t)])
    sizes = [h * w for t, h, w in GRIDS for _ in range(t)]
    segment = np.repeat(np.arange(len(sizes)) + 1, sizes)
    padding = 8

    def row(x, rubbish):
        return np.concatenate([x, np.full((padding, *x.shape[1:]), rubbish, x.dtype)])[None]

    tower = jax.jit(lambda *inputs: reference.DEFINITION(reference.params()).vision(*inputs))
    with jax.numpy_dtype_promotion("strict"):
        merged, features = tower(row(patches, 100.0), row(coords.astype(np.int32), 0), row(segment.astype(np.int32), 0))
    their_merged, their_features = reference.torch_model().model.visual(torch.tensor(patches), grid_thw=torch.tensor(GRIDS))
    assert merged.shape == (1, (count + padding) // 4, 32) and features.shape == (2, *merged.shape)
    np.testing.assert_allclose(merged[0, :count // 4], their_merged.numpy(), rtol=0, atol=PARITY_ABS)
    for ours, theirs in zip(features, their_features, strict=True):
        np.testing.assert_allclose(ours[0, :count // 4], theirs.numpy(), rtol=0, atol=PARITY_ABS)


@pytest.mark.parametrize("grid", [(2, 2), (48, 48), (30, 52), (90, 4)])
def test_interpolated_positions_at_the_published_table_size(grid):
    height, width = grid
    table = np.random.default_rng(1).standard_normal((48 * 48, 4)).astype(np.float32)
    index, weight = interpolation(reference.merge_order(height, width)[None].astype(np.int32), 48)
    ours = np.einsum("pcv,pc->pv", table[index[0]], weight[0])
    visual = reference.torch_model().model.visual
    kept = visual.pos_embed, visual.num_grid_per_side
    visual.pos_embed, visual.num_grid_per_side = torch.nn.Embedding.from_pretrained(torch.tensor(table)), 48
    theirs = visual.fast_pos_embed_interpolate(torch.tensor([(1, height, width)])).numpy()
    visual.pos_embed, visual.num_grid_per_side = kept
    np.testing.assert_allclose(ours, theirs, rtol=0, atol=PARITY_ABS)
