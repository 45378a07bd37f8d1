"""VINO: frozen VLM and VAE, learnable queries, two connectors and the MMDiT, as one set of functions over a tree of parameters.

Dims: B rows, L prompt tokens, Q queries, C context width, D MMDiT width, R reference tokens, K pool tokens, P values a latent
token (channels x patch), F H W latent or pixel frames, height, width.
"""
import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace

import jax
import jax.numpy as jnp

from vino_jax.batch import ROLE_MARKER, ROLE_PAD, Batch
from vino_jax.models.connector import Connector, Queries
from vino_jax.models.context import patchify, select_references
from vino_jax.models.mmdit import MMDiT, Through, run_blocks
from vino_jax.models.qwen_vl import QwenVL
from vino_jax.models.vae import VAE
from vino_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled
from vino_jax.nn.lora import Adapter, attach, within
from vino_jax.nn.module import Definition, Params
from vino_jax.nn.quantize import QUANTIZERS
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig


@jax.tree_util.register_dataclass
@dataclass
class Conditioning:
    """What the VLM says of one batch; it does not depend on the flow time, so a sampler computes it once."""

    context_BLC: jax.Array  # prompt and queries, as the MMDiT's context
    context_mask_BL: jax.Array  # bool
    markers_BLD: jax.Array  # VAE-branch connector at every prompt position, for boundary tokens


class Vino:
    """The whole model. `parts` name its Definitions; parameters are {"mmdit": ..., "connector": ..., "vae_connector": ...,
    "queries": ..., "vlm": ..., "vae": ...}, plain nested dicts; a method needs only the parts that it uses.

    tiling: of the VAE (models/vae_tiling.py); by default clips go through in windows of 16 frames, as the published VAE takes them.
    adapters: of the MMDiT's kernels (nn/lora.py), by whole path: "mmdit/...".
    """

    def __init__(self, config: VinoConfig, runtime: Runtime, tiling: Tiling | None = None, adapters: Mapping[str, Adapter] | None = None):
        self.config, self.runtime, self.adapters = config, runtime, dict(adapters or {})
        self._tiling = tiling or Tiling(side=None)
        vlm_width, ratio = config.vlm.text.width, config.connector_ratio
        self.parts = {
            "mmdit": self._mmdit(runtime),
            "connector": Definition(lambda r: Connector(vlm_width, config.mmdit.text_width, ratio, rngs=r)),
            "vae_connector": Definition(lambda r: Connector(vlm_width, config.mmdit.width, ratio, rngs=r)),
            "queries": Definition(lambda r: Queries(config.queries, vlm_width, rngs=r)),
            "vlm": Definition(lambda r: QwenVL(config.vlm, runtime, rngs=r)),
            "vae": Definition(lambda r: VAE(config.vae, runtime, rngs=r)),
        }

    def _mmdit(self, runtime: Runtime) -> Definition:
        return Definition(lambda r: attach(MMDiT(self.config.mmdit, runtime, rngs=r), within("mmdit", self.adapters), r))

    def with_remat(self, policy: str) -> "Vino":
        """The same model, whose MMDiT recomputes by another policy (nn/stack.py) in the backward pass."""
        if policy == self.runtime.remat:
            return self
        other = copy.copy(self)
        other.runtime = replace(self.runtime, remat=policy)
        other.parts = {**self.parts, "mmdit": self._mmdit(other.runtime)}  # the others are not built again: it takes a second
        return other

    @property
    def abstract(self) -> Params:
        """ShapeDtypeStructs (float32) of every parameter."""
        return {name: part.abstract for name, part in self.parts.items()}

    @property
    def axes(self) -> Params:
        """Logical axis names of every parameter."""
        return {name: part.axes for name, part in self.parts.items()}

    def axes_of(self, params: Params) -> Params:
        """Logical axis names of those parts that `params` holds."""
        return {name: self.parts[name].axes for name in params}

    def init(self, key: jax.Array, parts: tuple[str, ...] | None = None) -> Params:
        """Fresh parameters of `parts` (by default all); a part's values do not depend on which others are made."""
        order = list(self.parts)
        return {name: self.parts[name].init(jax.random.fold_in(key, order.index(name))) for name in parts or order}

    def encode(self, params: Params, pixels_BFHWC: jax.Array) -> jax.Array:
        """uint8 pixels -> float32 VAE moments (B, f, h, w, 2C); moments pass through as they are."""
        if pixels_BFHWC.dtype != jnp.uint8:
            return pixels_BFHWC
        x = pixels_BFHWC.astype(jnp.float32) / 127.5 - 1.0
        moments = encode_tiled(self.parts["vae"](params["vae"]), x.astype(self.runtime.compute_dtype), self._tiling)
        return jax.lax.stop_gradient(moments.astype(jnp.float32))

    def latents(self, moments_BFHWC: jax.Array, keys_B: jax.Array | None) -> jax.Array:
        """Scaled latents (B, f, h, w, C): a sample of the posterior with one key a row, its mode with None."""
        mean, log_variance = jnp.split(moments_BFHWC, 2, axis=-1)
        if keys_B is not None:
            noise = jax.vmap(lambda key: jax.random.normal(key, mean.shape[1:], mean.dtype))(keys_B)
            mean = mean + jnp.exp(0.5 * log_variance) * noise
        return mean * self.config.vae.scaling_factor

    def decode(self, params: Params, latents_BFHWC: jax.Array) -> jax.Array:
        """Scaled latents -> uint8 pixels (B, F, H, W, 3): clip(127.5 x + 127.5), truncated, as in the reference."""
        x = (latents_BFHWC / self.config.vae.scaling_factor).astype(self.runtime.compute_dtype)
        pixels = decode_tiled(self.parts["vae"](params["vae"]), x, self._tiling).astype(jnp.float32)
        return jnp.clip(pixels * 127.5 + 127.5, 0.0, 255.0).astype(jnp.uint8)

    def pool(self, batch: Batch, keys_B: jax.Array | None) -> jax.Array | None:
        """Latent tokens (B, K, P) of all references in pool order (see batch.py), from their moments; None where the bucket has none.

        keys_B: one key a row for the posterior sample, or None for its mode.
        """
        patch, tokens = self.config.mmdit.patch, []
        # two keys, one a kind: split(key, n)[0] equals fold_in(key, 0), so one key would give the first image and the clip the same noise
        image_keys_B, video_keys_B = (None, None) if keys_B is None else jnp.unstack(jax.vmap(jax.random.split)(keys_B), axis=1)
        if batch.images is not None:
            b, n = batch.images.shape[:2]
            keys = None if keys_B is None else jax.vmap(lambda key: jax.random.split(key, n))(image_keys_B).reshape(b * n)
            flat = batch.images.reshape(b * n, 1, *batch.images.shape[2:])
            image_tokens = patchify(self.latents(flat, keys), patch)
            tokens.append(image_tokens.reshape(b, -1, image_tokens.shape[-1]))
        if batch.video is not None:
            tokens.append(patchify(self.latents(batch.video, video_keys_B), patch))
        return jnp.concatenate(tokens, axis=1) if tokens else None

    def condition(self, params: Params, batch: Batch) -> Conditioning:
        """Run the VLM over prompts and queries and both connectors over its states."""
        dtype = self.runtime.compute_dtype
        queries_QW = self.parts["queries"](params["queries"])()
        prompt_BLW, queries_BQW = self.parts["vlm"](params["vlm"]).conditioning(batch, queries_QW.astype(dtype))
        connector = self.parts["connector"](params["connector"])
        context = jnp.concatenate([connector(prompt_BLW), connector(queries_BQW)], axis=1)
        mask = jnp.concatenate([batch.prompt_mask, jnp.ones(queries_BQW.shape[:2], jnp.bool_)], axis=1)
        if batch.role.shape[1]:
            markers = self.parts["vae_connector"](params["vae_connector"])(prompt_BLW)
        else:
            markers = jnp.zeros((*prompt_BLW.shape[:2], self.config.mmdit.width), dtype)
        return Conditioning(context, mask, markers)

    def velocity(self, params: Params, latents_BFHWC: jax.Array, time_B: jax.Array, pool_BKP: jax.Array | None, batch: Batch,
                 conditioning: Conditioning, through: Through = run_blocks) -> jax.Array:
        """The MMDiT's velocity (noise - data), float32, shaped as the scaled, noisy latents; time in [0, 1]."""
        dtype = self.runtime.compute_dtype
        if pool_BKP is None:
            pool_BKP = jnp.zeros((latents_BFHWC.shape[0], 0, self._token_values), jnp.float32)
        if not self.config.boundary_tokens:
            batch = batch.replace(role=jnp.where(batch.role == ROLE_MARKER, ROLE_PAD, batch.role))
        references = select_references(pool_BKP.astype(dtype), conditioning.markers_BLD, batch)
        mmdit = QUANTIZERS[self.runtime.quantize](self.parts["mmdit"](params["mmdit"]))
        return mmdit(latents_BFHWC.astype(dtype), time_B, references, batch.target_start, conditioning.context_BLC, conditioning.context_mask_BL,
                     through=through)

    @property
    def _token_values(self) -> int:
        f, h, w = self.config.mmdit.patch
        return self.config.mmdit.in_channels * f * h * w
