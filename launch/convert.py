"""PyTorch checkpoints to a model checkpoint and back.

    python -m launch.convert import --output DIR [--vino vino.ckpt] [--mmdit DIR] [--vae DIR] [--vlm DIR] [--dtype bfloat16|float32]
    python -m launch.convert export --checkpoint DIR --output DIR --format vino|diffusers [--dtype bfloat16|float32]
    python -m launch.convert verify --checkpoint DIR --against PATH [PATH ...]
    python -m launch.convert export-lora --checkpoint WORKDIR --output DIR [--weights average|raw]
    python -m launch.convert merge-lora --checkpoint DIR --lora FILE --output DIR
"""
import argparse
import ctypes
import dataclasses
import gc
import json
import math
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from launch import cli
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.atomic import atomic_folder, check_empty
from vino_jax.convert import configs, engine, lora, parts
from vino_jax.convert.io import SafetensorsWriter, write_pickle
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.lora import merged, within
from vino_jax.nn.module import by_path
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig
from vino_jax.sharding import rules
from vino_jax.sharding.mesh import make_mesh, parse_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.train.weights import run_adapters, run_weights
from vino_jax.train.workdir import is_run

DTYPES = ("float32", "bfloat16")
_M_ARENA_MAX = -8  # of malloc.h
_COMPARED = 1 << 24  # elements at a time
T = TypeVar("T")


def main() -> None:
    args = vars(_parser().parse_args())
    command = args.pop("command")
    spare_memory()
    if not args.get("mesh"):
        jax.config.update("jax_platforms", "cpu")  # conversion leaves accelerators to others
    command(**args)


def spare_memory() -> None:
    """Settings of this process under which a conversion holds little more than what it works on."""
    gc.freeze()  # what was imported is no garbage: collections after each group of arrays are cheap
    # each thread that reads or writes would get an arena of glibc's allocator, which keeps what was freed: 2 GB instead of 3 in all
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:  # glibc
        mallopt(_M_ARENA_MAX, 2)


def _parser() -> argparse.ArgumentParser:
    parser = cli.Parser(prog="launch.convert", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    take = commands.add_parser("import", help="PyTorch files -> model checkpoint")
    take.add_argument("--output", type=Path, required=True, help="the model checkpoint to write; must not hold anything yet")
    take.add_argument("--vino", type=Path, help="vino.ckpt, or the same names as safetensors (a file or a folder)")
    take.add_argument("--mmdit", type=Path, help="HunyuanVideo's folder of diffusers, its transformer/, or one file of weights: safetensors, "
                      "or Tencent's mp_rank_00_model_states.pt")
    take.add_argument("--vae", type=Path, help="HunyuanVideo's folder of diffusers, its vae/, or one file of safetensors")
    take.add_argument("--vlm", type=Path, help="Qwen3-VL's folder of transformers, with its processor, or one file of safetensors in it")
    take.add_argument("--dtype", choices=DTYPES, help="of all arrays; by default each keeps its own")
    take.add_argument("--queries", type=int, default=VinoConfig.queries, help="number of learnable queries where vino.ckpt has none")
    take.add_argument("--mesh", help="place every array on a mesh of these sizes, as fsdp=8, and write it from there, in shards; by default "
                      "arrays stay on the host and no accelerator is used")
    take.add_argument("--preset", default="fsdp", help="sharding preset that goes with --mesh (default fsdp)")
    take.set_defaults(command=_import)
    give = commands.add_parser("export", help="model checkpoint -> PyTorch files")
    give.add_argument("--checkpoint", type=Path, required=True, help="a model checkpoint, or the workdir of a training run: its newest step")
    give.add_argument("--output", type=Path, required=True, help="folder to write; must not hold anything yet")
    give.add_argument("--format", choices=("vino", "diffusers"), required=True,
                      help="vino: names of vino.ckpt (no VAE), safetensors; diffusers: transformer/ vae/ vlm/ vino/ with config.json")
    give.add_argument("--dtype", choices=DTYPES, help="of all tensors; by default each keeps its own")
    give.add_argument("--ckpt", action="store_true", help="with --format vino: vino.ckpt by torch.save; needs twice the disk on the way")
    give.add_argument("--weights", choices=("average", "raw"), default="average",
                      help="of a run: the average where its last stage keeps one (default), or the parameters themselves")
    give.set_defaults(command=export_parts)
    check = commands.add_parser("verify", help="compare a model checkpoint with PyTorch files, to the bit")
    check.add_argument("--checkpoint", type=Path, required=True)
    check.add_argument("--against", type=Path, nargs="+", required=True,
                       help="vino.ckpt, HunyuanVideo's and Qwen3-VL's folders, or parts of them")
    check.set_defaults(command=verify_parts)
    give = commands.add_parser("export-lora", help="adapters of a training run -> one file that diffusers' load_lora_weights reads")
    give.add_argument("--checkpoint", type=Path, required=True, help="the workdir of a training run: its newest step")
    give.add_argument("--output", type=Path, required=True, help="folder to write; must not hold anything yet")
    give.add_argument("--weights", choices=("average", "raw"), default="average",
                      help="the average where the run's last stage keeps one (default), or the adapters themselves")
    give.set_defaults(command=export_lora)
    add = commands.add_parser("merge-lora", help="model checkpoint + adapters -> model checkpoint")
    add.add_argument("--checkpoint", type=Path, required=True)
    add.add_argument("--lora", type=Path, required=True, dest="lora_file",
                     help="a file of adapters with PEFT's names, or a folder with one: export-lora's, or diffusers' own for HunyuanVideo")
    add.add_argument("--output", type=Path, required=True, help="the model checkpoint to write; must not hold anything yet")
    add.set_defaults(command=merge_lora)
    return parser


def _import(output: Path, queries: int, dtype: str | None, mesh: str | None, preset: str, **given: Path | None) -> None:
    on = (make_mesh(parse_mesh(mesh)), rules.preset(preset)) if mesh else None
    import_parts(output, parts.Given(**given), queries=queries, dtype=dtype, on=on)


def import_parts(output: Path, given: parts.Given, *, queries: int, dtype: str | None = None, on: tuple[Mesh, dict] | None = None) -> None:
    """Write the model checkpoint `output` from PyTorch files: everything that can be wrong with names and shapes is told before it
    is touched. queries: how many learnable ones where no file has them. dtype: of all arrays; None keeps each one's own.
    on: mesh and sharding rules; each array then goes onto the mesh as soon as it is read, and is written from there in shards.
    """
    check_empty(output)
    found = parts.find(given, queries)
    for note in found.notes:
        _say(note)
    left_out: dict[str, dict[str, np.ndarray]] = {part: {} for part in found.sources}
    info: dict[str, dict[str, str]] = {}
    stop = threading.Event()
    with ThreadPoolExecutor(1) as pool:  # files are hashed while they are converted
        given_files = {source.files: source for source in found.sources.values()}  # one file may hold several parts
        sums = {files: pool.submit(source.sha256, stop) for files, source in given_files.items()}

        def leaves(part: str) -> Iterator[tuple[str, Any]]:
            source = found.sources[part]
            yield from _told(part, plans[part], _placed(_ahead(engine.import_leaves(plans[part], source, left_out[part])), placed[part]))
            info[part] = {"source": source.label, "sha256": sums[source.files].result()}

        try:
            vino = Vino(found.config, Runtime())
            plans = _plans(vino, found, dict.fromkeys(found.sources, dtype))
            engine.check(plans)
            placed = {part: by_path(shardings(vino.abstract[part], vino.axes[part], *on)) if on else None for part in plans}
            model_checkpoint.save(output, {part: leaves(part) for part in plans}, found.config, info, found.processor_files, left_out)
        finally:
            stop.set()
    for part, entry in model_checkpoint.read_info(output).parts.items():
        _say(f"{part}: {entry.parameters:,} parameters, {entry.dtype}, from {entry.source}")


def _ahead(items: Iterator[T]) -> Iterator[T]:
    """The same items, each made in a thread while the one before is in use."""
    with ThreadPoolExecutor(1) as pool:
        none = object()
        coming = pool.submit(next, items, none)
        while (item := coming.result()) is not none:
            coming = pool.submit(next, items, none)
            yield item
            del item


def _placed(leaves: Iterator[tuple[str, np.ndarray]], shardings_: Mapping[str, NamedSharding] | None) -> Iterator[tuple[str, Any]]:
    """The leaves as arrays on the mesh, of which this process gives the shards of its own devices; as they are without shardings."""
    for path, leaf in leaves:
        yield path, leaf if shardings_ is None else jax.make_array_from_callback(leaf.shape, shardings_[path], leaf.__getitem__)


def export_parts(checkpoint: Path, output: Path, format: str, *, dtype: str | None = None, ckpt: bool = False,
                 weights: str = "average") -> None:
    """The exact inverse of import, left-out tensors included: a folder `output` in the "vino" or "diffusers" format.

    checkpoint: a model checkpoint or a run's workdir. dtype: of all tensors; None keeps each one's own. ckpt: with "vino", one vino.ckpt by
    torch.save instead of safetensors. weights: "average" or "raw", of a run.
    """
    given = run_weights(checkpoint, average=weights == "average") if is_run(checkpoint) else model_checkpoint.weights(checkpoint)
    info = given.info
    if ckpt and format != "vino":
        raise UserError("--ckpt goes with --format vino")
    groups = parts.export_groups(info.parts, format)
    if not any(groups.values()):
        raise UserError(f"{checkpoint} has no part that --format {format} holds; it has {', '.join(info.parts)}")
    if format == "vino" and "vae" in info.parts:
        _say("vae: not part of vino.ckpt, left out (--format diffusers has it)")
    with atomic_folder(output) as folder:
        for name, members in groups.items():
            _export_folder(given, folder / name, members, name, dtype, ckpt)


def _export_folder(given: model_checkpoint.Weights, output: Path, members: list[str], kind: str, dtype: str | None, pickled: bool) -> None:
    info = given.info
    cast = (lambda x: x) if dtype is None else (lambda x: x.astype(engine.DTYPES[dtype]))
    manifests, left_out, plans = {}, {}, {}
    table = parts.tables(info.config)
    for part in members:
        kernel = configs.kernels(info.config).get(part, ())
        leaves = {path: dataclasses.replace(leaf, dtype=dtype or leaf.dtype) for path, leaf in info.parts[part].leaves.items()}
        manifests[part] = engine.export_manifest(table[part], leaves, kernel)
        plans[part] = engine.make_plan(table[part], model_checkpoint.nested(leaves), manifests[part])
        left_out[part] = {name: cast(array) for name, array in given.left_out(part).items()}
    engine.check(plans)
    named = parts.vino_name if kind in ("", "vino") else lambda part, name: name

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for part in members:
            arrays = ((path, cast(array)) for path, array in given.arrays(part))
            leaves = _told(part, plans[part], arrays)
            for name, array in engine.export_tensors(plans[part], leaves):
                yield named(part, name), array
            for name, array in left_out[part].items():
                yield named(part, name), array

    manifest = {named(part, name): entry for part in members for name, entry in manifests[part].items()}
    manifest |= {named(part, name): (array.shape, array.dtype) for part in members for name, array in left_out[part].items()}
    writer = SafetensorsWriter(output, manifest, "diffusion_pytorch_model" if kind in ("transformer", "vae") else "model")
    for name, array in _ahead(tensors()):
        writer.write(name, array)
    writer.close()
    if pickled:
        write_pickle(output / "vino.ckpt", output)
        for file in output.glob("model*.safetensors*"):
            file.unlink()
    _write_config(given, output, kind)


def _write_config(given: model_checkpoint.Weights, output: Path, kind: str) -> None:
    info = given.info
    writers = {"transformer": lambda: configs.write_mmdit(info.config.mmdit), "vae": lambda: configs.write_vae(info.config.vae),
               "vlm": lambda: configs.write_vlm(info.config.vlm, given.processor)}
    if kind in writers:
        (output / "config.json").write_text(json.dumps(writers[kind](), indent=2) + "\n")
    if kind == "vlm" and given.processor.is_dir():
        for file in parts.processor_files(given.processor):
            shutil.copyfile(file, output / file.name)


def verify_parts(checkpoint: Path, against: Sequence[Path]) -> None:
    """Every tensor of the files, in the dtype of the checkpoint, against what the checkpoint holds; UserError names what differs."""
    info = model_checkpoint.read_info(checkpoint)
    found = parts.find(parts.classify(against), info.config.queries)
    for note in found.notes:
        _say(note)
    absent = [part for part in found.sources if part not in info.parts]
    if absent:
        raise UserError(f"{checkpoint} has no {', '.join(absent)}; it has {', '.join(info.parts)}")
    kinds = {part: info.parts[part].dtype for part in found.sources if info.parts[part].dtype != "mixed"}
    plans = _plans(Vino(info.config, Runtime()), found, kinds)
    engine.check(plans)
    different, count = [], 0
    for part, plan in plans.items():
        source, entries = found.sources[part], {entry.path: entry for entry in plan.entries}
        for path, array in _told(part, plan, model_checkpoint.iter_arrays(checkpoint, part, info)):
            for name, ours in engine.export_leaf(entries[path], array):
                count += 1
                if not _same(ours, source, name):
                    different.append(f"{part} {name}")
        kept = model_checkpoint.read_left_out(checkpoint, part)
        for name in plan.left_out:
            count += 1
            if name not in kept or not _same(kept[name], source, name):
                different.append(f"{part} {name}")
    if different:
        raise UserError(f"{len(different)} of {count} tensors differ: {', '.join(different)}")
    print(f"{count} tensors of {', '.join(plans)} are identical")


def export_lora(checkpoint: Path, output: Path, weights: str = "average") -> None:
    """The adapters of a run's newest checkpoint as `output`/pytorch_lora_weights.safetensors. weights: "average" or "raw"."""
    if not is_run(checkpoint):
        raise UserError(f"{checkpoint} is no training run's workdir; adapters of its own has only a run (its model/ has them merged)")
    adapters = run_adapters(checkpoint, average=weights == "average")
    lora.write(output, within("mmdit", adapters))
    _say(f"{sum(adapter.a.size + adapter.b.size for adapter in adapters.values()):,} parameters of {len(adapters)} kernels")


def merge_lora(checkpoint: Path, lora_file: Path, output: Path) -> None:
    """Write the model checkpoint `output`: `checkpoint` with the adapters of a file added to the MMDiT's kernels, in float32, each then
    rounded to the dtype that it has there."""
    check_empty(output)
    given = model_checkpoint.weights(checkpoint)
    info = given.info
    if "mmdit" not in info.parts:
        raise UserError(f"{checkpoint} has no mmdit; it has {', '.join(info.parts)}")
    stored = info.parts["mmdit"].leaves
    adapters = lora.read(lora_file, {path: leaf.shape for path, leaf in stored.items()})

    def leaves() -> Iterator[tuple[str, np.ndarray]]:
        for path, array in merged(given.arrays("mmdit"), adapters):
            yield path, array.astype(engine.DTYPES[stored[path].dtype], copy=False)

    sources = {part: {"source": entry.source, "sha256": entry.sha256} for part, entry in info.parts.items()}
    sources["mmdit"] = {"source": f"{info.parts['mmdit'].source} with {lora_file}", "sha256": ""}
    processor = sorted(given.processor.iterdir()) if given.processor.is_dir() else ()
    model_checkpoint.save(output, {part: leaves() if part == "mmdit" else given.arrays(part) for part in info.parts}, info.config, sources,
                          processor, {part: given.left_out(part) for part in info.parts}, info.sampling)
    _say(f"mmdit: {len(adapters)} kernels have been changed")


def _same(ours: np.ndarray, source: engine.Source, name: str) -> bool:
    """Whether the tensor, cast to the dtype of ours, has the same bits; some rows at a time."""
    shape, kind = source.manifest[name]
    if ours.shape != shape:
        return False
    bits, step = f"u{ours.dtype.itemsize}", max(1, _COMPARED // max(1, math.prod(shape[1:])))
    for first in range(0, shape[0] if shape else 1, step):
        mine = ours[first:first + step] if shape else ours
        theirs = np.empty(mine.shape, kind)
        source.read_into(name, theirs, first)
        if not np.array_equal(np.ascontiguousarray(mine).view(bits), theirs.astype(ours.dtype, copy=False).view(bits)):
            return False
    return True


def _plans(vino: Vino, found: parts.Found, dtypes: Mapping[str, str | None]) -> dict[str, engine.Plan]:
    table = parts.tables(vino.config)
    return {part: engine.make_plan(table[part], vino.abstract[part], source.manifest, dtypes.get(part))
            for part, source in found.sources.items()}


def _told(part: str, plan: engine.Plan, leaves: Iterator[tuple[str, np.ndarray]]) -> Iterator[tuple[str, np.ndarray]]:
    """The leaves as they are, with a line of progress on stderr now and then: bytes, rate, time left."""
    total = sum(entry.nbytes for entry in plan.entries)
    start = last = time.monotonic()
    done = 0
    for path, leaf in leaves:
        yield path, leaf
        done += leaf.nbytes
        now = time.monotonic()
        if now - last > 5 and done:
            left = (now - start) * (total - done) / done
            _say(f"{part}: {done / 1e9:.1f} of {total / 1e9:.1f} GB, {done / 1e9 / (now - start):.2f} GB/s, {left:.0f} s left")
            last = now


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


if __name__ == "__main__":
    cli.run(main)
