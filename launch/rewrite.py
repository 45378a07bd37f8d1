"""Let the VLM rewrite the captions of a task file: it reads each with its references, and writes the caption that is then generated.

    python -m launch.rewrite --checkpoint DIR --tasks FILE.json --output FILE.json [--root DIR] [--temperature 0.7 --top_k 20 --top_p 0.8]

Writes the same tasks, for launch.sample with the same --root: `caption` is the new one, `original_caption` the first. Tasks that failed are
left out, and no file is written where all did. Ends with 0, with 1 when a task failed (the others are done), with 2 when flags or files are
wrong.
"""
import argparse
import json
import math
import sys
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax

from data_pipelines.packing import SamplingOptions, pack_rewrite
from data_pipelines.prompts import Prompter
from data_pipelines.tasks import Task, read_tasks
from launch import cli
from launch.generator import PICTURE_TASKS, in_groups, model_directory, placed, placement
from vino_jax.batch import Batch
from vino_jax.checkpoint import atomic
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.sampling.rewrite import Decoding, Rewriter
from vino_jax.settings import SamplingConfig, build
from vino_jax.sharding.mesh import parse_mesh
from vino_jax.sharding.rules import preset


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="launch.rewrite", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", required=True, type=Path, help="model checkpoint, or the workdir of a finished training run; its VLM is read")
    p.add_argument("--tasks", required=True, type=Path, help="JSON array of {index, task, caption, ref_image_paths, ref_video_path, ...}")
    p.add_argument("--output", required=True, type=Path, help="JSON file of the rewritten tasks; one that is there is replaced at the end")
    p.add_argument("--root", type=Path, default=Path("."), help="where the paths in the task file start (default: here)")
    p.add_argument("--max_new_tokens", type=int, default=Decoding.max_new_tokens, help="of a caption, where it is cut (default 256)")
    p.add_argument("--temperature", type=float, default=Decoding.temperature, help="of sampling; 0 takes the likeliest token (default 0)")
    p.add_argument("--top_k", type=int, default=Decoding.top_k, help="sample among so many tokens; 0: among all (default 0)")
    p.add_argument("--top_p", type=float, default=Decoding.top_p, help="sample among the tokens that hold this probability (default 1)")
    p.add_argument("--seed", type=int, default=0, help="of sampling; a task draws by it and its index (default 0)")
    p.add_argument("--batch", type=int, default=8, help="captions of equal shapes that one pass writes (default 8)")
    p.add_argument("--mesh", help="sizes of mesh axes, as tensor=8 (default: tensor over as many accelerators as divide the key-value heads, "
                                  "data over the others; on a CPU one device)")
    p.add_argument("--dtype", choices=("float32", "bfloat16"), help="of the computation (default bfloat16, on a CPU float32)")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 when a task failed. Raises UserError for wrong flags or files."""
    flags = parser().parse_args(argv)
    decoding = check_flags(flags)
    directory = model_directory(flags.checkpoint)
    info = checkpoint.read_info(directory)
    defaults = build(SamplingConfig, info.sampling, "sampling.")
    tasks, problems = read_tasks(flags.tasks, flags.root)
    if flags.output.is_dir():
        raise UserError(f"--output {flags.output} is a folder; name a file")
    cli.make_output(flags.output.parent)
    report = Report(len(tasks) + len(problems))
    for problem in problems:
        report.failed(str(problem))
    if tasks:
        prompter = Prompter(checkpoint.processor_folder(directory))
        rewriter = load_rewriter(directory, info, flags, decoding, prompter.stops)
        for waiting in in_groups(packed(tasks, prompter, defaults, report), _shape, flags.batch):
            rewrite(rewriter, prompter, waiting, flags.seed, decoding, report)
    write(flags.output, tasks, report.captions)
    return report.end(flags.output)


def check_flags(flags: argparse.Namespace) -> Decoding:
    """Raises UserError for values that nothing could be written with."""
    if flags.batch < 1:
        raise UserError(f"--batch {flags.batch} must be at least 1")
    parse_mesh(flags.mesh or "")
    return Decoding(flags.max_new_tokens, flags.temperature, flags.top_k, flags.top_p)


def load_rewriter(directory: Path, info: checkpoint.ModelInfo, flags: argparse.Namespace, decoding: Decoding,
                  stops: Sequence[int]) -> Rewriter:
    """The VLM alone, in the dtype of the computation, on the mesh."""
    # over "tensor" a weight stays split where it is used; over "fsdp" each new token would gather all of them
    spread = {"tensor": math.gcd(jax.device_count(), info.config.vlm.text.kv_heads), "data": -1}
    dtype, mesh = placement(flags.dtype, flags.mesh, spread)
    vlm, rules = Vino(info.config, Runtime(dtype=dtype)).parts["vlm"], preset("fsdp") if mesh else None
    params = checkpoint.restore(directory, {"vlm": placed(vlm.abstract, vlm.axes, dtype, mesh, rules)})["vlm"]
    return Rewriter(vlm, params, decoding, stops, mesh=mesh, rules=rules)


def packed(tasks: Sequence[Task], prompter: Prompter, defaults: SamplingConfig, report: "Report") -> Iterator[tuple[Task, Batch]]:
    """Those whose references can be read; the others are reported."""
    for task in tasks:
        height, width = defaults.size(task.task in PICTURE_TASKS or defaults.num_frames == 1)
        try:
            yield task, pack_rewrite(task, prompter, SamplingOptions(height=height, width=width))
        except UserError as error:
            report.failed(str(error))


def _shape(one: tuple[Task, Batch]) -> tuple:
    return one[1].tokens.shape, one[1].patches.shape


def rewrite(rewriter: Rewriter, prompter: Prompter, waiting: Sequence[tuple[Task, Batch]], seed: int, decoding: Decoding, report: "Report") -> None:
    """Tasks whose prompts have equal shapes; an error in it (memory ran out) is reported for all its tasks."""
    try:
        # not one seed for all: tasks that draw the same numbers write alike
        seeds = [zlib.crc32(f"{seed} {task.index}".encode()) for task, _ in waiting]
        written = rewriter.generate([prompt for _, prompt in waiting], seeds)
    except jax.errors.JaxRuntimeError as error:
        for task, _ in waiting:
            report.failed(f"task {task.index}: {' '.join(str(error).split())}")
        return
    for (task, _), ids in zip(waiting, written, strict=True):
        caption = prompter.decode(ids).strip()
        if caption:
            report.rewritten(task, caption, f"{len(ids)} tokens{', cut' if len(ids) == decoding.max_new_tokens else ''}")
        else:
            report.failed(f"task {task.index}: the model wrote an empty caption")


def write(path: Path, tasks: Sequence[Task], captions: dict[str, str]) -> None:
    """The entries of the rewritten tasks, in their order. Raises UserError where the disk does not take them."""
    entries: list[dict[str, Any]] = [
        {**task.entry, "caption": captions[task.index], "original_caption": task.entry.get("original_caption", task.caption)}
        for task in tasks if task.index in captions]
    try:
        if entries:
            atomic.write_text(path, json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror or error}") from None


@dataclass
class Report:
    """New captions by index; lines of progress and, at the end, what came of all tasks."""

    total: int
    captions: dict[str, str] = field(default_factory=dict)
    failures: int = 0
    start: float = field(default_factory=time.perf_counter)

    def rewritten(self, task: Task, caption: str, size: str) -> None:
        self.captions[task.index] = caption
        self._line(f"{task.index}: {task.task}, {size}: {' '.join(caption.split())[:100]}")

    def failed(self, reason: str) -> None:
        self.failures += 1
        self._line(f"FAILED {reason}", sys.stderr)

    def end(self, output: Path) -> int:
        """Prints the summary; returns the exit code."""
        where = f"in {output}" if self.captions else f"{output} is not written"
        print(f"{self.total} tasks: {len(self.captions)} rewritten, {self.failures} failed, {time.perf_counter() - self.start:.1f} s, {where}",
              flush=True)
        return 1 if self.failures else 0

    def _line(self, text: str, stream=None) -> None:
        print(f"[{len(self.captions) + self.failures}/{self.total}] {text}", file=stream or sys.stdout, flush=True)


if __name__ == "__main__":
    cli.run(main)
