"""The prompt: template, tokens of references, boundary positions; against the reference's, to the token."""
import json

import numpy as np
import pytest

from data_pipelines.packing import SamplingOptions, pack_task
from data_pipelines.prompts import Prompter
from data_pipelines.tasks import read_tasks
from tests.data.folders import SHARED, SMALL_VLM, needs_shared
from vino_jax.batch import ROLE_MARKER
from vino_jax.errors import UserError

GREY = 2 / 255  # one grey level of normalised pixels


@pytest.fixture(scope="module")
def prompter():
    return Prompter(SMALL_VLM)


def picture(prompter, value, size=(64, 64)):
    return prompter.see_image(np.full((*size, 3), value, np.uint8))


def test_template_of_text_alone(prompter):
    prompt = prompter.encode("a red circle")
    assert prompter.tokenizer.decode(prompt.ids) == (
        "<|im_start|>system\nYou are a helpful assistant aimed at generating an output video caption.<|im_end|>\n"
        "<|im_start|>user\na red circle<|im_end|>\n<|im_start|>assistant\n")
    assert (prompt.mrope == np.arange(len(prompt.ids))).all() and (prompt.visual_index == -1).all()
    assert prompt.patches.shape == (0, 1536) and prompt.coords.shape == (0, 4) and len(prompt.starts) == len(prompt.ends) == 0


def test_references_come_first_and_are_numbered_per_kind(prompter):
    clip = prompter.see_clip(np.zeros((5, 64, 64, 3), np.uint8))
    prompt = prompter.encode("turn it blue", [picture(prompter, 0), picture(prompter, 255, (64, 96))], clip)
    image = "<|vision_start|>" + "<|image_pad|>" * 4 + "<|vision_end|>"
    wide = "<|vision_start|>" + "<|image_pad|>" * 6 + "<|vision_end|>"
    video = "".join(f"<{stamp} seconds><|vision_start|>{'<|video_pad|>' * 4}<|vision_end|>" for stamp in ("0.0", "0.1", "0.2", "0.3"))
    text = prompter.tokenizer.decode(prompt.ids)
    assert f"user\nImage 1: {image}Image 2: {wide}Video 1: {video}turn it blue<|im_end|>" in text
    tokens = prompter.tokenizer.convert_ids_to_tokens(prompt.ids)
    assert [tokens[i] for i in prompt.starts] == ["<|vision_start|>"] * 3 and [tokens[i] for i in prompt.ends] == ["<|vision_end|>"] * 3
    assert prompt.ends[0] - prompt.starts[0] == 5 and prompt.ends[1] - prompt.starts[1] == 7
    assert tokens[prompt.starts[2]:prompt.ends[2]].count("<|video_pad|>") == 16  # the whole clip lies between its markers
    pads = [t in ("<|image_pad|>", "<|video_pad|>") for t in tokens]
    assert prompt.visual_index[pads].tolist() == list(range(4 + 6 + 16)) and (prompt.visual_index[~np.array(pads)] == -1).all()
    assert len(prompt.patches) == len(prompt.coords) == len(prompt.segments) == 4 * 26
    assert np.bincount(prompt.segments).tolist() == [0, 16, 24, 16, 16, 16, 16]


def test_rewriting_has_its_own_system_text(prompter):
    from data_pipelines.prompts import REWRITE_SYSTEM

    assert "provide a caption describing the video and output it directly. <|im_end|>" in prompter.tokenizer.decode(
        prompter.encode("x", system=REWRITE_SYSTEM).ids)
    assert prompter.decode(prompter.encode("a blue square").ids).endswith("a blue square\nassistant\n")


def test_bad_input_is_named(prompter, tmp_path):
    with pytest.raises(UserError, match="special token"):
        prompter.encode("a <|image_pad|> of nothing")
    with pytest.raises(UserError, match="no tokenizer.json"):
        Prompter(tmp_path)
    tokenizer = json.loads((SMALL_VLM / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = [t for t in tokenizer["added_tokens"] if t["content"] != "<|video_pad|>"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(UserError, match="video_pad"):
        Prompter(tmp_path, prompter.limits)


@pytest.fixture(scope="module")
def golden():
    return Prompter(SHARED / "qwen3vl_processor"), json.loads((SHARED / "golden/pipeline.json").read_text())["cases"], np.load(
        SHARED / "golden/pipeline.npz")


@needs_shared
@pytest.mark.parametrize("name", ["t2i", "i2v", "tiv2v"])
def test_reference_prompts(golden, name):
    """Every branch of the goldens: ids, grids, boundary positions, and the patches within one grey level."""
    prompter, cases, arrays = golden
    case = cases[name]
    tasks, problems = read_tasks(SHARED / "samples" / case["json"], SHARED / "samples")
    assert not problems
    options = SamplingOptions(*case["hw"], num_frames=case["frames"], image_guidance=case["guidance_image"])
    packed = pack_task(tasks[case["index"]], prompter, options)
    assert (packed.frames, packed.height, packed.width) == arrays[f"{name}/pixels"].shape[1:4]
    assert len(packed.branches) == len(case["pos"])
    for i, (branch, (starts, ends)) in enumerate(zip(packed.branches, case["pos"])):
        ids = arrays[f"{name}/branch{i}/input_ids"][0]
        np.testing.assert_array_equal(branch.tokens[0, branch.prompt_mask[0]], ids)
        markers = branch.source[0][branch.role[0] == ROLE_MARKER]
        assert markers[0::2].tolist() == starts[0] and markers[1::2].tolist() == ends[0][:len(starts[0])]
        first = 0
        for values, grid in (("pixel_values", "image_grid_thw"), ("pixel_values_videos", "video_grid_thw")):
            if f"{name}/branch{i}/{grid}" not in arrays:
                continue
            for t, h, w in arrays[f"{name}/branch{i}/{grid}"]:
                patches = branch.patches[0, first:first + t * h * w]
                assert (branch.patch_coords[0, first:first + t * h * w, 2:] == [h, w]).all()
                head, means = arrays[f"{name}/branch{i}/{values}/head"], arrays[f"{name}/branch{i}/{values}/rowmean"]
                np.testing.assert_allclose(patches[:len(head)], head, rtol=0, atol=1.001 * GREY)
                np.testing.assert_allclose(patches.mean(1), means, rtol=0, atol=0.05 * GREY)
                first += t * h * w
        assert not branch.patch_segment[0, first:].any()
