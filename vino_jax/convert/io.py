"""PyTorch-side files: lazy readers of safetensors and of vino.ckpt, and a writer of safetensors that needs one tensor at a time.

PyTorch itself is imported only where a pickle is opened or written.
"""
import hashlib
import json
import math
import operator
import pickle
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from vino_jax.convert.engine import Manifest
from vino_jax.errors import UserError
from vino_jax.settings import read_json

SHARD_BYTES = 5 * 10**9  # as huggingface_hub cuts
_HASH_BYTES = 1 << 24  # at a time: between two blocks the thread waits for Python's lock, which busy ones hold for milliseconds
_READ_BYTES = 1 << 30  # of one system call, which takes less than 2 GB
# Names of the format -> numpy; what is not here is refused by name.
_DTYPES = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16, "I64": np.int64, "I32": np.int32,
           "I16": np.int16, "I8": np.int8, "U8": np.uint8, "BOOL": np.bool_,
           "F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
_NAMES = {np.dtype(kind): name for name, kind in _DTYPES.items()}


@dataclass(frozen=True)
class TensorSource:
    """Tensors of some files, by name. label: for messages and records; files: what was given.

    read_into(name, out, first): fill `out` (C order, the tensor's dtype) with its rows from `first` on, as many as `out` has; a tensor
    without dims is one row.
    """

    label: str
    files: tuple[Path, ...]
    manifest: Manifest
    read_into: Callable[[str, np.ndarray, int], None]

    def read(self, name: str) -> np.ndarray:
        """One tensor."""
        out = np.empty(*self.manifest[name])
        self.read_into(name, out, 0)
        return out

    def select(self, names: Mapping[str, str]) -> "TensorSource":
        """The tensors named, under other names: {new name: name here}."""
        manifest = {new: self.manifest[name] for new, name in names.items()}
        return TensorSource(self.label, self.files, manifest, lambda new, out, first: self.read_into(names[new], out, first))

    def sha256(self, stop: threading.Event) -> str:
        """Of the file, or, where there are several, of the lines `<sha256>  <name>` in the order of their names; of nothing any more, and
        soon done, once `stop` is set."""
        sums, block = [], memoryview(bytearray(_HASH_BYTES))
        for file in sorted(self.files):
            digest = hashlib.sha256()
            with open(file, "rb", buffering=0) as f:
                while not stop.is_set() and (count := f.readinto(block)):
                    digest.update(block[:count])
            sums.append((digest.hexdigest(), file.name))
        if len(sums) == 1:
            return sums[0][0]
        return hashlib.sha256("".join(f"{digest}  {name}\n" for digest, name in sums).encode()).hexdigest()


def open_source(path: str | Path) -> TensorSource:
    """A folder with (sharded) safetensors, one .safetensors file, or a pickle of torch.save (any other file).

    Raises UserError where the files are missing, cut off, or not what they should be.
    """
    path = Path(path)
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist")
    if path.suffix == ".safetensors":
        return _merge(str(path), [_open_safetensors(path)])
    return _open_pickle(path)


def has_safetensors(folder: Path) -> bool:
    """Whether the folder holds weights that open_source reads."""
    return any(folder.glob("*.safetensors")) or any(folder.glob("*.safetensors.index.json"))


@dataclass(frozen=True)
class _File:
    path: Path
    tensors: dict[str, tuple[tuple[int, ...], np.dtype, int]]  # name -> shape, dtype, offset in the file


def _open_folder(folder: Path) -> TensorSource:
    indexes = sorted(folder.glob("*.safetensors.index.json"))
    if len(indexes) > 1:
        raise UserError(f"{folder} has several index files: {', '.join(i.name for i in indexes)}")
    if not indexes:
        files = sorted(folder.glob("*.safetensors"))
        if len(files) != 1:
            what = f"{len(files)} safetensors files and no index" if files else "no safetensors file"
            raise UserError(f"{folder} has {what}")
        return _merge(str(folder), [_open_safetensors(files[0])])
    index = indexes[0]
    weights = read_json(index).get("weight_map")
    if not isinstance(weights, dict) or not all(isinstance(v, str) for v in weights.values()):
        raise UserError(f"{index} has no weight_map of names to files")
    opened = {}
    for name in sorted(set(weights.values())):
        path = folder / name
        if Path(name).name != name:
            raise UserError(f"{index} names a file outside of its folder: {name}")
        if not path.is_file():
            raise UserError(f"{index} names {name}, which is not there")
        opened[name] = _open_safetensors(path)
    for tensor, name in weights.items():
        if tensor not in opened[name].tensors:
            raise UserError(f"{index} says that {tensor} is in {name}, where it is not")
    return _merge(str(folder), opened.values())


def _merge(label: str, files: Iterable[_File]) -> TensorSource:
    where: dict[str, _File] = {}
    for file in files:
        for name in file.tensors:
            if name in where:
                raise UserError(f"{label} has {name} twice: in {where[name].path.name} and {file.path.name}")
            where[name] = file

    def read_into(name: str, out: np.ndarray, first: int) -> None:
        shape, kind, offset = where[name].tensors[name]
        try:  # a read and not a memory map: the peak stays one tensor, and a file that shrinks is an error and no SIGBUS
            with open(where[name].path, "rb", buffering=0) as f:
                f.seek(offset + first * math.prod(shape[1:]) * kind.itemsize)
                left = memoryview(out.reshape(-1).view(np.uint8))
                while count := f.readinto(left[:_READ_BYTES]):
                    left = left[count:]
        except OSError as error:
            raise UserError(f"{where[name].path} cannot be read: {error.strerror or error}") from None
        if left:
            raise UserError(f"{where[name].path} ended within {name}")

    manifest = {name: file.tensors[name][:2] for name, file in where.items()}
    return TensorSource(label, tuple(sorted({file.path for file in where.values()})), manifest, read_into)


def _open_safetensors(path: Path) -> _File:
    """The header: 8 bytes of its length, JSON {name: {dtype, shape, data_offsets}}, then the data."""
    size = path.stat().st_size
    with open(path, "rb") as f:
        length = int.from_bytes(f.read(8), "little")
        if size < 8 or length > size - 8:
            raise UserError(f"{path} is cut off or no safetensors file: its header does not fit in {size} bytes")
        try:
            header = json.loads(f.read(length))
            header.pop("__metadata__", None)
            entries = {}
            for name, entry in header.items():
                begin, end = map(operator.index, entry["data_offsets"])
                entries[name] = tuple(map(operator.index, entry["shape"])), entry["dtype"], begin, end
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{path} is no safetensors file: its header cannot be read") from None
    tensors = {}
    for name, (shape, dtype, begin, end) in entries.items():
        if dtype not in _DTYPES:
            raise UserError(f"{path}: {name} has dtype {dtype}, which is not supported")
        kind = np.dtype(_DTYPES[dtype])
        if begin < 0 or end - begin != math.prod(shape) * kind.itemsize:
            raise UserError(f"{path} is damaged: {name} has {end - begin} bytes for {list(shape)} {dtype}")
        if 8 + length + end > size:
            raise UserError(f"{path} is cut off: {name} ends at byte {8 + length + end} of {size}")
        tensors[name] = (shape, kind, 8 + length + begin)
    return _File(path, tensors)


def _open_pickle(path: Path) -> TensorSource:
    """A flat dict of tensors of torch.save, or one under the key "module" (DeepSpeed), memory-mapped; nothing else in it is ever executed."""
    import torch

    try:
        tensors = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise UserError(f"{path} holds something other than plain tensors; it was not opened") from None
    except (RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
        raise UserError(f"{path} is cut off or no file of torch.save: {str(error).splitlines()[0]}") from None
    if isinstance(tensors, dict) and isinstance(tensors.get("module"), dict):
        tensors = tensors["module"]
    if not isinstance(tensors, dict) or not all(isinstance(k, str) and isinstance(v, torch.Tensor) for k, v in tensors.items()):
        raise UserError(f"{path} is no flat dict of tensors")
    kinds = {torch.float64: np.float64, torch.float32: np.float32, torch.float16: np.float16, torch.bfloat16: ml_dtypes.bfloat16,
             torch.int64: np.int64, torch.int32: np.int32, torch.uint8: np.uint8, torch.bool: np.bool_}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds or tensor.layout != torch.strided:
            raise UserError(f"{path}: {name} is {tensor.dtype} {tensor.layout}, which is not supported")

    def read_into(name: str, out: np.ndarray, first: int) -> None:
        tensor = tensors[name].detach()
        array = tensor.view(torch.uint16).numpy().view(ml_dtypes.bfloat16) if tensor.dtype == torch.bfloat16 else tensor.numpy()
        out[...] = array[first:first + len(out)] if array.ndim else array

    manifest = {name: (tuple(t.shape), np.dtype(kinds[t.dtype])) for name, t in tensors.items()}
    return TensorSource(str(path), (path,), manifest, read_into)


class SafetensorsWriter:
    """A folder of safetensors whose tensors arrive one at a time in any order; sharded with an index where they are large."""

    def __init__(self, folder: Path, manifest: Manifest, stem: str = "model"):
        folder.mkdir(parents=True, exist_ok=True)
        self._manifest = dict(manifest)
        self._left = set(manifest)
        shards: list[dict] = [{}]
        size = 0
        for name, (shape, kind) in manifest.items():
            count = math.prod(shape) * kind.itemsize
            if shards[-1] and size + count > SHARD_BYTES:
                shards.append({})
                size = 0
            shards[-1][name] = {"dtype": _NAMES[kind], "shape": list(shape), "data_offsets": [size, size + count]}
            size += count
        names = [f"{stem}.safetensors"]
        if len(shards) > 1:
            names = [f"{stem}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
        self._places: dict[str, tuple[Path, int]] = {}
        for file, shard in zip(names, shards):
            self._start(folder / file, shard)
        if len(shards) > 1:
            total = sum(math.prod(shape) * kind.itemsize for shape, kind in manifest.values())
            weights = {name: file for file, shard in zip(names, shards) for name in shard}
            (folder / f"{stem}.safetensors.index.json").write_text(
                json.dumps({"metadata": {"total_size": total}, "weight_map": dict(sorted(weights.items()))}, indent=2) + "\n")

    def _start(self, path: Path, shard: dict) -> None:
        header = json.dumps({"__metadata__": {"format": "pt"}, **shard}, separators=(",", ":")).encode()
        header += b" " * (-len(header) % 8)
        path.write_bytes(len(header).to_bytes(8, "little") + header)
        for name, entry in shard.items():
            self._places[name] = (path, 8 + len(header) + entry["data_offsets"][0])

    def write(self, name: str, array: np.ndarray) -> None:
        """Put one tensor in its place."""
        if (array.shape, array.dtype) != self._manifest[name]:
            raise ValueError(f"{name} is {array.dtype}{list(array.shape)}, planned was {self._manifest[name]}")
        path, offset = self._places[name]
        with open(path, "r+b") as f:
            f.seek(offset)
            f.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8))
        self._left.remove(name)

    def close(self) -> None:
        """Check that every tensor was written."""
        if self._left:
            raise ValueError(f"{len(self._left)} tensors were never written: {', '.join(sorted(self._left)[:3])}")


def write_pickle(path: Path, folder: Path) -> None:
    """The tensors of a folder of safetensors as torch.save writes a flat dict of them; their pages are read from the files as they are
    written, so that none need be in memory."""
    import torch

    def tensor(file: Path, shape: tuple[int, ...], kind: np.dtype, offset: int) -> "torch.Tensor":
        array = np.memmap(file, kind, "c", offset, shape) if math.prod(shape) else np.empty(shape, kind)
        return torch.from_numpy(array.view(np.uint16)).view(torch.bfloat16) if kind == ml_dtypes.bfloat16 else torch.from_numpy(array)

    files = [_open_safetensors(file) for file in sorted(folder.glob("*.safetensors"))]
    torch.save({name: tensor(file.path, *found) for file in files for name, found in file.tensors.items()}, path)
