"""Writes the small random VLM of the embedded data set: a Qwen3-VL folder as transformers writes one, under 3 MB.

    python -m launch.make_vlm --output data_pipelines/shapes_parts/qwen3vl

The tokenizer is a byte-level BPE of the Qwen kind, trained on the texts of `shapes`; the weights are random and never trained.
The same seed gives the same bytes. Nothing is downloaded.
"""
import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from data_pipelines import shapes
from data_pipelines.prompts import REWRITE_SYSTEM, SYSTEM
from data_pipelines.shapes_tasks import PICTURE_TASKS
from data_pipelines.tasks import NEGATIVE_IMAGE, NEGATIVE_VIDEO
from launch import cli
from vino_jax.batch import TASKS

MERGES = 1000  # at most; the trainer stops earlier when no pair is left that occurs twice
TEXTS_A_TASK = 100
VOCAB_MULTIPLE = 64

# Qwen3's, in its order; the first 14 are special, the others plain added tokens
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>", "<|box_end|>",
           "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
ADDED = ("<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>", "<|repo_name|>",
         "<|file_sep|>", "<tool_response>", "</tool_response>", "<think>", "</think>")
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"

TEXT = {"hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 32, "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 5000000.0, "max_position_embeddings": 4096,
        "attention_bias": False, "rope_scaling": {"rope_type": "default", "mrope_section": [6, 5, 5], "mrope_interleaved": True},
        "model_type": "qwen3_vl_text"}
VISION = {"depth": 3, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2, "patch_size": 16, "temporal_patch_size": 2,
          "spatial_merge_size": 2, "in_channels": 3, "out_hidden_size": 128, "num_position_embeddings": 64,
          "deepstack_visual_indexes": [0, 1, 2], "hidden_act": "gelu_pytorch_tanh", "model_type": "qwen3_vl"}

# pictures of 64x64 become 4 merged tokens; `first_resize` and `sampled_frames` are read by data_pipelines.pixels alone
FIRST_RESIZE = {"factor": 32, "shortest_edge": 32 * 32, "longest_edge": 128 * 128}
PROCESSOR = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2, "image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 3,
             "rescale_factor": 1 / 255, "do_resize": True, "do_rescale": True, "do_normalize": True, "do_convert_rgb": True,
             "processor_class": "Qwen3VLProcessor"}


def corpus(seed: int = 0) -> list[str]:
    """The texts that the tokenizer learns: captions and instructions of every task, and what stands around them."""
    around = [SYSTEM, REWRITE_SYSTEM, NEGATIVE_IMAGE, NEGATIVE_VIDEO, "system\n", "user\n", "assistant\n"]
    around += [f"{kind} {number}: " for kind in ("Image", "Video") for number in range(1, 5)]
    around += [f"<{tenth / 10:.1f} seconds>" for tenth in range(4)]
    texts = 2 * around
    for task in TASKS:
        for index in range(TEXTS_A_TASK):
            sample = shapes.sample(seed, index, task, 1 if task in PICTURE_TASKS else 5, 32, 32)
            texts += [sample.texts[kind] for kind in sorted(sample.texts)]
    return texts


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """Byte-level BPE with Qwen's normaliser, split and added tokens; those come last, as in Qwen."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(Regex(SPLIT), "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=len(alphabet) + MERGES, min_frequency=2, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens([AddedToken(t, normalized=False, special=True) for t in SPECIAL])
    tokenizer.add_tokens([AddedToken(t, normalized=False, special=False) for t in ADDED])
    return tokenizer


def model_config(tokenizer: Tokenizer) -> dict:
    """config.json in transformers' form."""
    vocab = -(-tokenizer.get_vocab_size() // VOCAB_MULTIPLE) * VOCAB_MULTIPLE
    ids = {f"{name}_id": tokenizer.token_to_id(token) for name, token in (
        ("image_token", "<|image_pad|>"), ("video_token", "<|video_pad|>"), ("vision_start_token", "<|vision_start|>"),
        ("vision_end_token", "<|vision_end|>"))}
    return {"architectures": ["Qwen3VLForConditionalGeneration"], "model_type": "qwen3_vl", "tie_word_embeddings": True,
            "dtype": "bfloat16", **ids, "text_config": {**TEXT, "vocab_size": vocab, "tie_word_embeddings": True, "dtype": "bfloat16",
                                   "eos_token_id": tokenizer.token_to_id("<|im_end|>")},
            "vision_config": VISION}


def parameter_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Every parameter by the name that transformers gives it. The head is tied to the embedding and so not stored."""
    text, vision = config["text_config"], config["vision_config"]
    width, heads = text["hidden_size"], text["head_dim"] * text["num_attention_heads"]
    keys, mlp = text["head_dim"] * text["num_key_value_heads"], text["intermediate_size"]
    shapes_ = {"model.language_model.embed_tokens.weight": (text["vocab_size"], width), "model.language_model.norm.weight": (width,)}
    for i in range(text["num_hidden_layers"]):
        layer = {"input_layernorm.weight": (width,), "post_attention_layernorm.weight": (width,),
                 "self_attn.q_proj.weight": (heads, width), "self_attn.k_proj.weight": (keys, width),
                 "self_attn.v_proj.weight": (keys, width), "self_attn.o_proj.weight": (width, heads),
                 "self_attn.q_norm.weight": (text["head_dim"],), "self_attn.k_norm.weight": (text["head_dim"],),
                 "mlp.gate_proj.weight": (mlp, width), "mlp.up_proj.weight": (mlp, width),
                 "mlp.down_proj.weight": (width, mlp)}
        shapes_ |= {f"model.language_model.layers.{i}.{name}": shape for name, shape in layer.items()}
    wide, merged = vision["hidden_size"], vision["hidden_size"] * vision["spatial_merge_size"] ** 2

    def linear(name, outputs, inputs):
        return {f"model.visual.{name}.weight": (outputs, inputs), f"model.visual.{name}.bias": (outputs,)}

    def norm(name, size):
        return {f"model.visual.{name}.weight": (size,), f"model.visual.{name}.bias": (size,)}

    patch = (vision["in_channels"], vision["temporal_patch_size"], vision["patch_size"], vision["patch_size"])
    shapes_ |= {"model.visual.patch_embed.proj.weight": (wide, *patch), "model.visual.patch_embed.proj.bias": (wide,),
                "model.visual.pos_embed.weight": (vision["num_position_embeddings"], wide)}
    for i in range(vision["depth"]):
        at, hidden = f"blocks.{i}", vision["intermediate_size"]
        shapes_ |= norm(f"{at}.norm1", wide) | norm(f"{at}.norm2", wide) | linear(f"{at}.attn.qkv", 3 * wide, wide)
        shapes_ |= linear(f"{at}.attn.proj", wide, wide)
        shapes_ |= linear(f"{at}.mlp.linear_fc1", hidden, wide) | linear(f"{at}.mlp.linear_fc2", wide, hidden)
    for at, size in [("merger", wide)] + [(f"deepstack_merger_list.{i}", merged) for i in range(len(vision["deepstack_visual_indexes"]))]:
        shapes_ |= norm(f"{at}.norm", size) | linear(f"{at}.linear_fc1", merged, merged)
        shapes_ |= linear(f"{at}.linear_fc2", vision["out_hidden_size"], merged)
    return shapes_


def random_weights(config: dict, seed: int = 0) -> dict[str, np.ndarray]:
    """bfloat16 weights under which activations keep a scale near 1: norms 1, biases 0, embeddings N(0, 1), products
    N(0, 1/inputs), those that feed the residual stream at half of that deviation."""
    rng = np.random.default_rng(seed)
    weights = {}
    for name, shape in sorted(parameter_shapes(config).items()):
        if name.endswith(".bias"):
            value = np.zeros(shape, np.float32)
        elif len(shape) == 1:
            value = np.ones(shape, np.float32)
        else:
            deviation = 1.0 if "embed_tokens" in name or "pos_embed" in name else np.prod(shape[1:]) ** -0.5
            if any(part in name for part in ("o_proj", "down_proj", "attn.proj", "mlp.linear_fc2", "deepstack_merger_list")):
                deviation /= 2
            value = rng.standard_normal(shape, np.float32) * np.float32(deviation)
        weights[name] = value.astype(ml_dtypes.bfloat16)
    return weights


def write(folder: Path, seed: int = 0) -> None:
    """Writes the whole folder, replacing files of the same names."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer(corpus(seed))
    config = model_config(tokenizer)
    added = {str(tokenizer.token_to_id(t)): {"content": t, "lstrip": False, "normalized": False, "rstrip": False, "single_word": False,
                                              "special": t in SPECIAL} for t in (*SPECIAL, *ADDED)}
    files = {
        "config.json": config,
        "tokenizer_config.json": {"added_tokens_decoder": added, "additional_special_tokens": list(SPECIAL[1:]), "bos_token": None,
                                  "clean_up_tokenization_spaces": False, "eos_token": "<|im_end|>", "model_max_length": 4096,
                                  "pad_token": "<|endoftext|>", "processor_class": "Qwen3VLProcessor", "tokenizer_class": "Qwen2Tokenizer",
                                  "unk_token": None},
        "preprocessor_config.json": {**PROCESSOR, "image_processor_type": "Qwen2VLImageProcessorFast", "first_resize": FIRST_RESIZE,
                                     "size": {"shortest_edge": 32 * 32, "longest_edge": 128 * 128}},
        "video_preprocessor_config.json": {**PROCESSOR, "video_processor_type": "Qwen3VLVideoProcessor", "first_resize": FIRST_RESIZE,
                                           "sampled_frames": 8, "size": {"shortest_edge": 8 * 32 * 32, "longest_edge": 8 * 128 * 128}},
    }
    for name, table in files.items():
        (folder / name).write_text(json.dumps(table, indent=1) + "\n")
    tokenizer.save(str(folder / "tokenizer.json"), pretty=False)
    save_file(random_weights(config, seed), str(folder / "model.safetensors"), {"format": "pt"})


def main() -> None:
    parser = cli.Parser(prog="launch.make_vlm", description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    write(arguments.output, arguments.seed)
    size = sum(f.stat().st_size for f in arguments.output.iterdir())
    print(f"wrote {arguments.output}: {size / 1e6:.2f} MB")


if __name__ == "__main__":
    cli.run(main)
