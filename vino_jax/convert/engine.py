"""Conversion of one part by its table, in both directions, one of our leaves at a time.

A plan is made from names, shapes and dtypes alone: everything that is wrong is known before a byte is read.
"""
import math
import re
from collections.abc import Iterable, Iterator, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any, Protocol

import jax
import ml_dtypes
import numpy as np

from vino_jax.convert.ops import PATCH, Op
from vino_jax.convert.rules import Table
from vino_jax.errors import UserError
from vino_jax.nn.module import by_path

DTYPES = {"float32": np.dtype(np.float32), "bfloat16": np.dtype(ml_dtypes.bfloat16), "float16": np.dtype(np.float16)}
_PIECE = 1 << 19  # elements
Manifest = Mapping[str, tuple[tuple[int, ...], np.dtype]]  # PyTorch name -> (shape, dtype)


class Source(Protocol):
    """Tensors by their PyTorch names, read when asked for."""

    manifest: Manifest

    def read(self, name: str) -> np.ndarray: ...

    def read_into(self, name: str, out: np.ndarray, first: int) -> None: ...


@dataclass(frozen=True)
class Entry:
    """Our leaf `path` and the tensors that it is made of: one, or one a layer where `stacked`. shape, dtype: of the leaf."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    op: Op
    names: tuple[str, ...]
    torch_shape: tuple[int, ...]  # of each tensor
    stacked: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Plan:
    """entries: all leaves. left_out: PyTorch names that are present and have no leaf. problems: why it cannot be carried out."""

    entries: tuple[Entry, ...]
    left_out: tuple[str, ...] = ()
    problems: tuple[str, ...] = ()


def make_plan(table: Table, abstract: Mapping[str, Any], manifest: Manifest, dtype: str | None = None) -> Plan:
    """How the tensors of `manifest` fill the tree `abstract` (nested dict of things with a shape).

    dtype: of all leaves; by default each keeps that of its tensors. Nothing is raised here: see `check`.
    """
    leaves, problems, entries = by_path(abstract), [], []
    used: dict[str, str] = {}  # PyTorch name -> our path
    for rule, path, names in _rules(table, leaves, problems):
        for name in names:
            if name in used:
                problems.append(f"{name} is mapped to both {used[name]} and {path}")
            used[name] = path
        present = [name for name in names if name in manifest]
        problems += [f"{name} is missing (for {path})" for name in names if name not in manifest]
        stacked = "{i}" in rule.torch
        shape = tuple(leaves[path].shape)
        before = len(problems)
        for name in present:
            problems += _mismatch(name, manifest[name], rule.op, shape[1:] if stacked else shape, path)
        kinds = {manifest[name][1] for name in present}
        if dtype is None and len(kinds) > 1 and len(problems) == before:
            problems.append(f"{path} is made of tensors of several dtypes ({', '.join(sorted(map(str, kinds)))}); name one with --dtype")
        kind = DTYPES[dtype] if dtype else next(iter(kinds), DTYPES["float32"])
        entries.append(Entry(path, shape, kind, rule.op, names, manifest[present[0]][0] if present else (), stacked))
    left_out = tuple(name for name in manifest if name not in used and any(re.fullmatch(rule.torch, name) for rule in table.left_out))
    problems += [f"{name} is not known" for name in manifest if name not in used and name not in left_out]
    return Plan(tuple(entries), left_out, tuple(problems))


def check(plans: Mapping[str, Plan]) -> None:
    """Raises one UserError with every problem of every part."""
    problems = [f"{part}: {problem}" for part, plan in plans.items() for problem in plan.problems]
    if problems:
        raise UserError(f"cannot convert, {len(problems)} problem{'s' * (len(problems) > 1)}: {'; '.join(problems)}")


def import_leaves(plan: Plan, source: Source, left_out: MutableMapping[str, np.ndarray] | None = None) -> Iterator[tuple[str, np.ndarray]]:
    """(our path, array) of every leaf, read one at a time; what the table leaves out is put into `left_out`.

    An array is a view of what was read, in the order of PyTorch's layout: whoever needs it in C order says so (`contiguous`).
    Raises UserError for a tensor that holds NaN.
    """
    for entry in plan.entries:
        yield entry.path, _leaf(entry, source)
    for name in plan.left_out if left_out is not None else ():
        left_out[name] = source.read(name)


def _leaf(entry: Entry, source: Source) -> np.ndarray:
    if not entry.names:  # a stack without layers
        return np.empty(entry.shape, entry.dtype)
    kind = source.manifest[entry.names[0]][1]
    read = np.empty((len(entry.names), *entry.torch_shape), kind)
    for i, name in enumerate(entry.names):
        layer = read[i, ...]
        source.read_into(name, layer, 0)
        if _has_nan(layer):
            raise UserError(f"{name} holds NaN")
    stack = read.astype(entry.dtype, copy=False)
    first = entry.op.to_jax(stack[0, ...])
    if not entry.stacked:
        return first
    # operations only look at what is there in another order, so that views of equal layers, one behind the other, are one view
    if not np.may_share_memory(first, stack):
        raise ValueError(f"operation {entry.op.name} copies")
    return np.lib.stride_tricks.as_strided(first, entry.shape, (stack.strides[0], *first.strides), writeable=False)


def _has_nan(array: np.ndarray) -> bool:
    """A piece that fits in the cache at a time; of bfloat16, which numpy does not know, by its bits."""
    flat = array.reshape(-1)
    if array.dtype == DTYPES["bfloat16"]:
        return any((flat[i:i + _PIECE].view(np.uint16) & 0x7FFF).max() > 0x7F80 for i in range(0, flat.size, _PIECE))
    return any(np.isnan(flat[i:i + _PIECE]).any() for i in range(0, flat.size, _PIECE))


def contiguous(array: np.ndarray) -> np.ndarray:
    """The array in C order: itself, or a copy by JAX's CPU client, whose transposition is some five times as fast as numpy's."""
    return array if array.flags.c_contiguous else np.asarray(jax.device_put(array, jax.local_devices(backend="cpu")[0]))


def export_manifest(table: Table, leaves: Mapping[str, Any], kernel: tuple[int, ...]) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """PyTorch names, shapes and dtypes of a tree of ours, {path: thing with shape and dtype}.

    kernel: of the part's convolutions that we hold as products (PATCH), which our shape alone does not tell.
    """
    problems: list[str] = []
    manifest = {}
    for rule, path, names in _rules(table, leaves, problems):
        shape, kind = tuple(leaves[path].shape), DTYPES[str(leaves[path].dtype)]
        placeholder = np.broadcast_to(np.zeros((), np.bool_), shape[1:] if "{i}" in rule.torch else shape)
        if rule.op is PATCH:
            torch_shape = (shape[-1], shape[-2] // math.prod(kernel), *kernel)
        else:
            torch_shape = rule.op.to_torch(placeholder, placeholder.shape).shape
        manifest.update(dict.fromkeys(names, (torch_shape, kind)))
    if problems:
        raise UserError(f"cannot export: {'; '.join(problems)}")
    return manifest


def export_leaf(entry: Entry, leaf: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """(PyTorch name, array) of the tensors of one leaf, contiguous."""
    for name, array in zip(entry.names, leaf if entry.stacked else [leaf]):
        yield name, contiguous(entry.op.to_torch(array, entry.torch_shape))


def export_tensors(plan: Plan, leaves: Iterable[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """(PyTorch name, array) for (our path, array), one leaf at a time, the inverse of import_leaves."""
    entries = {entry.path: entry for entry in plan.entries}
    for path, leaf in leaves:
        yield from export_leaf(entries[path], leaf)


def _rules(table: Table, leaves: Mapping[str, Any], problems: list[str]) -> Iterator[tuple[Any, str, tuple[str, ...]]]:
    """(rule, path, PyTorch names) for every rule that has a leaf; what does not match on our side goes to `problems`."""
    seen = set()
    for rule in table.rules:
        if rule.jax not in leaves:
            problems.append(f"the table names {rule.jax}, which the model does not have")
        elif rule.jax in seen:
            problems.append(f"{rule.jax} is mapped twice")
        else:
            seen.add(rule.jax)
            layers = leaves[rule.jax].shape[0] if "{i}" in rule.torch else None
            yield rule, rule.jax, (rule.torch,) if layers is None else tuple(rule.torch.replace("{i}", str(i)) for i in range(layers))
    problems += [f"{path} of the model has no rule" for path in leaves if path not in seen]


def _mismatch(name: str, found: tuple[tuple[int, ...], np.dtype], op: Op, shape: tuple[int, ...], path: str) -> list[str]:
    torch_shape, kind = found
    if kind not in DTYPES.values():
        return [f"{name} is {kind}, not {', '.join(DTYPES)}"]
    try:
        ours = tuple(op.shape(torch_shape))
    except (IndexError, ValueError):
        ours = None  # too few dims for this operation
    if ours != shape:
        return [f"{name} has shape {list(torch_shape)}, which does not fill {path} {list(shape)}"]
    return []

