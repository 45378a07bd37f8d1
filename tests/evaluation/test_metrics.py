"""Model-free metrics against scikit-image and by hand."""
import numpy as np
import pytest
from skimage.metrics import peak_signal_noise_ratio, structural_similarity

from vino_jax.evaluation.metrics import psnr, ssim, steadiness


@pytest.fixture
def pair():
    rng = np.random.default_rng(0)
    clean = rng.integers(0, 256, (3, 4, 5, 3), np.uint8).repeat(8, 1).repeat(8, 2)
    noisy = np.clip(clean + rng.normal(0, 12, clean.shape), 0, 255).astype(np.uint8)
    return clean, noisy


def test_psnr_is_scikit_images(pair):
    for a, b in (pair, (pair[0][0], pair[1][0])):
        assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(a, b, data_range=255), abs=1e-4)
    assert psnr(pair[0], pair[0]) == float("inf")


def test_ssim_is_scikit_images(pair):
    for a, b in zip(*pair):
        assert ssim(a, b) == pytest.approx(structural_similarity(a, b, channel_axis=-1, data_range=255), abs=1e-4)
    whole = np.mean([structural_similarity(a, b, channel_axis=-1, data_range=255) for a, b in zip(*pair)])
    assert ssim(*pair) == pytest.approx(whole, abs=1e-4)
    assert ssim(pair[0], pair[0]) == pytest.approx(1.0)


def test_steadiness_by_hand():
    clip = np.zeros((3, 8, 8, 3), np.uint8)
    assert steadiness(clip) == 1.0
    clip[1] = 51  # there and back: a fifth of the range at each of two changes
    assert steadiness(clip) == pytest.approx(0.8)


def test_wrong_shapes_are_told(pair):
    for call in (lambda: psnr(pair[0], pair[0][:1]), lambda: ssim(pair[0][:, :5], pair[0][:, :5]), lambda: steadiness(pair[0][:1])):
        with pytest.raises(ValueError):
            call()
