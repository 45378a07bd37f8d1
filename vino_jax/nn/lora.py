"""Low-rank adapters (LoRA, Hu et al., 2021): y = x W + b + (alpha / rank) (x A) B, where W stays as it is and A and B train.

What is added is added to activations: neither a change of W nor a gradient of its size ever lies in memory. A starts random and B at zero, so
an adapter that is fresh changes nothing. A model is built without adapters; `attach` puts them on its Linears, on stacked ones
a stack of them.
"""
import functools
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from flax import nnx

T = TypeVar("T")
LEAVES = ("lora_a", "lora_b")  # names beside "kernel", which layers.Linear gives them


@dataclass(frozen=True)
class Adapter:
    """Of one kernel, or of every layer of a stacked one."""

    rank: int
    alpha: float


@dataclass(frozen=True)
class LowRank:
    """An adapter's values, float32: a ([layers,] inputs, rank), b ([layers,] rank, outputs)."""

    a: np.ndarray
    b: np.ndarray
    alpha: float

    @property
    def rank(self) -> int:
        return self.a.shape[-1]

    @property
    def change(self) -> np.ndarray:
        """What it adds to the kernel, in the kernel's shape."""
        return np.float32(self.alpha / self.rank) * (self.a @ self.b)


def kernel_of(path: str) -> str | None:
    """Path of the kernel whose adapter the parameter at `path` is part of; None for a parameter of no adapter."""
    parent, _, name = path.rpartition("/")
    return f"{parent}/kernel" if name in LEAVES else None


def within(part: str, by_kernel: Mapping[str, T]) -> dict[str, T]:
    """Those of one part of the model, by their paths in it."""
    return {path.removeprefix(f"{part}/"): value for path, value in by_kernel.items() if path.startswith(f"{part}/")}


def attach(module: nnx.Module, adapters: Mapping[str, Adapter], rngs: nnx.Rngs) -> nnx.Module:
    """`module` with adapters, by the paths of kernels of its Linears such as "double/visual/out/kernel"."""
    for path, adapter in adapters.items():
        linear = functools.reduce(getattr, path.split("/")[:-1], module)
        linear.adapt(adapter.rank, adapter.alpha / adapter.rank, rngs)
    return module


def low_ranks(leaves: Mapping[str, np.ndarray], adapters: Mapping[str, Adapter]) -> dict[str, LowRank]:
    """{path of a kernel: adapter} from adapters' leaves by their own paths."""
    a, b = LEAVES
    kernels = {kernel_of(path): path.rpartition("/")[0] for path in leaves}
    return {kernel: LowRank(leaves[f"{parent}/{a}"], leaves[f"{parent}/{b}"], adapters[kernel].alpha) for kernel, parent in kernels.items()}


def merged(leaves: Iterable[tuple[str, Any]], adapters: Mapping[str, LowRank]) -> Iterator[tuple[str, Any]]:
    """(path, array) without adapters' leaves; kernels that have an adapter with what it adds, in float32."""
    for path, leaf in leaves:
        if kernel_of(path) is None:
            yield path, leaf.astype(np.float32) + adapters[path].change if path in adapters else leaf
