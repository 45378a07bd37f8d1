"""The procedural data set: a pure function of (seed, index, task), with a held-out side and every task's contract."""
import json

import numpy as np
import pytest

from data_pipelines import shapes, shapes_scene
from vino_jax.batch import TASKS
from vino_jax.errors import UserError

PICTURES = ("t2i", "ti2i", "ti2i_baseimg")
IMAGES = {"t2i": (0,), "t2v": (0,), "i2v": (1,), "ti2v": (1, 2), "ti2i": (1,), "ti2i_baseimg": (1, 2), "tv2v": (0,), "tiv2v": (1,)}
EDITS = ("ti2i", "ti2i_baseimg", "tv2v", "tiv2v")


def frames_of(task, clip=5):
    return 1 if task in PICTURES else clip


def draw(task, index, seed=0, size=(64, 64)):
    return shapes.sample(seed, index, task, frames_of(task), *size)


def test_the_same_index_gives_the_same_sample_and_others_differ():
    for task in TASKS:
        one, again, other = draw(task, 7), draw(task, 7), draw(task, 8)
        assert one.id == again.id and one.texts == again.texts and one.expected == again.expected
        assert all(np.array_equal(a, b) for a, b in zip((one.target, *one.images), (again.target, *again.images)))
        assert one.id != other.id and not np.array_equal(one.target, other.target)
        assert not np.array_equal(one.target, draw(task, 7, seed=1).target)


@pytest.mark.parametrize("size", [(64, 64), (48, 80), (96, 32)])
@pytest.mark.parametrize("task", TASKS)
def test_every_task_keeps_its_contract(task, size):
    counts = set()
    for index in range(30):
        s = draw(task, index, size=size)
        assert s.task == task and s.target.dtype == np.uint8 and s.target.shape == (frames_of(task), *size, 3)
        assert all(i.dtype == np.uint8 and i.shape == (*size, 3) for i in s.images)
        assert (s.video is not None) == (task in ("tv2v", "tiv2v")) and s.base_image == (task == "ti2i_baseimg")
        assert s.video is None or (s.video.dtype == np.uint8 and s.video.shape == s.target.shape)
        assert set(s.texts) == {"long", "short"} | ({"instruction"} if task in EDITS else set())
        assert all(t.strip() and "  " not in t for t in s.texts.values())
        assert json.loads(json.dumps(s.expected)) == s.expected
        assert (s.expected["frames"], s.expected["height"], s.expected["width"]) == s.target.shape[:3]
        assert ("edit" in s.expected) == (task in EDITS)
        counts.add(len(s.images))
    assert counts == set(IMAGES[task])


def test_the_first_frame_is_the_reference_of_i2v():
    s = draw("i2v", 3)
    assert np.array_equal(s.images[0], s.target[0])


def test_edits_change_what_their_boxes_say_and_nothing_else():
    for task in EDITS:
        for index in range(60):
            s = draw(task, index)
            source, edit = s.images[-1][None] if s.video is None else s.video, s.expected["edit"]
            differs = (source != s.target).any(-1)
            assert differs.any(), s.id
            if edit["kind"] == "background":
                continue
            for frame, boxes in zip(differs, edit["boxes"]):
                for top, left, bottom, right in boxes:
                    frame[top:bottom, left:right] = False
            assert not differs.any(), s.id


def scenes(monkeypatch, seed, count):
    """The discrete scenes that a stream rendered as target, or as the source of an edit."""
    seen = set()
    real = shapes.shapes_tasks._draw

    def spy(*args):
        drawn = real(*args)
        seen.update(part.key() for part in drawn if isinstance(part, shapes_scene.Scene))
        return drawn

    with monkeypatch.context() as patch:
        patch.setattr(shapes.shapes_tasks, "_draw", spy)
        for task in TASKS:
            for index in range(count):
                draw(task, index, seed)
    return seen


def test_training_and_held_out_streams_share_no_scene(monkeypatch):
    train, held = scenes(monkeypatch, 0, 150), scenes(monkeypatch, shapes.held_out(0), 150)
    assert len(train) > 500 and len(held) > 150 and not train & held
    assert scenes(monkeypatch, 1, 150) & train, "two training streams draw from the same world"
    assert shapes.held_out(shapes.held_out(5)) == shapes.held_out(5) != shapes.held_out(6)


@pytest.mark.parametrize("side", [0, shapes.held_out(0)])
def test_both_sides_hold_every_colour_shape_and_background(side):
    drawn = [draw("t2i", i, side).expected for i in range(300)]
    objects = [o for e in drawn for o in e["objects"]]
    assert {o["colour"] for o in objects} == set(shapes_scene.COLOURS)
    assert {o["shape"] for o in objects} == set(shapes_scene.SHAPES)
    assert {o["texture"] for o in objects} == set(shapes_scene.TEXTURES)
    assert {e["background"] for e in drawn} == set(shapes_scene.BACKGROUNDS)
    assert {e["relation"] for e in drawn if "relation" in e} == set(shapes_scene.RELATIONS)
    assert {e["count"] for e in drawn if "count" in e} == {1, 2, 3, 4}
    single = np.mean([len(e["objects"]) == 1 and "count" not in e for e in drawn])
    assert .5 < single < .7


def test_long_clips_move_evenly_and_stay_in_the_picture():
    for index in range(40):
        s = shapes.sample(0, index, "t2v", 17, 64, 64)
        ground = np.asarray(shapes_scene.BACKGROUNDS[s.expected["background"]])
        border = np.concatenate([s.target[:, 0].reshape(-1, 3), s.target[:, -1].reshape(-1, 3), s.target[:, :, 0].reshape(-1, 3),
                                 s.target[:, :, -1].reshape(-1, 3)])
        assert (border == ground).all(), s.id
        tops = np.asarray(s.expected["objects"][0]["boxes"])[:, :2]
        assert np.abs(np.diff(tops, n=2, axis=0)).max() <= 2


@pytest.mark.parametrize("call", [
    ("t2x", 1, 64, 64), ("t2i", 5, 64, 64), ("t2v", 4, 64, 64), ("t2v", 0, 64, 64), ("t2i", 1, 60, 64), ("t2i", 1, 64, 16)])
def test_what_it_cannot_draw_is_told(call):
    with pytest.raises(UserError, match="shapes: "):
        shapes.sample(0, 0, *call)
