"""Public benchmarks: generate what their scorers read, check that all of it is there, and aggregate what the scorers wrote.

    python -m launch.benchmark generate  --benchmark NAME --prompts FILE --checkpoint DIR --output DIR [--images ROOT] [--seed 0] ...
    python -m launch.benchmark check     --benchmark NAME --prompts FILE --output DIR
    python -m launch.benchmark aggregate --benchmark NAME --scores FILE [--prompts FILE] [--json OUT]

generate writes OUTPUT in the layout of the benchmark's scorer, and OUTPUT/seeds.json: path -> {seed, prompt}. What is there already is kept.
Ends with 0; with 1 where an output failed, is missing or cannot be read, or no overall score comes of what is there; with 2 when flags or
files are wrong. docs/public_benchmarks.md says where the prompt files come from and how each scorer is run.
"""
import argparse
import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from data_pipelines.tasks import Task
from launch import cli, sample
from launch.generator import model_directory
from vino_jax import processes
from vino_jax.checkpoint import model as checkpoint
from vino_jax.checkpoint.atomic import write_text
from vino_jax.errors import UserError
from vino_jax.evaluation.aggregation import Scores
from vino_jax.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    Item,
    Output,
    check,
    plan,
    read_items,
    remove_unfinished,
    write_seeds,
)
from vino_jax.settings import SamplingConfig, build


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="launch.benchmark", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = p.add_subparsers(required=True)
    generate = commands.add_parser("generate", help="a checkpoint's outputs, where the benchmark's scorer looks for them", allow_abbrev=False)
    _add_prompts(generate)
    generate.add_argument("--images", type=Path, metavar="ROOT", help="where the paths of reference pictures in the prompt file start")
    generate.add_argument("--seed", type=int, default=0, help="of all outputs; each has one of its own that comes of it (default 0)")
    sample.add_sampling_flags(generate)
    generate.set_defaults(command=_generate, save_latents=False, contact_sheet=None)
    examine = commands.add_parser("check", help="what is missing or cannot be read; every file is decoded", allow_abbrev=False)
    _add_prompts(examine)
    examine.add_argument("--output", required=True, type=Path, help="folder that generate wrote")
    examine.set_defaults(command=_check)
    aggregate = commands.add_parser("aggregate", help="the benchmark's numbers, from what its scorer wrote", allow_abbrev=False)
    aggregate.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    aggregate.add_argument("--scores", required=True, type=Path, help="file or folder that the benchmark's scorer wrote")
    aggregate.add_argument("--prompts", type=Path, help="the benchmark's prompt file, where its rule needs it (imgedit)")
    aggregate.add_argument("--json", type=Path, metavar="OUT", help="also write the numbers as JSON")
    aggregate.set_defaults(command=_aggregate)
    return p


def _add_prompts(p: argparse.ArgumentParser) -> None:
    p.add_argument("--benchmark", required=True, choices=BENCHMARKS)
    p.add_argument("--prompts", required=True, type=Path, help="the benchmark's own prompt file")
    p.add_argument("--samples", type=int, metavar="N", help="of each prompt, in place of the benchmark's number")
    p.add_argument("--partial", action="store_true", help="take a part of the prompts or samples: its scores are not the benchmark's")


def main(argv: Sequence[str] | None = None) -> int:
    """Returns the exit code. Raises UserError for wrong flags or files."""
    flags = parser().parse_args(argv)
    return flags.command(flags)


# --- generate ---


def _generate(flags: argparse.Namespace) -> int:
    cli.join_processes()
    directory, benchmark = model_directory(flags.checkpoint), BENCHMARKS[flags.benchmark]
    defaults = build(SamplingConfig, checkpoint.read_info(directory).sampling, "sampling.")
    sample.check_flags(flags, defaults)
    if benchmark.is_clip and (flags.num_frames or defaults.num_frames) == 1:
        raise UserError(f"{flags.benchmark} takes clips, and --num_frames or the checkpoint says 1")
    items = read_items(benchmark, flags.prompts, flags.samples, flags.partial)
    root = picture_root(benchmark, flags, items)
    outputs = plan(items, flags.seed)
    cli.make_output(flags.output)
    problems = processes.of_first(lambda: prepare(benchmark, flags, items, outputs))
    report = sample.Report(len(outputs))
    for reason in problems.values():
        report.failed(reason)
    sample.generate_all(directory, tasks(outputs, root, problems), flags, defaults, report)
    if flags.overwrite and processes.is_first():
        write_seeds(flags.output, outputs)  # again: others were there before
    return report.end(flags.output)


def picture_root(benchmark: Benchmark, flags: argparse.Namespace, items: Sequence[Item]) -> Path:
    """Where the paths of reference pictures start. Raises UserError where none of them is there."""
    if benchmark.embedded:
        return flags.output
    first = next((item.images[0] for item in items if item.images), None)
    if first is None:
        return Path(".")
    if flags.images is None:
        raise UserError(f"{flags.benchmark} has reference pictures: --images says where they lie")
    if not any((flags.images / image).is_file() for item in items for image in item.images):
        raise UserError(f"none of the reference pictures lies in --images {flags.images}: the first would be {flags.images / first}")
    return flags.images


def prepare(benchmark: Benchmark, flags: argparse.Namespace, items: Sequence[Item], outputs: Sequence[Output]) -> dict[str, str]:
    """Write what lies beside the outputs. Path of an output that cannot be made -> why."""
    try:
        remove_unfinished(flags.output, outputs)
        write_seeds(flags.output, outputs)
        return benchmark.files(flags.prompts, items, flags.output)
    except OSError as error:
        raise UserError(f"cannot write to {flags.output}: {error.strerror or error}") from None


def tasks(outputs: Sequence[Output], root: Path, problems: dict[str, str]) -> list[Task]:
    """A task an output, named by its path without the ending, so that launch.sample's loop writes it there."""
    return [Task(str(Path(output.path).parent / Path(output.path).name[:-len(".png")]), output.item.task, output.item.caption,
                 tuple(root / image for image in output.item.images), seed=output.seed)
            for output in outputs if output.path not in problems]


# --- check, aggregate ---


def _check(flags: argparse.Namespace) -> int:
    benchmark = BENCHMARKS[flags.benchmark]
    items = read_items(benchmark, flags.prompts, flags.samples, flags.partial)
    if not flags.output.is_dir():
        raise UserError(f"there is no folder {flags.output}")
    problems = check(benchmark, items, flags.output)
    for problem in problems:
        print(problem, file=sys.stderr)
    print(f"{flags.benchmark}: {len(items)} prompts, {sum(len(item.outputs) for item in items)} outputs, {len(problems)} problems")
    return 1 if problems else 0


def _aggregate(flags: argparse.Namespace) -> int:
    scores = BENCHMARKS[flags.benchmark].scores(flags.scores, flags.prompts)
    print("\n".join(lines(scores)))
    if flags.json:
        try:
            write_text(flags.json, json.dumps(dataclasses.asdict(scores), indent=1))
        except OSError as error:
            raise UserError(f"cannot write {flags.json}: {error.strerror or error}") from None
    return 1 if scores.missing else 0


def lines(scores: Scores) -> list[str]:
    """The table, the overall scores, and what is to be known of them."""
    width = max(map(len, [*scores.parts, *scores.overall, ""]))
    rows = [f"{name:<{width}}  " + "  ".join(f"{column} {value:g}" if isinstance(value, int) else f"{column} {value:.4f}"
                                               for column, value in row.items()) for name, row in scores.parts.items()]
    rows += [f"{name:<{width}}  {value:.4f}" for name, value in scores.overall.items()]
    if scores.missing:
        rows.append(f"no score: {', '.join(scores.missing)}: what they are part of has no number")
    return rows + [f"note: {note}" for note in scores.notes]


if __name__ == "__main__":
    cli.run(main)
