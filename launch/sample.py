"""Generate what a task file asks for, one picture or clip a task.

    python -m launch.sample --checkpoint DIR --tasks FILE.json --output DIR [--root DIR] [--steps 50] [--seed 0] ...

Writes OUTPUT/<index>.png or .mp4, and OUTPUT/<index>.npz with --save_latents. What is there already is kept. Ends with 0, with 1 when
a task failed (the others are done), with 2 when flags or files are wrong. On several processes (launch/cli.py: join_processes) all
generate together, and the first writes.
"""
import argparse
import sys
import time
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import jax
import numpy as np

from data_pipelines.tasks import Task, read_tasks
from launch import cli
from launch.generator import TILINGS, Asked, Generator, in_groups, model_directory
from vino_jax import processes
from vino_jax.batch import PackedTask
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.sampling.pipeline import BRANCHES, POSTERIORS, Progress, Result, shapes
from vino_jax.sampling.sheet import write_sheet
from vino_jax.sampling.video import ENDINGS, read_metadata, write_latents, write_output
from vino_jax.settings import SamplingConfig, build
from vino_jax.sharding.mesh import parse_mesh
from vino_jax.train import compile_cache


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="launch.sample", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--tasks", required=True, type=Path, help="JSON array of {index, task, caption, ref_image_paths, ref_video_path, seed, ...}")
    p.add_argument("--root", type=Path, default=Path("."), help="where the paths in the task file start (default: here)")
    p.add_argument("--seed", type=int, default=0, help="of the noise, for tasks that name none (default 0)")
    p.add_argument("--initial_noise", type=Path, help=".npz with one array (1, C, T, H, W) a task, named by its index")
    p.add_argument("--save_latents", action="store_true", help="also write <index>.npz: latents (1, C, T, H, W), scaled")
    p.add_argument("--contact_sheet", type=Path, metavar="FILE.png", help="also write one picture of all results with their prompts")
    add_sampling_flags(p)
    return p


def add_sampling_flags(p: argparse.ArgumentParser) -> None:
    """What every command that generates takes; a value that is not given is the checkpoint's own, else the published model's."""
    p.add_argument("--checkpoint", required=True, type=Path, help="model checkpoint, or the workdir of a finished training run")
    p.add_argument("--output", required=True, type=Path, help="folder of the results")
    p.add_argument("--height", type=int, help="of pictures 640, of clips 480; a multiple of 16; with the width the budget of references")
    p.add_argument("--width", type=int, help="of pictures 640, of clips 848; a multiple of 16")
    p.add_argument("--num_frames", type=int, help="of clips, 4k+1, at most 89 (default 85)")
    p.add_argument("--steps", type=int, help="of denoising (default 50)")
    p.add_argument("--guidance", type=float, help="by the text (default 5 for pictures, 7 for clips)")
    p.add_argument("--image_guidance", type=float, help="by reference images; a third branch runs above 1.0 (default 1.0)")
    p.add_argument("--negative_prompt", help="for tasks that name none (default: the published model's, for pictures and for clips)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation (default bfloat16, on a CPU float32)")
    p.add_argument("--posterior", choices=POSTERIORS, default="sample", help="of the VAE for references (default sample)")
    p.add_argument("--vae_tiling", choices=TILINGS, default="frames",
                   help="the VAE takes long clips in windows of frames (default), or large pictures in tiles too, in less memory")
    p.add_argument("--mesh", help="sizes of mesh axes, as fsdp=2,seq=8 (default: all accelerators share each sample; on a CPU one device)")
    p.add_argument("--batch", type=int, default=1, help="tasks of equal shapes that are generated side by side (default 1)")
    p.add_argument("--step_cache", type=int, default=1, metavar="N",
                   help="run the blocks of the MMDiT in every N-th step alone, and in between add what they added last (default 1: in all)")
    p.add_argument("--compile_cache", type=Path, metavar="DIR", help="keep compiled programs here for later runs")
    p.add_argument("--overwrite", action="store_true", help="generate again what the output folder has already")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a task failed. Raises UserError for wrong flags or files."""
    flags = parser().parse_args(argv)
    cli.join_processes()
    directory = model_directory(flags.checkpoint)
    defaults = build(SamplingConfig, checkpoint.read_info(directory).sampling, "sampling.")
    check_flags(flags, defaults)
    tasks, problems = read_tasks(flags.tasks, flags.root)
    noise = read_noise(flags.initial_noise) if flags.initial_noise else None
    if flags.contact_sheet:
        cli.make_output(flags.contact_sheet.parent)
    cli.make_output(flags.output)
    report = Report(len(tasks) + len(problems))
    for problem in problems:
        report.failed(str(problem))
    generate_all(directory, tasks, flags, defaults, report, noise)
    if flags.contact_sheet and processes.is_first():
        rows = [(f"{task.index}: {task.task}\n{task.caption}", path) for task in tasks if (path := finished(flags, task))]
        write_sheet(flags.contact_sheet, rows)
    return report.end(flags.output)


def generate_all(directory: Path, tasks: Sequence[Task], flags: argparse.Namespace, defaults: SamplingConfig, report: "Report",
                 noise: dict[str, np.ndarray] | None = None) -> None:
    """Generate, with the model checkpoint at `directory`, the tasks whose results the output folder has not, each as <index>.png or .mp4
    in it; a task that fails is reported and holds no other up. The model is loaded where something is left to do."""
    # what the first process finds: on a disk of its own another one would find other files, and wait for ever for who keeps what it has not
    done = {} if flags.overwrite else processes.of_first(lambda: kept(flags, tasks))
    for index, (path, differs) in done.items():
        report.kept(index, path, differs)
    waiting = [task for task in tasks if task.index not in done]
    if not waiting:
        return
    if flags.compile_cache:
        compile_cache.use(str(flags.compile_cache))
    generator = Generator.load(directory, dtype=flags.dtype, mesh=flags.mesh, vae_tiling=flags.vae_tiling, tell=report.progress)
    for group in in_groups(_packed(generator, waiting, flags, noise, report), shapes, flags.batch):
        generate(generator, group, flags, defaults, noise, report)


def asked(flags: argparse.Namespace) -> Asked:
    return Asked(flags.height, flags.width, flags.num_frames, flags.seed, flags.guidance, flags.image_guidance, flags.negative_prompt)


def check_flags(flags: argparse.Namespace, defaults: SamplingConfig) -> None:
    """Raises UserError for values that no task could be generated with."""
    asked(flags).check(defaults)
    for name in ("steps", "batch", "step_cache"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    if flags.contact_sheet and flags.contact_sheet.suffix != ".png":
        raise UserError(f"--contact_sheet {flags.contact_sheet} must end with .png")
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


def finished(flags: argparse.Namespace, task: Task) -> Path | None:
    """The result that the output folder has already, complete; None where there is none."""
    if flags.save_latents and not (flags.output / f"{task.index}.npz").exists():
        return None
    return next((path for path in (flags.output / f"{task.index}{ending}" for ending in ENDINGS) if path.exists()), None)


def kept(flags: argparse.Namespace, tasks: Sequence[Task]) -> dict[str, tuple[str, list[str]]]:
    """Index -> (the result that is there already, in what it differs from what is asked)."""
    found = ((task, finished(flags, task)) for task in tasks)
    return {task.index: (str(path), differing(path, metadata_asked(task, flags))) for task, path in found if path}


def metadata_asked(task: Task, flags: argparse.Namespace) -> dict[str, str]:
    """What is known of an output before it is made, as `metadata` writes it."""
    return {"prompt": task.caption, "seed": str(flags.seed if task.seed is None else task.seed), "task": task.task}


def metadata(task: PackedTask, steps: int, step_cache: int) -> dict[str, str]:
    """What an output tells of itself."""
    return {"prompt": task.prompt, "seed": str(task.seed), "task": task.task, "steps": str(steps), "guidance": f"{task.guidance:g}",
            "image_guidance": f"{task.image_guidance:g}", "shift": f"{task.shift:g}", "step_cache": str(step_cache),
            "software": ", ".join(f"{name} {version(name)}" for name in ("vino_jax", "jax"))}


def differing(path: Path, wanted: Mapping[str, str]) -> list[str]:
    """In what an output that is there already differs from what is asked; nothing is known of one that cannot be read."""
    try:
        found = read_metadata(path)
    except UserError:
        found = {}
    return [name for name, value in wanted.items() if found.get(name, value) != value]


def generate(generator: Generator, packed: Sequence[PackedTask], flags: argparse.Namespace, defaults: SamplingConfig,
             noise: dict[str, np.ndarray] | None, report: "Report") -> None:
    """Sample and write tasks of equal shapes; one that cannot be written is reported and holds no other up, an error in sampling (memory
    ran out) is reported for all of them."""
    start, steps = time.perf_counter(), flags.steps or defaults.steps
    starts = None if noise is None else [noise[task.index] for task in packed]
    try:
        results = generator.sampler.generate_many(packed, steps=steps, posterior=flags.posterior, batch=flags.batch, noise=starts,
                                                  step_cache=flags.step_cache)
    except (UserError, jax.errors.JaxRuntimeError) as error:
        advice = "; --vae_tiling full, a smaller --batch or more devices take less memory" if "RESOURCE_EXHAUSTED" in str(error) else ""
        for task in packed:
            report.failed(f"task {task.index}: {' '.join(str(error).split())}{advice}")
        return
    report.cached(flags.step_cache, results[0].change)
    for task, result in zip(packed, results, strict=True):
        try:
            path = _write(task, result, flags, steps) if processes.is_first() else flags.output
            report.written(task, path, (time.perf_counter() - start) / len(packed))
        except OSError as error:  # the disk is full
            report.failed(f"task {task.index}: cannot write to {flags.output}: {error.strerror or error}")


def _packed(generator: Generator, tasks: Sequence[Task], flags: argparse.Namespace, noise: dict[str, np.ndarray] | None,
            report: "Report") -> Iterator[PackedTask]:
    """Those that can be packed; the others are reported."""
    for task in tasks:
        try:
            if noise is not None and task.index not in noise:
                raise UserError(f"task {task.index}: {flags.initial_noise} has no array of that name")
            yield generator.pack(task, asked(flags))
        except UserError as error:
            report.failed(str(error))


def _write(task: PackedTask, result: Result, flags: argparse.Namespace, steps: int) -> Path:
    if flags.save_latents:
        write_latents(flags.output / f"{task.index}.npz", result.latents)
    path = write_output(flags.output, task.index, result.pixels, metadata(task, steps, flags.step_cache))
    for ending in ENDINGS:  # of another task that had this index
        if ending != path.suffix:
            path.with_suffix(ending).unlink(missing_ok=True)
    return path


@dataclass
class Report:
    """Lines of progress and, at the end, what came of all tasks; of several processes the first prints them."""

    total: int
    counts: dict[str, int] = field(default_factory=lambda: {"written": 0, "kept": 0, "failed": 0})
    start: float = field(default_factory=time.perf_counter)
    _seconds: float = 0.0  # of the tasks that were written
    _loop: tuple[int, float] = (0, 0.0)  # step and time since which a loop runs without compiling

    def progress(self, now: Progress) -> None:
        """The branches at the start of a loop; on its way steps and seconds left, as soon as steps took time without compilation."""
        clock = time.perf_counter()
        names = ", ".join(now.tasks)
        if now.step == 0:
            self._loop = (0, 0.0)
            self._say(f"    {names}: {now.steps} steps, {len(now.passes)} passes a step: "
                      + "; ".join(" + ".join(BRANCHES[i] for i in members) for members in now.passes))
            return
        step, since = self._loop
        left = ""
        if since:
            left = f", {(clock - since) / (now.step - step) * (now.steps - now.step):.0f} s of denoising left"
        else:
            self._loop = (now.step, clock)
        others = self.total - sum(self.counts.values()) - len(now.tasks)
        if self.counts["written"] and others > 0:
            left += f", {self._seconds / self.counts['written'] * others:.0f} s for the {others} tasks after it"
        self._say(f"    {names}: step {now.step} of {now.steps}{left}")

    def cached(self, every: int, change: float) -> None:
        if every > 1:
            self._say(f"    step cache: what the blocks add changed by up to {change:.1%} in the {every} steps from one run of them to the next")

    def written(self, task: PackedTask, path: Path, seconds: float) -> None:
        self._seconds += seconds
        self._line("written", f"{task.index}: {task.task} {task.frames}x{task.height}x{task.width} -> {path}, {seconds:.1f} s")

    def kept(self, index: str, path: str, differs: Sequence[str]) -> None:
        other = f", made with another {' and '.join(differs)}" if differs else ""
        self._line("kept", f"{index}: kept {path}{other} (--overwrite generates it again)")

    def failed(self, reason: str) -> None:
        self._line("failed", f"FAILED {reason}", sys.stderr)

    def end(self, output: Path) -> int:
        """Prints the summary; returns the exit code."""
        told = ", ".join(f"{count} {what}" for what, count in self.counts.items())
        self._say(f"{self.total} tasks: {told}, {time.perf_counter() - self.start:.1f} s, in {output}")
        return 1 if self.counts["failed"] else 0

    def _line(self, what: str, text: str, stream=None) -> None:
        self.counts[what] += 1
        self._say(f"[{sum(self.counts.values())}/{self.total}] {text}", stream)

    @staticmethod
    def _say(text: str, stream=None) -> None:
        if processes.is_first():
            print(text, file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    cli.run(main)
