"""Tiled encoding and decoding, so that memory does not grow with the size of a clip; the numbers are those of diffusers' tiling.

A long clip goes through in windows of frames, a large picture in tiles; each overlaps its neighbour before it and is blended linearly
into it. Tiles of one shape run through one compiled body, one after another (lax.map), so neither memory nor compile time grows with
their number. On a mesh (sharding/constrain.py) they are shared out among the devices over which no rows lie.

Dims: N tiles, B batch, F frames, H height, W width, C channels.
"""
from collections.abc import Callable
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from vino_jax.errors import UserError
from vino_jax.models.vae import VAE
from vino_jax.sharding.constrain import map_tiles, tile_shards

_FRAMES, _ROWS, _COLUMNS = 1, 2, 3  # dims of (B, F, H, W, C)


@dataclass(frozen=True)
class Tiling:
    """Sizes in pixels and frames of pixels; None does not tile. The defaults are diffusers' after enable_tiling(); without it, it tiles
    frames only: Tiling(side=None). Larger inputs than `frames` or `side` are tiled, each tile starting a stride after the one before it.

    Raises UserError for a size that is no multiple of the VAE's 8 pixels or 4 frames, or a stride that is not within its size.
    """

    frames: int | None = 16
    frame_stride: int = 12
    side: int | None = 256
    stride: int = 192

    def __post_init__(self):
        for name, size, stride, unit in (("frames", self.frames, self.frame_stride, 4), ("side", self.side, self.stride, 8)):
            if size is not None and not (0 < stride <= size and size % unit == 0 and stride % unit == 0):
                raise UserError(f"tiling: {name} {size} with stride {stride} must be multiples of {unit}, the stride at most the size")


def encode_tiled(vae: VAE, pixels_BFHWC: jax.Array, tiling: Tiling) -> jax.Array:
    """Moments as VAE.encode gives them, (B, 1 + (F-1)/4, H/8, W/8, 2C) float32; the same as it where nothing needs tiling."""
    space, time = vae.config.spatial_compression, vae.config.temporal_compression
    return _run_windows(_Part.of(vae, VAE.encode), pixels_BFHWC, _Plan.of(tiling, (1, 1), (time, space)))


def decode_tiled(vae: VAE, latents_BFHWC: jax.Array, tiling: Tiling) -> jax.Array:
    """Pixels as VAE.decode gives them of unscaled latents, (B, 1 + 4(F-1), 8H, 8W, 3) float32; the same where nothing needs tiling."""
    space, time = vae.config.spatial_compression, vae.config.temporal_compression
    return _run_windows(_Part.of(vae, VAE.decode), latents_BFHWC, _Plan.of(tiling, (time, space), (1, 1)))


@dataclass(frozen=True)
class _Axis:
    """Tiling along one axis, in positions of what goes in; `kept` and `blend` in positions of what comes out."""

    size: int | None
    stride: int
    kept: int
    blend: int

    @classmethod
    def of(cls, size: int | None, stride: int, unit_in: int, unit_out: int) -> "_Axis":
        return cls(size and size // unit_in, stride // unit_in, stride // unit_out, ((size or stride) - stride) // unit_out)


@dataclass(frozen=True)
class _Plan:
    frames: _Axis
    side: _Axis

    @classmethod
    def of(cls, tiling: Tiling, units_in: tuple[int, int], units_out: tuple[int, int]) -> "_Plan":
        """units: pixels that a position stands for, in time and in space."""
        time, space = zip(units_in, units_out)
        return cls(_Axis.of(tiling.frames, tiling.frame_stride, *time), _Axis.of(tiling.side, tiling.stride, *space))


@dataclass(frozen=True)
class _Part:
    """A method of a VAE, (B, F, H, W, C) to its like, apart from the weights."""

    call: Callable  # (weights, x)
    weights: nnx.State

    @classmethod
    def of(cls, vae: VAE, method: Callable) -> "_Part":
        graph, weights = nnx.split(vae)
        return cls(lambda weights, x: method(nnx.merge(graph, weights), x), weights)

    def each(self, tiles_NBFHWC: jax.Array) -> jax.Array:
        """Of N tiles."""
        if len(tiles_NBFHWC) == 1:
            return self.call(self.weights, tiles_NBFHWC[0])[None]
        # each device has the same number: what the last ones lack is filled up with the last tile
        missing = -len(tiles_NBFHWC) % tile_shards(tiles_NBFHWC.shape[1])
        filled = jnp.concatenate([tiles_NBFHWC, *[tiles_NBFHWC[-1:]] * missing])
        done = map_tiles(lambda weights, tiles: jax.lax.map(lambda x: self.call(weights, x), tiles), self.weights, filled)
        return done[:len(tiles_NBFHWC)]


def _run_windows(part: _Part, x: jax.Array, plan: _Plan) -> jax.Array:
    frames, side = x.shape[_FRAMES], plan.side
    # A window has one frame more than its size, and all but the first lose their first frame, which was without its past: one of a
    # single frame would have nothing left.
    windows = [(0, frames)]
    if plan.frames.size is not None and frames > plan.frames.size:
        windows = [(i, min(i + plan.frames.size + 1, frames)) for i in range(0, frames, plan.frames.stride) if i == 0 or i + 1 < frames]
    rows, columns = ([(0, x.shape[dim])] for dim in (_ROWS, _COLUMNS))
    if side.size is not None and max(x.shape[_ROWS], x.shape[_COLUMNS]) > side.size:
        rows, columns = ([(i, min(i + side.size, x.shape[dim])) for i in range(0, x.shape[dim], side.stride)] for dim in (_ROWS, _COLUMNS))

    tiles = iter(_run_by_shape(part, [x[:, f0:f1, r0:r1, c0:c1] for f0, f1 in windows for r0, r1 in rows for c0, c1 in columns]))
    done = []
    for i in range(len(windows)):
        window = _join_grid([[next(tiles) for _ in columns] for _ in rows], side)
        done.append(window if i == 0 else _blend(done[-1], window[:, 1:], plan.frames.blend, _FRAMES))
    if len(done) == 1:
        return done[0]
    return jnp.concatenate([window[:, :plan.frames.kept + (i == 0)] for i, window in enumerate(done)], axis=_FRAMES)


def _join_grid(grid: list[list[jax.Array]], side: _Axis) -> jax.Array:
    """One picture of rows of tiles: each is blended into the finished one above it, then into the finished one to its left."""
    if len(grid) == len(grid[0]) == 1:
        return grid[0][0]
    rows = []
    for i, row in enumerate(grid):
        for j in range(len(row)):
            if i > 0:
                row[j] = _blend(grid[i - 1][j], row[j], side.blend, _ROWS)
            if j > 0:
                row[j] = _blend(row[j - 1], row[j], side.blend, _COLUMNS)
        rows.append(jnp.concatenate([tile[:, :, :side.kept, :side.kept] for tile in row], axis=_COLUMNS))
    return jnp.concatenate(rows, axis=_ROWS)


def _run_by_shape(part: _Part, tiles: list[jax.Array]) -> list[jax.Array]:
    """What `part` makes of each tile, in order."""
    by_shape: dict[tuple[int, ...], list[int]] = {}
    for i, tile in enumerate(tiles):
        by_shape.setdefault(tile.shape, []).append(i)
    done = {}
    for members in by_shape.values():
        done.update(zip(members, part.each(jnp.stack([tiles[i] for i in members]))))
    return [done[i] for i in range(len(tiles))]


def _blend(before: jax.Array, tile: jax.Array, extent: int, dim: int) -> jax.Array:
    """`tile` with its first `extent` positions along `dim` faded in over the last of `before`."""
    extent = min(extent, before.shape[dim], tile.shape[dim])
    if extent == 0:
        return tile
    weight = (jnp.arange(extent, dtype=tile.dtype) / extent).reshape([-1 if d == dim else 1 for d in range(tile.ndim)])
    old = jax.lax.slice_in_dim(before, before.shape[dim] - extent, None, axis=dim)
    new = jax.lax.slice_in_dim(tile, 0, extent, axis=dim)
    return jnp.concatenate([old * (1 - weight) + new * weight, jax.lax.slice_in_dim(tile, extent, None, axis=dim)], axis=dim)
