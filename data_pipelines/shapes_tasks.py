"""The eight tasks on scenes of `shapes`: each draws scenes by lot and builds a Sample with texts, references and `expected`.

`expected` is plain JSON, for vino_jax.evaluation.shapes: size, frames, background, objects (colour, shape, texture, boxes by
frame), what to score (colour, shape, count, relation, motion), and for edits {"edit": {kind, to, index, relation, boxes}}.
"""
from dataclasses import dataclass, replace

from data_pipelines import shapes_text as text
from data_pipelines.samples import Sample
from data_pipelines.shapes_render import boxes, render
from data_pipelines.shapes_scene import (
    BACKGROUNDS,
    COLOURS,
    MOTIONS,
    RELATIONS,
    SIZES,
    TEXTURES,
    Scene,
    Thing,
    crosswise,
    draw_thing,
    is_held_out,
    pick,
    place,
    travel_length,
)

PICTURE_TASKS = ("t2i", "ti2i", "ti2i_baseimg")


def _draw(make, rng, held):
    """What `make(rng)` gives (scenes, ...) on the right side of the split: drawn again until all scenes are."""
    while True:
        drawn = make(rng)
        if all(is_held_out(part) == held for part in drawn if isinstance(part, Scene)):
            return drawn


def _single(rng, clip: bool, motions=MOTIONS) -> Scene:
    motion = pick(rng, motions) if clip else "still"
    size = "" if motion in ("grow", "shrink") else pick(rng, SIZES)
    return Scene((replace(draw_thing(rng), size=size),), pick(rng, BACKGROUNDS), motion)


def _pair(rng, clip: bool) -> Scene:
    first = draw_thing(rng)
    second = draw_thing(rng, (first.colour,), (first.shape,))
    relation = pick(rng, RELATIONS)
    motion = pick(rng, crosswise(relation)) if clip else "still"
    return Scene((first, second), pick(rng, BACKGROUNDS), motion, relation)


def _describe(scene: Scene, size) -> dict:
    frames, height, width = size
    return {"frames": frames, "height": height, "width": width, "background": scene.background, "objects": [
        {"colour": t.colour, "shape": t.shape, "texture": t.texture, "boxes": boxes(t, scene.motion, *size)} for t in scene.things]}


def _attributes(scene: Scene, size, count: bool = False) -> dict:
    """The description with what is right or wrong about it."""
    first, found = scene.things[0], _describe(scene, size)
    if scene.relation:
        found["relation"] = scene.relation
    else:
        found.update(colour=first.colour, shape=first.shape)
    if count:
        found["count"] = len(scene.things)
    if size[0] > 1:
        found["motion"] = scene.motion
    return found


def _captions(scene, frames, rng, exact=False):
    return {"long": text.long(scene, frames, rng, exact), "short": text.short(scene, frames, exact)}


def picture(name, task, rng, held, size):
    """t2i: 60 % one object, 20 % one to four alike, 20 % two in a relation. t2v: one object that moves."""
    clip, lot = size[0] > 1, rng.random()

    def make(rng):
        if clip or lot < .6:
            return (_single(rng, clip),)
        if lot < .8:
            thing = draw_thing(rng)
            return (Scene((thing,) * (1 + int(4 * rng.random())), pick(rng, BACKGROUNDS)),)
        return (_pair(rng, False),)

    scene = place(_draw(make, rng, held)[0], rng, *size[1:])
    counted = not clip and .6 <= lot < .8
    return Sample(name, task, render(scene, *size), _captions(scene, size[0], rng, counted), expected=_attributes(scene, size, counted))


def from_first_frame(name, task, rng, held, size):
    """i2v: the first frame is given, the text tells the motion."""
    scene = place(_draw(lambda r: (_single(r, size[0] > 1),), rng, held)[0], rng, *size[1:])
    target = render(scene, *size)
    texts = {"long": text.long(scene, size[0], rng), "short": text.animate(scene)}
    return Sample(name, task, target, texts, images=(target[0].copy(),), expected=_attributes(scene, size))


def _portrait(thing: Thing, rng, size):
    """The thing alone, large, on a plain background: (H, W, 3)."""
    scene = place(Scene((replace(thing, size="large"),), pick(rng, BACKGROUNDS)), rng, *size[1:])
    return render(scene, 1, *size[1:])[0]


def with_objects(name, task, rng, held, size):
    """ti2v: one referenced object (75 %) or two in a relation, put into a clip."""
    two = rng.random() < .25
    make = _pair if two else _single
    scene = place(_draw(lambda r: (make(r, size[0] > 1),), rng, held)[0], rng, *size[1:])
    images = tuple(_portrait(t, rng, size) for t in scene.things)
    return Sample(name, task, render(scene, *size), text.referenced(scene, rng), images=images, expected=_attributes(scene, size))


@dataclass(frozen=True)
class _Edit:
    """source and target are scenes without places; *_slots say which places of the larger of the two their things take."""

    kind: str
    source: Scene
    target: Scene
    source_slots: tuple[int, ...]
    target_slots: tuple[int, ...]
    changed: int  # the place that changes
    old: Thing | None
    new: Thing | None


def _draw_edit(rng, held, kind, clip) -> _Edit:
    def make(rng):
        two = kind in ("add", "remove") or (kind != "motion" and rng.random() < .4)
        if two:
            full = _pair(rng, clip)
        else:
            full = _single(rng, clip)
            full = replace(full, things=(replace(full.things[0], size=""),))
        slots, things = tuple(range(len(full.things))), full.things
        if kind == "add":  # things[0] is new: the relation is told from it
            source = replace(full, things=things[1:], relation="")
            return source, full, _Edit(kind, source, full, (1,), slots, 0, None, things[0])
        at = int(rng.random() * len(things))
        if kind == "remove":
            target = replace(full, things=(things[1 - at],), relation="")
            return full, target, _Edit(kind, full, target, slots, (1 - at,), at, things[at], None)
        target, new = _changed(full, things, at, kind, rng)
        return full, target, _Edit(kind, full, target, slots, slots, at, things[at], new)

    return _draw(make, rng, held)[-1]


def _changed(full, things, at, kind, rng):
    """The scene after a change that keeps all places, and the changed thing."""
    old, colours, shapes = things[at], [t.colour for t in things], [t.shape for t in things]
    if kind == "background":
        return replace(full, background=pick(rng, BACKGROUNDS, (full.background,))), None
    if kind == "motion":
        return replace(full, motion=pick(rng, MOTIONS, (full.motion,))), old
    new = {"recolour": lambda: replace(old, colour=pick(rng, COLOURS, colours)),
           "restyle": lambda: replace(old, texture=pick(rng, TEXTURES, (old.texture,))),
           "replace": lambda: draw_thing(rng, colours, shapes)}[kind]()
    return replace(full, things=things[:at] + (new,) + things[at + 1:]), new


def _place_edit(edit: _Edit, rng, size) -> tuple[Scene, Scene]:
    """source and target with places: what is in both stands where it stood."""
    larger = edit.source if len(edit.source.things) >= len(edit.target.things) else edit.target
    places = place(larger, rng, *size[1:]).things

    def settle(scene, slots):
        moved = [replace(t, **{k: getattr(places[s], k) for k in ("y", "x", "radius", "travel")}) for t, s in zip(scene.things, slots)]
        if scene.motion != larger.motion:
            moved = [replace(t, travel=travel_length(scene.motion, t.radius, *size[1:], rng)) for t in moved]
        return replace(scene, things=tuple(moved))

    return settle(edit.source, edit.source_slots), settle(edit.target, edit.target_slots)


def _edit_expected(edit: _Edit, source: Scene, target: Scene, size) -> dict:
    """What to check: edit.to holds the asked attributes, index the changed object in `objects` (-1: removed or the background)."""
    new = edit.new
    to = {"recolour": lambda: {"colour": new.colour}, "restyle": lambda: {"texture": new.texture},
          "replace": lambda: {"colour": new.colour, "shape": new.shape}, "add": lambda: {"colour": new.colour, "shape": new.shape},
          "remove": dict, "background": lambda: {"background": target.background}, "motion": lambda: {"motion": target.motion}}[edit.kind]()
    regions = [boxes(scene.things[slots.index(edit.changed)], scene.motion, *size)
               for scene, slots in ((source, edit.source_slots), (target, edit.target_slots))
               if edit.changed in slots and edit.kind != "background"]
    found = _describe(target, size)
    found["edit"] = {"kind": edit.kind, "to": to, "index": edit.target_slots.index(edit.changed) if regions and new else -1,
                     "boxes": [list(frame) for frame in zip(*regions)] if regions else [[] for _ in range(size[0])]}
    if edit.kind == "add":
        found["edit"]["relation"] = target.relation
    return found


def edited(name, task, rng, held, size):
    """ti2i, ti2i_baseimg, tv2v, tiv2v: the last image or the clip is edited.

    An image of the new object comes first in 70 % of ti2i_baseimg, and always in tiv2v: it is added or takes another's place."""
    clip, moves = task in ("tv2v", "tiv2v"), size[0] > 1
    shown = task == "tiv2v" or (task == "ti2i_baseimg" and rng.random() < .7)
    kinds = ("add", "replace") if shown else ("recolour", "restyle", "replace", "remove", "add", "background") + ("motion",) * moves
    edit = _draw_edit(rng, held, pick(rng, kinds), moves)
    source, target = _place_edit(edit, rng, size)
    images = (_portrait(edit.new, rng, size),) if shown else ()
    medium = "the video" if clip else "image 2" if shown else "the picture"
    place_words = ""
    if edit.kind == "add":
        place_words = f"{text.RELATION_WORDS[target.relation]} the {text.name(target.things[1])}"
    order = text.order(edit.kind, rng, edit.old, edit.new, target, place_words, "the object of image 1" if shown else "", medium)
    video = render(source, *size)
    texts = {"instruction": order, **_captions(target, size[0], rng)}
    return Sample(name, task, render(target, *size), texts, images=images if clip else images + (video[0],), video=video if clip else None,
                  base_image=task == "ti2i_baseimg", expected=_edit_expected(edit, source, target, size))


BUILD = {"t2i": picture, "t2v": picture, "i2v": from_first_frame, "ti2v": with_objects,
         "ti2i": edited, "ti2i_baseimg": edited, "tv2v": edited, "tiv2v": edited}
