"""Run an experiment on `shapes`: its arms over several seeds, and what came out with confidence intervals.

    python -m launch.experiment --name curriculum|queries|boundary|guidance --output runs/experiments [--seeds 0,1,2] [--short]

Trains what is not trained yet in OUTPUT/<training>/<seed>/run, measures it with launch.evaluate, and writes OUTPUT/<name>.json and <name>.md.
Arms share trainings: OUTPUT may be one folder for all experiments. Started again it goes on where it stopped. docs/experiments.md tells
what each asks, and what came out. --short: a few steps and samples, for tests.
"""
import fnmatch
import json
import math
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch import cli
from launch.config import load_config
from vino_jax.checkpoint.atomic import write_text
from vino_jax.errors import UserError
from vino_jax.evaluation.report import read_records
from vino_jax.evaluation.statistics import difference, interval, roughness
from vino_jax.settings import nearest, read_json

ROOT = Path(__file__).resolve().parent.parent
CONFIG = "configs/shapes.py"
SEEDS_AT_LEAST = 3  # for an interval that says something

# name -> flags of launch.train
TRAININGS = {
    "curriculum": ("--config", CONFIG),
    "stage3_alone": ("--config", "configs/shapes_stage3.py"),
    "no_queries": ("--config", CONFIG, "--config.model.queries=0"),
    "no_boundary": ("--config", CONFIG, "--config.model.boundary_tokens=False"),
}


@dataclass(frozen=True)
class Arm:
    training: str  # of TRAININGS
    evaluation: tuple[str, ...] = ()  # flags of launch.evaluate


@dataclass(frozen=True)
class Experiment:
    """arms: the first is the one that others are set against. tasks: what is measured; reads: patterns of the names of values that are told, of
    all that are kept."""

    arms: Mapping[str, Arm]
    tasks: str
    reads: tuple[str, ...]


def _guidance(scale: float) -> Arm:
    return Arm("curriculum", (f"--config.sampling.image_guidance={scale}", "--measures=shapes"))


_PICTURES, _CLIPS = "t2i,ti2i,ti2i_baseimg", "i2v,tv2v"
EXPERIMENTS = {
    "curriculum": Experiment({"curriculum": Arm("curriculum"), "stage3_alone": Arm("stage3_alone")}, f"{_PICTURES},{_CLIPS}",
                             ("loss*", "t2i/*", "ti2i/*", "ti2i_baseimg/followed", "tv2v/followed")),
    "queries": Experiment({"with": Arm("curriculum"), "without": Arm("no_queries")}, f"{_PICTURES},{_CLIPS}",
                          ("gradient_norm/*", "loss*", "t2i/*", "ti2i/*", "ti2i_baseimg/followed", "tv2v/followed")),
    "boundary": Experiment({"with": Arm("curriculum"), "without": Arm("no_boundary")}, f"{_PICTURES},{_CLIPS}",
                           ("loss*", "i2v/first_frame", "i2v/later_frames", "tv2v/first_frame", "tv2v/later_frames", "ti2i/followed")),
    "guidance": Experiment({f"image guidance {scale}": _guidance(scale) for scale in (1.0, 2.0, 3.0, 4.0, 5.0)}, "i2v,ti2v",
                           ("i2v/first_frame", "i2v/later_frames", "i2v/motion", "i2v/steadiness", "ti2v/*")),
}
_SHORT_STAGE = {"steps": 1, "decay_steps": 0}  # of every stage
_SHORT = ("--loss_rows=2", "--prompts=2", "--edits=2", "--clips=1", "--steps=1", "--batch=2", "--show=0")  # of launch.evaluate
_FULL = ("--loss_rows=32", "--prompts=200", "--edits=60", "--clips=20", "--steps=12", "--show=0")


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="launch.experiment", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--name", required=True, help=f"one of {', '.join(EXPERIMENTS)}")
    parser.add_argument("--output", required=True, type=Path, help="folder of trainings and results")
    parser.add_argument("--seeds", default="0,1,2", help="comma-separated (default 0,1,2)")
    parser.add_argument("--short", action="store_true", help="a few steps and samples of everything")
    flags = parser.parse_args(argv)
    if flags.name not in EXPERIMENTS:
        raise UserError(f"--name: unknown experiment {flags.name!r}{nearest(flags.name, EXPERIMENTS)}; known: {', '.join(EXPERIMENTS)}")
    seeds = read_seeds(flags.seeds)
    experiment = EXPERIMENTS[flags.name]
    cli.make_output(flags.output)
    values: dict[str, dict[int, dict[str, float]]] = {arm: {} for arm in experiment.arms}
    for seed in seeds:  # a seed of all arms before the next, so that a run that is cut off compares as many of each
        for name, arm in experiment.arms.items():
            folder = flags.output / arm.training / (f"{seed}_short" if flags.short else str(seed))
            train(arm.training, folder / "run", seed, flags.short)
            scores = evaluate(arm, experiment.tasks, folder, flags.name, name, _SHORT if flags.short else _FULL)
            values[name][seed] = {**gradients(folder / "run"), **flat(scores), **by_kind(scores)}
            result = summarise(flags.name, values)
            write_text(flags.output / f"{flags.name}.json", json.dumps(result, indent=1) + "\n")
            write_text(flags.output / f"{flags.name}.md", table(result, experiment.reads))
    print((flags.output / f"{flags.name}.md").read_text(), flush=True)
    if len(seeds) < SEEDS_AT_LEAST:
        print(f"{len(seeds)} seeds: fewer than {SEEDS_AT_LEAST} say little", flush=True)


def read_seeds(text: str) -> list[int]:
    """Raises UserError for anything but different whole numbers from 0 on."""
    parts = text.split(",")
    if not all(part.isdigit() for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--seeds {text!r} must be different whole numbers, as 0,1,2")
    return [int(part) for part in parts]


# --- running ---


def command(module: str, *flags: object) -> None:
    """Run a command of launch/ on one CPU device or all accelerators. Raises UserError where it fails."""
    print(f"== {module} {' '.join(map(str, flags))}", flush=True)
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([sys.executable, "-m", module, *map(str, flags)], cwd=ROOT, env=environment, check=False)
    if done.returncode:
        raise UserError(f"{module} ended with {done.returncode}, see its last lines above; the same command goes on from there")


def train(training: str, workdir: Path, seed: int, short: bool) -> None:
    if (workdir / "model" / "model.json").exists():
        return
    stages = load_config(str(ROOT / TRAININGS[training][1]), {})["stages"] if short else ()
    shortened = [f"--config.stages.{stage}.{key}={value}" for stage in stages for key, value in _SHORT_STAGE.items()]
    command("launch.train", *TRAININGS[training], "--workdir", workdir.absolute(), f"--config.seed={seed}", "--config.log.every=1",
            "--config.log.preview_every=0", "--quiet", *shortened)


def evaluate(arm: Arm, tasks: str, folder: Path, experiment: str, name: str, extra: Sequence[str]) -> dict[str, Any]:
    """The scores of an arm's checkpoint, measured once; arms that ask for nothing of their own share theirs."""
    own = f"{experiment}_{name}".replace(" ", "_") if arm.evaluation else "scores"
    output = folder / own
    command("launch.evaluate", "--checkpoint", (folder / "run").absolute(), *TRAININGS[arm.training], "--output", output.absolute(),
            "--tasks", tasks, *extra, *arm.evaluation)
    return read_json(output / "scores.json")["checkpoints"]["trained"]


# --- what came out ---


def flat(scores: Mapping[str, Any]) -> dict[str, float]:
    """name -> value of what launch.evaluate has measured: "loss", "loss/<task>", "<task>/<attribute>"."""
    found = {f"{task}/{name}": a["mean"] for task, result in scores["tasks"].items() for name, a in result["attributes"].items()}
    if "loss" in scores:
        found |= {"loss": scores["loss"]["loss"]} | {f"loss/{task}": entry["loss"] for task, entry in scores["loss"]["tasks"].items()}
    return found


def by_kind(scores: Mapping[str, Any]) -> dict[str, float]:
    """"<task>/followed <kind of edit>" -> how many of that kind were followed, of the tasks that edit."""
    found: dict[str, list[float]] = {}
    for task, result in scores["tasks"].items():
        for values in result["samples"]:
            if "edit" in values:
                found.setdefault(f"{task}/followed {values['edit']}", []).append(values["followed"])
    return {name: math.fsum(values) / len(values) for name, values in sorted(found.items())}


def gradients(workdir: Path) -> dict[str, float]:
    """Roughness of the gradient norms by stage, see vino_jax/evaluation/statistics.py."""
    records = read_records(workdir / "metrics.jsonl")
    stages = dict.fromkeys(record["stage"] for record in records)
    return {f"gradient_norm/{stage}": roughness([r["gradient_norm"] for r in records if r["stage"] == stage]) for stage in stages}


def summarise(name: str, values: Mapping[str, Mapping[int, Mapping[str, float]]]) -> dict[str, Any]:
    """{"experiment", "values": {arm: {seed: {name: value}}}, "arms": {arm: {name: {"mean", "interval", "against": [difference, interval]}}}}:
    intervals are half widths at 95 %; differences are those to the first arm, seed by seed; null where one seed alone tells none."""
    base = next(iter(values))

    def by_seed(arm: str, measure: str) -> dict[int, float]:
        return {seed: found[measure] for seed, found in values[arm].items() if math.isfinite(found.get(measure, math.nan))}

    arms: dict[str, dict[str, Any]] = {}
    for arm, seeds in values.items():
        arms[arm] = {}
        for measure in dict.fromkeys(key for found in seeds.values() for key in found):
            ours, theirs = by_seed(arm, measure), by_seed(base, measure)
            if ours:
                mean, width = interval(list(ours.values()))
                apart = difference(ours, theirs) if arm != base and ours.keys() & theirs.keys() else None
                arms[arm][measure] = {"mean": mean, "interval": _told(width), "against": apart and [_told(x) for x in apart]}
    return {"experiment": name, "values": values, "arms": arms}


def _told(value: float) -> float | None:
    return value if math.isfinite(value) else None


def table(result: Mapping[str, Any], reads: Sequence[str]) -> str:
    """Markdown: a row a value, a column an arm, and behind those the differences to the first; * where its interval leaves 0 out."""
    base, *others = result["arms"]
    names = [name for name in result["arms"][base] if any(fnmatch.fnmatchcase(name, pattern) for pattern in reads)]
    seeds = ", ".join(str(seed) for seed in result["values"][base])
    heads = ["", base, *(f"{arm}{what}" for arm in others for what in ("", f" − {base}"))]
    lines = [f"Seeds {seeds}; mean ± half of the 95 % interval over seeds; * where a difference's interval leaves out 0.", "",
             "| " + " | ".join(heads) + " |", "|" + " --- |" * len(heads)]
    for name in names:
        cells = [name, _cell(result["arms"][base][name])]
        for arm in others:
            entry = result["arms"][arm].get(name)
            cells += [_cell(entry), _apart(entry)] if entry else ["-", "-"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(entry: Mapping[str, Any]) -> str:
    return f"{entry['mean']:.3f}" + (f" ± {entry['interval']:.3f}" if entry["interval"] is not None else "")


def _apart(entry: Mapping[str, Any]) -> str:
    if entry["against"] is None:
        return "-"
    mean, width = entry["against"]
    return f"{mean:+.3f}" + (f" ± {width:.3f}{'*' * (abs(mean) > width)}" if width is not None else "")


if __name__ == "__main__":
    cli.run(main)
