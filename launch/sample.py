"""Generate what a task file asks for, one picture or clip a task.

    python -m launch.sample --checkpoint DIR --tasks FILE.json --output DIR [--root DIR] [--steps 50] [--seed 0] ...

Writes OUTPUT/<index>.png or .mp4, and OUTPUT/<index>.npz with --save_latents. What is there already is kept. Ends with 0, with 1 when
a task failed (the others are done), with 2 when flags or files are wrong.
"""
import argparse
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import jax
import numpy as np

from data_pipelines.packing import SamplingOptions, check_options, pack_task
from data_pipelines.prompts import Prompter
from data_pipelines.tasks import Task, read_tasks
from launch import cli
from vino_jax.batch import PackedTask
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.models.vae_tiling import Tiling
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.sampling.pipeline import POSTERIORS, Result, Sampler
from vino_jax.sampling.video import write_latents, write_output
from vino_jax.settings import SamplingConfig, build
from vino_jax.sharding.mesh import make_mesh, parse_mesh
from vino_jax.sharding.resolve import shardings
from vino_jax.sharding.rules import preset

# As the published VAE does by default, and as it does after enable_tiling().
TILINGS = {"frames": Tiling(side=None), "full": Tiling()}
PICTURE_TASKS = ("t2i", "ti2i", "ti2i_baseimg")


def parser() -> argparse.ArgumentParser:
    """The flags; a value that is not given is the checkpoint's own, else the published model's."""
    p = cli.Parser(prog="launch.sample", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", required=True, type=Path, help="model checkpoint, or the workdir of a finished training run")
    p.add_argument("--tasks", required=True, type=Path, help="JSON array of {index, task, caption, ref_image_paths, ref_video_path, ...}")
    p.add_argument("--output", required=True, type=Path, help="folder of the results")
    p.add_argument("--root", type=Path, default=Path("."), help="where the paths in the task file start (default: here)")
    p.add_argument("--height", type=int, help="of pictures 640, of clips 480; a multiple of 16; with the width the budget of references")
    p.add_argument("--width", type=int, help="of pictures 640, of clips 848; a multiple of 16")
    p.add_argument("--num_frames", type=int, help="of clips, 4k+1, at most 89 (default 85)")
    p.add_argument("--steps", type=int, help="of denoising (default 50)")
    p.add_argument("--seed", type=int, default=0, help="of the noise (default 0)")
    p.add_argument("--guidance", type=float, help="by the text (default 5 for pictures, 7 for clips)")
    p.add_argument("--image_guidance", type=float, help="by reference images; a third branch runs above 1.0 (default 1.0)")
    p.add_argument("--negative_prompt", help="default: the published model's, for pictures and for clips")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation (default bfloat16, on a CPU float32)")
    p.add_argument("--posterior", choices=POSTERIORS, default="sample", help="of the VAE for references (default sample)")
    p.add_argument("--vae_tiling", choices=TILINGS, default="frames",
                   help="the VAE takes long clips in windows of frames (default), or large pictures in tiles too, in less memory")
    p.add_argument("--initial_noise", type=Path, help=".npz with one array (1, C, T, H, W) a task, named by its index")
    p.add_argument("--save_latents", action="store_true", help="also write <index>.npz: latents (1, C, T, H, W), scaled")
    p.add_argument("--mesh", help="sizes of mesh axes, as data=1,seq=8 (default: fsdp over all accelerators; on a CPU one device)")
    p.add_argument("--batch", type=int, default=1, help="tasks of equal shapes that one pass generates (default 1)")
    p.add_argument("--overwrite", action="store_true", help="generate again what the output folder has already")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a task failed. Raises UserError for wrong flags or files."""
    flags = parser().parse_args(argv)
    directory = model_directory(flags.checkpoint)
    info = checkpoint.read_info(directory)
    defaults = build(SamplingConfig, info.sampling, "sampling.")
    check_flags(flags, defaults)
    tasks, problems = read_tasks(flags.tasks, flags.root)
    noise = read_noise(flags.initial_noise) if flags.initial_noise else None
    cli.make_output(flags.output)
    report = Report(len(tasks) + len(problems))
    for problem in problems:
        report.failed(str(problem))
    waiting = []
    for task in tasks:
        done = None if flags.overwrite else finished(flags, task)
        if done:
            report.kept(task.index, done)
        else:
            waiting.append(task)
    if waiting:
        sampler, prompter = load_sampler(directory, info, flags), Prompter(checkpoint.processor_folder(directory))
        for first in range(0, len(waiting), flags.batch):
            generate(sampler, prompter, waiting[first:first + flags.batch], flags, defaults, noise, report)
    return report.end(flags.output)


def model_directory(path: Path) -> Path:
    """The model checkpoint at `path`, or that at the end of the training run there."""
    return path / "model" if not (path / "model.json").exists() and (path / "model" / "model.json").exists() else path


def options(flags: argparse.Namespace, defaults: SamplingConfig, picture: bool) -> SamplingOptions:
    """Flags before the checkpoint's own values before the published ones."""

    def first(*values):
        return next((value for value in values if value is not None), None)

    height, width = defaults.size(picture)
    return SamplingOptions(
        height=first(flags.height, height), width=first(flags.width, width), num_frames=first(flags.num_frames, defaults.num_frames),
        seed=flags.seed, guidance=first(flags.guidance, defaults.guidance(picture)), shift=defaults.shift(picture),
        image_guidance=first(flags.image_guidance, defaults.image_guidance), negative_prompt=flags.negative_prompt)


def check_flags(flags: argparse.Namespace, defaults: SamplingConfig) -> None:
    """Raises UserError for values that no task could be generated with."""
    for picture in (True, False):
        check_options(options(flags, defaults, picture))
    for name in ("steps", "batch"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    parse_mesh(flags.mesh or "")


def read_noise(path: Path) -> dict[str, np.ndarray]:
    """Index of a task -> noise (1, f, h, w, C) float32. Raises UserError for a file that is no npz of such arrays."""
    try:
        file = np.load(path)
        if not isinstance(file, np.lib.npyio.NpzFile):
            raise UserError(f"the initial noise {path} is no .npz: write it with numpy.savez, one array a task, named by its index")
        with file:
            arrays = {name: file[name] for name in file.files}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise UserError(f"cannot read the initial noise {path}: {error}") from None
    for name, array in arrays.items():
        if array.ndim != 5 or not np.issubdtype(array.dtype, np.floating):
            raise UserError(f"the initial noise {name!r} in {path} is {array.dtype} of the shape {array.shape}; "
                            "it must be floating-point (1, C, T, H, W)")
    return {name: np.moveaxis(array, 1, -1).astype(np.float32) for name, array in arrays.items()}


def load_sampler(directory: Path, info: checkpoint.ModelInfo, flags: argparse.Namespace) -> Sampler:
    """The model in the dtype of the computation, on the mesh."""
    on_cpu = jax.default_backend() == "cpu"
    dtype = flags.dtype or ("float32" if on_cpu else "bfloat16")
    vino = Vino(info.config, Runtime(dtype=dtype), TILINGS[flags.vae_tiling])
    sizes = parse_mesh(flags.mesh) if flags.mesh else None if on_cpu or jax.device_count() == 1 else {"fsdp": -1}
    mesh = rules = None
    abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, dtype), vino.abstract)
    if sizes is not None:
        mesh, rules = make_mesh(sizes), preset("fsdp")
        placed = shardings(abstract, vino.axes, mesh, rules)
        abstract = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), abstract, placed)
    return Sampler(vino, checkpoint.restore(directory, abstract), mesh=mesh, rules=rules)


def finished(flags: argparse.Namespace, task: Task) -> Path | None:
    """The result that the output folder has already, complete; None where there is none."""
    if flags.save_latents and not (flags.output / f"{task.index}.npz").exists():
        return None
    return next((path for path in (flags.output / f"{task.index}{ending}" for ending in (".png", ".mp4")) if path.exists()), None)


def generate(sampler: Sampler, prompter: Prompter, tasks: Sequence[Task], flags: argparse.Namespace, defaults: SamplingConfig,
             noise: dict[str, np.ndarray] | None, report: "Report") -> None:
    """Pack, sample and write some tasks; one that cannot be packed or written is reported and holds no other up, an error in
    sampling (memory ran out) is reported for all of them."""
    start = time.perf_counter()
    packed = list(_packed(prompter, tasks, flags, defaults, noise, report))
    starts = None if noise is None else [noise[task.index] for task in packed]
    try:
        results = sampler.generate_many(packed, steps=flags.steps or defaults.steps, posterior=flags.posterior, batch=flags.batch,
                                        noise=starts)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        for task in packed:
            report.failed(f"task {task.index}: {' '.join(str(error).split())}")
        return
    for task, result in zip(packed, results, strict=True):
        try:
            report.written(task, _write(task, result, flags), (time.perf_counter() - start) / len(packed))
        except OSError as error:  # the disk is full
            report.failed(f"task {task.index}: cannot write to {flags.output}: {error.strerror or error}")


def _packed(prompter: Prompter, tasks: Sequence[Task], flags: argparse.Namespace, defaults: SamplingConfig,
            noise: dict[str, np.ndarray] | None, report: "Report") -> Iterator[PackedTask]:
    for task in tasks:
        try:
            if noise is not None and task.index not in noise:
                raise UserError(f"task {task.index}: {flags.initial_noise} has no array of that name")
            picture = task.task in PICTURE_TASKS or (flags.num_frames or defaults.num_frames) == 1
            yield pack_task(task, prompter, options(flags, defaults, picture))
        except UserError as error:
            report.failed(str(error))


def _write(task: PackedTask, result: Result, flags: argparse.Namespace) -> Path:
    if flags.save_latents:
        write_latents(flags.output / f"{task.index}.npz", result.latents)
    return write_output(flags.output, task.index, result.pixels, {"prompt": task.prompt, "seed": str(task.seed)})


@dataclass
class Report:
    """Lines of progress and, at the end, what came of all tasks."""

    total: int
    counts: dict[str, int] = field(default_factory=lambda: {"written": 0, "kept": 0, "failed": 0})
    start: float = field(default_factory=time.perf_counter)

    def written(self, task: PackedTask, path: Path, seconds: float) -> None:
        self._line("written", f"{task.index}: {task.task} {task.frames}x{task.height}x{task.width} -> {path}, {seconds:.1f} s")

    def kept(self, index: str, path: Path) -> None:
        self._line("kept", f"{index}: kept {path} (--overwrite generates it again)")

    def failed(self, reason: str) -> None:
        self._line("failed", f"FAILED {reason}", sys.stderr)

    def end(self, output: Path) -> int:
        """Prints the summary; returns the exit code."""
        told = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        print(f"{self.total} tasks: {told}, {time.perf_counter() - self.start:.1f} s, in {output}", flush=True)
        return 1 if self.counts["failed"] else 0

    def _line(self, what: str, text: str, stream=None) -> None:
        self.counts[what] += 1
        print(f"[{sum(self.counts.values())}/{self.total}] {text}", file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    cli.run(main)
