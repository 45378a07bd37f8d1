"""Positions of the prompt against transformers' own get_rope_index."""
import numpy as np
import pytest
import torch
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

from data_pipelines.prompts import Prompter
from tests.data.folders import SMALL_VLM


class RopeOnly:
    """What get_rope_index reads of a model."""

    config = Qwen3VLConfig.from_pretrained(SMALL_VLM)
    get_rope_index = Qwen3VLModel.get_rope_index


@pytest.mark.parametrize("images, clip", [
    ((), None), (((64, 64),), None), (((64, 96), (128, 64)), None), ((), (96, 64)), (((96, 64),), (64, 128))])
def test_positions_are_transformers(images, clip):
    prompter = Prompter(SMALL_VLM)
    rng = np.random.default_rng(0)
    seen = [prompter.see_image(rng.integers(0, 256, (*size, 3), np.uint8)) for size in images]
    video = prompter.see_clip(rng.integers(0, 256, (9, *clip, 3), np.uint8)) if clip else None
    prompt = prompter.encode("Make the red circle of Image 1 move left.", seen, video)
    expected, delta = RopeOnly().get_rope_index(
        torch.from_numpy(prompt.ids.astype(np.int64))[None],
        torch.tensor([s.grid for s in seen]) if seen else None, torch.tensor([video.grid]) if video else None)
    np.testing.assert_array_equal(prompt.mrope, expected[:, 0].numpy())
    assert prompt.mrope.max() + 1 - len(prompt.ids) == int(delta)
    assert prompt.mrope[0, -1] == prompt.mrope.max()  # the queries' positions start from the last token's
