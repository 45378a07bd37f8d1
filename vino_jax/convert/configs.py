"""config.json of diffusers and transformers <-> our settings. A field that changes what is computed and that we do not have is refused."""
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vino_jax.convert.engine import Manifest
from vino_jax.errors import UserError
from vino_jax.settings import MMDiTConfig, VAEConfig, VinoConfig, VLMConfig, VLMTextConfig, VLMVisionConfig, read_json

MMDIT_CLASS, VAE_CLASS, VLM_TYPE = "HunyuanVideoTransformer3DModel", "AutoencoderKLHunyuanVideo", "qwen3_vl"

# Our field -> the field of config.json.
_MMDIT = {
    "in_channels": "in_channels", "out_channels": "out_channels", "heads": "num_attention_heads", "head_dim": "attention_head_dim",
    "double_blocks": "num_layers", "single_blocks": "num_single_layers", "refiner_blocks": "num_refiner_layers", "mlp_ratio": "mlp_ratio",
    "text_width": "text_embed_dim", "pooled_width": "pooled_projection_dim", "rope_theta": "rope_theta", "rope_axes": "rope_axes_dim",
}
_VAE = {
    "in_channels": "in_channels", "latent_channels": "latent_channels", "block_widths": "block_out_channels",
    "layers_per_block": "layers_per_block",
    "norm_groups": "norm_num_groups", "scaling_factor": "scaling_factor", "spatial_compression": "spatial_compression_ratio",
    "temporal_compression": "temporal_compression_ratio",
}
_TEXT = {
    "vocab": "vocab_size", "width": "hidden_size", "layers": "num_hidden_layers", "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim", "mlp": "intermediate_size", "rms_eps": "rms_norm_eps", "rope_theta": "rope_theta",
}
_VISION = {
    "layers": "depth", "width": "hidden_size", "heads": "num_heads", "mlp": "intermediate_size", "patch": "patch_size",
    "temporal_patch": "temporal_patch_size", "merge": "spatial_merge_size", "channels": "in_channels", "out_width": "out_hidden_size",
    "positions": "num_position_embeddings", "deepstack": "deepstack_visual_indexes",
}
# What we compute, where the other side has a choice.
_MMDIT_FIXED = {"qk_norm": "rms_norm", "guidance_embeds": True, "image_condition_type": None}
_VAE_FIXED = {"act_fn": "silu", "mid_block_add_attention": True}
_TEXT_FIXED = {"hidden_act": "silu", "attention_bias": False}
_VISION_FIXED = {"hidden_act": "gelu_pytorch_tanh"}
# Special tokens and their ids in Qwen's vocabulary; a model with a tokenizer of its own has others.
_TOKENS = {"image_token_id": ("<|image_pad|>", 151655), "video_token_id": ("<|video_pad|>", 151656),
           "vision_start_token_id": ("<|vision_start|>", 151652), "vision_end_token_id": ("<|vision_end|>", 151653)}


def read_mmdit(folder: Path) -> MMDiTConfig:
    """From a folder's config.json of diffusers' HunyuanVideoTransformer3DModel."""
    path = folder / "config.json"
    data = _read(path, "_class_name", MMDIT_CLASS)
    _known(data, {*_MMDIT.values(), *_MMDIT_FIXED, "patch_size", "patch_size_t"}, path)
    _fixed(data, _MMDIT_FIXED, path)
    size = data.get("patch_size", 2)
    return replace(MMDiTConfig(**_fields(data, _MMDIT, MMDiTConfig, path)), patch=(data.get("patch_size_t", 1), size, size))


def read_vae(folder: Path) -> VAEConfig:
    """From a folder's config.json of diffusers' AutoencoderKLHunyuanVideo."""
    path = folder / "config.json"
    data = _read(path, "_class_name", VAE_CLASS)
    _known(data, {*_VAE.values(), *_VAE_FIXED, "out_channels", "down_block_types", "up_block_types"}, path)
    _fixed(data, _VAE_FIXED, path)
    config = VAEConfig(**_fields(data, _VAE, VAEConfig, path))
    if data.get("out_channels", 3) != config.in_channels:
        raise UserError(f"{path}: out_channels is {data['out_channels']}, supported is {config.in_channels}, as many as in_channels")
    for field, kind in (("down_block_types", "HunyuanVideoDownBlock3D"), ("up_block_types", "HunyuanVideoUpBlock3D")):
        kinds = data.get(field, [kind] * len(config.block_widths))
        if kinds != [kind] * len(config.block_widths):
            raise UserError(f"{path}: {field} is {kinds}, supported is {kind}, one for each of block_out_channels")
    return config


def read_vlm(folder: Path) -> VLMConfig:
    """From a folder's config.json of transformers' Qwen3VLForConditionalGeneration (dense)."""
    path = folder / "config.json"
    data = _read(path, "model_type", VLM_TYPE)
    text, vision = data.get("text_config"), data.get("vision_config")
    if not isinstance(text, dict) or not isinstance(vision, dict):
        raise UserError(f"{path} lacks text_config or vision_config")
    for table, fixed in ((text, _TEXT_FIXED), (vision, _VISION_FIXED)):
        _fixed(table, fixed, path)
    _fixed({"tie_word_embeddings": data.get("tie_word_embeddings", text.get("tie_word_embeddings", True))}, {"tie_word_embeddings": True}, path)
    rope = text.get("rope_scaling") or text.get("rope_parameters") or {}
    _fixed(rope, {"mrope_interleaved": True, "rope_type": "default"}, path)
    text = {**({"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}), **text}
    section = tuple(rope.get("mrope_section", VLMTextConfig.mrope_section))
    return VLMConfig(VLMTextConfig(**_fields(text, _TEXT, VLMTextConfig, path), mrope_section=section),
                     VLMVisionConfig(**_fields(vision, _VISION, VLMVisionConfig, path)))


def write_mmdit(config: MMDiTConfig) -> dict[str, Any]:
    """config.json that diffusers opens."""
    time, height, width = config.patch
    if height != width:
        raise UserError(f"patch {config.patch}: diffusers has one size for rows and columns")
    return {"_class_name": MMDIT_CLASS, **_back(config, _MMDIT), **_MMDIT_FIXED, "patch_size": height, "patch_size_t": time}


def write_vae(config: VAEConfig) -> dict[str, Any]:
    """config.json that diffusers opens."""
    blocks = len(config.block_widths)
    return {"_class_name": VAE_CLASS, **_back(config, _VAE), **_VAE_FIXED, "out_channels": config.in_channels,
            "down_block_types": ["HunyuanVideoDownBlock3D"] * blocks, "up_block_types": ["HunyuanVideoUpBlock3D"] * blocks}


def write_vlm(config: VLMConfig, processor: Path) -> dict[str, Any]:
    """config.json that transformers opens. processor: folder whose tokenizer_config.json, where there is one, gives the ids of tokens."""
    tokenizer = processor / "tokenizer_config.json"
    added = read_json(tokenizer).get("added_tokens_decoder", {}) if tokenizer.exists() else {}
    ids = {token["content"]: int(number) for number, token in added.items()}
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": list(config.text.mrope_section)}
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"], "model_type": VLM_TYPE, "tie_word_embeddings": True,
        **{field: ids.get(token, published) for field, (token, published) in _TOKENS.items()},
        "text_config": {"model_type": "qwen3_vl_text", **_back(config.text, _TEXT), **_TEXT_FIXED,
                        "rope_scaling": rope, "tie_word_embeddings": True},
        "vision_config": {"model_type": VLM_TYPE, **_back(config.vision, _VISION), **_VISION_FIXED},
    }


def compose(mmdit: MMDiTConfig | None, vae: VAEConfig | None, vlm: VLMConfig | None, vino: Manifest, queries: int) -> VinoConfig:
    """The whole architecture from the configs that are known and the shapes in vino.ckpt; what is absent is made to fit the rest.

    vino: manifest of vino.ckpt, or empty. queries: their number where vino.ckpt has none.
    """
    def shape(name: str) -> tuple[int, ...] | None:
        found = vino.get(f"mm_encoder.{name}")
        return found[0] if found and len(found[0]) == 2 else None

    up, down, table = shape("connector.mlp.0.weight"), shape("connector.mlp.2.weight"), shape("metaquery")
    if vlm is None:
        width = up[1] if up else table[1] if table else VLMTextConfig.width
        vlm = VLMConfig(replace(VLMTextConfig(), width=width), replace(VLMVisionConfig(), out_width=width))
    if mmdit is None:
        channels = vae.latent_channels if vae else MMDiTConfig.in_channels
        mmdit = MMDiTConfig(in_channels=channels, out_channels=channels, text_width=down[0] if down else MMDiTConfig.text_width)
    if vae is None:
        vae = VAEConfig(latent_channels=mmdit.in_channels)
    ratio = up[0] // down[0] if up and down and down[0] and up[0] >= down[0] else VinoConfig.connector_ratio
    return VinoConfig(mmdit, vae, vlm, table[0] if table else queries, ratio)


def kernels(config: VinoConfig) -> dict[str, tuple[int, ...]]:
    """Part -> kernel of its convolutions that we hold as products."""
    vision = config.vlm.vision
    return {"mmdit": config.mmdit.patch, "vlm": (vision.temporal_patch, vision.patch, vision.patch), "vae": (1, 1, 1)}


def _read(path: Path, kind: str, expected: str) -> dict[str, Any]:
    data = read_json(path)
    if data.get(kind, expected) != expected:
        raise UserError(f"{path}: {kind} is {data[kind]!r}, supported is {expected!r}")
    return data


def _known(data: Mapping[str, Any], known: set[str], path: Path) -> None:
    for name in data:
        if name not in known and not name.startswith("_"):
            raise UserError(f"{path}: {name} is not supported")


def _fixed(data: Mapping[str, Any], fixed: Mapping[str, Any], path: Path) -> None:
    for name, value in fixed.items():
        if data.get(name, value) != value:
            raise UserError(f"{path}: {name} is {data[name]!r}, supported is {value!r}")


def _fields(data: Mapping[str, Any], names: Mapping[str, str], cls: type, path: Path) -> dict[str, Any]:
    """Values for `cls`; a field that config.json lacks keeps our default, which is the published one."""
    values = {}
    for ours, theirs in names.items():
        if theirs not in data:
            continue
        value, default = data[theirs], getattr(cls, ours)
        kinds = (int, float) if isinstance(default, float) else (list, tuple) if isinstance(default, tuple) else int
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise UserError(f"{path}: {theirs} is {value!r}, expected like {default!r}")
        values[ours] = type(default)(value)
    return values


def _back(config: Any, names: Mapping[str, str]) -> dict[str, Any]:
    values = {theirs: getattr(config, ours) for ours, theirs in names.items()}
    return {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
