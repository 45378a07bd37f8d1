"""One HTML file about checkpoints that launch.evaluate has measured, and about training runs; the same as JSON beside it.

    python -m launch.report --evaluation DIR --output report.html [--run NAME=WORKDIR ...] [--title TEXT]

It needs no network. DIR is an output of launch.evaluate: its --checkpoint, "trained" here, is set against the others. The first run is the
one whose stages are drawn by flow time; call it "trained" where it made that checkpoint.
"""
from collections.abc import Sequence
from datetime import date
from pathlib import Path

from launch import cli
from vino_jax.errors import UserError
from vino_jax.evaluation.report import write_report


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="launch.report", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--evaluation", required=True, type=Path, help="output folder of launch.evaluate")
    parser.add_argument("--output", required=True, type=Path, help="the HTML file")
    parser.add_argument("--run", action="append", default=[], metavar="NAME=WORKDIR", help="a training run; may be repeated")
    parser.add_argument("--title", default="Evaluation", help='(default "Evaluation")')
    flags = parser.parse_args(argv)
    runs = read_runs(flags.run)
    if flags.output.suffix != ".html":
        raise UserError(f"--output {flags.output} must end with .html")
    cli.make_output(flags.output.parent)
    path = write_report(flags.output, title=flags.title, lead=f"Checkpoints on samples that training never draws, from {flags.evaluation}.",
                        facts={"date": date.today().isoformat()}, runs=runs, evaluation=flags.evaluation)
    print(f"report: {path}, {path.with_suffix('.json')}", flush=True)


def read_runs(entries: Sequence[str]) -> dict[str, Path]:
    """Name -> workdir. Raises UserError for an entry that is not NAME=WORKDIR, or a name that comes twice."""
    runs: dict[str, Path] = {}
    for entry in entries:
        name, equals, workdir = entry.partition("=")
        if not equals or not name or name in runs:
            raise UserError(f"--run {entry!r} must be NAME=WORKDIR, each name once")
        runs[name] = cli.local_path(workdir)
    return runs


if __name__ == "__main__":
    cli.run(main)
