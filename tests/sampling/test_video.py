"""What is written can be read back: pixels, sizes, rate, metadata; a failure leaves neither a file nor a temporary one."""
import av
import numpy as np
import pytest
from PIL import Image

from vino_jax.sampling import video

METADATA = {"prompt": "ein Würfel, 红色; a=b\nsecond line", "seed": "7"}


def _clip(frames=5, height=32, width=48):
    y, x = np.mgrid[0:height, 0:width]
    return np.stack([np.stack([x * 4 + f * 3, y * 5, np.full_like(x, 40 * f)], -1) for f in range(frames)]).clip(0, 255).astype(np.uint8)


def test_a_png_keeps_its_pixels_and_metadata(tmp_path):
    pixels = _clip(1)
    path = video.write_output(tmp_path / "new", "a/0001", pixels, METADATA)
    assert path == tmp_path / "new" / "a" / "0001.png"
    with Image.open(path) as image:
        assert np.array_equal(np.asarray(image), pixels[0])
        assert dict(image.text) == METADATA


def test_an_mp4_has_its_frames_rate_codec_and_metadata(tmp_path):
    pixels = _clip()
    path = video.write_output(tmp_path, "clip", pixels, METADATA)
    assert path.name == "clip.mp4"
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        assert stream.codec_context.name == "h264" and stream.pix_fmt == "yuv420p" and stream.average_rate == 24
        assert {k: container.metadata[k] for k in METADATA} == METADATA
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(stream)])
    assert frames.shape == pixels.shape
    assert np.abs(frames.astype(int) - pixels).mean() < 6.0


def test_latents_are_written_channels_first(tmp_path):
    latents = np.random.default_rng(0).standard_normal((1, 2, 3, 4, 5)).astype(np.float32)
    video.write_latents(tmp_path / "x.npz", latents)
    assert np.array_equal(np.load(tmp_path / "x.npz")["latents"], latents.transpose(0, 4, 1, 2, 3))


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path):
    video.write_output(tmp_path, "clip", _clip(), METADATA)
    before = (tmp_path / "clip.mp4").read_bytes()
    with pytest.raises(ValueError):
        video.write_mp4(tmp_path / "clip.mp4", _clip().astype(np.float32), METADATA)
    assert [p.name for p in tmp_path.iterdir()] == ["clip.mp4"] and (tmp_path / "clip.mp4").read_bytes() == before
