"""VAE: our leaves and those of diffusers' AutoencoderKLHunyuanVideo (the vae/ folder). Its blocks differ, so names depend on the sizes."""
from vino_jax.convert.ops import CONV, COPY, LINEAR, PATCH, Op
from vino_jax.convert.rules import Rule, Table
from vino_jax.models.vae import block_factors
from vino_jax.settings import VAEConfig


def _pair(ours: str, torch: str, op: Op, kernel: str = "kernel") -> list[Rule]:
    return [Rule(f"{ours}/{kernel}", f"{torch}.weight", op), Rule(f"{ours}/bias", f"{torch}.bias", COPY)]


def _conv(path: str) -> list[Rule]:
    return _pair(path, path.replace("/", ".") + ".conv", CONV)


def _pointwise(path: str, suffix: str = "") -> list[Rule]:
    return _pair(path, path.replace("/", ".") + suffix, PATCH)  # a 1x1x1 convolution is a linear map


def _norm(path: str) -> list[Rule]:
    return _pair(path, path.replace("/", "."), COPY, "scale")


def _resnet(path: str, shortcut: bool) -> list[Rule]:
    rules = [*_norm(f"{path}/norm1"), *_conv(f"{path}/conv1"), *_norm(f"{path}/norm2"), *_conv(f"{path}/conv2")]
    return rules + _pointwise(f"{path}/conv_shortcut", ".conv") if shortcut else rules


def _mid(path: str) -> list[Rule]:
    attention = f"{path}/attentions/0"
    rules = [*_resnet(f"{path}/resnets/0", False), *_resnet(f"{path}/resnets/1", False), *_norm(f"{attention}/group_norm")]
    for name, torch in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")):
        rules += _pair(f"{attention}/{name}", f"{attention}/{torch}".replace("/", "."), LINEAR)
    return rules


def _half(half: str, blocks: str, sampler: str, widths: tuple[int, ...], layers: int,
          factors: tuple[tuple[int, int, int], ...]) -> list[Rule]:
    rules = [*_conv(f"{half}/conv_in"), *_mid(f"{half}/mid_block"), *_norm(f"{half}/conv_norm_out"), *_conv(f"{half}/conv_out")]
    for i, factor in enumerate(factors):
        for layer in range(layers):
            rules += _resnet(f"{half}/{blocks}/{i}/resnets/{layer}", layer == 0 and i > 0 and widths[i] != widths[i - 1])
        if factor != (1, 1, 1):
            rules += _conv(f"{half}/{blocks}/{i}/{sampler}/0/conv")
    return rules


def table(config: VAEConfig) -> Table:
    """All rules of a VAE of these sizes."""
    widths, layers, factors = config.block_widths, config.layers_per_block, block_factors(config)
    return Table((
        *_half("encoder", "down_blocks", "downsamplers", widths, layers, factors),
        *_half("decoder", "up_blocks", "upsamplers", widths[::-1], layers + 1, factors),
        *_pointwise("quant_conv"), *_pointwise("post_quant_conv"),
    ))
