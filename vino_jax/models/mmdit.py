"""The MMDiT: HunyuanVideo's double- and single-stream transformer over an interleaved context.

Dims: B rows, F H W latent frames, height, width, C channels or context width, S target tokens, R reference tokens, V = S + R visual
tokens, L context tokens, D width, N heads, H head width (of q, k, v and the RoPE tables), P values a token.

Visual tokens lie as [target ; references]: RoPE carries their order, so what leaves is a static slice. In joint attention the
context follows, shard by shard where tokens lie on several (sharding/constrain.py: join). What a remat policy can save has a name
(nn/stack.py). Parameter names of the published model stand in convert/tables/mmdit.py.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name

from vino_jax.batch import ROLE_MARKER, ROLE_PAD
from vino_jax.models.context import References, patchify, target_positions, unpatchify
from vino_jax.nn.attention import attend
from vino_jax.nn.layers import LayerNorm, Linear, RMSNorm, gelu_tanh, sinusoid
from vino_jax.nn.rope import apply_rope, rope_tables
from vino_jax.nn.runtime import Runtime
from vino_jax.nn.stack import run_stack, stacked, within_budget
from vino_jax.settings import MMDiTConfig
from vino_jax.sharding.constrain import constrain, join, part, shards

_TIME_FEATURES = 256
# Modulations and the output start near zero, so that fresh blocks are near the identity; not at zero, where a frozen MMDiT would
# hide the context from whoever trains the connector alone.
_SMALL = 0.1
# (visual tokens, all blocks) -> what comes of the tokens: who calls the MMDiT may put something in the place of `run_blocks`
Through = Callable[[jax.Array, Callable[[jax.Array], jax.Array]], jax.Array]


def run_blocks(x_BVD: jax.Array, blocks: Callable[[jax.Array], jax.Array]) -> jax.Array:
    return blocks(x_BVD)



def _parts(modulation: Linear, signal_BD: jax.Array, count: int) -> list[jax.Array]:
    """The shifts, scales and gates (B, D) that one product gives side by side. They are gathered before they are cut: XLA's partitioner
    (jax 0.10.2) gives wrong numbers for pieces of a dim that lies over "tensor" while rows lie over two mesh axes."""
    return jnp.split(constrain(modulation(signal_BD), "batch", None), count, axis=-1)


def _modulate(x_BLD, shift_BD, scale_BD):
    return x_BLD * (1 + scale_BD[:, None]) + shift_BD[:, None]


class MLP(nnx.Module):
    """Linear, activation, Linear."""

    def __init__(self, inputs: int, hidden: int, outputs: int, activation, axes=("embed", "mlp", "embed"), *, rngs: nnx.Rngs):
        self.up = Linear(inputs, hidden, axes[:2], rngs=rngs)
        self.down = Linear(hidden, outputs, axes[1:], rngs=rngs)
        self.activation = activation

    def __call__(self, x: jax.Array) -> jax.Array:
        return self.down(self.activation(checkpoint_name(self.up(x), "mlp")))


def _embedder(inputs: int, width: int, rngs: nnx.Rngs) -> MLP:
    """Of a row's time, guidance or pooled text: features -> width."""
    return MLP(inputs, width, width, jax.nn.silu, (None, "embed", None), rngs=rngs)


class Projections(nnx.Module):
    """Queries, keys and values of one stream, RMS-normed by head where `norm`."""

    def __init__(self, config: MMDiTConfig, *, norm: bool, rngs: nnx.Rngs):
        width, self.heads = config.width, config.heads
        self.query = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.key = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.value = Linear(width, width, ("embed", "heads"), rngs=rngs)
        self.query_norm = RMSNorm(config.head_dim, eps=1e-6, rngs=rngs) if norm else None
        self.key_norm = RMSNorm(config.head_dim, eps=1e-6, rngs=rngs) if norm else None

    def __call__(self, x_BLD: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        q, k, v = (checkpoint_name(p(x_BLD), "qkv").reshape(*x_BLD.shape[:2], self.heads, -1) for p in (self.query, self.key, self.value))
        return (q, k, v) if self.query_norm is None else (self.query_norm(q), self.key_norm(k), v)


class RefinerBlock(nnx.Module):
    """Self-attention and MLP over the context alone; time and pooled context gate both."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.norm1 = LayerNorm(width, rngs=rngs)
        self.attention = Projections(config, norm=False, rngs=rngs)
        self.out = Linear(width, width, ("heads", "embed"), rngs=rngs)
        self.norm2 = LayerNorm(width, rngs=rngs)
        # the published refiner keeps ratio 4 whatever mlp_ratio says
        self.mlp = MLP(width, 4 * width, width, jax.nn.silu, rngs=rngs)
        self.gates = Linear(width, 2 * width, ("embed", "modulation"), rngs=rngs)

    def __call__(self, x_BLD: jax.Array, signal_BD: jax.Array, mask_B1LL: jax.Array, kernel: str) -> jax.Array:
        gate_attention, gate_mlp = (gate[:, None] for gate in _parts(self.gates, signal_BD, 2))
        q, k, v = self.attention(self.norm1(x_BLD))
        x_BLD = x_BLD + gate_attention * self.out(attend(q, k, v, mask=mask_B1LL, kernel=kernel).reshape(x_BLD.shape))
        return x_BLD + gate_mlp * self.mlp(self.norm2(x_BLD))


class TokenRefiner(nnx.Module):
    """VLM-branch embeddings (B, L, C) -> context (B, L, D), through blocks gated by time and by the mean embedding."""

    def __init__(self, config: MMDiTConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        self.runtime = runtime
        self.time = _embedder(_TIME_FEATURES, config.width, rngs)
        self.pooled = _embedder(config.text_width, config.width, rngs)
        self.context_in = Linear(config.text_width, config.width, (None, "embed"), rngs=rngs)
        self.blocks = stacked(lambda r: RefinerBlock(config, rngs=r), config.refiner_blocks, rngs)

    def __call__(self, context_BLC: jax.Array, mask_BL: jax.Array, features_BT: jax.Array) -> jax.Array:
        weights_BL1 = mask_BL[:, :, None].astype(jnp.float32)
        pooled_BC = jnp.sum(context_BLC.astype(jnp.float32) * weights_BL1, axis=1) / jnp.maximum(jnp.sum(weights_BL1, axis=1), 1.0)
        signal_BD = jax.nn.silu(self.time(features_BT) + self.pooled(pooled_BC)).astype(context_BLC.dtype)
        # a row of padding sees column 0, so that its softmax is over something
        mask_BLL = (mask_BL[:, :, None] & mask_BL[:, None, :]) | (jnp.arange(mask_BL.shape[1]) == 0)
        call = lambda block, x, _: (block(x, signal_BD, mask_BLL[:, None], self.runtime.attention), None)  # noqa: E731
        return run_stack(self.blocks, call, self.context_in(context_BLC), remat="full")[0]


class Stream(nnx.Module):
    """One of a double block's two streams: all of it but the joint attention."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        width = config.width
        self.modulation = Linear(width, 6 * width, ("embed", "modulation"), gain=_SMALL, rngs=rngs)
        self.norm = LayerNorm(width, affine=False, rngs=rngs)
        self.attention = Projections(config, norm=True, rngs=rngs)
        self.out = Linear(width, width, ("heads", "embed"), rngs=rngs)
        self.mlp = MLP(width, int(width * config.mlp_ratio), width, gelu_tanh, rngs=rngs)

    def before(self, x_BLD: jax.Array, signal_BD: jax.Array):
        """(q, k, v) for the joint attention, and what `after` needs of the modulation."""
        shift, scale, *rest = _parts(self.modulation, signal_BD, 6)
        return self.attention(_modulate(self.norm(x_BLD), shift, scale)), rest

    def after(self, x_BLD: jax.Array, attended_BLNH: jax.Array, rest: list[jax.Array]) -> jax.Array:
        gate_attention, shift, scale, gate_mlp = rest
        x_BLD = x_BLD + gate_attention[:, None] * checkpoint_name(self.out(attended_BLNH.reshape(x_BLD.shape)), "branch")
        return x_BLD + gate_mlp[:, None] * checkpoint_name(self.mlp(_modulate(self.norm(x_BLD), shift, scale)), "branch")


class DoubleBlock(nnx.Module):
    """Visual tokens and context with weights of their own, joined in attention."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        self.visual = Stream(config, rngs=rngs)
        self.context = Stream(config, rngs=rngs)

    def __call__(self, x_BVD: jax.Array, context_BLD: jax.Array, signal_BD: jax.Array, rope, valid_BS: jax.Array, kernel: str):
        visual_qkv, visual_rest = self.visual.before(x_BVD, signal_BD)
        context_qkv, context_rest = self.context.before(context_BLD, signal_BD)
        q, k, v = (join(*pair) for pair in zip(visual_qkv, context_qkv))
        attended_BSNH = attend(apply_rope(q, *rope), apply_rope(k, *rope), v, valid=valid_BS, kernel=kernel)
        visual_BVNH, context_BLNH = part(attended_BSNH, x_BVD.shape[1])
        return self.visual.after(x_BVD, visual_BVNH, visual_rest), self.context.after(context_BLD, context_BLNH, context_rest)


class SingleBlock(nnx.Module):
    """All tokens with the same weights; attention and MLP side by side into one output product."""

    def __init__(self, config: MMDiTConfig, *, rngs: nnx.Rngs):
        width, hidden = config.width, int(config.width * config.mlp_ratio)
        self.modulation = Linear(width, 3 * width, ("embed", "modulation"), gain=_SMALL, rngs=rngs)
        self.norm = LayerNorm(width, affine=False, rngs=rngs)
        self.attention = Projections(config, norm=True, rngs=rngs)
        self.mlp = Linear(width, hidden, ("embed", "mlp"), rngs=rngs)
        self.out = Linear(width + hidden, width, ("mlp", "embed"), rngs=rngs)

    def __call__(self, x_BSD: jax.Array, signal_BD: jax.Array, rope, valid_BS: jax.Array, kernel: str) -> jax.Array:
        shift, scale, gate = _parts(self.modulation, signal_BD, 3)
        normed = _modulate(self.norm(x_BSD), shift, scale)
        q, k, v = self.attention(normed)
        attended = attend(apply_rope(q, *rope), apply_rope(k, *rope), v, valid=valid_BS, kernel=kernel).reshape(x_BSD.shape)
        # out([attended, mlp]) as two products: cutting the kernel is cheap, joining the activations is not
        kernel_ID, bias_D = self.out.weights(x_BSD.dtype)
        attention_kernel, mlp_kernel = jnp.split(kernel_ID, [x_BSD.shape[-1]])
        out = attended @ attention_kernel + gelu_tanh(checkpoint_name(self.mlp(normed), "mlp")) @ mlp_kernel + bias_D
        return x_BSD + gate[:, None] * checkpoint_name(out, "branch")


class MMDiT(nnx.Module):
    """Velocity (noise - data) of a noisy target, given references and context."""

    def __init__(self, config: MMDiTConfig, runtime: Runtime, *, rngs: nnx.Rngs):
        self.config, self.runtime = config, runtime
        width, (pt, ph, pw) = config.width, config.patch
        self.latent_in = Linear(config.in_channels * pt * ph * pw, width, (None, "embed"), rngs=rngs)
        self.refiner = TokenRefiner(config, runtime, rngs=rngs)
        self.time = _embedder(_TIME_FEATURES, width, rngs)
        self.guidance = _embedder(_TIME_FEATURES, width, rngs)
        self.pooled = _embedder(config.pooled_width, width, rngs)  # published and unused: kept, so that a conversion loses nothing
        self.double = stacked(lambda r: DoubleBlock(config, rngs=r), config.double_blocks, rngs)
        self.single = stacked(lambda r: SingleBlock(config, rngs=r), config.single_blocks, rngs)
        self.modulation_out = Linear(width, 2 * width, ("embed", "modulation"), gain=_SMALL, rngs=rngs)
        self.norm_out = LayerNorm(width, affine=False, rngs=rngs)
        self.out = Linear(width, config.out_channels * pt * ph * pw, ("embed", None), gain=_SMALL, rngs=rngs)

    def __call__(self, latents_BFHWC: jax.Array, time_B: jax.Array, references: References, target_start_B: jax.Array,
                 context_BLC: jax.Array, context_mask_BL: jax.Array, *, joint_mask_BL: jax.Array | None = None,
                 through: Through = run_blocks) -> jax.Array:
        """Velocity, float32, shaped as the noisy latents.

        latents: scaled VAE space, computed in the runtime's dtype whatever theirs is; time: flow time in [0, 1];
        target_start (B,) int32: time step of the target's first frame; context: VLM-branch embeddings, text_width wide;
        context_mask: bool, True for tokens that count (at least one a row). joint_mask: bool, context tokens that the joint attention
        sees, by default those that count; the reference implementation, which pads nothing, masks the refiner only (all True here).
        Raises UserError where the patch does not divide the latents.
        """
        config, dtype = self.config, self.runtime.compute_dtype
        joint_mask_BL = context_mask_BL if joint_mask_BL is None else joint_mask_BL
        grid = tuple(size // p for size, p in zip(latents_BFHWC.shape[1:4], config.patch))
        tokens_BSP = patchify(latents_BFHWC.astype(dtype), config.patch)
        targets, padding = tokens_BSP.shape[1], shards("tokens")
        references = _padded(references, -(targets + references.role_BR.shape[1]) % padding)
        context_BLC, context_mask_BL, joint_mask_BL = (_pad(x, -x.shape[1] % padding) for x in (context_BLC, context_mask_BL, joint_mask_BL))
        features_BT = sinusoid(time_B.astype(jnp.float32) * config.time_scale, _TIME_FEATURES)
        signal_BD = self._signal(features_BT).astype(dtype)
        context_BLD = self.refiner(context_BLC.astype(dtype), context_mask_BL, features_BT)
        x_BVD = self._visual(tokens_BSP, references)
        position_BV3 = jnp.concatenate([target_positions(*grid, target_start_B), references.position_BR3], axis=1)
        rope = self._rope(position_BV3, context_BLD.shape[1])
        valid_BV = jnp.concatenate([jnp.ones(tokens_BSP.shape[:2], jnp.bool_), references.role_BR != ROLE_PAD], axis=1)
        valid_BS = join(valid_BV, joint_mask_BL)
        x_BVD = through(x_BVD, lambda x: self._blocks(x, context_BLD, signal_BD, rope, valid_BS))
        scale, shift = _parts(self.modulation_out, signal_BD, 2)
        x_BVD = _modulate(self.norm_out(x_BVD), shift, scale)
        # cut after the product: where tokens lie on several shards, 64 values each travel, not the model's width
        return unpatchify(self.out(x_BVD.astype(jnp.float32))[:, :targets], grid, config.patch)

    def _signal(self, features_BT: jax.Array) -> jax.Array:
        """What every modulation reads (B, D): time and the constant guidance, float32."""
        guidance_1T = sinusoid(jnp.full((1,), self.config.guidance, jnp.float32), _TIME_FEATURES)
        return jax.nn.silu(self.time(features_BT) + self.guidance(guidance_1T))

    def _visual(self, tokens_BSP: jax.Array, references: References) -> jax.Array:
        """Target, latent and boundary tokens (B, S + R, D)."""
        x_BVD = self.latent_in(jnp.concatenate([tokens_BSP, references.tokens_BRP.astype(tokens_BSP.dtype)], axis=1))
        target, reference = jnp.split(x_BVD, [tokens_BSP.shape[1]], axis=1)
        marker_BR1 = (references.role_BR == ROLE_MARKER)[:, :, None]
        return jnp.concatenate([target, jnp.where(marker_BR1, references.markers_BRD.astype(x_BVD.dtype), reference)], axis=1)

    def _rope(self, position_BV3: jax.Array, context: int) -> tuple[jax.Array, jax.Array]:
        """Tables over [visual ; context]; the context's rows do not turn (cos 1, sin 0)."""
        cos, sin = rope_tables(position_BV3, self.config.rope_axes, self.config.rope_theta)
        rows = (cos.shape[0], context, cos.shape[2])
        return join(cos, jnp.ones(rows, cos.dtype)), join(sin, jnp.zeros(rows, sin.dtype))

    def _blocks(self, x_BVD, context_BLD, signal_BD, rope, valid_BS) -> jax.Array:
        """All blocks; visual tokens (B, V, D)."""
        kernel = self.runtime.attention

        def double(block, carry, _):
            x, context = block(*carry, signal_BD, rope, valid_BS, kernel)
            return (constrain(x, "batch", "tokens", "width"), constrain(context, "batch", "tokens", "width")), None

        def single(block, x, _):
            return constrain(block(x, signal_BD, rope, valid_BS, kernel), "batch", "tokens", "width"), None

        streams = (constrain(x_BVD, "batch", "tokens", "width"), constrain(context_BLD, "batch", "tokens", "width"))
        of_double, of_single = within_budget(self.runtime.remat, [(self.double, double, streams), (self.single, single, join(*streams))])
        streams, _ = run_stack(self.double, double, streams, remat=of_double)
        joined, _ = run_stack(self.single, single, constrain(join(*streams), "batch", "tokens", "width"), remat=of_single)
        return part(joined, x_BVD.shape[1])[0]


def _pad(x_BL: jax.Array, count: int) -> jax.Array:
    """`count` zeros (False) more along dim 1."""
    return jnp.pad(x_BL, [(0, 0), (0, count), *[(0, 0)] * (x_BL.ndim - 2)])


def _padded(references: References, count: int) -> References:
    """With `count` more tokens of padding."""
    return jax.tree.map(lambda x: _pad(x, count), references)
