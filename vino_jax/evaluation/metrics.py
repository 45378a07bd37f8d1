"""Measures of pictures and clips that need no model. All take uint8 RGB, (H, W, 3) or (F, H, W, 3).

METRICS is their table: what each compares, and which way is better. Those that need weights are in learned.py.
"""
from collections.abc import Callable
from dataclasses import dataclass

import cv2
import numpy as np
from scipy.ndimage import uniform_filter

_PEAK = 255.0
_WINDOW = 7  # side of SSIM's square window
_FLOW = {"pyr_scale": 0.5, "levels": 3, "winsize": 15, "iterations": 3, "poly_n": 5, "poly_sigma": 1.2, "flags": 0}  # OpenS2V-Eval's
_FLOW_WIDTH = 16  # to which it scales every flow map down
# Of changed_region, in grey levels: above noise. On three photographs the library's own mp4 (crf 12) and JPEGs of quality 90 exceed it in
# less than 0.03 % of the pixels, JPEGs of quality 75 in less than 0.3 %.
CHANGED = 16.0


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Peak signal-to-noise ratio in dB over all pixels (of a clip: of all frames together, no mean of the frames' values); infinite for
    equal arrays. Raises ValueError where shapes differ."""
    _check(a, b)
    # frame by frame in whole numbers: exact, and a clip needs no float copies of itself
    squares = sum(int(np.square(np.subtract(x, y, dtype=np.int32)).sum(dtype=np.int64)) for x, y in zip(_frames(a), _frames(b)))
    return 10.0 * float(np.log10(_PEAK**2 * a.size / squares)) if squares else float("inf")


def ssim(a: np.ndarray, b: np.ndarray) -> float:
    """Structural similarity, -1..1, mean over frames and channels: Wang et al. 2004 with a uniform 7x7 window and sample covariances
    (k1 = 0.01, k2 = 0.03), over pixels whose window lies inside; scikit-image's default, not the Gaussian window of 11 that some papers
    use. Raises ValueError where shapes differ or a side is under 7 pixels."""
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

    VBench asks it of scenes that should stand still: it takes motion for flicker. Its figure for a model is the mean over clips, each the
    same whatever its length (Vchitect/VBench, vbench/temporal_flickering.py). Raises ValueError for fewer than two frames.
    """
    _check_clip(clip_FHWC)
    change = np.mean([cv2.absdiff(x, y).mean() for x, y in zip(clip_FHWC, clip_FHWC[1:])])
    return 1.0 - float(change) / _PEAK


def motion(clip_FHWC: np.ndarray) -> float:
    """Motion amplitude as OpenS2V-Eval scores it ("motion_fb"): |mean of Farneback's optical flow|, in pixels a frame at the clip's own size
    and rate.

    The mean is of signed values, over neighbouring frames, places, and the two components together: what moves right by k pixels over the
    whole frame gives k/2, and opposite motions cancel, a zoom too. OpenS2V-Eval cuts each clip's value at 1.0 before it takes the mean over
    clips; here it is not cut (PKU-YuanGroup/OpenS2V-Nexus, eval/get_motionscore.py). Raises ValueError for fewer than two frames, and for
    one more than 16 times as wide as high.
    """
    _check_clip(clip_FHWC)
    height, width = clip_FHWC.shape[1:3]
    size = (_FLOW_WIDTH, int(height * (_FLOW_WIDTH / width)))
    if not size[1]:
        raise ValueError(f"motion is not defined for a clip more than {_FLOW_WIDTH} times as wide as high, got {clip_FHWC.shape}")
    # It takes RGB for BGR: red and blue swap their weights in the grey. Kept, so that scores are comparable.
    grey = [cv2.cvtColor(np.ascontiguousarray(frame), cv2.COLOR_BGR2GRAY) for frame in clip_FHWC]
    flows = [cv2.resize(cv2.calcOpticalFlowFarneback(x, y, None, **_FLOW), size, interpolation=cv2.INTER_AREA) for x, y in zip(grey, grey[1:])]
    return abs(float(np.mean(flows, dtype=np.float64)))


def changed_region(source: np.ndarray, output: np.ndarray, threshold: float = CHANGED) -> float:
    """Share of an edit's pixels, 0..1, that differ visibly from its source.

    A pixel is changed where the mean of output - source over the 3x3 pixels around it (at the rim the nearest pixels count again) is more
    than `threshold` grey levels away from 0 in any channel. The mean is of signed differences: noise of codecs and of a VAE cancels in
    it, another colour does not; a changed region grows by up to a pixel. Our own definition; no benchmark has one.
    Raises ValueError where shapes differ.
    """
    _check(source, output)
    count = sum(int((np.abs(_box_sum(np.subtract(y, x, dtype=np.int32))).max(-1) > 9 * threshold).sum())
                for x, y in zip(_frames(source), _frames(output)))
    return count / (source.size // 3)


@dataclass(frozen=True)
class Metric:
    """A metric of one output. score takes the output and what `needs` names: "" nothing more, "reference" (what it should be), "source"
    (what was edited) or "caption". media: "any", "picture" or "clip". better: "higher", "lower", or "neither" where it only tells."""

    needs: str
    media: str
    better: str
    score: Callable[..., float]


METRICS: dict[str, Metric] = {
    "psnr": Metric("reference", "any", "higher", psnr),
    "ssim": Metric("reference", "any", "higher", ssim),
    "steadiness": Metric("", "clip", "higher", steadiness),
    "motion": Metric("", "clip", "higher", motion),
    "changed_region": Metric("source", "any", "neither", lambda output, source, **options: changed_region(source, output, **options)),
}


def _frames(pixels: np.ndarray) -> np.ndarray:
    return pixels if pixels.ndim == 4 else pixels[None]


def _box_sum(x_HWC: np.ndarray) -> np.ndarray:
    """Sum over the 3x3 pixels around each, in whole numbers: a filter of floats would decide by its rounding at the threshold."""
    padded = np.pad(x_HWC, ((1, 1), (1, 1), (0, 0)), mode="edge")
    rows = padded[:-2] + padded[1:-1] + padded[2:]
    return rows[:, :-2] + rows[:, 1:-1] + rows[:, 2:]


def _check(a: np.ndarray, b: np.ndarray) -> None:
    if a.shape != b.shape or a.shape[-1] != 3 or a.ndim not in (3, 4):
        raise ValueError(f"two pictures or clips of one shape are needed, got {a.shape} and {b.shape}")


def _check_clip(clip_FHWC: np.ndarray) -> None:
    if clip_FHWC.ndim != 4 or len(clip_FHWC) < 2:
        raise ValueError(f"a clip of two frames or more is needed, got {clip_FHWC.shape}")
