"""Qwen3-VL: our tree (qwen_vl.QwenVL) against transformers' Qwen3VLForConditionalGeneration."""
from vino_jax.convert.ops import COPY, LINEAR, PATCH
from vino_jax.convert.rules import LeftOut, Rule, Table


def _linear(jax: str, torch: str, *, bias: bool = True) -> tuple[Rule, ...]:
    weight = Rule(f"{jax}/kernel", f"{torch}.weight", LINEAR)
    return (weight, Rule(f"{jax}/bias", f"{torch}.bias", COPY)) if bias else (weight,)


def _layer_norm(jax: str, torch: str) -> tuple[Rule, ...]:
    return Rule(f"{jax}/scale", f"{torch}.weight"), Rule(f"{jax}/bias", f"{torch}.bias")


def _merger(jax: str, torch: str) -> tuple[Rule, ...]:
    return (*_layer_norm(f"{jax}/norm", f"{torch}.norm"), *_linear(f"{jax}/up", f"{torch}.linear_fc1"),
            *_linear(f"{jax}/down", f"{torch}.linear_fc2"))


_VISION, _BLOCK = "model.visual", "model.visual.blocks.{i}"
_TEXT, _LAYER = "model.language_model", "model.language_model.layers.{i}"

TABLE = Table(
    rules=(
        Rule("vision/patch_embed/kernel", f"{_VISION}.patch_embed.proj.weight", PATCH),
        Rule("vision/patch_embed/bias", f"{_VISION}.patch_embed.proj.bias"),
        Rule("vision/positions/table", f"{_VISION}.pos_embed.weight"),
        *_layer_norm("vision/layers/attention_norm", f"{_BLOCK}.norm1"),
        *_linear("vision/layers/qkv", f"{_BLOCK}.attn.qkv"),
        *_linear("vision/layers/out", f"{_BLOCK}.attn.proj"),
        *_layer_norm("vision/layers/mlp_norm", f"{_BLOCK}.norm2"),
        *_linear("vision/layers/up", f"{_BLOCK}.mlp.linear_fc1"),
        *_linear("vision/layers/down", f"{_BLOCK}.mlp.linear_fc2"),
        *_merger("vision/merger", f"{_VISION}.merger"),
        *_merger("vision/deepstack", f"{_VISION}.deepstack_merger_list.{{i}}"),
        Rule("text/embed/table", f"{_TEXT}.embed_tokens.weight"),
        Rule("text/layers/attention_norm/scale", f"{_LAYER}.input_layernorm.weight"),
        *_linear("text/layers/attention/q", f"{_LAYER}.self_attn.q_proj", bias=False),
        *_linear("text/layers/attention/k", f"{_LAYER}.self_attn.k_proj", bias=False),
        *_linear("text/layers/attention/v", f"{_LAYER}.self_attn.v_proj", bias=False),
        *_linear("text/layers/attention/out", f"{_LAYER}.self_attn.o_proj", bias=False),
        Rule("text/layers/attention/q_norm/scale", f"{_LAYER}.self_attn.q_norm.weight"),
        Rule("text/layers/attention/k_norm/scale", f"{_LAYER}.self_attn.k_norm.weight"),
        Rule("text/layers/mlp_norm/scale", f"{_LAYER}.post_attention_layernorm.weight"),
        *_linear("text/layers/gate", f"{_LAYER}.mlp.gate_proj", bias=False),
        *_linear("text/layers/up", f"{_LAYER}.mlp.up_proj", bias=False),
        *_linear("text/layers/down", f"{_LAYER}.mlp.down_proj", bias=False),
        Rule("text/norm/scale", f"{_TEXT}.norm.weight"),
    ),
    left_out=(LeftOut(r"lm_head\.weight", "tied: the output head is the token embedding"),),
)
