"""The interleaved context as flat tokens: patches, positions, and the references picked for each row.

Dims: B rows, F H W latent frames, height, width, C channels, S target tokens, P values a token (C x patch), K pool tokens,
L prompt tokens, R reference tokens, D MMDiT width.
"""
import math
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from vino_jax.batch import ROLE_LATENT, ROLE_MARKER, Batch
from vino_jax.errors import UserError


@jax.tree_util.register_dataclass
@dataclass
class References:
    """Reference tokens of each row, in any order: `position` carries theirs. A token is a latent (tokens_BRP counts), a marker
    (markers_BRD counts) or padding, as role_BR (ROLE_* of batch.py) says."""

    tokens_BRP: jax.Array
    markers_BRD: jax.Array
    role_BR: jax.Array
    position_BR3: jax.Array


def patchify(latents_BFHWC: jax.Array, patch: tuple[int, int, int]) -> jax.Array:
    """(B, F, H, W, C) -> tokens (B, S, P), frame-major, a token's values in the order (C, pt, ph, pw) of a torch conv weight's inputs.

    Raises UserError where the patch does not divide the latents.
    """
    b, *sizes, c = latents_BFHWC.shape
    if any(size % p for size, p in zip(sizes, patch)):
        raise UserError(f"latents of {sizes} frames, rows and columns do not divide into patches of {list(patch)}; choose a size that does")
    (f, h, w), (pt, ph, pw) = (tuple(size // p for size, p in zip(sizes, patch)), patch)
    x = latents_BFHWC.reshape(b, f, pt, h, ph, w, pw, c).transpose(0, 1, 3, 5, 7, 2, 4, 6)
    return x.reshape(b, f * h * w, c * pt * ph * pw)


def unpatchify(tokens_BSP: jax.Array, grid: tuple[int, int, int], patch: tuple[int, int, int]) -> jax.Array:
    """The inverse of patchify; grid: tokens by frame, row and column."""
    (f, h, w), (pt, ph, pw) = grid, patch
    b, _, values = tokens_BSP.shape
    c = values // math.prod(patch)
    x = tokens_BSP.reshape(b, f, h, w, c, pt, ph, pw).transpose(0, 1, 5, 2, 6, 3, 7, 4)
    return x.reshape(b, f * pt, h * ph, w * pw, c)


def target_positions(frames: int, height: int, width: int, start_B: jax.Array) -> jax.Array:
    """Positions (B, S, 3) int32 (time, row, column) of a target of that token grid, whose first frame is at time step start_B."""
    grid = jnp.stack(jnp.meshgrid(*(jnp.arange(n, dtype=jnp.int32) for n in (frames, height, width)), indexing="ij"), -1).reshape(1, -1, 3)
    start_B13 = jnp.pad(start_B.astype(jnp.int32)[:, None, None], ((0, 0), (0, 0), (0, 2)))
    return grid + start_B13


def _pick(x_BKD: jax.Array, index_BR: jax.Array, keep_BR: jax.Array) -> jax.Array:
    """Rows of x by index where `keep`, zeros elsewhere."""
    if x_BKD.shape[1] == 0:
        return jnp.zeros((*index_BR.shape, x_BKD.shape[2]), x_BKD.dtype)
    picked = jnp.take_along_axis(x_BKD, jnp.where(keep_BR, index_BR, 0)[:, :, None], axis=1, mode="clip")
    return jnp.where(keep_BR[:, :, None], picked, jnp.zeros((), x_BKD.dtype))


def select_references(pool_BKP: jax.Array, marker_BLD: jax.Array, batch: Batch) -> References:
    """The references of each row: latent tokens from the pool, boundary tokens from the VAE-branch connector's outputs at the
    prompt positions of vision_start and vision_end, both by `batch.source`; padding is zero."""
    latent_BR, marker_BR = batch.role == ROLE_LATENT, batch.role == ROLE_MARKER
    return References(_pick(pool_BKP, batch.source, latent_BR), _pick(marker_BLD, batch.source, marker_BR), batch.role, batch.position)
