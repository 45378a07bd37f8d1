"""Words for scenes of `shapes`: long captions, short captions, edit instructions."""
from data_pipelines.shapes_scene import Scene, Thing, pick

_NUMBER = {1: "one", 2: "two", 3: "three", 4: "four"}
RELATION_WORDS = {"left of": "to the left of", "right of": "to the right of", "above": "above", "below": "below"}
MOTION_WORDS = {"left": "moves to the left", "right": "moves to the right", "up": "moves up", "down": "moves down",
                "still": "stays still", "grow": "grows larger", "shrink": "shrinks"}
MOTION_ORDERS = {"left": "move to the left", "right": "move to the right", "up": "move up", "down": "move down",
                 "still": "stay still", "grow": "grow larger", "shrink": "shrink"}
_FILL = {"solid": " and plain", "striped": " with dark stripes", "dotted": " with dark dots"}


def article(words: str) -> str:
    """`words` with "a" or "an" in front."""
    return ("an " if words[0] in "aeiou" else "a ") + words


def name(thing: Thing, full: bool = False) -> str:
    """"red circle"; full: with its size and texture, where they are to be told."""
    texture = thing.texture if thing.texture != "solid" else ""
    words = [thing.size, texture, thing.colour, thing.shape] if full else [thing.colour, thing.shape]
    return " ".join(w for w in words if w)


def _plural(words: str) -> str:
    return words + ("es" if words.endswith("cross") else "s")


def _subject(scene: Scene, full: bool) -> str:
    first, count = name(scene.things[0], full), len(scene.things)
    if scene.relation:
        return f"{article(first)} {RELATION_WORDS[scene.relation]} {article(name(scene.things[1], full))}"
    return article(first) if count == 1 else f"{_NUMBER[count]} {_plural(first)}"


def short(scene: Scene, frames: int, exact: bool = False) -> str:
    """One phrase; with the motion in clips. exact: a lone object is "one ..." """
    subject = "one " + name(scene.things[0]) if exact and len(scene.things) == 1 else _subject(scene, False)
    return subject if frames == 1 else f"{subject} that {MOTION_WORDS[scene.motion]}" if len(scene.things) == 1 \
        else f"{subject}, both {_ing(scene.motion)}"


def _ing(motion: str) -> str:
    return {"still": "standing still", "grow": "growing", "shrink": "shrinking"}.get(motion) or f"moving {motion}"


def long(scene: Scene, frames: int, rng, exact: bool = False) -> str:
    """Two to four sentences."""
    first, count, medium = scene.things[0], len(scene.things), "picture" if frames == 1 else "video"
    subject = "exactly one " + name(first, True) if exact and count == 1 else _subject(scene, True)
    verb = "are" if count > 1 and not scene.relation else "is"
    lines = [pick(rng, (f"The {medium} shows {subject}.", f"A {medium} of {subject}.", f"In this {medium} there {verb} {subject}."))]
    if count == 1 or not scene.relation:
        one = f"The {first.shape}" if count == 1 else "Each of them"
        lines.append(pick(rng, (f"{one} is {first.colour}{_FILL[first.texture]}.", f"{one} has a {first.texture} {first.colour} fill.")))
    if frames > 1:
        who = f"The {first.colour} {first.shape}" if count == 1 else "Everything"
        lines.append(f"{who} {MOTION_WORDS[scene.motion]}" + pick(rng, (".", " at an even pace.", " over the whole video.")))
    ground = scene.background
    lines.append(pick(rng, (f"The background is {ground}.", f"Behind it everything is {ground}.",
                            f"It is set on a plain {ground} background.")))
    return " ".join(lines)


def animate(scene: Scene) -> str:
    """One phrase for a clip whose first frame is given."""
    return f"the {name(scene.things[0])} {MOTION_WORDS[scene.motion]}"


def referenced(scene: Scene, rng) -> dict[str, str]:
    """Captions of a clip whose objects are given as images 1, 2: the pictures tell what they look like."""
    named = rng.random() < .5
    who = [f"the {t.shape if named else 'object'} of image {i + 1}" for i, t in enumerate(scene.things)]
    if len(who) == 1:
        phrase = f"{who[0]} {MOTION_WORDS[scene.motion]}"
    else:
        phrase = f"{who[0]} is {RELATION_WORDS[scene.relation]} {who[1]}, both {_ing(scene.motion)}"
    first = pick(rng, (f"In this video {phrase}.", f"{phrase[0].upper()}{phrase[1:]}.", f"A video in which {phrase}."))
    last = pick(rng, (f"The background is {scene.background}.", f"It is set on a plain {scene.background} background."))
    return {"long": f"{first} {last}", "short": f"{phrase} on {scene.background}"}


def order(kind: str, rng, old: Thing | None, new: Thing | None, target: Scene, place: str = "", source: str = "",
          medium: str = "the picture") -> str:
    """The instruction of an edit. place: "to the left of the red circle"; source: what the new object is called if a reference
    shows it ("the object of image 1"); medium: what the edited thing is called."""
    it = f"the {name(old)}" if old else ""
    thing = source or (article(name(new, True)) if new else "")
    ground, motion = target.background, MOTION_ORDERS[target.motion]
    table = {
        "recolour": lambda: (f"Change the colour of {it} to {new.colour}.", f"Make {it} {new.colour}.", f"Paint {it} {new.colour}."),
        "restyle": lambda: (f"Make {it} {new.texture}.", f"Give {it} a {new.texture} fill.", f"Turn {it} into a {new.texture} one."),
        "replace": lambda: (f"Replace {it} of {medium} with {thing}.", f"Turn {it} of {medium} into {thing}.",
                            f"Put {thing} where {it} of {medium} is."),
        "remove": lambda: (f"Remove {it}.", f"Take {it} out of {medium}.", f"Delete {it} from {medium}."),
        "add": lambda: (f"Add {thing} {place}.", f"Put {thing} {place} into {medium}.", f"Place {thing} {place}."),
        "background": lambda: (f"Change the background to {ground}.", f"Make the background {ground}.",
                               f"Set {medium} on a {ground} background."),
        "motion": lambda: (f"Let {it} {motion} instead.", f"Change the motion: {it} should {motion}.", f"Make {it} {motion}."),
    }
    return pick(rng, table[kind]())
