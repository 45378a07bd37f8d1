"""MMDiT: our leaves and those of diffusers' HunyuanVideoTransformer3DModel (`transformer.*` in vino.ckpt)."""
from vino_jax.convert.ops import COPY, LINEAR, PATCH
from vino_jax.convert.rules import Rule, Table

# Linear maps: our path -> torch name, both without kernel/weight and bias.
_LINEAR = {
    "refiner/time/up": "context_embedder.time_text_embed.timestep_embedder.linear_1",
    "refiner/time/down": "context_embedder.time_text_embed.timestep_embedder.linear_2",
    "refiner/pooled/up": "context_embedder.time_text_embed.text_embedder.linear_1",
    "refiner/pooled/down": "context_embedder.time_text_embed.text_embedder.linear_2",
    "refiner/context_in": "context_embedder.proj_in",
    "time/up": "time_text_embed.timestep_embedder.linear_1",
    "time/down": "time_text_embed.timestep_embedder.linear_2",
    "guidance/up": "time_text_embed.guidance_embedder.linear_1",
    "guidance/down": "time_text_embed.guidance_embedder.linear_2",
    "pooled/up": "time_text_embed.text_embedder.linear_1",
    "pooled/down": "time_text_embed.text_embedder.linear_2",
    "modulation_out": "norm_out.linear",
    "out": "proj_out",
}
_REFINER = {
    "attention/query": "attn.to_q", "attention/key": "attn.to_k", "attention/value": "attn.to_v", "out": "attn.to_out.0",
    "mlp/up": "ff.net.0.proj", "mlp/down": "ff.net.2", "gates": "norm_out.linear",
}
_DOUBLE = {
    "visual/modulation": "norm1.linear", "context/modulation": "norm1_context.linear",
    "visual/attention/query": "attn.to_q", "context/attention/query": "attn.add_q_proj",
    "visual/attention/key": "attn.to_k", "context/attention/key": "attn.add_k_proj",
    "visual/attention/value": "attn.to_v", "context/attention/value": "attn.add_v_proj",
    "visual/out": "attn.to_out.0", "context/out": "attn.to_add_out",
    "visual/mlp/up": "ff.net.0.proj", "context/mlp/up": "ff_context.net.0.proj",
    "visual/mlp/down": "ff.net.2", "context/mlp/down": "ff_context.net.2",
}
_SINGLE = {
    "modulation": "norm.linear", "attention/query": "attn.to_q", "attention/key": "attn.to_k", "attention/value": "attn.to_v",
    "mlp": "proj_mlp", "out": "proj_out",
}
# Norm scales: our path without /scale -> torch name without .weight.
_DOUBLE_NORMS = {
    "visual/attention/query_norm": "attn.norm_q", "visual/attention/key_norm": "attn.norm_k",
    "context/attention/query_norm": "attn.norm_added_q", "context/attention/key_norm": "attn.norm_added_k",
}
_SINGLE_NORMS = {"attention/query_norm": "attn.norm_q", "attention/key_norm": "attn.norm_k"}


def _linear(ours: str, theirs: str, names: dict[str, str]) -> list[Rule]:
    leaves = (("kernel", "weight", LINEAR), ("bias", "bias", COPY))
    return [Rule(f"{ours}{name}/{leaf}", f"{theirs}{torch}.{tensor}", op) for name, torch in names.items() for leaf, tensor, op in leaves]


def _scales(ours: str, theirs: str, names: dict[str, str]) -> list[Rule]:
    return [Rule(f"{ours}{name}/scale", f"{theirs}{torch}.weight") for name, torch in names.items()]


_REFINER_BLOCK = ("refiner/blocks/", "context_embedder.token_refiner.refiner_blocks.{i}.")
_DOUBLE_BLOCK = ("double/", "transformer_blocks.{i}.")
_SINGLE_BLOCK = ("single/", "single_transformer_blocks.{i}.")

MMDIT = Table((
    Rule("latent_in/kernel", "x_embedder.proj.weight", PATCH),
    Rule("latent_in/bias", "x_embedder.proj.bias"),
    *_linear("", "", _LINEAR),
    *_linear(*_REFINER_BLOCK, _REFINER),
    *(Rule(f"{_REFINER_BLOCK[0]}{norm}/{leaf}", f"{_REFINER_BLOCK[1]}{norm}.{torch}")
      for norm in ("norm1", "norm2") for leaf, torch in (("scale", "weight"), ("bias", "bias"))),
    *_linear(*_DOUBLE_BLOCK, _DOUBLE),
    *_scales(*_DOUBLE_BLOCK, _DOUBLE_NORMS),
    *_linear(*_SINGLE_BLOCK, _SINGLE),
    *_scales(*_SINGLE_BLOCK, _SINGLE_NORMS),
))
