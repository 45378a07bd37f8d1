"""Which frames of a clip are taken: windows, true frame rates, and what the table says of speed."""
import json
from fractions import Fraction

import av
import numpy as np
import pytest

from data_pipelines.buckets import assign, table
from data_pipelines.files import clip_facts, decoded_facts
from data_pipelines.media import Clips, MediaSource, read_cut_clip
from vino_jax.batch import BucketSpec
from vino_jax.errors import UserError

BUCKET = BucketSpec("clip", 1, 5, 32, 32, 64)
STEP = 4  # grey levels from a frame to the next


def write_clip(path, frames, rate=Fraction(24), times=None):
    """Frame i is grey 4 i. times: of the frames, in seconds (variable rate)."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.options = 32, 32, "yuv420p", {"crf": "1"}
        if times is not None:
            stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((32, 32, 3), STEP * i, np.uint8))
            if times is not None:
                frame.pts, frame.time_base = round(times[i] * 1000), Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def numbers(clip):
    """Which frame of the file each frame is."""
    return np.rint(clip.mean((1, 2, 3)) / STEP).astype(int).tolist()


@pytest.mark.parametrize("options, starts", [
    ({}, [0]), ({"windows": "middle"}, [8]), ({"windows": "sliding"}, [0, 5, 10, 15]), ({"windows": "sliding", "stride": 7}, [0, 7, 14]),
    ({"windows": "uniform", "count": 3}, [0, 8, 16]), ({"windows": "uniform", "count": 40}, list(range(17))), ({"windows": "uniform"}, [0]),
])
def test_windows(tmp_path, options, starts):
    path = write_clip(tmp_path / "clip.mp4", 21)
    clips = Clips(**options)
    assert clips.starts(16, 5) == starts and clips.starts(0, 5) == [0]
    (tmp_path / "m.jsonl").write_text(json.dumps({"task": "t2v", "target": path.name, "short": "x"}))
    source = MediaSource(tmp_path / "m.jsonl", tmp_path, [BUCKET], clips=clips)
    assert source.count("t2v", BUCKET) == len(starts)
    for index, start in enumerate(starts[:4]):
        assert numbers(source.sample("t2v", BUCKET, index).target) == list(range(start, start + 5))


def test_a_reference_clip_is_cut_where_its_target_is(tmp_path):
    write_clip(tmp_path / "long.mp4", 21)
    write_clip(tmp_path / "short.mp4", 13)
    bucket = BucketSpec("edit", 1, 5, 32, 32, 64, video_frames=5, video_height=32, video_width=32)
    (tmp_path / "m.jsonl").write_text(json.dumps({"task": "tv2v", "target": "long.mp4", "video": "short.mp4", "instruction": "x"}))
    source = MediaSource(tmp_path / "m.jsonl", tmp_path, [bucket], clips=Clips("uniform", 3))
    assert source.count("tv2v", bucket) == 3
    for index, start in enumerate((0, 4, 8)):  # of the 13 frames that both have
        sample = source.sample("tv2v", bucket, index)
        assert numbers(sample.target) == numbers(sample.video) == list(range(start, start + 5))


@pytest.mark.parametrize("windows, starts", [("sliding", [0]), ("middle", [0]), ("uniform", [0, 1])])
def test_a_reference_clip_may_be_shorter_than_its_target(tmp_path, windows, starts):
    write_clip(tmp_path / "target.mp4", 12)
    write_clip(tmp_path / "short.mp4", 6)
    bucket = BucketSpec("edit", 1, 9, 32, 32, 64, video_frames=5, video_height=32, video_width=32)
    (tmp_path / "m.jsonl").write_text(json.dumps({"task": "tv2v", "target": "target.mp4", "video": "short.mp4", "instruction": "x"}))
    source = MediaSource(tmp_path / "m.jsonl", tmp_path, [bucket], clips=Clips(windows, 2))
    assert source.count("tv2v", bucket) == len(starts)
    for index, start in enumerate(starts):
        sample = source.sample("tv2v", bucket, index)
        assert numbers(sample.target) == list(range(start, start + 9)) and numbers(sample.video) == list(range(start, start + 5))


def test_frames_that_an_edit_list_hides_are_no_frames(tmp_path):
    """As where a clip was cut without coding it anew: what is needed to decode its first frame lies before it, and is not shown."""
    path = write_clip(tmp_path / "whole.mp4", 12)
    with av.open(str(path)) as whole, av.open(str(tmp_path / "cut.mp4"), "w") as cut:
        stream = cut.add_stream_from_template(whole.streams.video[0])
        for packet in whole.demux(video=0):
            if packet.size:
                earlier = 4 * packet.duration
                packet.pts, packet.dts, packet.stream = packet.pts - earlier, packet.dts - earlier, stream
                cut.mux(packet)
    facts = clip_facts(tmp_path / "cut.mp4")
    assert facts == decoded_facts(tmp_path / "cut.mp4") and facts.frames == 8
    assert numbers(read_cut_clip(tmp_path / "cut.mp4", 8, 32, 32)) == list(range(4, 12))


def test_true_rates(tmp_path):
    """At 24 a second: of 48 every other, of 12 each twice, of 23.976 each once; by time stamps where there is no rate."""
    read = lambda path, count, start=0: numbers(read_cut_clip(path, count, 32, 32, start, 24.0))  # noqa: E731
    for rate, frames, wanted in ((48, 21, [0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20]), (Fraction(24000, 1001), 15, list(range(15)))):
        path = write_clip(tmp_path / f"{frames}.mp4", frames, rate)
        assert read(path, len(wanted)) == wanted and read(path, 3, 2) == wanted[2:5]
        assert clip_facts(path) == decoded_facts(path) and clip_facts(path).at_rate(24) == len(wanted)
    slow = write_clip(tmp_path / "slow.mp4", 9, 12)
    assert clip_facts(slow).at_rate(24) == 17 and read(slow, 17)[::2] == list(range(9)) and set(np.diff(read(slow, 17))) == {0, 1}
    times = [0, 0.1, 0.16, 0.2, 0.6, 0.66]  # variable
    path = write_clip(tmp_path / "variable.mp4", 6, 24, times)
    facts = clip_facts(path)
    assert facts.seconds == pytest.approx(0.66, abs=2e-3) and facts.at_rate(24) == 16
    nearest = [int(np.argmin([abs(t - k / 24) for t in times])) for k in range(16)]
    assert read(path, 16) == nearest
    with pytest.raises(UserError, match="decodes to"):
        read(path, 18)


def test_retiming_is_seen_in_the_table(tmp_path):
    lines = []
    for name, rate in (("a.mp4", 15), ("b.mp4", 30)):
        write_clip(tmp_path / name, 16, rate)
        lines.append(json.dumps({"task": "t2v", "target": name, "short": "x"}))
    (tmp_path / "m.jsonl").write_text("\n".join(lines))
    told = {}
    for compat in ("reference", "true_rate"):
        source = MediaSource(tmp_path / "m.jsonl", tmp_path, [BUCKET], clips=Clips(compat=compat))
        told[compat] = table(assign({"t2v": 1.0}, [BUCKET], source), source)
    assert "0.80-1.60 x" in told["reference"] and " 1.00 x " in told["true_rate"]


@pytest.mark.parametrize("options, message", [
    ({"windows": "tail"}, "data.clips.windows is 'tail'; known: head"), ({"compat": "x"}, "data.clips.compat"), ({"count": 0}, "at least 1"),
    ({"stride": -1}, "must not be negative"),
])
def test_wrong_options_are_told(options, message):
    with pytest.raises(UserError, match=message):
        Clips(**options)
