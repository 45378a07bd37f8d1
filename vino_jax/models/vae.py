"""HunyuanVideo's causal 3D VAE: 8x in space, 4x in time (diffusers' AutoencoderKLHunyuanVideo), channels last.

Dims: B batch, F frames (of pixels or latents), H height, W width, C channels, S = H*W positions of a frame,
D/I/O channels of a convolution: input I, output O; G norm groups.
Submodules carry the names of diffusers' class, lists as "0", "1", ...
"""
import functools
import math
from collections.abc import Callable, Iterable

import jax
import jax.numpy as jnp
from flax import nnx

from vino_jax.nn.attention import attend
from vino_jax.nn.layers import Linear
from vino_jax.nn.module import param
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VAEConfig
from vino_jax.sharding.constrain import constrain, weight

_EPS = 1e-6
_LOGVAR_RANGE = (-30.0, 20.0)  # of the posterior (diffusers' DiagonalGaussianDistribution)
_DIMS_3D = ("NDHWC", "DHWIO", "NDHWC")
_DIMS_2D = ("NHWC", "HWIO", "NHWC")
Norm = tuple[jax.Array, jax.Array, jax.Array]  # mean, scale and bias of a group norm, see GroupNorm.of
Residual = tuple[jax.Array, ...]  # what is added: x, or x and the kernel and bias that it first goes through


def _numbered(modules: Iterable[nnx.Module]) -> nnx.Dict:
    """Modules under "0", "1", ...: string keys, where nnx.List would put integers into the parameter tree."""
    return nnx.Dict({str(i): module for i, module in enumerate(modules)})


def _conv3d(x_BFHWI, kernel, stride):
    return jax.lax.conv_general_dilated(x_BFHWI, kernel, stride, "VALID", dimension_numbers=_DIMS_3D)


def _conv2d(x_NHWI, kernel, stride):
    return jax.lax.conv_general_dilated(x_NHWI, kernel, stride, "VALID", dimension_numbers=_DIMS_2D)


def _conv3d_by_taps(x_BFHWI, kernel, stride):
    """The same numbers as _conv3d, as a sum over the kernel's time taps of 2D convolutions on all frames at once."""
    frames = (x_BFHWI.shape[1] - kernel.shape[0]) // stride[0] + 1
    out = None
    for tap in range(kernel.shape[0]):
        seen = x_BFHWI[:, tap:tap + (frames - 1) * stride[0] + 1:stride[0]]
        y = _conv2d(seen.reshape(-1, *seen.shape[2:]), kernel[tap], stride[1:])
        out = y if out is None else out + y
    return out.reshape(x_BFHWI.shape[0], frames, *out.shape[1:])


def _pad_space(x_BFHWC):
    return jnp.pad(x_BFHWC, (*[(0, 0)] * (x_BFHWC.ndim - 3), (1, 1), (1, 1), (0, 0)), mode="edge")


def _space_phases(kernel):
    """A 3x3 kernel (3, 3, ...) on a picture of doubled rows and columns, as 2x2 kernels on the picture itself: {(row, column): (2, 2, ...)}
    of the four pixels that each pixel becomes. Some taps fall on the same pixel: 4 times 4 products are left of 36."""
    def halves(k):
        return jnp.stack([k[0], k[1] + k[2]]), jnp.stack([k[0] + k[1], k[2]])

    return {(i, j): jnp.moveaxis(across, 0, 1) for i, rows in enumerate(halves(kernel))
            for j, across in enumerate(halves(jnp.moveaxis(rows, 1, 0)))}


def _conv_frame(x_BHWI, kernel, doubled: bool):
    """3x3 convolution of a frame, borders repeated; doubled: of the frame with its rows and columns doubled."""
    padded, (batch, height, width, _) = _pad_space(x_BHWI), x_BHWI.shape
    if not doubled:
        return _conv2d(padded, kernel, (1, 1))
    y = {at: _conv2d(padded, k, (1, 1))[:, at[0]:at[0] + height, at[1]:at[1] + width] for at, k in _space_phases(kernel).items()}
    rows = [jnp.stack([y[i, 0], y[i, 1]], axis=3) for i in (0, 1)]
    return jnp.stack(rows, axis=2).reshape(batch, 2 * height, 2 * width, -1)


def _normed(x_BFHWC, norm: Norm | None):
    """x itself, or silu of its group norm."""
    if norm is None:
        return x_BFHWC
    return jax.nn.silu(_scaled(x_BFHWC, norm))


def _scaled(x_BFHWC, norm: Norm):
    mean, scale, bias = norm
    return ((x_BFHWC.astype(jnp.float32) - mean) * scale + bias).astype(x_BFHWC.dtype)


def _through(residual: Residual, at: Callable = lambda x: x):
    """What is added to a block's result: x, or the part `at` takes of it, through the linear shortcut if there is one."""
    x_BFHWC, *shortcut = residual
    if not shortcut:
        return at(x_BFHWC)
    kernel, bias = shortcut
    return at(x_BFHWC) @ kernel + bias


def _padded(x_BFHWC, norm: Norm | None, factor: tuple[int, int, int]):
    x_BFHWC = upsample(_normed(x_BFHWC, norm), factor)
    return jnp.pad(x_BFHWC, ((0, 0), (2, 0), (1, 1), (1, 1), (0, 0)), mode="edge")


def _one_frame(said, first, next_one, next_two):
    """(the frames that a frame becomes, what it and those before say of the next two): of one that stays one. said: its products with the
    taps for itself, for the next and for the one after; first: it also stands for the two before it."""
    now, later, last = said
    out = now + jnp.where(first, later + last, next_one)
    return out[:, None], (later + jnp.where(first, last, next_two), last)


def _two_frames(said, first, odd, even):
    """The same of one that is doubled in time, but for the first, of which there is only the second: it is given twice."""
    now_odd, next_odd, now_even, next_even = said
    out_odd, out_even = now_odd + odd, now_even + jnp.where(first, next_even, even)
    return jnp.stack([jnp.where(first, out_even, out_odd), out_even], axis=1), (next_odd, next_even)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _conv_by_frames(x_BFHWI, kernel, bias, residual: Residual | None, norm: Norm | None, factor: tuple[int, int, int]):
    """Causal convolution of stride 1 of upsample(silu(norm(x)), factor), with bias and residual (or None) added, one frame after the other.

    All else than x and the result is a few frames large. A frame is convolved once, with the kernel's time taps side by side as output
    channels; what it says of later frames is carried along. Where frames are doubled in time, taps that see the same one are added up.
    """
    k0, k1, k2 = kernel
    taps, become = ((k2, k1, k0), _one_frame) if factor[0] == 1 else ((k2, k0 + k1, k1 + k2, k0), _two_frames)
    batch, frames, height, width, _ = x_BFHWI.shape
    shape = (batch, 1 + (frames - 1) * factor[0], height * factor[1], width * factor[2], kernel.shape[-1])
    in_place, wide = shape == x_BFHWI.shape, jnp.concatenate(taps, axis=-1)  # no later frame needs what the result is written over

    def at(x, i):
        return jax.lax.dynamic_slice_in_dim(x, i, 1, axis=1)

    def step(i, carry):
        out, *before = carry
        said = _conv_frame(_normed(at(out if in_place else x_BFHWI, i), norm)[:, 0], wide, factor[1] == 2)
        new, carried = become(jnp.split(said, len(taps), axis=-1), i == 0, *before)
        new = new + bias
        if residual is not None:
            new = new + _through(residual, lambda x: at(x, i))
        return jax.lax.dynamic_update_slice_in_dim(out, new, jnp.maximum(factor[0] * i - factor[0] + 1, 0), axis=1), *carried

    # Made of x, not of zeros: those that wait for nothing XLA makes all at once, for every convolution of the model.
    start = x_BFHWI if in_place else jnp.broadcast_to(x_BFHWI[:, :1, :1, :1, :1], shape)
    none = jnp.zeros((batch, *shape[2:]), x_BFHWI.dtype)
    return jax.lax.fori_loop(0, frames, step, (start, none, none))[0]


def _conv_by_frames_fwd(x_BFHWI, kernel, bias, residual, norm, factor):
    return _conv_by_frames(x_BFHWI, kernel, bias, residual, norm, factor), (x_BFHWI, kernel, bias, residual, norm)


def _conv_by_frames_bwd(factor, saved, grad):
    def by_taps(x, kernel, bias, residual, norm):  # of all frames at once: a loop's gradients would pass over all of x at every frame
        y = _conv3d_by_taps(_padded(x, norm, factor), kernel, (1, 1, 1)) + bias
        return y if residual is None else y + _through(residual)

    return jax.vjp(by_taps, *saved)[1](grad)


_conv_by_frames.defvjp(_conv_by_frames_fwd, _conv_by_frames_bwd)


class CausalConv3d(nnx.Module):
    """3x3x3 convolution; frames are padded in front only, rows and columns on both sides, by repeating the border.

    axes: logical names of the input and output channels (None where they are few: pixels, latents).
    """

    def __init__(self, inputs: int, outputs: int, *, stride: tuple[int, int, int] = (1, 1, 1),
                 axes: tuple[str | None, str | None] = ("conv_in", "conv_out"), rngs: nnx.Rngs):
        self.kernel = param(rngs, (3, 3, 3, inputs, outputs), (None, None, None, *axes), _fan_in)
        self.bias = param(rngs, (outputs,), axes[1:], lambda key, shape, dtype: jnp.zeros(shape, dtype))
        self.stride, self.axes = stride, axes

    def __call__(self, x_BFHWC: jax.Array, *, norm: Norm | None = None, factor: tuple[int, int, int] = (1, 1, 1),
                 residual: Residual | None = None) -> jax.Array:
        """residual + convolution of upsample(silu(norm(x)), factor). norm: of x, from GroupNorm; without it and its silu, x as it is."""
        dtype = x_BFHWC.dtype
        stored = weight(self.kernel[...], (None, None, None, *self.axes), self.kernel.dtype)
        bias = self.bias[...].astype(dtype)

        def plus(y):
            return y + bias if residual is None else y + bias + _through(residual)

        if x_BFHWC.shape[1] == 1:
            # One frame and its repetitions in front: all time taps see the same picture, so their sum is one 2D kernel.
            kernel = jnp.sum(stored.astype(jnp.float32), axis=0).astype(dtype)
            return plus(self._picture(_normed(x_BFHWC, norm)[:, 0], kernel, factor)[:, None])

        def on_cpu(x, kernel):
            if self.stride == (1, 1, 1):
                return _conv_by_frames(x, kernel, bias, residual, norm, factor)
            return plus(_conv3d_by_taps(_padded(x, norm, factor), kernel, self.stride))

        # XLA's 3D convolution on a CPU is 5 times slower than 2D ones, its gradients up to 30 times; a TPU takes it as it is.
        # platform_dependent chooses at lowering, so that compiling for a TPU on a CPU host gives the TPU's program.
        return jax.lax.platform_dependent(x_BFHWC, stored.astype(dtype), cpu=on_cpu,
                                          default=lambda x, kernel: plus(_conv3d(_padded(x, norm, factor), kernel, self.stride)))

    def _picture(self, x_BHWC, kernel, factor):
        def plain(x, k):
            return _conv2d(_pad_space(upsample(x[:, None], factor)[:, 0]), k, self.stride[1:])

        def on_cpu(x, k):
            return plain(x, k) if self.stride != (1, 1, 1) else _conv_frame(x, k, factor[1] == 2)

        return jax.lax.platform_dependent(x_BHWC, kernel, cpu=on_cpu, default=plain)


def _fan_in(key, shape, dtype):
    return jax.random.normal(key, shape, dtype) / math.sqrt(math.prod(shape[:-1]))


class GroupNorm(nnx.Module):
    """Group norm of each sample over (F, H, W, C/G) in float32, returned in the dtype of x."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.scale = param(rngs, (width,), (None,), lambda key, shape, dtype: jnp.ones(shape, dtype))
        self.bias = param(rngs, (width,), (None,), lambda key, shape, dtype: jnp.zeros(shape, dtype))
        self.groups = groups

    def _group_mean(self, x_BFHWC: jax.Array) -> jax.Array:
        """Mean over positions and a group's channels, spread back over the channels: (B, 1, 1, 1, C)."""
        mean_BC = jnp.mean(x_BFHWC, axis=(1, 2, 3))
        batch, width = mean_BC.shape
        mean_BG = jnp.mean(mean_BC.reshape(batch, self.groups, -1), axis=-1)
        return jnp.repeat(mean_BG, width // self.groups, axis=-1)[:, None, None, None]

    def of(self, x_BFHWC: jax.Array) -> Norm:
        """(mean, scale, bias) with which (x - mean) * scale + bias is the norm of x; float32, broadcastable to x."""
        x = x_BFHWC.astype(jnp.float32)
        mean = self._group_mean(x)
        scale = jax.lax.rsqrt(self._group_mean(jnp.square(x - mean)) + _EPS) * self.scale[...].astype(jnp.float32)
        return mean, scale, self.bias[...].astype(jnp.float32)

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        return _scaled(x_BFHWC, self.of(x_BFHWC))


class ResnetBlock(nnx.Module):
    """x + conv(silu(norm(conv(silu(norm(x)))))), x through a linear shortcut where the width changes."""

    def __init__(self, inputs: int, outputs: int, groups: int, *, rngs: nnx.Rngs):
        self.norm1 = GroupNorm(inputs, groups, rngs=rngs)
        self.conv1 = CausalConv3d(inputs, outputs, rngs=rngs)
        self.norm2 = GroupNorm(outputs, groups, rngs=rngs)
        self.conv2 = CausalConv3d(outputs, outputs, rngs=rngs)
        self.conv_shortcut = None if inputs == outputs else Linear(inputs, outputs, ("conv_in", "conv_out"), rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        y = self.conv1(x_BFHWC, norm=self.norm1.of(x_BFHWC))
        shortcut = () if self.conv_shortcut is None else self.conv_shortcut.weights(x_BFHWC.dtype)
        return self.conv2(y, norm=self.norm2.of(y), residual=(x_BFHWC, *shortcut))


class CausalAttention(nnx.Module):
    """One head over all positions of a frame and of the frames before it, added to its input."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.group_norm = GroupNorm(width, groups, rngs=rngs)
        self.to_q, self.to_k, self.to_v = (Linear(width, width, ("conv_in", "conv_out"), rngs=rngs) for _ in range(3))
        self.to_out = Linear(width, width, ("conv_in", "conv_out"), rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        batch, frames, height, width, channels = x_BFHWC.shape
        normed = self.group_norm(x_BFHWC)
        q, k, v = (to(normed).reshape(batch, -1, 1, channels) for to in (self.to_q, self.to_k, self.to_v))
        # Frame by frame over a growing prefix: the numbers of a dense causal mask, which at 720p would have 230k x 230k entries.
        area = height * width
        seen = [attend(q[:, f * area:(f + 1) * area], k[:, :(f + 1) * area], v[:, :(f + 1) * area]) for f in range(frames)]
        return x_BFHWC + self.to_out(jnp.concatenate(seen, axis=1).reshape(x_BFHWC.shape))


class MidBlock(nnx.Module):
    """Residual block, attention, residual block."""

    def __init__(self, width: int, groups: int, *, rngs: nnx.Rngs):
        self.attentions = _numbered([CausalAttention(width, groups, rngs=rngs)])
        self.resnets = _numbered(ResnetBlock(width, width, groups, rngs=rngs) for _ in range(2))

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        return self.resnets["1"](self.attentions["0"](self.resnets["0"](x_BFHWC)))


class _Resampler(nnx.Module):
    """Holds a resampling convolution under the name that diffusers has for it."""

    def __init__(self, width: int, stride: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.conv = CausalConv3d(width, width, stride=stride, rngs=rngs)


class DownBlock(nnx.Module):
    """Residual blocks, then a strided convolution unless `factor` is (1, 1, 1)."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, factor: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.resnets = _numbered(ResnetBlock(inputs if i == 0 else outputs, outputs, groups, rngs=rngs) for i in range(layers))
        self.downsamplers = None if factor == (1, 1, 1) else _numbered([_Resampler(outputs, factor, rngs=rngs)])

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        for i in range(len(self.resnets)):
            x_BFHWC = self.resnets[str(i)](x_BFHWC)
        return x_BFHWC if self.downsamplers is None else self.downsamplers["0"].conv(x_BFHWC)


class UpBlock(nnx.Module):
    """Residual blocks, then nearest upsampling by `factor` and a convolution unless `factor` is (1, 1, 1)."""

    def __init__(self, inputs: int, outputs: int, layers: int, groups: int, factor: tuple[int, int, int], *, rngs: nnx.Rngs):
        self.resnets = _numbered(ResnetBlock(inputs if i == 0 else outputs, outputs, groups, rngs=rngs) for i in range(layers))
        self.upsamplers = None if factor == (1, 1, 1) else _numbered([_Resampler(outputs, (1, 1, 1), rngs=rngs)])
        self.factor = factor

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        for i in range(len(self.resnets)):
            x_BFHWC = self.resnets[str(i)](x_BFHWC)
        return x_BFHWC if self.upsamplers is None else self.upsamplers["0"].conv(x_BFHWC, factor=self.factor)


def upsample(x_BFHWC: jax.Array, factor: tuple[int, int, int]) -> jax.Array:
    """Nearest upsampling; the first frame stays one frame, the others are repeated: F -> 1 + (F-1) * factor[0]."""
    if factor[0] > 1:
        x_BFHWC = jnp.concatenate([x_BFHWC[:, :1], jnp.repeat(x_BFHWC[:, 1:], factor[0], axis=1)], axis=1)
    return jnp.repeat(jnp.repeat(x_BFHWC, factor[1], axis=2), factor[2], axis=3)


def block_factors(config: VAEConfig) -> tuple[tuple[int, int, int], ...]:
    """(frames, rows, columns) by which block i of the encoder divides and block i of the decoder multiplies.

    Both count from their own input: space in the first blocks, time in the last ones but the very last.
    """
    blocks, space, time = len(config.block_widths), int(math.log2(config.spatial_compression)), int(math.log2(config.temporal_compression))
    return tuple((2 if blocks - 1 - time <= i < blocks - 1 else 1, *((2, 2) if i < space else (1, 1))) for i in range(blocks))


class Encoder(nnx.Module):
    """Pixels to twice the latent channels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_widths, config.norm_groups
        self.conv_in = CausalConv3d(config.in_channels, widths[0], axes=(None, "conv_out"), rngs=rngs)
        self.down_blocks = _numbered(
            DownBlock(widths[max(i - 1, 0)], widths[i], config.layers_per_block, groups, factor, rngs=rngs)
            for i, factor in enumerate(block_factors(config)))
        self.mid_block = MidBlock(widths[-1], groups, rngs=rngs)
        self.conv_norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], 2 * config.latent_channels, axes=("conv_in", None), rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        x_BFHWC = self.conv_in(x_BFHWC)
        for i in range(len(self.down_blocks)):
            x_BFHWC = self.down_blocks[str(i)](constrain(x_BFHWC, "batch", None, "pixels", None, None))
        x_BFHWC = self.mid_block(x_BFHWC)
        return self.conv_out(x_BFHWC, norm=self.conv_norm_out.of(x_BFHWC))


class Decoder(nnx.Module):
    """Latents to pixels."""

    def __init__(self, config: VAEConfig, *, rngs: nnx.Rngs):
        widths, groups = config.block_widths[::-1], config.norm_groups
        self.conv_in = CausalConv3d(config.latent_channels, widths[0], axes=(None, "conv_out"), rngs=rngs)
        self.mid_block = MidBlock(widths[0], groups, rngs=rngs)
        self.up_blocks = _numbered(
            UpBlock(widths[max(i - 1, 0)], widths[i], config.layers_per_block + 1, groups, factor, rngs=rngs)
            for i, factor in enumerate(block_factors(config)))
        self.conv_norm_out = GroupNorm(widths[-1], groups, rngs=rngs)
        self.conv_out = CausalConv3d(widths[-1], config.in_channels, axes=("conv_in", None), rngs=rngs)

    def __call__(self, x_BFHWC: jax.Array) -> jax.Array:
        x_BFHWC = self.mid_block(self.conv_in(x_BFHWC))
        for i in range(len(self.up_blocks)):
            x_BFHWC = self.up_blocks[str(i)](constrain(x_BFHWC, "batch", None, "pixels", None, None))
        return self.conv_out(x_BFHWC, norm=self.conv_norm_out.of(x_BFHWC))


class VAE(nnx.Module):
    """Pixels (B, F, H, W, 3) in [-1, 1] <-> latents (B, 1 + (F-1)/4, H/8, W/8, C), not scaled. F is 4k+1."""

    def __init__(self, config: VAEConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        latent = config.latent_channels
        self.encoder = Encoder(config, rngs=rngs)
        self.decoder = Decoder(config, rngs=rngs)
        self.quant_conv = Linear(2 * latent, 2 * latent, (None, None), rngs=rngs)
        self.post_quant_conv = Linear(latent, latent, (None, None), rngs=rngs)
        self.config, self.dtype = config, runtime.compute_dtype

    def encode(self, pixels_BFHWC: jax.Array) -> jax.Array:
        """Moments of the posterior, float32: mean and log variance (clipped to [-30, 20]) side by side on the last dim."""
        moments = self.quant_conv(self.encoder(pixels_BFHWC.astype(self.dtype))).astype(jnp.float32)
        mean, logvar = jnp.split(moments, 2, axis=-1)
        return jnp.concatenate([mean, jnp.clip(logvar, *_LOGVAR_RANGE)], axis=-1)

    def decode(self, latents_BFHWC: jax.Array) -> jax.Array:
        """Pixels of unscaled latents, float32, about [-1, 1] (not clipped)."""
        return self.decoder(self.post_quant_conv(latents_BFHWC.astype(self.dtype))).astype(jnp.float32)
