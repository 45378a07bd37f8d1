"""A model checkpoint: what `launch.convert` writes, training starts from, sampling and evaluation read.

    DIR/model.json             architecture, and for every part: source, sha256, parameter count, dtype, its leaves
    DIR/arrays/<part>/<n>/     Orbax, a group of whole leaves each, so that a part is written leaf by leaf in bounded memory
    DIR/left_out/<part>.safetensors   PyTorch tensors that the part's table leaves out, for export
    DIR/processor/             tokenizer and image processor files

A checkpoint is written beside its place as DIR.incomplete and renamed at the end: what has the name is whole.
"""
import dataclasses
import gc
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from orbax.checkpoint import v1 as ocp
from safetensors.numpy import load_file, save_file

from vino_jax.checkpoint.atomic import atomic_folder
from vino_jax.checkpoint.storage import reading
from vino_jax.errors import UserError
from vino_jax.nn.module import Params, by_path
from vino_jax.settings import VinoConfig, build, read_json

FORMAT = 1
GROUP_BYTES = 1 << 28  # leaves are gathered to about this size before they are written; a larger leaf is a group of its own
_FILE_BYTES = 1 << 25  # about which a file is closed: those of a group are written side by side, and one is synced while others fill
CHUNK_BYTES = 1 << 26  # of what is read at a time: whoever restores a shard reads little more than it
Leaves = Iterable[tuple[str, Any]]
# Of what is under way Orbax keeps one number a process, which a save reads again and again until its end: while it runs, neither
# another save nor a load may begin. It is taken where a save is asked for, not in the thread that carries it out, so that saves and
# loads have the same order, and numbers, on every host.
_ORBAX = threading.Lock()


@dataclass(frozen=True)
class Leaf:
    """shape, dtype and the group of arrays/ that holds it (-1: no elements, nothing stored)."""

    shape: tuple[int, ...]
    dtype: str
    group: int


@dataclass(frozen=True)
class PartInfo:
    """Where a part came from. sha256: of its source files, "" where there is none; dtype: that of its arrays ("mixed")."""

    source: str
    sha256: str
    parameters: int
    dtype: str
    leaves: dict[str, Leaf] = field(repr=False, default_factory=dict)


@dataclass(frozen=True)
class ModelInfo:
    """What model.json says."""

    config: VinoConfig
    parts: dict[str, PartInfo]
    sampling: dict[str, Any] = field(default_factory=dict)  # defaults of sampling that are this model's own
    trained: dict[str, int] = field(default_factory=dict)  # steps by stage of the training run that wrote it


@dataclass(frozen=True)
class Weights:
    """What an export reads, of a model checkpoint or of a training run: what there is, and how to read it, a little at a time."""

    info: ModelInfo
    arrays: Callable[[str], Iterator[tuple[str, np.ndarray]]]  # part -> (slash-joined path, array) of all its leaves
    left_out: Callable[[str], dict[str, np.ndarray]]  # part -> see `read_left_out`
    processor: Path  # its files, where there are any


def weights(directory: str | Path) -> Weights:
    """Of a model checkpoint. Raises UserError where there is no whole one."""
    directory, info = Path(directory), read_info(directory)
    return Weights(info, lambda part: iter_arrays(directory, part, info), lambda part: read_left_out(directory, part),
                   directory / "processor")


def save(directory: str | Path, parts: Mapping[str, Params | Leaves], config: VinoConfig,
         info: Mapping[str, Mapping[str, str]] | None = None,
         processor_files: Iterable[str | Path] = (), left_out: Mapping[str, Mapping[str, np.ndarray]] | None = None,
         sampling: Mapping[str, Any] | None = None, *, trained: Mapping[str, int] | None = None, replace: bool = False) -> None:
    """Write a model checkpoint.

    parts: name -> nested dict of arrays (numpy, or jax arrays under any sharding), or an iterable of (slash-joined path, array),
    which is consumed a group at a time. info: name -> {"source", "sha256"}. left_out: name -> torch name -> array. Both may be filled
    while the iterables run. sampling, trained: JSON values for ModelInfo. replace: what `directory` held before is removed at the end.
    On several hosts call it on every one, with the same parts. Raises UserError where `directory` already holds something that is not
    to be replaced, or cannot be written.
    """
    directory = Path(directory).absolute()
    if not parts:
        raise UserError(f"nothing to write to {directory}: no part was given")
    info = {} if info is None else info
    with atomic_folder(directory, replace=replace) as folder, _Writer() as writer:
        described = {}
        for name, tree in parts.items():
            leaves = _write_part(folder / "arrays" / name, by_path(tree).items() if isinstance(tree, Mapping) else tree, writer)
            source = info.get(name, {})
            count = sum(math.prod(leaf.shape) for leaf in leaves.values())
            described[name] = PartInfo(source.get("source", ""), source.get("sha256", ""), count, _dtype(leaves), leaves)
        writer.wait()
        if jax.process_index() == 0:
            _write_rest(folder, ModelInfo(config, described, dict(sampling or {}), dict(trained or {})), processor_files, left_out or {})


def read_info(directory: str | Path) -> ModelInfo:
    """What the checkpoint holds, without reading arrays. Raises UserError where there is no whole checkpoint."""
    path = Path(directory) / "model.json"
    if not path.exists():
        raise UserError(f"{directory} is no model checkpoint: it has no model.json")
    data = read_json(path)
    if data.get("format") != FORMAT:
        raise UserError(f"{path} has format {data.get('format')}, this program reads format {FORMAT}")
    try:
        config = build(VinoConfig, data["config"])
        parts = {}
        for name, part in data["parts"].items():
            leaves = {p: Leaf(tuple(shape), dtype, group) for p, (shape, dtype, group) in part.pop("leaves").items()}
            parts[name] = PartInfo(**part, leaves=leaves)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged: {type(error).__name__} {error}") from None
    return ModelInfo(config, parts, data.get("sampling", {}), data.get("trained", {}))


def restore(directory: str | Path, abstract: Mapping[str, Params], config: VinoConfig | None = None, *,
            skip: Container[str] = ()) -> dict[str, Params]:
    """The parts named in `abstract` ({part: nested dict of ShapeDtypeStructs}), each array read straight onto the sharding of
    its struct (the default device where it has none) in the dtype of its struct.

    config: where given, the checkpoint must have been written for it. skip: paths (part/...) that are not read and absent from the
    result. Raises UserError, before arrays are read, that names the missing parts, or the first field or array that differs.
    """
    directory, info = Path(directory).absolute(), read_info(directory)
    if config is not None:
        check_config(directory, info, config)
    missing = [name for name in abstract if name not in info.parts]
    if missing:
        raise UserError(f"{directory} has no {', '.join(missing)} (it has {', '.join(info.parts)}); import it with launch.convert")
    wanted = {name: by_path(tree) for name, tree in abstract.items()}
    for name, leaves in wanted.items():
        _check_leaves(directory, name, info.parts[name].leaves, leaves)
    read = {name: {path: leaf for path, leaf in leaves.items() if f"{name}/{path}" not in skip} for name, leaves in wanted.items()}
    return {name: nested(_read_part(directory / "arrays" / name, info.parts[name].leaves, leaves)) for name, leaves in read.items()}


def iter_arrays(directory: str | Path, part: str, info: ModelInfo, *, skip: Container[str] = ()) -> Iterator[tuple[str, np.ndarray]]:
    """(slash-joined path, array as it is stored) of a whole part but its paths in `skip`, on the host, a group at a time."""
    stored = info.parts[part].leaves
    cpu = jax.sharding.SingleDeviceSharding(jax.local_devices(backend="cpu")[0])
    for number in sorted({leaf.group for path, leaf in stored.items() if path not in skip}):
        wanted = {path: jax.ShapeDtypeStruct(leaf.shape, jnp.dtype(leaf.dtype), sharding=cpu)
                  for path, leaf in stored.items() if leaf.group == number and path not in skip}
        read = _read_part(Path(directory).absolute() / "arrays" / part, stored, wanted)
        yield from ((path, np.asarray(read.pop(path))) for path in list(read))
        gc.collect()  # Orbax's tasks hold what they have read in cycles: several groups would lie in memory


def arrays_sha256(directory: str | Path, part: str, info: ModelInfo) -> str:
    """Of the paths, shapes and values of a whole part as they are stored, in any order of its leaves."""
    sums = {path: (array.shape, hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8)).hexdigest())
            for path, array in iter_arrays(directory, part, info)}
    return hashlib.sha256(json.dumps(sums, sort_keys=True).encode()).hexdigest()


def read_left_out(directory: str | Path, part: str) -> dict[str, np.ndarray]:
    """The PyTorch tensors of a part that have no leaf of ours, bit for bit."""
    path = Path(directory) / "left_out" / f"{part}.safetensors"
    return load_file(path) if path.exists() else {}


def processor_folder(directory: str | Path) -> Path:
    """Where the tokenizer and processor files lie. Raises UserError where the checkpoint was made without them."""
    folder = Path(directory) / "processor"
    if not folder.is_dir():
        raise UserError(f"{directory} has no processor files; import it with --vlm, whose folder has them")
    return folder


def check_config(directory: str | Path, info: ModelInfo, config: VinoConfig) -> None:
    """Raises UserError that names the first field in which the checkpoint's architecture is not `config`."""
    ours, theirs = (by_path(dataclasses.asdict(c)) for c in (config, info.config))
    for name, value in ours.items():
        if theirs[name] != value:
            key = name.replace("/", ".")
            raise UserError(f"{directory} was written for another architecture: {key} is {theirs[name]} there, {value} here")


def nested(flat: Mapping[str, Any]) -> Params:
    """{slash-joined path: leaf} -> nested dict."""
    tree: Params = {}
    for path, leaf in flat.items():
        *parents, last = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[last] = leaf
    return tree


class _Writer:
    """Groups of arrays, each written in a thread while the next one, of this part or of the next, is gathered."""

    def __init__(self) -> None:
        self._pool = ThreadPoolExecutor(1)
        self._last: Future[None] | None = None

    def write(self, folder: Path, group: dict[str, Any]) -> None:
        """Returns as soon as the group before it is written; an error of that one comes out here."""
        self.wait()
        _ORBAX.acquire()
        self._last = self._pool.submit(_save, folder, group)
        self._last.add_done_callback(lambda _: _ORBAX.release())

    def wait(self) -> None:
        """Returns when all groups are written, or raises what the last one raised."""
        if self._last:
            self._last.result()

    def __enter__(self) -> "_Writer":
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _write_part(folder: Path, leaves: Leaves, writer: _Writer) -> dict[str, Leaf]:
    """The leaves in groups; the last one may still be under way."""
    described: dict[str, Leaf] = {}
    group: dict[str, Any] = {}
    size, count, cpu = 0, 0, jax.local_devices(backend="cpu")[0]
    for path, array in leaves:
        if path in described:
            raise ValueError(f"{path} was given twice")
        if group and size + array.nbytes > GROUP_BYTES:
            writer.write(folder / str(count), group)
            group, size, count = {}, 0, count + 1
        described[path] = Leaf(tuple(array.shape), jnp.dtype(array.dtype).name, count if array.size else -1)
        if array.size:  # Orbax cannot store arrays without elements
            # JAX brings an array into C order, as it is written, several times as fast as numpy would; of several processes Orbax takes
            # no arrays that one alone holds, but numpy's, which the first writes
            alone = isinstance(array, np.ndarray) and jax.process_count() == 1
            group[path] = jax.device_put(array, cpu) if alone else array
            size += array.nbytes
        del array
    if group:
        writer.write(folder / str(count), group)
    return described


def _save(folder: Path, group: dict[str, Any]) -> None:
    context = ocp.Context()
    context.array.saving.use_compression = False  # weights hardly shrink, and zstd is four times slower than the disk
    context.array.saving.storage_options = ocp.options.ArrayOptions.Saving.StorageOptions(chunk_byte_size=CHUNK_BYTES)
    context.array.saving.ocdbt_target_data_file_size = _FILE_BYTES
    context.memory.deepcopy_host_arrays = False  # they are not written to while this waits
    with context:
        ocp.save(folder, group)


def _read_part(folder: Path, stored: Mapping[str, Leaf], wanted: Mapping[str, jax.ShapeDtypeStruct]) -> dict[str, jax.Array]:
    default = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    groups: dict[int, dict[str, jax.ShapeDtypeStruct]] = {}
    for path, struct in wanted.items():
        target = jax.ShapeDtypeStruct(struct.shape, struct.dtype, sharding=getattr(struct, "sharding", None) or default)
        groups.setdefault(stored[path].group, {})[path] = target
    arrays: dict[str, jax.Array] = {path: jnp.zeros(s.shape, s.dtype, device=s.sharding) for path, s in groups.pop(-1, {}).items()}
    for number, targets in sorted(groups.items()):
        others = [path for path, leaf in stored.items() if leaf.group == number and path not in targets]
        with reading(str(folder / str(number)), "copy or import the checkpoint again"), _ORBAX:
            arrays.update(ocp.load(folder / str(number), {**targets, **dict.fromkeys(others, ocp.PLACEHOLDER)}))
    return {path: arrays[path] for path in wanted}


def _write_rest(folder: Path, info: ModelInfo, processor_files: Iterable[str | Path],
                left_out: Mapping[str, Mapping[str, np.ndarray]]) -> None:
    for part, tensors in left_out.items():
        if tensors:
            (folder / "left_out").mkdir(exist_ok=True)
            save_file({name: np.ascontiguousarray(x) for name, x in tensors.items()}, folder / "left_out" / f"{part}.safetensors")
    for file in processor_files:
        (folder / "processor").mkdir(exist_ok=True)
        shutil.copyfile(file, folder / "processor" / Path(file).name)
    data = {"format": FORMAT, "config": dataclasses.asdict(info.config), "sampling": info.sampling, "trained": info.trained, "parts": {}}
    for name, part in info.parts.items():
        leaves = {path: [list(leaf.shape), leaf.dtype, leaf.group] for path, leaf in part.leaves.items()}
        data["parts"][name] = {**dataclasses.asdict(part), "leaves": leaves}
    (folder / "model.json").write_text(json.dumps(data, indent=1) + "\n")


def _check_leaves(directory: Path, part: str, stored: Mapping[str, Leaf], wanted: Mapping[str, Any]) -> None:
    where = f"{directory} was written for another architecture: {part}"
    for path in [*wanted, *stored]:
        if path not in stored:
            raise UserError(f"{where} lacks {path}")
        if path not in wanted:
            raise UserError(f"{where} has {path}, which the model does not")
        if stored[path].shape != tuple(wanted[path].shape):
            raise UserError(f"{where}/{path} is {list(stored[path].shape)} there, {list(wanted[path].shape)} here")


def _dtype(leaves: Mapping[str, Leaf]) -> str:
    kinds = {leaf.dtype for leaf in leaves.values()}
    return kinds.pop() if len(kinds) == 1 else "mixed"
