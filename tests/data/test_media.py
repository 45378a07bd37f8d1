"""The manifest source on real pictures that scikit-image ships and clips panned over them."""
import dataclasses
import json
import re
from pathlib import Path

import av
import numpy as np
import pytest
import skimage
from PIL import Image

from data_pipelines.buckets import assign, table
from data_pipelines.loader import Loader
from data_pipelines.media import MediaSource, cover, read_cut_clip
from data_pipelines.mixture import Mixture
from data_pipelines.prompts import Prompter
from tests.data.folders import SMALL_VLM
from tests.data.test_mixture import WEIGHTS
from vino_jax.batch import ROLE_PAD, TASKS, BucketSpec
from vino_jax.errors import UserError

PICTURES = Path(skimage.__file__).parent / "data"

BUCKETS = (
    BucketSpec("picture", 2, 1, 32, 32, 96), BucketSpec("wide", 2, 1, 32, 48, 96), BucketSpec("clip9", 2, 9, 32, 48, 96),
    BucketSpec("clip5", 2, 5, 32, 48, 96),
    BucketSpec("edit", 2, 1, 32, 48, 128, 16, images=2, image_height=32, image_width=48),
    BucketSpec("clip_edit", 2, 5, 32, 48, 176, 64, images=1, image_height=32, image_width=48,
               video_frames=5, video_height=32, video_width=48),
)


def write_clip(path, picture, frames, height=96, width=144):
    """A camera that pans over a picture, 3 pixels a frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.options = width, height, "yuv420p", {"crf": "8"}
        for i in range(frames):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture[100:100 + height, 3 * i:3 * i + width]))))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    for name in ("astronaut", "coffee", "chelsea"):
        (root / f"{name}.png").write_bytes((PICTURES / f"{name}.png").read_bytes())
    coffee = np.asarray(Image.open(root / "coffee.png").convert("RGB"))
    for name, frames in (("long.mp4", 12), ("mid.mp4", 6), ("tiny.mp4", 3)):
        write_clip(root / name, coffee, frames)
    return root


LINES = [
    {"task": "t2i", "target": "astronaut.png", "long": "A woman in an orange space suit smiles before a flag.", "short": "An astronaut."},
    {"task": "t2i", "target": "coffee.png", "long": "A cup of coffee on a wooden table."},
    {"task": "t2i", "target": "chelsea.png", "short": "A cat.", "id": "the cat"},
    {"task": "t2v", "target": "long.mp4", "long": "The camera pans over a cup of coffee."},
    {"task": "t2v", "target": "mid.mp4", "short": "A pan over a cup."},
    {"task": "t2v", "target": "tiny.mp4", "short": "Too short."},
    {"task": "i2v", "target": "long.mp4", "short": "The camera pans to the right."},
    {"task": "ti2v", "target": "mid.mp4", "images": ["chelsea.png"], "short": "The cat of image 1 beside a cup."},
    {"task": "ti2i", "target": "coffee.png", "images": ["coffee.png"], "instruction": "Keep the cup as it is."},
    {"task": "ti2i_baseimg", "target": "coffee.png", "images": ["chelsea.png", "coffee.png"], "instruction": "Add the cat of image 1."},
    {"task": "tv2v", "target": "mid.mp4", "video": "mid.mp4", "instruction": "Leave everything."},
    {"task": "tiv2v", "target": "mid.mp4", "video": "long.mp4", "images": ["astronaut.png"], "instruction": "Put her in."},
    {"task": "ti2i", "target": "coffee.png", "images": ["coffee.png"] * 3, "instruction": "Too many."},
]


def source_of(root, lines, buckets=BUCKETS, prompter=None):
    manifest = root / "manifest.jsonl"
    manifest.write_text("\n".join(x if isinstance(x, str) else json.dumps(x) for x in lines) + "\n")
    return MediaSource(manifest, root, buckets, prompter)


def test_items_go_where_they_fit_and_the_others_are_listed(root):
    source = source_of(root, [*LINES[:4], "", *LINES[4:]])
    found = {(task, b.name): source.count(task, b) for task in TASKS for b in BUCKETS if source.count(task, b)}
    assert found == {("t2i", "picture"): 1, ("t2i", "wide"): 2, ("t2v", "clip9"): 1, ("t2v", "clip5"): 1, ("i2v", "clip_edit"): 1,
                     ("ti2v", "clip_edit"): 1, ("ti2i", "edit"): 1, ("ti2i_baseimg", "edit"): 1, ("tv2v", "clip_edit"): 1,
                     ("tiv2v", "clip_edit"): 1}
    assert set(source.tasks()) == set(TASKS)
    short, many = source.unplaced()
    assert short.startswith("tiny.mp4 (") and short.endswith("manifest.jsonl:7): no bucket for t2v of 3x96x144 with 0 reference images")
    assert many.startswith("coffee.png (") and many.endswith("manifest.jsonl:14): no bucket for ti2i of 1x400x600 with 3 reference images")


def test_texts_that_are_too_long_are_found_before_the_run(root):
    """They go to a bucket with more room, or to the list: never to a batch that cannot hold them."""
    wordy = {"task": "ti2i", "target": "coffee.png", "images": ["coffee.png"], "short": "A cup.", "instruction": "Make it blue. " * 30}
    roomy = dataclasses.replace(BUCKETS[4], name="roomy", prompt_tokens=512, images=3)  # never the first choice: a slot more is empty
    prompter = Prompter(SMALL_VLM)
    for buckets, place in ((BUCKETS, None), ((*BUCKETS, roomy), roomy)):
        source = source_of(root, [LINES[8], wordy], buckets, prompter)
        assert source.count("ti2i", BUCKETS[4]) == 1 and bool(place) == (not source.unplaced())
        if place:
            assert source.count("ti2i", place) == 1
        else:
            reason = r"coffee.png .*:2\): with its instruction text it needs \d+ prompt tokens, bucket edit has 128"
            assert re.fullmatch(reason, source.unplaced()[0])
    narrow = [dataclasses.replace(BUCKETS[4], patches=4)]
    assert source_of(root, [LINES[8]], narrow, prompter).unplaced()[0].endswith("it needs 8 VLM patches, bucket edit has 4")


def test_a_stage_leaves_other_tasks_and_knows_its_samples(root):
    source_of(root, LINES)
    pictures = MediaSource(root / "manifest.jsonl", root, BUCKETS, tasks=("t2i", "t2v"))
    assert pictures.undrawn() == {"i2v": 1, "ti2v": 1, "ti2i": 2, "ti2i_baseimg": 1, "tv2v": 1, "tiv2v": 1}
    other = [[*LINES[:8], {**LINES[8], **change}, *LINES[9:]] for change in (
        {"instruction": "Break it."}, {"images": ["chelsea.png"]}, {"images": ["coffee.png", "chelsea.png"]}, {"short": "A cup."})]
    orders = (LINES, LINES, LINES[1:], [LINES[0], LINES[2], LINES[1], *LINES[3:]], [*LINES, LINES[0]], *other)
    prints = [source_of(root, lines).fingerprint() for lines in orders]
    assert prints[0] == prints[1] and len(set(prints)) == 8


def test_pixels_are_those_of_the_files(root):
    source, by_name = source_of(root, LINES), {b.name: b for b in BUCKETS}
    cup = np.asarray(Image.open(root / "coffee.png").convert("RGB"))
    edit = source.sample("ti2i", by_name["edit"], 0)
    small = np.asarray(Image.fromarray(cup).resize((48, 32), Image.Resampling.LANCZOS))  # 600x400 is 3:2 as well: nothing is cut
    assert np.array_equal(edit.target[0], small) and np.array_equal(edit.images[0], small) and not edit.base_image
    base = source.sample("ti2i_baseimg", by_name["edit"], 0)
    assert base.base_image and np.array_equal(base.images[1], small)
    clip = source.sample("t2v", by_name["clip9"], 0).target
    truth = np.stack([cover(np.ascontiguousarray(cup[100:196, 3 * i:3 * i + 144]), 32, 48) for i in range(9)])
    errors = [[np.abs(a.astype(int) - b).mean() for b in truth.astype(int)] for a in clip]
    assert np.argmin(errors, 1).tolist() == list(range(9)) and np.diag(errors).max() < 4  # every frame, in order; lossy by a few levels
    first = source.sample("i2v", by_name["clip_edit"], 0)
    assert np.array_equal(first.images[0], first.target[0])
    edited = source.sample("tiv2v", by_name["clip_edit"], 0)
    assert edited.images[0].shape == (32, 48, 3) and (edited.images[0][:, :4] == 255).all()  # a square picture, letterboxed
    assert edited.video.shape == (5, 32, 48, 3) and edited.texts == {"instruction": ("Put her in.",)}


def test_a_reference_of_another_shape_than_the_target_loses_nothing(root):
    """Where a bucket's reference images are square and its target is not, they are letterboxed, as in sampling."""
    square = [dataclasses.replace(BUCKETS[4], images=1, image_width=32), dataclasses.replace(BUCKETS[5], image_width=32)]
    source = source_of(root, [LINES[8], LINES[6]], square)
    for task, bucket in (("ti2i", square[0]), ("i2v", square[1])):
        sample = source.sample(task, bucket, 0)
        (seen,), whole = sample.images, sample.target[0]
        assert (seen[:4] == 255).all() and (seen[-4:] == 255).all()  # 32 x 21 of a 3:2 picture, on white
        narrow = np.asarray(Image.fromarray(whole).resize((32, 21), Image.Resampling.LANCZOS))
        assert np.abs(seen[5:26, [0, -1]].astype(int) - narrow[:, [0, -1]]).mean() < 8  # its left and right ends


def test_cutting_is_even():
    image = np.tile(np.arange(100, dtype=np.uint8)[None, :, None], (20, 1, 3))
    assert cover(image, 20, 40)[0, :, 0].tolist() == list(range(30, 70))
    assert cover(image, 10, 16).shape == (10, 16, 3) and cover(image, 20, 100) is image


def test_all_eight_tasks_become_batches(root):
    mixture = Mixture(WEIGHTS, {"long": .4, "short": .3, "instruction": .3}, 0.0, 0.0)
    seen, prompter = {}, Prompter(SMALL_VLM)
    source = source_of(root, LINES, BUCKETS, prompter)
    with Loader(source, mixture, BUCKETS, prompter, 0, stop_step=60, threads=2) as batches:
        told = table(batches.schedule.assigned, source)
        for _, name, batch in batches:
            spec = next(b for b in BUCKETS if b.name == name).spec()
            assert batch.target.shape == spec.target.shape and batch.tokens.shape == spec.tokens.shape
            seen.update({TASKS[t]: int((role != ROLE_PAD).sum()) for t, role in zip(batch.task, batch.role)})
    image, clip = 2 * 3 + 2, 2 * 2 * 3 + 2
    assert seen == {"t2i": 0, "t2v": 0, "i2v": image, "ti2v": image, "ti2i": image, "ti2i_baseimg": 2 * image, "tv2v": clip,
                    "tiv2v": image + clip}
    assert "2 items fit no bucket" in told and "tiny.mp4" in told and "t2i (2)" in told


@pytest.mark.parametrize("line, message", [
    ("{", r"manifest.jsonl:2: not JSON"), ("[1]", r"manifest.jsonl:2: not a JSON object"),
    ({"task": "t2i", "target": "coffee.png"}, "no text: give at least one of long, short, instruction"),
    ({"task": "t2i", "target": "coffee.png", "caption": "x"}, "unknown key 'caption'"),
    ({"task": "t2x", "target": "coffee.png", "long": "x"}, "unknown task 't2x'"),
    ({"task": "t2i", "long": "x"}, "'target' is missing"),
    ({"task": "t2i", "target": "none.png", "long": "x"}, "there is no file .*none.png"),
    ({"task": "t2i", "target": "long.mp4", "long": "x"}, "cannot read the image"),
    ({"task": "t2v", "target": "manifest.jsonl", "long": "x"}, "cannot read the video"),
    ({"task": "t2i", "target": "coffee.png", "long": "x", "images": ["coffee.png"]}, "task t2i takes no 'images'"),
    ({"task": "ti2i", "target": "coffee.png", "long": "x"}, "task ti2i needs 'images'"),
    ({"task": "ti2i", "target": "coffee.png", "long": "x", "images": "coffee.png"}, "'images' must be a list of strings"),
    ({"task": "tv2v", "target": "mid.mp4", "long": "x"}, "task tv2v needs a 'video'"),
    ({"task": "t2v", "target": "mid.mp4", "long": "x", "video": "mid.mp4"}, "task t2v takes no 'video'"),
])
def test_a_bad_line_is_named(root, line, message):
    with pytest.raises(UserError, match=message) as error:
        source_of(root, [LINES[0], line])
    assert "manifest.jsonl:2" in str(error.value) and "\n" not in str(error.value)


def test_bad_files_are_named(root, tmp_path):
    with pytest.raises(UserError, match="cannot read the manifest"):
        MediaSource(tmp_path / "none.jsonl", root, BUCKETS)
    with pytest.raises(UserError, match="no bucket takes task 't2v'.*tiny.mp4"):
        assign({"t2v": 1.0}, BUCKETS, source_of(root, [LINES[5]]))
    with pytest.raises(UserError, match="has no items"):
        source_of(root, [""])
    with pytest.raises(UserError, match="mid.mp4 decodes to 6 frames, 9 are needed"):
        read_cut_clip(root / "mid.mp4", 9, 32, 32)
