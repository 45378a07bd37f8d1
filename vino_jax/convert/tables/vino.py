"""What VINO adds: both connectors and the queries, as under mm_encoder.* of vino.ckpt (names without the part's prefix)."""
from vino_jax.convert.ops import LINEAR
from vino_jax.convert.rules import Rule, Table

CONNECTOR = Table((
    Rule("norm/scale", "norm_qwen.weight"),
    Rule("up/kernel", "mlp.0.weight", LINEAR),
    Rule("up/bias", "mlp.0.bias"),
    Rule("down/kernel", "mlp.2.weight", LINEAR),
    Rule("down/bias", "mlp.2.bias"),
))
VAE_CONNECTOR = CONNECTOR
# The tensor is mm_encoder.metaquery itself, so its name stands here whole.
QUERIES = Table((Rule("embedding", "metaquery"),))
