"""Letterboxing, clips, and the VLM's patches."""
import json
from fractions import Fraction

import av
import numpy as np
import pytest
from PIL import Image

from data_pipelines import files, pixels
from data_pipelines.pixels import PixelLimits, bounded_size, letterbox, letterbox_size
from tests.data.folders import SHARED, SMALL_VLM, needs_shared
from vino_jax.errors import UserError


def write_clip(path, frames=21, height=48, width=80, rate=15):
    """A clip whose frame i is grey 10 * i, so that every frame can be told."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", Fraction(rate), options={"crf": "0"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        for i in range(frames):
            frame = av.VideoFrame.from_ndarray(np.full((height, width, 3), 10 * i, np.uint8), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("size, budget, expected", [
    ((800, 1200), 64 * 96, (64, 96)), ((350, 350), 64 * 96, (80, 80)), ((64, 64), 64 * 64, (64, 64)), ((480, 848), 480 * 848, (480, 848)),
    ((10, 1000), 32 * 32, (16, 1600)), ((1000, 10), 32 * 32, (64, 16))])
def test_letterbox_size_is_the_nearest_area(size, budget, expected):
    assert letterbox_size(*size, budget) == expected


def test_letterbox_size_against_all_candidates():
    rng = np.random.default_rng(0)
    for _ in range(20):
        high, wide, budget = rng.integers(100, 900), rng.integers(100, 900), int(rng.integers(4000, 90000))
        ratio = wide / high
        candidates = [(h, w) for h in range(16, 4096, 16) for w in (int(ratio * h // 16) * 16, -int(-ratio * h // 16) * 16) if w]
        best = min(candidates, key=lambda c: (abs(c[0] * c[1] - budget), abs(c[1] / c[0] - ratio)))
        assert letterbox_size(int(high), int(wide), budget) == best


def test_letterbox_centres_on_white():
    black = np.zeros((20, 40, 3), np.uint8)
    boxed = letterbox(black, 64, 64)
    assert boxed.shape == (64, 64, 3)
    assert (boxed[16:48] == 0).all() and (boxed[:16] == 255).all() and (boxed[48:] == 255).all()
    assert letterbox(boxed, 64, 64) is boxed


def test_sizes_of_the_field():
    limits = PixelLimits()
    assert limits.image_sizes(480, 832) == ((476, 840), (480, 832))
    assert limits.video_sizes(480, 832)[1] == (480, 832)
    assert limits.video_sizes(720, 1280)[1] == (576, 1024)
    assert bounded_size(10, 10, 28, 0, 10**9) == (28, 28)
    with pytest.raises(UserError, match="aspect ratio above 200"):
        bounded_size(5, 1001, 28, 1, 10**9)


def test_patches_are_in_merge_order():
    """Each pixel tells its place: a row of the patches is (C, 2, 16, 16), rows go through 2x2 cells."""
    limits = PixelLimits.from_folder(SMALL_VLM)
    image = np.zeros((64, 96, 3), np.uint8)
    rows, columns = np.meshgrid(np.arange(64) // 16, np.arange(96) // 16, indexing="ij")
    image[..., 0], image[..., 1], image[..., 2] = rows * 20, columns * 20, 255
    seen = pixels.image_patches(image, limits)
    assert seen.grid == (1, 4, 6) and seen.values.dtype == np.float32
    coords = pixels.patch_coordinates(seen.grid)
    assert coords[:5, :2].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1], [0, 2]] and (coords[:, 2:] == [4, 6]).all()
    values = (seen.values.reshape(24, 3, 2, 16, 16) + 1) * 127.5
    np.testing.assert_allclose(values[:, 0].mean((1, 2, 3)), coords[:, 0] * 20, atol=1e-3)
    np.testing.assert_allclose(values[:, 1].mean((1, 2, 3)), coords[:, 1] * 20, atol=1e-3)
    np.testing.assert_allclose(values[:, 2], 255, atol=1e-3)


def test_clip_patches_sample_evenly_and_pair_frames():
    limits = PixelLimits.from_folder(SMALL_VLM)
    clip = np.broadcast_to((np.arange(21) * 10).astype(np.uint8)[:, None, None, None], (21, 64, 64, 3))
    seen = pixels.clip_patches(clip, limits)
    assert seen.grid == (4, 4, 4)
    greys = ((seen.values.reshape(4, 16, 3, 2, 16, 16) + 1) * 127.5).mean((1, 2, 4, 5)).ravel()
    np.testing.assert_allclose(greys, np.linspace(0, 20, 8).round() * 10, atol=1e-3)
    assert pixels.sampled_indices(3, 8).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_clips_are_cut_scaled_and_cropped(tmp_path):
    path = write_clip(tmp_path / "clip.mp4")
    clip = pixels.read_clip(path, 12, 40 * 80)
    assert clip.shape == (9, 32, 64, 3)  # 12 -> 9 frames; 44x73 -> 32x64
    np.testing.assert_allclose(clip.mean((1, 2, 3)), np.arange(9) * 10, atol=2)
    assert pixels.read_clip(path, 89, 48 * 80).shape == (21, 48, 80, 3)
    sampled = pixels.read_sampled(path, 8)
    assert sampled.shape == (8, 48, 80, 3)
    np.testing.assert_allclose(sampled.mean((1, 2, 3)), np.linspace(0, 20, 8).round() * 10, atol=2)


def test_what_cannot_be_read_is_named(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    for read in (files.read_image, lambda p: pixels.read_clip(p, 5, 4096), lambda p: pixels.read_sampled(p, 8)):
        with pytest.raises(UserError, match="bad.png"):
            read(bad)
    Image.fromarray(np.full((4, 4, 4), 128, np.uint8), "RGBA").save(tmp_path / "alpha.png")
    assert files.read_image(tmp_path / "alpha.png").shape == (4, 4, 3)
    with pytest.raises(UserError, match="too small"):
        pixels.crop_to_tokens(np.zeros((1, 8, 32, 3), np.uint8))


def test_a_clip_whose_frames_change_size_is_told(tmp_path):
    """As joined transport streams have it."""
    parts = []
    for name, side in (("a.ts", 48), ("b.ts", 64)):
        with av.open(str(tmp_path / name), "w") as container:
            stream = container.add_stream("libx264", rate=24)
            stream.width, stream.height, stream.pix_fmt = side, side, "yuv420p"
            for _ in range(8):
                container.mux(stream.encode(av.VideoFrame.from_ndarray(np.full((side, side, 3), 90, np.uint8))))
            container.mux(stream.encode())
        parts.append((tmp_path / name).read_bytes())
    (tmp_path / "joined.ts").write_bytes(b"".join(parts))
    with pytest.raises(UserError, match="joined.ts differ in size: bring it to one size"):
        pixels.read_sampled(tmp_path / "joined.ts", 8)


def test_limits_from_a_folder(tmp_path):
    for name in ("preprocessor_config.json", "video_preprocessor_config.json"):
        table = {"size": {"shortest_edge": 65536, "longest_edge": 16777216}, "patch_size": 16, "temporal_patch_size": 2, "merge_size": 2}
        if name.startswith("video"):
            table["size"] = {"shortest_edge": 4096, "longest_edge": 25165824}
        (tmp_path / name).write_text(json.dumps(table))
    assert PixelLimits.from_folder(tmp_path) == PixelLimits()
    assert PixelLimits.from_folder(tmp_path, video_fps=8.0).video_fps == 8.0
    (tmp_path / "preprocessor_config.json").write_text("{}")
    with pytest.raises(UserError, match="size.shortest_edge"):
        PixelLimits.from_folder(tmp_path)
    (tmp_path / "preprocessor_config.json").unlink()
    with pytest.raises(UserError, match="no preprocessor_config.json"):
        PixelLimits.from_folder(tmp_path)
    assert PixelLimits.from_folder(SMALL_VLM).image_sizes(64, 64)[1] == (64, 64)


@needs_shared
def test_limits_of_the_published_folder():
    assert PixelLimits.from_folder(SHARED / "qwen3vl_processor") == PixelLimits()
