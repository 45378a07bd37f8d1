"""Model-free metrics against scikit-image, against the benchmarks' formulas written once more, and by hand."""
import cv2
import numpy as np
import pytest
from skimage import data
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vino_jax.evaluation.metrics import METRICS, changed_region, motion, psnr, ssim, steadiness


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (3, 4, 5, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    noisy = np.clip(clean + rng.normal(0, 12, clean.shape), 0, 255).astype(np.uint8)
    return clean, noisy


def noisy(clean, sigma):
    return np.clip(clean + np.random.default_rng(1).normal(0, sigma, clean.shape), 0, 255).astype(np.uint8)


def textured(height=192, width=256):
    rng = np.random.default_rng(2)
    return cv2.GaussianBlur(rng.integers(0, 256, (height, width, 3), np.uint8), (0, 0), 2)


def moving_square(step, side=48, frames=6, size=128):
    """A textured square on grey that moves by step = (right, down) pixels a frame."""
    clip, square = np.full((frames, size, size, 3), 128, np.uint8), textured()[:side, :side]
    for i in range(frames):
        clip[i, 40 + step[1] * i:, 12 + step[0] * i:][:side, :side] = square
    return clip


# --- psnr, ssim ---


def test_psnr_is_scikit_images(pair):
    for a, b in (pair, (pair[0][0], pair[1][0])):
        assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-9)
    assert psnr(pair[0], pair[0]) == float("inf")


def test_psnr_by_hand():
    a, b = np.zeros((2, 10, 10, 3), np.uint8), np.zeros((2, 10, 10, 3), np.uint8)
    b[0] = 255  # half of all is as wrong as can be: over all pixels 3 dB, while the mean of the frames would be infinite
    assert psnr(a, b) == pytest.approx(10 * np.log10(2)) and psnr(b, a) == psnr(a, b)


def test_ssim_is_scikit_images(pair):
    for a, b in zip(*pair):
        assert ssim(a, b) == pytest.approx(structural_similarity(a, b, channel_axis=-1, data_range=255), abs=1e-9)
    whole = np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in zip(*pair)])
    assert ssim(*pair) == pytest.approx(whole, abs=1e-9)
    assert ssim(pair[0], pair[0]) == pytest.approx(1.0)


@pytest.mark.parametrize("photograph", ["astronaut", "chelsea", "coffee"])
@pytest.mark.parametrize("height, width", [(7, 7), (8, 33), (151, 97), (240, 320)])
@pytest.mark.parametrize("sigma", [2, 25])
def test_both_on_real_pictures_of_several_sizes(photograph, height, width, sigma):
    clean = getattr(data, photograph)()[20:20 + height, 60:60 + width]
    found = noisy(clean, sigma)
    assert psnr(clean, found) == pytest.approx(peak_signal_noise_ratio(clean, found, data_range=255), abs=1e-9)
    wanted = structural_similarity(clean, found, channel_axis=-1, data_range=255, win_size=7, gaussian_weights=False, K1=.01, K2=.03)
    assert ssim(clean, found) == pytest.approx(wanted, abs=1e-9)


def test_both_on_a_clip_of_real_pictures():
    clean = np.stack([data.astronaut()[i:i + 90, 2 * i:2 * i + 120] for i in range(4)])
    found = noisy(clean, 9)
    assert psnr(clean, found) == pytest.approx(peak_signal_noise_ratio(clean, found, data_range=255), abs=1e-9)
    assert ssim(clean, found) == pytest.approx(
        np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in zip(clean, found)]), abs=1e-9)


# --- steadiness ---


def test_steadiness_by_hand():
    clip = np.zeros((3, 8, 8, 3), np.uint8)
    assert steadiness(clip) == 1.0
    clip[1] = 51  # there and back: a fifth of the range at each of two changes
    assert steadiness(clip) == pytest.approx(0.8)


def test_steadiness_is_vbenchs_formula(pair):
    clip = noisy(pair[0], 30)
    means = [np.mean(cv2.absdiff(np.array(a, np.float32), np.array(b, np.float32))) for a, b in zip(clip[:-1], clip[1:])]
    assert steadiness(clip) == pytest.approx((255.0 - np.mean(means)) / 255.0, abs=1e-6)


# --- motion ---


def opens2v(clip):
    """OpenS2V-Eval's motion_fb, written from its definition once more."""
    maps = []
    for a, b in zip(clip[:-1], clip[1:]):
        a, b = (cv2.cvtColor(frame, cv2.COLOR_BGR2GRAY) for frame in (a, b))  # of RGB frames, as theirs
        flow = cv2.calcOpticalFlowFarneback(a, b, flow=None, pyr_scale=0.5, levels=3, winsize=15, iterations=3, poly_n=5,
                                            poly_sigma=1.2, flags=0)
        maps.append(cv2.resize(flow, (16, int(flow.shape[0] * (16 / flow.shape[1]))), interpolation=cv2.INTER_AREA))
    return abs(float(np.mean(np.mean(np.array(maps), axis=0))))


@pytest.mark.parametrize("clip", [moving_square((3, 1)), np.stack([textured()[:100, 3 * i:150 + 3 * i] for i in range(5)]),
                                  np.stack([data.astronaut()[2 * i:2 * i + 90, i:i + 70] for i in range(4)])])
def test_motion_is_opens2vs_formula(clip):
    assert motion(clip) == pytest.approx(opens2v(clip), rel=1e-5)
    assert motion(clip) > 0.05


def test_a_still_clip_does_not_move_and_a_faster_one_moves_more():
    assert motion(np.stack([textured()] * 3)) == pytest.approx(0, abs=1e-3)
    found = [motion(moving_square((step, 0))) for step in range(5)]
    assert found[0] == 0 and all(a < b for a, b in zip(found, found[1:]))
    assert found[4] / found[1] == pytest.approx(4, rel=0.05)


@pytest.mark.parametrize("step", [1, 2, 4])
def test_motion_of_a_pan_is_half_its_pixels(step):
    """Half: the mean is over both components, and one of them is 0."""
    clip = np.stack([textured()[40:140, 60 - step * i:200 - step * i] for i in range(5)])
    assert motion(clip) == pytest.approx(step / 2, rel=0.1)


def test_motion_is_of_signed_values():
    assert motion(moving_square((2, 2))) == pytest.approx(2 * motion(moving_square((2, 0))), rel=0.05)
    assert motion(moving_square((2, -2))) == pytest.approx(0, abs=0.01)


def test_motion_takes_red_and_blue_for_each_other():
    clip = moving_square((2, 0))
    red, blue = clip.copy(), clip.copy()
    red[..., 1:], blue[..., :2] = 128, 128
    grey = [np.abs(cv2.cvtColor(one[0], cv2.COLOR_BGR2GRAY).astype(int) - 128).mean() for one in (red, blue)]
    assert grey[0] < grey[1]  # red weighs 0.114
    for one in (red, blue):
        assert motion(one) == pytest.approx(opens2v(one), rel=1e-5)


# --- changed_region ---


def test_nothing_and_everything_changed():
    source = data.astronaut()[:64, :80]
    assert changed_region(source, source) == 0
    assert changed_region(np.zeros_like(source), np.full_like(source, 17)) == 1
    assert changed_region(np.zeros_like(source), np.full_like(source, 16)) == 0  # more than the threshold
    assert changed_region(np.zeros_like(source), np.full_like(source, 16), threshold=15.9) == 1


@pytest.mark.parametrize("channel", [0, 1, 2])
@pytest.mark.parametrize("sign", [1, -1])
def test_a_square_in_one_channel(channel, sign):
    source = np.full((40, 50, 3), 120, np.uint8)
    output = source.copy()
    output[10:20, 15:35, channel] += np.int8(sign * 100).astype(np.uint8)
    # beyond its sides by one pixel, where a third of the window is changed; not at the corners' outer pixels, where one of nine is 11.1
    assert changed_region(source, output) == (12 * 22 - 4) / 2000
    output = source.copy()
    output[10:20, 15:35, channel] += np.int8(sign * 40).astype(np.uint8)  # a third of 40 is below 16
    assert changed_region(source, output) == (10 * 20) / 2000


def test_noise_is_no_change_where_a_colour_of_the_same_size_is_one():
    source = np.full((60, 60, 3), 128, np.uint8)
    output = noisy(source, 12)
    assert np.abs(output.astype(int) - source).max() > 40 and changed_region(source, output) < 0.002
    output[20:30, 20:30] += 30
    assert changed_region(source, output) == pytest.approx(0.036, abs=0.008)


def test_a_photograph_through_jpeg_is_hardly_changed():
    source = data.coffee()[:200, :300]
    for quality, most in ((90, 3e-4), (75, 3e-3)):
        output = cv2.imdecode(cv2.imencode(".jpg", source, [cv2.IMWRITE_JPEG_QUALITY, quality])[1], cv2.IMREAD_COLOR)
        assert 0 < np.abs(output.astype(int) - source).max() and changed_region(source, output) < most


def test_of_a_clip_it_is_the_share_over_all_frames():
    source = np.zeros((4, 20, 20, 3), np.uint8)
    output = source.copy()
    output[1] = 90
    assert changed_region(source, output) == 0.25


def test_wrong_shapes_are_told(pair):
    clip = pair[0]
    for call in (lambda: psnr(clip, clip[:1]), lambda: ssim(clip[:, :5], clip[:, :5]), lambda: steadiness(clip[:1]),
                 lambda: motion(clip[:1]), lambda: motion(clip[0]), lambda: motion(np.zeros((2, 4, 65, 3), np.uint8)),
                 lambda: changed_region(clip, clip[:, :8]), lambda: changed_region(clip[..., :1], clip[..., :1])):
        with pytest.raises(ValueError):
            call()


def test_the_table_calls_each_with_what_it_needs(pair):
    clean, found = pair
    other = {"": (), "reference": (clean,), "source": (clean,)}
    values = {name: metric.score(found, *other[metric.needs]) for name, metric in METRICS.items()}
    assert values == {"psnr": psnr(clean, found), "ssim": ssim(clean, found), "steadiness": steadiness(found), "motion": motion(found),
                      "changed_region": changed_region(clean, found)}
