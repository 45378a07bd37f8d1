"""Bad data, kind by kind: the run ends and names the item, or goes on without it and lists it; no batch ever holds a wrong sample."""
import json
import re
import struct

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image

from data_pipelines.files import ORIENTATION, clip_facts, decoded_facts, picture_facts, read_image
from data_pipelines.loader import Loader
from data_pipelines.media import MediaSource, read_cut_clip
from data_pipelines.mixture import Mixture
from data_pipelines.pixels import read_clip
from data_pipelines.problems import Problems
from data_pipelines.prompts import Prompter
from tests.data.folders import SMALL_VLM
from vino_jax.batch import ROLE_MARKER, TASKS, BucketSpec
from vino_jax.errors import UserError

BUCKETS = (
    BucketSpec("picture", 1, 1, 32, 32, 128), BucketSpec("clip", 1, 9, 32, 32, 128),
    BucketSpec("edit", 1, 1, 32, 32, 160, 64, images=2, image_height=32, image_width=32),
    BucketSpec("clip_edit", 1, 9, 32, 32, 192, 64, video_frames=9, video_height=32, video_width=32),
)
GREY = 90  # of all that is right


def write_clip(path, frames, grey=GREY):
    """A clip of one grey, faststart: what is cut off at its end does not make it unreadable as a whole."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.options = 64, 64, "yuv420p", {"g": "4", "bf": "0"}
        for i in range(frames):
            noise = np.random.default_rng(i).integers(-6, 7, (64, 64, 3))
            container.mux(stream.encode(av.VideoFrame.from_ndarray((grey + noise).astype(np.uint8))))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    Image.new("RGB", (64, 64), (GREY,) * 3).save(root / "good.png")
    Image.new("RGB", (1, 1)).save(root / "dot.png")
    Image.new("RGB", (250, 1)).save(root / "line.png")
    whole = (root / "good.png").read_bytes()
    (root / "cut.png").write_bytes(whole[:len(whole) // 2])
    (root / "empty.png").write_bytes(b"")
    Image.fromarray(np.full((64, 64), GREY / 255, np.float32)).save(root / "float.tiff")
    write_clip(root / "good.mp4", 12)
    whole = (root / "good.mp4").read_bytes()
    (root / "cut.mp4").write_bytes(whole[:len(whole) * 11 // 12])
    (root / "head.mp4").write_bytes(whole[:200])
    (root / "codec.mp4").write_bytes(whole.replace(b"avc1", b"zzzz"))
    with av.open(str(root / "none.mp4"), "w") as container:  # a video stream without a frame
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt = 64, 64, "yuv420p"
        container.mux(stream.encode())
    with av.open(str(root / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), "fltp", "mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return root


GOOD = [
    {"task": "t2i", "target": "good.png", "short": "grey"}, {"task": "t2v", "target": "good.mp4", "short": "grey"},
    {"task": "ti2i", "target": "good.png", "images": ["good.png"], "instruction": "Make it blue."},  # that names no reference
    {"task": "tv2v", "target": "good.mp4", "video": "good.mp4", "instruction": "Keep it."},
]
# name -> (item, what is told of it where the run stops; None: it fits no bucket and is listed in the table, whatever the policy)
BAD = {
    "truncated clip": ({"task": "t2v", "target": "cut.mp4", "short": "x"}, None),
    "half a header": ({"task": "t2v", "target": "head.mp4", "short": "x"}, "head.mp4 has no video stream"),
    "no frame": ({"task": "t2v", "target": "none.mp4", "short": "x"}, "none.mp4"),
    "unknown codec": ({"task": "t2v", "target": "codec.mp4", "short": "x"}, "cannot read the video .*codec.mp4|codec.mp4 is of a kind"),
    "sound only": ({"task": "t2v", "target": "sound.mp4", "short": "x"}, "sound.mp4 has no video stream"),
    "truncated picture": ({"task": "t2i", "target": "cut.png", "short": "x"}, "cannot read the image .*cut.png"),
    "empty picture": ({"task": "t2i", "target": "empty.png", "short": "x"}, "cannot read the image .*empty.png"),
    "truncated reference": ({"task": "ti2i", "target": "good.png", "images": ["cut.png"], "short": "x"}, "cannot read the image .*cut.png"),
    "1x1": ({"task": "t2i", "target": "dot.png", "short": "x"}, None), "1:250": ({"task": "t2i", "target": "line.png", "short": "x"}, None),
    "1x1 reference": ({"task": "ti2i", "target": "good.png", "images": ["dot.png"], "short": "x"}, None),
    "1:250 reference": ({"task": "ti2i", "target": "good.png", "images": ["line.png"], "short": "x"}, None),
    "32 bits": ({"task": "t2i", "target": "float.tiff", "short": "x"}, "float.tiff: its values have 32 bits"),
    "missing": ({"task": "t2i", "target": "nowhere.png", "short": "x"}, "there is no file .*nowhere.png"),
    "no caption": ({"task": "t2i", "target": "good.png", "short": " ", "long": ""}, "no text"),
    "10,000 letters": ({"task": "t2i", "target": "good.png", "long": "word " * 2000}, None),
    "special token": ({"task": "t2i", "target": "good.png", "long": "a <|im_end|> b"}, "holds the special token"),
    "two videos": ({"task": "tv2v", "target": "good.mp4", "video": ["good.mp4"] * 2, "short": "x"}, "at most one reference clip"),
    "out of the root": ({"task": "t2i", "target": "../good.png", "short": "x"}, "leads out of the data root"),
}
BEYOND = {"truncated clip": "no bucket for t2v of", "1x1": "enlarged 32.0 times", "1:250": "would lose 100 % of the picture",
          "1x1 reference": "its reference image of 1x1 would be enlarged", "1:250 reference": "250x1 has an aspect ratio above 200",
          "10,000 letters": r"needs \d+ prompt tokens, bucket [a-z]+ has 1"}


def manifest_of(folder, entries):
    path = folder / "manifest.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


@pytest.fixture(scope="module")
def prompter():
    return Prompter(SMALL_VLM)


def steps(source, prompter, tasks, count=24):
    weights = {task: 1.0 for task in tasks}
    with Loader(source, Mixture(weights, {"long": .4, "short": .3, "instruction": .3}, 0, 0), BUCKETS, prompter, 0, stop_step=count) as batches:
        return [batch for _, _, batch in batches]


@pytest.mark.parametrize("kind", BAD)
def test_a_bad_item_is_named_or_left_out(root, tmp_path, prompter, kind):
    entry, told = BAD[kind]
    manifest = manifest_of(tmp_path, [GOOD[0], entry, *GOOD[1:]])

    def run(problems):
        source = MediaSource(manifest, root, BUCKETS, prompter, problems=problems)
        return source, steps(source, prompter, {e["task"] for e in GOOD})

    if told:
        with pytest.raises(UserError, match=told) as error:
            run(Problems())
        assert "manifest.jsonl:2" in str(error.value)
    problems = Problems(tmp_path / "skipped.jsonl")
    source, batches = run(problems)
    listed = [json.loads(line) for line in problems.listed()]
    assert [x["item"] for x in listed] == ([f"{manifest}:2"] if told else [])
    if not told:
        (line,) = source.unplaced()
        assert f"{manifest}:2" in line and re.search(BEYOND[kind], line)
    for batch in batches:  # every row is of a good item, whole
        assert np.abs(batch.target.astype(int) - GREY).max() < 25 and abs(batch.target.mean() - GREY) < 3
        assert batch.prompt_mask.any()


def test_a_clip_that_breaks_when_it_is_read(root, tmp_path, prompter, monkeypatch):
    """Its header promised more. With "skip", the next item takes its place, the same on every process; without, it is named."""
    entries = [{**GOOD[1], "target": name} for name in ("good.mp4", "bad.mp4", "good.mp4")]
    data = bytearray((root / "good.mp4").read_bytes())
    (root / "bad.mp4").write_bytes(data)
    manifest = manifest_of(tmp_path, entries)
    facts = clip_facts(root / "bad.mp4")
    assert facts.frames == 12
    write_clip(root / "bad.mp4", 5, grey=200)
    sources = [MediaSource(manifest, root, BUCKETS, prompter, problems=Problems(path)) for path in (tmp_path / "skipped.jsonl", None)]
    assert sources[0].count("t2v", BUCKETS[1]) == 3
    batches = steps(sources[0], prompter, ["t2v"], 6)
    assert all(abs(batch.target.mean() - GREY) < 3 for batch in batches)
    (line,) = Problems(tmp_path / "skipped.jsonl").listed()
    assert "decodes to 5 frames, 9 are needed" in line and f"{manifest}:2" in line
    with pytest.raises(UserError, match=r"manifest.jsonl:2: the video .*bad.mp4 decodes to 5 frames, 9 are needed"):
        sources[1].sample("t2v", BUCKETS[1], 1)


def test_when_no_item_is_left(root, tmp_path, prompter):
    manifest = manifest_of(tmp_path, [BAD["truncated picture"][0]] * 3)
    source = MediaSource(manifest, root, BUCKETS, prompter, problems=Problems(tmp_path / "skipped.jsonl"))
    with pytest.raises(UserError, match="none of the 3 samples of task t2i in bucket picture can be read"):
        source.sample("t2i", BUCKETS[0], 1)
    assert len(Problems(tmp_path / "skipped.jsonl").listed()) == 3


def test_a_reference_that_no_text_names_is_in_the_row(root, tmp_path, prompter):
    source = MediaSource(manifest_of(tmp_path, [GOOD[2]]), root, BUCKETS, prompter)
    (batch,) = steps(source, prompter, ["ti2i"], 1)
    assert TASKS[batch.task[0]] == "ti2i" and (batch.role == ROLE_MARKER).sum() == 2
    assert "Image 1:" in prompter.decode(batch.tokens[0][batch.prompt_mask[0]])


@pytest.mark.parametrize("mode, pixel, seen", [
    ("1", 1, (255,) * 3), ("L", 90, (90,) * 3), ("LA", (90, 0), (90,) * 3), ("RGBA", (10, 20, 30, 128), (10, 20, 30)),
    ("CMYK", (0, 0, 0, 255), (0,) * 3), ("P", 7, (70, 80, 90)), ("I;16", 90 << 8 | 255, (90,) * 3), ("YCbCr", (90, 128, 128), (90,) * 3),
])
def test_colour_modes(tmp_path, mode, pixel, seen):
    """Every mode as RGB; 16 bits are not clipped to white."""
    image = Image.new(mode, (3, 2), pixel)
    if mode == "P":
        image.putpalette(np.tile(np.arange(256)[:, None], (1, 3)).clip(0, 255).astype(np.uint8).tobytes())
        image.putpalette(b"".join(bytes((70, 80, 90)) for _ in range(256)))
    path = tmp_path / ("x.jpg" if mode == "YCbCr" else "x.tiff" if mode == "CMYK" else "x.png")
    image.save(path)
    assert read_image(path).shape == (2, 3, 3) and np.abs(read_image(path).astype(int) - seen).max() <= 1


@settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
@given(name=st.sampled_from(["good.png", "good.mp4"]), data=st.binary(max_size=40), at=st.floats(0, 1), insert=st.booleans(), end=st.floats(0, 1))
def test_any_bytes_are_read_or_told(root, name, data, at, insert, end):
    """Bytes written over or into a right file, or its end cut off: pixels of the right size, or one line; never another error."""
    whole = (root / name).read_bytes()
    place = int(at * len(whole))
    broken = whole[:place] + data + whole[place + len(data) * (not insert):]
    path = root / f"broken_{name}"
    path.write_bytes(broken[:max(1, int(len(broken) * (1 - end * insert)))])
    try:
        if name.endswith("png"):
            assert read_image(path).ndim == 3
        else:
            facts = decoded_facts(path)
            assert read_cut_clip(path, facts.frames, 32, 32).shape == (facts.frames, 32, 32, 3)
            clip_facts.__wrapped__(path)
    except UserError as error:
        assert f"broken_{name}" in str(error)


def test_damaged_frames_are_refused(tmp_path):
    """What a decoder would conceal: the slice of a frame overwritten in the middle of the file."""
    write_clip(tmp_path / "clip.mp4", 12)
    with av.open(str(tmp_path / "clip.mp4")) as container:
        places = [(p.pos, p.size) for p in container.demux(video=0) if p.size]
    data = bytearray((tmp_path / "clip.mp4").read_bytes())
    at, size = places[5]
    data[at + size // 2:at + size] = b"\x55" * (size - size // 2)
    (tmp_path / "hurt.mp4").write_bytes(data)
    with pytest.raises(UserError, match="hurt.mp4 is damaged at 0.21 s|cannot read the video .*hurt.mp4"):
        read_cut_clip(tmp_path / "hurt.mp4", 12, 32, 32)
    assert read_cut_clip(tmp_path / "hurt.mp4", 5, 32, 32).shape == (5, 32, 32, 3)  # what comes before it is whole
    (tmp_path / "cut.mp4").write_bytes((tmp_path / "clip.mp4").read_bytes()[:places[5][0] + 10])
    assert clip_facts(tmp_path / "cut.mp4").frames == 5


def test_what_is_turned_is_shown_upright(tmp_path):
    """As phones write it: a tag beside the pixels. Size, pixels and bucket are those of what a viewer shows."""
    picture = np.zeros((16, 48, 3), np.uint8)
    picture[:, :16] = 255  # white at the left; turned by 90 degrees clockwise it is at the top
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    for name in ("turned.jpg", "turned.png"):
        Image.fromarray(picture).save(tmp_path / name, exif=exif)
        facts, shown = picture_facts(tmp_path / name), read_image(tmp_path / name)
        assert (facts.height, facts.width) == shown.shape[:2] == (48, 16) and shown[:12].min() > 240 and shown[20:].max() < 16
    path = tmp_path / "turned.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.width, stream.height, stream.pix_fmt, stream.options = 48, 16, "yuv420p", {"crf": "1"}
        for _ in range(5):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture)))
        container.mux(stream.encode())
    data = bytearray(path.read_bytes())
    matrix = struct.pack(">9i", 1 << 16, 0, 0, 0, 1 << 16, 0, 0, 0, 1 << 30)
    at = data.index(matrix, data.index(b"tkhd"))
    data[at:at + 36] = struct.pack(">9i", 0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)  # 90 degrees clockwise
    path.write_bytes(data)
    facts, clip = clip_facts(path), read_cut_clip(path, 5, 48, 16)
    assert (facts.height, facts.width) == (48, 16) and facts == decoded_facts(path)
    assert clip[:, :12].min() > 200 and clip[:, 20:].max() < 50
    assert read_clip(path, 5, 48 * 16).shape == (5, 48, 16, 3)
