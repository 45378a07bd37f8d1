"""Scenes to pixels: signed distance functions, anti-aliased, only around each object. numpy alone.

Distance functions are in units of the radius: negative inside. They follow the usual 2D primitives (disc, box, half planes).
Dims: F frames, K side of the square that is drawn around an object.
"""
import numpy as np

from data_pipelines.shapes_scene import BACKGROUNDS, COLOURS, Scene, Thing, track

SHADE = 0.4  # stripes and dots are the object's colour times this: dark, but told apart from every background


def _star(y, x):
    """Five points: the edge line of the nearest tip after folding the angle."""
    fifth = 2 * np.pi / 5
    angle = np.arctan2(x, -y)
    angle = np.abs(angle - fifth * np.round(angle / fifth))
    radius = np.hypot(x, y)
    inner_x, inner_y = .5 * np.cos(fifth / 2), .5 * np.sin(fifth / 2)
    tip = 1.08
    length = np.hypot(tip - inner_x, inner_y)
    return ((radius * np.cos(angle) - tip) * inner_y + radius * np.sin(angle) * (tip - inner_x)) / length


def _cross(y, x):
    y, x = np.abs(y), np.abs(x)
    return np.minimum(np.maximum(y - .98, x - .34), np.maximum(y - .34, x - .98))


DISTANCE = {
    "circle": lambda y, x: np.hypot(x, y) - 1,
    "square": lambda y, x: np.maximum(np.abs(y), np.abs(x)) - .88,
    "triangle": lambda y, x: np.maximum(y - .8, (1.8 * np.abs(x) - 1.02 * (y + 1)) / np.hypot(1.8, 1.02)),
    "cross": _cross,
    "star": _star,
    "ring": lambda y, x: np.abs(np.hypot(x, y) - .78) - .24,
}


def _shaded(texture, y, x, pixels):
    """Share of the dark colour (0..1) at y, x (units of the radius); pixels: the radius in pixels, for the soft edge."""
    wave = 2 * np.pi / .62  # periods of 0.62 radii
    if texture == "striped":
        field = np.cos(wave * y) - .2
    else:
        field = np.cos(wave * y) + np.cos(wave * x) - .9
    return np.clip(field * pixels / wave + .5, 0, 1)


def draw(frames_FHWC: np.ndarray, thing: Thing, motion: str) -> None:
    """Draws the thing into uint8 frames (F, H, W, 3), in place; what falls outside the picture is cut off."""
    count, height, width = frames_FHWC.shape[:3]
    if motion == "still" and count > 1:
        draw(frames_FHWC[:1], thing, motion)
        frames_FHWC[1:] = frames_FHWC[:1]
        return
    y_F, x_F, radius_F = track(thing, motion, count)
    side = 2 * int(np.ceil(radius_F.max() * 1.1 + 1)) + 1
    top_F, left_F = (np.round(c - side / 2).astype(int) for c in (y_F, x_F))
    grid_K = np.arange(side, dtype=np.float32) + .5
    scale = (1 / radius_F).astype(np.float32)[:, None, None]
    pixels = radius_F.astype(np.float32)[:, None, None]
    y = (grid_K[None, :, None] + (top_F - y_F).astype(np.float32)[:, None, None]) * scale
    x = (grid_K[None, None, :] + (left_F - x_F).astype(np.float32)[:, None, None]) * scale
    y, x = np.broadcast_arrays(y, x)
    cover_FKK = np.clip(.5 - DISTANCE[thing.shape](y, x) * pixels, 0, 1)
    colour = np.asarray(COLOURS[thing.colour], np.float32)
    if thing.texture == "solid":
        paint = np.broadcast_to(colour, (count, 1, 1, 3))
    else:
        paint = (1 - (1 - SHADE) * _shaded(thing.texture, y, x, pixels))[..., None] * colour
    for f in range(count):
        y0, x0 = max(top_F[f], 0), max(left_F[f], 0)
        y1, x1 = min(top_F[f] + side, height), min(left_F[f] + side, width)
        part = (slice(y0 - top_F[f], y1 - top_F[f]), slice(x0 - left_F[f], x1 - left_F[f]))
        under = frames_FHWC[f, y0:y1, x0:x1].astype(np.float32)
        over = paint[f] if paint.shape[1] == 1 else paint[f][part]
        frames_FHWC[f, y0:y1, x0:x1] = under + cover_FKK[f][part][..., None] * (over - under) + .5


def render(scene: Scene, frames: int, height: int, width: int) -> np.ndarray:
    """The scene as uint8 RGB (frames, height, width, 3)."""
    pixels = np.empty((frames, height, width, 3), np.uint8)
    pixels[:] = BACKGROUNDS[scene.background]
    for thing in scene.things:
        draw(pixels, thing, scene.motion)
    return pixels


def boxes(thing: Thing, motion: str, frames: int, height: int, width: int) -> list[list[int]]:
    """Where the thing is: [top, left, bottom, right] a frame in pixels, with 2 pixels of margin, cut to the picture."""
    y, x, radius = track(thing, motion, frames)
    reach = radius * 1.08 + 2
    low = lambda c, r: np.maximum(np.floor(c - r), 0)  # noqa: E731
    return np.stack([low(y, reach), low(x, reach), np.minimum(np.ceil(y + reach), height), np.minimum(np.ceil(x + reach), width)],
                    -1).astype(int).tolist()
