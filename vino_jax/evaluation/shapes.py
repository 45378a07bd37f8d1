"""Scores pictures and clips of `shapes` by program: classical vision, no model.

Reads pixels and the `expected` dict of a sample (data_pipelines.shapes_tasks), nothing else. Objects are what differs from the
colour of the border; a colour is voted by the object's pixels, a shape is the nearest rendered template by overlap.

What counts as right (1.0) or wrong (0.0), and what guessing uniformly gives (CHANCE):
  colour   the pixels' vote is the asked one of 8: 1/8. For clips the vote of three frames.
  shape    the nearest of 6 templates is the asked one: 1/6.
  count    so many separate objects; the data ask for 1 to 4 equally often: 1/4.
  relation the two largest objects stand so: the one that fits objects[0] better is left of, right of, above or below the other,
           along the longer of the two distances: 1/4.
  pair     those two have both colours and shapes asked for: two ordered pairs of 48 x 48 fit: 2/2304.
  motion   of the whole foreground, one of 7: left, right, up, down, still, grow, shrink: 1/7.
  followed the edit is done, by kind (EDIT_CHANCE): recolour 1/8; restyle 1/3 textures; replace 1/48 (colour and shape); add 1/192
           (colour, shape and one of four sides); remove 1/2 (one of two objects); background 1/4; motion 1/7. CHANCE holds the
           mean over the seven kinds; `chance(expected)` gives that of one sample, so its mean over a set is that set's.
Those are rates of a guess that draws well-formed objects; an output without any object scores 0.
Made for 64 pixels on the shorter side and more. At 48 blur and noise cost `pair` and `add` up to a fifth of their truths; at 32 small
objects are beyond it.
`preserved` is no attribute but a PSNR in dB (peak 255, at most 60) outside the changed region against the source.
"""
import numpy as np
from scipy import ndimage

COLOURS = {
    "red": (215, 35, 40), "green": (35, 160, 60), "blue": (40, 75, 220), "yellow": (240, 215, 40),
    "purple": (135, 45, 170), "orange": (245, 130, 20), "cyan": (50, 200, 225), "pink": (250, 130, 195),
}
BACKGROUNDS = {"white": (240, 240, 240), "black": (20, 20, 20), "grey": (128, 128, 128), "beige": (222, 202, 165)}
SHAPES = ("circle", "square", "triangle", "cross", "star", "ring")
EDIT_CHANCE = {"recolour": 1 / 8, "restyle": 1 / 3, "replace": 1 / 48, "add": 1 / 192, "remove": 1 / 2, "background": 1 / 4,
               "motion": 1 / 7}
CHANCE: dict[str, float] = {"colour": 1 / 8, "shape": 1 / 6, "count": 1 / 4, "relation": 1 / 4, "pair": 2 / 48**2, "motion": 1 / 7,
                            "followed": sum(EDIT_CHANCE.values()) / len(EDIT_CHANCE)}

_CONTRAST = 40.0  # RGB distance from the background from which a pixel is foreground
_SMALLEST = 0.006  # of the shorter side squared: smaller spots are noise
_GRID = 32  # side of the normalised masks
PSNR_LIMIT = 60.0
_PALETTE = np.asarray(list(COLOURS.values()), np.float32)
_COLOUR_NAMES = tuple(COLOURS)


def _normalise(mask_HW: np.ndarray) -> np.ndarray:
    """The mask's bounding box, centred in a square, sampled bilinearly to (_GRID, _GRID) float in 0..1."""
    rows, columns = np.flatnonzero(mask_HW.any(1)), np.flatnonzero(mask_HW.any(0))
    top, left = rows[0], columns[0]
    height, width = rows[-1] + 1 - top, columns[-1] + 1 - left
    side = max(height, width)
    steps = (np.arange(_GRID) + .5) / _GRID * side - .5
    y, x = np.meshgrid(steps + top - (side - height) / 2, steps + left - (side - width) / 2, indexing="ij")
    return ndimage.map_coordinates(mask_HW.astype(np.float32), (y, x), order=1, mode="constant")


def _templates() -> np.ndarray:
    """(6, _GRID, _GRID): what each of SHAPES looks like, normalised as the masks are."""
    axis = (np.arange(96) + .5 - 48) / 40
    y, x = np.meshgrid(axis, axis, indexing="ij")
    radius, fifth = np.hypot(x, y), 2 * np.pi / 5
    turn = np.arctan2(x, -y)
    turn = np.abs(turn - fifth * np.round(turn / fifth))
    inner = (.5 * np.cos(fifth / 2), .5 * np.sin(fifth / 2))
    masks = {
        "circle": radius < 1, "square": np.maximum(abs(x), abs(y)) < .88, "triangle": (y < .8) & (abs(x) * 1.8 < 1.02 * (y + 1)),
        "cross": ((abs(y) < .98) & (abs(x) < .34)) | ((abs(x) < .98) & (abs(y) < .34)),
        "star": (radius * np.cos(turn) - 1.08) * inner[1] + radius * np.sin(turn) * (1.08 - inner[0]) < 0,
        "ring": abs(radius - .78) < .24,
    }
    return np.stack([_normalise(masks[name]) for name in SHAPES])


_TEMPLATES = _templates()


class _Spot:
    """One connected object of a frame. Its rim lies where the contrast to the background is half its own (what three in five of
    its pixels exceed, so that dark stripes on black stay in): blur neither fattens it nor fills a ring."""

    def __init__(self, mask_HW, contrast_HW, pixels_HWC):
        self.whole = mask_HW
        self.mask = mask_HW & (contrast_HW > max(_CONTRAST, .5 * np.percentile(contrast_HW[mask_HW], 35)))
        self.area = int(self.mask.sum())
        self.centre = np.asarray(ndimage.center_of_mass(self.mask))
        self.pixels = pixels_HWC

    def inside(self, depth: int) -> np.ndarray:
        """The spot less its rim of `depth` pixels, or of fewer where too little would remain."""
        for iterations in range(depth, 0, -1):
            core = ndimage.binary_erosion(self.whole, iterations=iterations)
            if core.sum() >= max(12, .15 * self.area):
                return core
        return self.mask

    def colours(self) -> np.ndarray:
        """Share of the pixels that each of the 8 colours wins. Dark stripes and dots count for their colour: the distance is that
        to the colour times anything from 0.35 to 1."""
        found_NC = self.pixels[self.inside(1)]
        scale_NP = np.clip(found_NC @ _PALETTE.T / (_PALETTE**2).sum(1), .35, 1)
        away_NP = ((found_NC[:, None] - scale_NP[..., None] * _PALETTE) ** 2).sum(-1)
        return np.bincount(away_NP.argmin(1), minlength=len(_PALETTE)) / len(found_NC)

    def shapes(self) -> np.ndarray:
        """Overlap (intersection over union, 0..1) with each of the 6 templates."""
        mask = _normalise(self.mask)
        return np.minimum(mask, _TEMPLATES).sum((1, 2)) / np.maximum(mask, _TEMPLATES).sum((1, 2))

    def texture(self) -> str:
        """solid, striped or dotted: by the spread of brightness, and how much of it rows explain."""
        core = self.inside(2)
        bright = np.linalg.norm(self.pixels, axis=-1)
        bright = bright / np.percentile(bright[core], 80)
        if bright[core].std() < .1:
            return "solid"
        rows = [bright[r][core[r]] for r in np.flatnonzero(core.sum(1) > 1)]
        mean = np.concatenate([np.full(len(r), r.mean()) for r in rows])
        return "striped" if mean.var() > .62 * np.concatenate(rows).var() else "dotted"

    def is_object(self, colour: str, shape: str) -> bool:
        return _COLOUR_NAMES[self.colours().argmax()] == colour and SHAPES[self.shapes().argmax()] == shape


def _ground(pixels_HWC) -> np.ndarray:
    """The background's colour: the median of the border."""
    border = (pixels_HWC[:2], pixels_HWC[-2:], pixels_HWC[:, :2], pixels_HWC[:, -2:])
    return np.median(np.concatenate([side.reshape(-1, 3) for side in border]), axis=0)


def _contrast(pixels_HWC) -> np.ndarray:
    """(H, W): distance from the background's colour, a little smoothed."""
    return np.linalg.norm(ndimage.gaussian_filter(pixels_HWC, (.5, .5, 0)) - _ground(pixels_HWC), axis=-1)


def _foreground(contrast_HW) -> np.ndarray:
    """(H, W) bool."""
    mask = contrast_HW > _CONTRAST
    return ndimage.binary_closing(np.pad(mask, 2), np.ones((3, 3)))[2:-2, 2:-2] | mask


def _spots(pixels_HWC) -> list[_Spot]:
    """The objects of one frame (float32), largest first."""
    contrast = _contrast(pixels_HWC)
    labels, count = ndimage.label(_foreground(contrast), np.ones((3, 3)))
    least = _SMALLEST * min(contrast.shape) ** 2
    sizes = np.bincount(labels.ravel(), minlength=count + 1)
    order = sorted((i for i in range(1, count + 1) if sizes[i] >= least), key=lambda i: -sizes[i])
    return [_Spot(labels == i, contrast, pixels_HWC) for i in order]


def _motion(pixels_FHWC) -> str:
    """One of the seven motions, of the whole foreground; "" without one."""
    masks = [_foreground(_contrast(f)) for f in pixels_FHWC]
    least = _SMALLEST * min(pixels_FHWC.shape[1:3]) ** 2
    seen = [i for i, m in enumerate(masks) if m.sum() >= least]
    if len(seen) < max(2, .6 * len(masks)):
        return ""
    time = np.asarray(seen) / (len(masks) - 1)
    centre = np.asarray([ndimage.center_of_mass(masks[i]) for i in seen])
    size = np.log([np.sqrt(masks[i].sum()) for i in seen])
    dy, dx, growth = np.polyfit(time, np.column_stack([centre, size]), 1)[0]
    way, change = max(abs(dy), abs(dx)) / (.12 * min(masks[0].shape)), abs(growth) / np.log(1.3)
    if max(way, change) < 1:
        return "still"
    if change > way:
        return "grow" if growth > 0 else "shrink"
    return ("down" if dy > 0 else "up") if abs(dy) > abs(dx) else ("right" if dx > 0 else "left")


def _relation(a: _Spot, b: _Spot) -> str:
    """Where a stands to b."""
    dy, dx = a.centre - b.centre
    return ("above" if dy < 0 else "below") if abs(dy) > abs(dx) else ("left of" if dx < 0 else "right of")


def _pair(spots, objects) -> tuple[_Spot, _Spot]:
    """The two largest spots, in the order in which they fit the two objects better."""
    def fit(spot, thing):
        return spot.colours()[_COLOUR_NAMES.index(thing["colour"])] + spot.shapes()[SHAPES.index(thing["shape"])]

    a, b = spots[:2]
    return (a, b) if fit(a, objects[0]) + fit(b, objects[1]) >= fit(b, objects[0]) + fit(a, objects[1]) else (b, a)


def _at(spots, box) -> _Spot | None:
    """The spot that lies most in the box, if 40 % of it do."""
    top, left, bottom, right = box
    inside = [s.mask[top:bottom, left:right].sum() for s in spots]
    best = int(np.argmax(inside)) if spots else -1
    return spots[best] if spots and inside[best] >= .4 * spots[best].area else None


def _nearest(colour, palette) -> str:
    return min(palette, key=lambda name: float(((np.asarray(palette[name]) - colour) ** 2).sum()))


def _followed(pixels_HWC, frame: int, expected) -> bool:
    """Whether one frame satisfies the edit."""
    edit, objects = expected["edit"], expected["objects"]
    kind, to = edit["kind"], edit["to"]
    if kind == "background":
        return _nearest(_ground(pixels_HWC), BACKGROUNDS | COLOURS) == to["background"]
    spots = _spots(pixels_HWC)
    if kind == "remove":
        gone, kept = _at(spots, edit["boxes"][frame][0]), _at(spots, objects[0]["boxes"][frame])
        return gone is None and kept is not None
    if kind == "add":
        if len(spots) < 2:
            return False
        new, old = _pair(spots, objects)
        return new.is_object(**to) and _relation(new, old) == edit["relation"]
    spot = _at(spots, objects[edit["index"]]["boxes"][frame])
    if spot is None:
        return False
    if kind == "recolour":
        return _COLOUR_NAMES[spot.colours().argmax()] == to["colour"]
    return spot.texture() == to["texture"] if kind == "restyle" else spot.is_object(**to)


def _edit_followed(pixels_FHWC, expected) -> bool:
    edit, frames = expected["edit"], len(pixels_FHWC)
    if edit["kind"] == "motion":
        spots = _spots(pixels_FHWC[frames // 2])
        same = bool(spots) and _COLOUR_NAMES[spots[0].colours().argmax()] == expected["objects"][0]["colour"]
        return same and _motion(pixels_FHWC) == edit["to"]["motion"]
    looks = sorted({0, frames // 2, frames - 1})
    return 2 * sum(_followed(pixels_FHWC[f], f, expected) for f in looks) > len(looks)


def preserved(pixels_FHWC: np.ndarray, expected: dict, source_FHWC: np.ndarray) -> float:
    """PSNR in dB (peak 255, at most 60) between output and source, outside the boxes of what the edit changes; where it changes
    the background: on the source's objects, without their rim."""
    output, source = np.asarray(pixels_FHWC, np.float32), np.asarray(source_FHWC, np.float32)
    if expected["edit"]["kind"] == "background":
        keep = np.stack([ndimage.binary_erosion(_foreground(_contrast(f)), iterations=2) for f in source])
    else:
        keep = np.ones(source.shape[:3], bool)
        for frame, boxes in zip(keep, expected["edit"]["boxes"]):
            for top, left, bottom, right in boxes:
                frame[top:bottom, left:right] = False
    error = float(((output - source)[keep] ** 2).mean()) if keep.any() else 0.0
    return min(PSNR_LIMIT, 10 * float(np.log10(255**2 / error))) if error > 0 else PSNR_LIMIT


def chance(expected: dict) -> dict[str, float]:
    """What uniform guessing gives, for each attribute that `score` finds right or wrong for this sample."""
    if "edit" in expected:
        return {"followed": EDIT_CHANCE[expected["edit"]["kind"]]}
    names = [n for n in ("colour", "shape", "count", "relation", "motion") if n in expected] + ["pair"] * ("relation" in expected)
    return {name: CHANCE[name] for name in names}


def score(pixels_FHWC: np.ndarray, expected: dict, source: np.ndarray | None = None) -> dict[str, float]:
    """Scores an output against what its sample expects.

    pixels_FHWC: uint8 RGB (F, H, W, 3), of the size in `expected`. source: what an edit started from (same shape; a picture has
    F = 1), for `preserved`; without it that is left out. Returns 1.0 or 0.0 for each of colour, shape, count, relation, pair,
    motion that `expected` names, or followed (and preserved in dB) for an edit. Raises ValueError for another size.
    """
    size = (expected["frames"], expected["height"], expected["width"], 3)
    for what, array in (("pixels", pixels_FHWC), ("source", source)):
        if array is not None and tuple(array.shape) != size:
            raise ValueError(f"{what} have shape {tuple(array.shape)}, expected {size}")
    pixels = np.asarray(pixels_FHWC, np.float32)
    if "edit" in expected:
        found = {"followed": float(_edit_followed(pixels, expected))}
        return found if source is None else found | {"preserved": preserved(pixels, expected, source)}
    frames = len(pixels)
    looks = [_spots(pixels[f]) for f in sorted({0, frames // 2, frames - 1})]
    middle, right = looks[len(looks) // 2], {}
    for what, names, vote in (("colour", _COLOUR_NAMES, _Spot.colours), ("shape", SHAPES, _Spot.shapes)):
        if what in expected:
            votes = sum((vote(s) for spots in looks for s in (spots if "count" in expected else spots[:1])), np.zeros(len(names)))
            right[what] = votes.any() and names[votes.argmax()] == expected[what]
    if "count" in expected:
        right["count"] = len(middle) == expected["count"]
    if "relation" in expected:
        right["relation"] = right["pair"] = False
        if len(middle) >= 2:
            ordered = _pair(middle, expected["objects"])
            right["relation"] = _relation(*ordered) == expected["relation"]
            right["pair"] = all(s.is_object(o["colour"], o["shape"]) for s, o in zip(ordered, expected["objects"]))
    if "motion" in expected:
        right["motion"] = _motion(pixels) == expected["motion"]
    return {name: float(value) for name, value in right.items()}
