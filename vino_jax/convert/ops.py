"""Invertible changes of layout between a PyTorch tensor and ours. Each is exact: a round trip gives the same bits.

Ours is channels last: linear (in, out), convolution (spatial..., in, out).
"""
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Op:
    """to_jax: torch layout -> ours; to_torch(array, torch_shape): the inverse; shape: torch shape -> our shape."""

    name: str
    to_jax: Callable[[np.ndarray], np.ndarray]
    to_torch: Callable[[np.ndarray, tuple[int, ...]], np.ndarray]
    shape: Callable[[tuple[int, ...]], tuple[int, ...]]


COPY = Op("copy", lambda x: x, lambda x, s: x, lambda s: s)
LINEAR = Op("linear", lambda x: x.T, lambda x, s: x.T, lambda s: s[::-1])  # (out, in) <-> (in, out)
CONV = Op("conv",  # (out, in, *spatial) <-> (*spatial, in, out)
          lambda x: np.moveaxis(x, (0, 1), (-1, -2)), lambda x, s: np.moveaxis(x, (-1, -2), (0, 1)), lambda s: (*s[2:], s[1], s[0]))
# A convolution whose stride is its kernel, as a product: (out, in, *kernel) <-> (in * prod(kernel), out), input order (in, *kernel).
PATCH = Op("patch", lambda x: x.reshape(x.shape[0], -1).T, lambda x, s: x.T.reshape(s), lambda s: (int(np.prod(s[1:])), s[0]))
