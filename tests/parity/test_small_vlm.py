"""The VLM folder of the embedded data set: transformers opens it as it is, and its activations keep a sane scale."""
import json

import numpy as np
import torch
from safetensors.numpy import load_file
from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

from data_pipelines import shapes
from data_pipelines.prompts import Prompter
from launch import make_vlm
from tests.data.folders import SMALL_VLM

torch.set_num_threads(1)


def test_transformers_opens_it():
    model, info = Qwen3VLForConditionalGeneration.from_pretrained(SMALL_VLM, output_loading_info=True, dtype=torch.float32)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    tokenizer, prompter = AutoTokenizer.from_pretrained(SMALL_VLM), Prompter(SMALL_VLM)
    assert model.config.image_token_id == tokenizer.convert_tokens_to_ids("<|image_pad|>") == prompter.token_id("<|image_pad|>")
    sample = shapes.sample(0, 0, "tiv2v", 5, 64, 64)
    text = sample.texts["instruction"]
    images, video = [prompter.see_image(i) for i in sample.images], prompter.see_clip(sample.video)
    prompt = prompter.encode(text, images, video)
    assert tokenizer.encode(prompter.tokenizer.decode(prompt.ids)) == prompt.ids.tolist()
    as_tensor = lambda x: torch.from_numpy(np.ascontiguousarray(x))  # noqa: E731
    with torch.no_grad():
        out = model(input_ids=as_tensor(prompt.ids[None].astype(np.int64)), output_hidden_states=True,
                    pixel_values=torch.cat([as_tensor(i.values) for i in images]), image_grid_thw=torch.tensor([i.grid for i in images]),
                    pixel_values_videos=as_tensor(video.values), video_grid_thw=torch.tensor([video.grid]))
    for hidden in out.hidden_states[:-1]:
        assert 0.3 < float(hidden.std()) < 5 and float(hidden.abs().max()) < 50


def test_the_folder_is_what_the_script_writes():
    """Configuration, names, shapes and values of the weights; the tokenizer may be older than the words of `shapes`."""
    config = json.loads((SMALL_VLM / "config.json").read_text())
    weights = load_file(SMALL_VLM / "model.safetensors")
    fresh = make_vlm.random_weights(config)
    assert weights.keys() == fresh.keys()
    assert all((weights[k].view(np.uint16) == fresh[k].view(np.uint16)).all() for k in fresh)
    assert sum(f.stat().st_size for f in SMALL_VLM.iterdir()) < 3e6


def test_tokenizer_is_deterministic_and_whole(tmp_path):
    texts = make_vlm.corpus()
    first, second = (make_vlm.train_tokenizer(texts) for _ in range(2))
    assert first.to_str() == second.to_str()
    added = [first.id_to_token(first.get_vocab_size() - 26 + i) for i in range(26)]
    assert added == [*make_vlm.SPECIAL, *make_vlm.ADDED]  # they come last, as in Qwen
    for text in ("Ein größerer, grüner Kreis\n\n  bewegt sich 12 px", texts[-1]):
        assert first.decode(first.encode(text).ids) == text
