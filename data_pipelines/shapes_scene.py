"""The world of `shapes`: what may stand in a scene, and how scenes are drawn by lot and laid out.

A scene is discrete (colours, shapes, textures, sizes, background, motion) plus continuous positions and radii in pixels.
Discrete scenes are split by a hash of their content: one in five belongs to the held-out side for good (`is_held_out`).
"""
import zlib
from dataclasses import dataclass, replace

import numpy as np

COLOURS = {  # RGB, at least 87 apart
    "red": (215, 35, 40), "green": (35, 160, 60), "blue": (40, 75, 220), "yellow": (240, 215, 40),
    "purple": (135, 45, 170), "orange": (245, 130, 20), "cyan": (50, 200, 225), "pink": (250, 130, 195),
}
BACKGROUNDS = {"white": (240, 240, 240), "black": (20, 20, 20), "grey": (128, 128, 128), "beige": (222, 202, 165)}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
TEXTURES = ("solid", "striped", "dotted")
SIZES = ("small", "large")
RELATIONS = ("left of", "right of", "above", "below")
MOTIONS = ("left", "right", "up", "down", "still", "grow", "shrink")
HELD_OUT_SHARE = 5  # one discrete scene in so many is never trained on
_STEP = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}  # (y, x)
_SLOTS = {  # places of n equal objects, in parts of (height, width)
    1: ((.5, .5),), 3: ((.29, .5), (.72, .27), (.72, .73)), 4: ((.27, .27), (.27, .73), (.73, .27), (.73, .73))}


@dataclass(frozen=True)
class Thing:
    """One object. y, x: its centre in the middle of the clip; radius there too, all in pixels."""

    colour: str
    shape: str
    texture: str = "solid"
    size: str = ""  # "" where the text says nothing about it
    y: float = 0.0
    x: float = 0.0
    radius: float = 0.0
    travel: float = 0.0  # pixels from the first frame to the last


@dataclass(frozen=True)
class Scene:
    """Objects on a background; all of them share one motion. relation: of things[0] to things[1]."""

    things: tuple[Thing, ...]
    background: str
    motion: str = "still"
    relation: str = ""

    def key(self) -> str:
        """The discrete content, without motion: equal for scenes that differ in positions only."""
        things = sorted(f"{t.colour} {t.texture} {t.shape}" for t in self.things)
        return f"{self.background}; " + ", ".join(things)


def is_held_out(scene: Scene) -> bool:
    """Whether the scene's discrete content belongs to the held-out side; a fixed property of the content."""
    return zlib.crc32(scene.key().encode()) % HELD_OUT_SHARE == 0


def pick(rng: np.random.Generator, options, but=()):
    """One of `options` that is not in `but`, uniformly."""
    options = [o for o in options if o not in but] if but else list(options)
    return options[int(rng.random() * len(options))]


def draw_thing(rng, colours_but=(), shapes_but=()) -> Thing:
    """An object without a place: uniform colour and shape, 60 % solid."""
    texture = "solid" if rng.random() < .6 else pick(rng, TEXTURES[1:])
    return Thing(pick(rng, COLOURS, colours_but), pick(rng, SHAPES, shapes_but), texture)


def place(scene: Scene, rng, height: int, width: int) -> Scene:
    """Gives every thing its place, radius and travel for a picture of that size (pixels); radii are about 11 to 20 pixels
    for one thing at 64x64, 9.5 to 11 for several, scaled with the shorter side. Things never overlap and never leave the picture."""
    unit, count = min(height, width) / 64, len(scene.things)
    scale = unit**.6 if unit < 1 else unit  # small pictures: shrink less, to stay readable
    jitter = lambda span: (2 * rng.random() - 1) * span * unit  # noqa: E731
    moving = scene.motion != "still"
    if count == 1:
        thing = scene.things[0]
        low = ({"small": 11.0, "large": 15.0, "": 13.0} if moving else {"small": 13.0, "large": 18.5, "": 16.0})[thing.size]
        radius = (low + 2 * rng.random()) * scale
        if scene.motion in ("grow", "shrink"):
            radius = (13.5 + rng.random()) * scale
        travel = travel_length(scene.motion, radius, height, width, rng)
        spot = replace(thing, y=height / 2 + jitter(3), x=width / 2 + jitter(3), radius=radius, travel=travel)
        return replace(scene, things=(spot,))
    radius = min((9.5 + 1.5 * rng.random()) * scale, .17 * min(height, width))
    if count == 2:
        slots = {"left of": ((.5, .27), (.5, .73)), "above": ((.27, .5), (.73, .5))}
        flip = {"right of": "left of", "below": "above"}
        relation = scene.relation or pick(rng, RELATIONS)
        slots = slots[relation] if relation in slots else slots[flip[relation]][::-1]
    else:
        slots = _SLOTS[count]
    travel = travel_length(scene.motion, radius, height, width, rng)
    things = tuple(replace(t, y=y * height + jitter(2), x=x * width + jitter(2), radius=radius, travel=travel)
                   for t, (y, x) in zip(scene.things, slots))
    return replace(scene, things=things)


def travel_length(motion: str, radius: float, height: int, width: int, rng) -> float:
    """How far a thing moves over the clip, in pixels: about 0.38 of the side, less where there is no room."""
    if motion not in _STEP:
        return 0.0
    side = height if _STEP[motion][0] else width
    room = side - 2 * radius - 10 * min(height, width) / 64  # jitter and a margin on both sides
    return float(min(room, side * (.34 + .08 * rng.random())))


def track(thing: Thing, motion: str, frames: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(y, x, radius), each (frames,) float64 in pixels: linear over the clip, the middle of the way in its middle."""
    time = np.linspace(-.5, .5, frames) if frames > 1 else np.zeros(1)
    dy, dx = _STEP.get(motion, (0, 0))
    grow = {"grow": .64, "shrink": -.64}.get(motion, 0.0)
    return thing.y + dy * thing.travel * time, thing.x + dx * thing.travel * time, thing.radius * (1 + grow * time)


def crosswise(relation: str) -> tuple[str, ...]:
    """Motions that two things in that relation can share without leaving the picture."""
    return ("still", "up", "down") if relation in ("left of", "right of") else ("still", "left", "right")
