"""Conversion at real size: PyTorch files to a model checkpoint and back, to the bit, with its speed beside that of cp and its memory.

    python -m tests.benchmarks.convert --folder DIR

Writes random weights in the published layouts under DIR (about 21 GB of disk in all): the whole VAE in float32, and slices of the MMDiT
(2 double and 2 single blocks) and of Qwen3-VL (2 text and 3 vision layers) at full width in bfloat16. Then, in several rounds,
each as a process of its own: cp of these files, launch.convert import, export and verify; and compares every tensor of the export with
the files. A figure counts the bytes of the files, from the start of the process until its data are on the disk (sync). Exit code 1
where a bar of this file is missed.
"""
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median

import numpy as np

from launch import cli
from vino_jax.convert import configs, engine, parts
from vino_jax.convert.io import SafetensorsWriter, open_source
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.module import by_path
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import MMDiTConfig, VinoConfig, VLMConfig, VLMTextConfig, VLMVisionConfig

CONFIG = VinoConfig(mmdit=MMDiTConfig(double_blocks=2, single_blocks=2),
                    vlm=VLMConfig(VLMTextConfig(layers=2), VLMVisionConfig(layers=3, deepstack=(0, 1, 2))))
LAYOUT = {"vae": ("hunyuan/vae", "float32"), "mmdit": ("hunyuan/transformer", "bfloat16"), "vlm": ("qwen3vl", "bfloat16")}
MARGIN = 2e9  # bytes over the largest leaf that a conversion may take
SLOWEST = 2.0  # times cp
ROUNDS = 3
HUGE_PAGES = "glibc.malloc.hugetlb=1"  # for all of them, as README advises: without, page faults take an import a tenth to a fifth longer


def random(shape: tuple[int, ...], kind: np.dtype, rng: np.random.Generator) -> np.ndarray:
    """Any finite bits: exponents are kept away from the largest."""
    bits = rng.integers(0, 1 << (8 * kind.itemsize), shape, np.dtype(f"u{kind.itemsize}"))
    return (bits & ~np.array(1 << (8 * kind.itemsize - 2), bits.dtype)).view(kind)


def write_published(folder: Path) -> int:
    """The files; the bytes of the largest leaf of ours that they become."""
    rng, vino, largest = np.random.default_rng(0), Vino(CONFIG, Runtime()), 0
    writers = {"vae": lambda: configs.write_vae(CONFIG.vae), "mmdit": lambda: configs.write_mmdit(CONFIG.mmdit),
               "vlm": lambda: configs.write_vlm(CONFIG.vlm, folder / "none")}
    for part, (place, dtype) in LAYOUT.items():
        leaves = {path: _Leaf(tuple(x.shape), dtype) for path, x in by_path(vino.abstract[part]).items()}
        manifest = engine.export_manifest(parts.tables(CONFIG)[part], leaves, configs.kernels(CONFIG)[part])
        writer = SafetensorsWriter(folder / place, manifest)
        for name, (shape, kind) in manifest.items():
            writer.write(name, random(shape, kind, rng))
        writer.close()
        (folder / place / "config.json").write_text(json.dumps(writers[part]()))
        largest = max(largest, *(int(np.prod(leaf.shape)) * engine.DTYPES[dtype].itemsize for leaf in leaves.values()))
    return largest


@dataclasses.dataclass(frozen=True)
class _Leaf:
    shape: tuple[int, ...]
    dtype: str


def forget(folder: Path) -> None:
    """Files of the folder leave the page cache: a checkpoint of 13 B parameters is larger than it."""
    os.sync()
    for file in (path for path in folder.rglob("*") if path.is_file()):
        with open(file, "rb") as opened:
            os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def touch_memory() -> None:
    """Most of the free memory is written to: what a virtual machine has given back to its host comes back at some seconds a GB, to
    whichever command asks for it first."""
    np.ones(int(0.6 * os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")), np.uint8)


def run(folder: Path, apart: Executor, *command: object) -> tuple[float, float]:
    """(seconds, peak bytes resident) of a process that must end well, with what it wrote on the disk; what lies in `folder` it reads
    from the disk. apart: another process."""
    forget(folder)
    apart.submit(touch_memory).result()
    start = time.perf_counter()
    process = subprocess.Popen([str(word) for word in command], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "GLIBC_TUNABLES": HUGE_PAGES})
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise UserError(f"{' '.join(map(str, command))} ended with {os.waitstatus_to_exitcode(status)}")
    os.sync()
    return time.perf_counter() - start, usage.ru_maxrss * 1024.0


def differing(ours: Path, theirs: Path) -> Iterator[str]:
    a, b = open_source(ours), open_source(theirs)
    yield from sorted(a.manifest.keys() ^ b.manifest.keys())
    yield from (name for name in a.manifest.keys() & b.manifest.keys()
                if a.manifest[name] != b.manifest[name] or a.read(name).tobytes() != b.read(name).tobytes())


def measure(folder: Path, apart: Executor) -> dict[str, list[tuple[float, float]]]:
    """What `run` says of every command, once a round."""
    published, module = folder / "published", (sys.executable, "-m", "launch.convert")
    commands = {
        "start": (*module, "--help"),
        "cp": ("cp", "-r", published, folder / "copy"),
        "import": (*module, "import", "--output", folder / "model", "--mmdit", published / "hunyuan", "--vae", published / "hunyuan",
                   "--vlm", published / "qwen3vl"),
        "export": (*module, "export", "--checkpoint", folder / "model", "--output", folder / "out", "--format", "diffusers"),
        "verify": (*module, "verify", "--checkpoint", folder / "model", "--against", published / "hunyuan", published / "qwen3vl"),
    }
    figures: dict[str, list[tuple[float, float]]] = {name: [] for name in commands}
    for _ in range(ROUNDS):
        for made in ("model", "out"):
            shutil.rmtree(folder / made, ignore_errors=True)
        for name, command in commands.items():
            figures[name].append(run(folder, apart, *command))
            shutil.rmtree(folder / "copy", ignore_errors=True)
            print(f"{name}: {figures[name][-1][0]:.1f} s, peak {figures[name][-1][1] / 1e9:.2f} GB", flush=True)
    return figures


def main() -> int:
    parser = cli.Parser(prog="tests.benchmarks.convert", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, required=True, help="where the files go; it must not hold anything yet")
    folder = parser.parse_args().folder
    if folder.exists():
        raise UserError(f"{folder} exists already; choose another --folder")
    with ProcessPoolExecutor(1, get_context("spawn")) as apart:  # a process starts with the peak of the one that started it
        largest = apart.submit(write_published, folder / "published").result()
        size = sum(file.stat().st_size for file in (folder / "published").rglob("*.safetensors"))
        print(f"files of {size / 1e9:.2f} GB; the largest stacked leaf has {largest / 1e9:.2f} GB", flush=True)
        figures = measure(folder, apart)
    seconds = {name: median(took for took, _ in rounds) for name, rounds in figures.items()}
    peaks = {name: max(peak for _, peak in rounds) for name, rounds in figures.items()}
    places = {"vae": "hunyuan/vae", "transformer": "hunyuan/transformer", "vlm": "qwen3vl"}
    different = [f"{place}/{name}" for place, given in places.items()
                 for name in differing(folder / "out" / place, folder / "published" / given)]
    print(f"tensors that differ after the round trip: {len(different)} {', '.join(different[:5])}")
    shutil.rmtree(folder)
    ratios = {name: (seconds[name] - seconds["start"]) / seconds["cp"] for name in ("import", "export", "verify")}
    print(f"medians of {ROUNDS}; {seconds['start']:.1f} s of every conversion are the start of its program; cp has "
          f"{size / 1e9 / seconds['cp']:.2f} GB/s")
    for name, ratio in ratios.items():
        rate = size / 1e9 / (seconds[name] - seconds["start"])
        print(f"{name}: {seconds[name]:.1f} s, without the start {rate:.2f} GB/s, {ratio:.2f} x cp; peak {peaks[name] / 1e9:.2f} GB")
    slow = [name for name in ("import", "export") if ratios[name] > SLOWEST]
    large = [name for name in ("import", "export", "verify") if peaks[name] > largest + MARGIN]
    print(f"within {SLOWEST:g} x cp: {'no: ' + ', '.join(slow) if slow else 'yes'}; "
          f"peak under the largest leaf + {MARGIN / 1e9:g} GB: {'no: ' + ', '.join(large) if large else 'yes'}")
    return int(bool(different or slow or large))


if __name__ == "__main__":
    cli.run(main)
