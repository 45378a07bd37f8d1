"""Measures of pictures and clips that need no model. All take uint8 RGB, (H, W, 3) or (F, H, W, 3)."""
import numpy as np
from scipy.ndimage import uniform_filter

_PEAK = 255.0
_WINDOW = 7  # side of SSIM's square window


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels; infinite for equal arrays. Raises ValueError where shapes differ."""
    _check(a, b)
    error = float(np.mean(np.square(a.astype(np.float64) - b.astype(np.float64))))
    return 10.0 * float(np.log10(_PEAK**2 / error)) if error else float("inf")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity, -1..1, mean over frames and channels: Wang et al. 2004 with a uniform 7x7 window and sample covariances
    (k1 = 0.01, k2 = 0.03), over pixels whose window lies inside. Raises ValueError where shapes differ or a side is under 7 pixels."""
    _check(a, b)
    if min(a.shape[-3:-1]) < _WINDOW:
        raise ValueError(f"ssim needs at least {_WINDOW} pixels a side, got {a.shape}")
    if a.ndim == 4:
        return float(np.mean([ssim(x, y) for x, y in zip(a, b)]))

    def mean(x):
        return uniform_filter(x, (_WINDOW, _WINDOW, 1))

    x, y = a.astype(np.float64), b.astype(np.float64)
    mean_x, mean_y = mean(x), mean(y)
    sample = _WINDOW**2 / (_WINDOW**2 - 1)
    var_x, var_y, both = (sample * (mean(p * q) - m * n)
                          for p, q, m, n in ((x, x, mean_x, mean_x), (y, y, mean_y, mean_y), (x, y, mean_x, mean_y)))
    c1, c2 = (0.01 * _PEAK) ** 2, (0.03 * _PEAK) ** 2
    similar = (2 * mean_x * mean_y + c1) * (2 * both + c2) / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))
    rim = _WINDOW // 2
    return float(similar[rim:-rim, rim:-rim].mean())


def steadiness(clip_FHWC: np.ndarray) -> float:
    """Temporal flickering as VBench scores it: (255 - mean absolute difference of neighbouring frames) / 255; 1.0 is a still clip.

    Raises ValueError for fewer than two frames.
    """
    if clip_FHWC.ndim != 4 or len(clip_FHWC) < 2:
        raise ValueError(f"a clip of two frames or more is needed, got {clip_FHWC.shape}")
    return 1.0 - float(np.abs(np.diff(clip_FHWC.astype(np.float32), axis=0)).mean()) / _PEAK


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.shape[-1] != 3 or a.ndim not in (3, 4):
        raise ValueError(f"two pictures or clips of one shape are needed, got {a.shape} and {b.shape}")
