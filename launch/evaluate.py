"""Measure checkpoints on samples that training never draws: the loss by flow time and task, and what they make of `shapes`.

    python -m launch.evaluate --checkpoint DIR --config configs/shapes.py --output DIR [--against NAME=DIR ...] [--measures loss,shapes]

DIR is a model checkpoint or a finished run; RUN@raw and RUN@average are the weights at the newest checkpoint of a run, finished or not.
"loss" is the flow-matching loss in ten bins of the flow time, at fixed times and noise, on the config's held-out samples; "shapes"
generates what each task poses, and a program judges it. Writes OUTPUT/scores.json; of "shapes" outputs/<checkpoint>/<task>/<number>.png|.mp4
and for the first and the worst few samples of every task their references/, ideal/ targets and samples.json,
from which launch.report draws. What scores.json has of a (checkpoint, task) is kept: the same command goes on after a kill. The
checkpoint of --checkpoint is called "trained"; parts that a checkpoint lacks are made fresh from the config's seed, as a training run
would start with. The same checkpoint gives the same numbers, on any mesh to rounding.
"""
import argparse
import dataclasses
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from data_pipelines.packing import check_options
from data_pipelines.prompts import Prompter
from launch import cli
from launch.config import parse
from launch.data import check_data, check_held_out
from launch.generator import model_directory
from launch.held_out import HeldOutLoss
from launch.shapes_scores import evaluate, options, poses, write_poses, write_worst
from vino_jax import processes
from vino_jax.batch import TASKS
from vino_jax.checkpoint import model as checkpoint
from vino_jax.checkpoint.atomic import write_text
from vino_jax.errors import UserError
from vino_jax.evaluation.held_out import summary
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params, by_path
from vino_jax.sampling.pipeline import Sampler
from vino_jax.settings import SamplingConfig, VinoConfig, build, read_json
from vino_jax.sharding.mesh import make_mesh, parse_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import RunConfig, run_config
from vino_jax.train.initial import initial_params, param_structs, resolve_model
from vino_jax.train.loop import make_encoder
from vino_jax.train.weights import run_weights
from vino_jax.train.workdir import is_run, steps_done

MAIN = "trained"
MEASURES = ("loss", "shapes")
WEIGHTS = ("raw", "average")


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="launch.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", required=True, help="model checkpoint, workdir of a finished run, or WORKDIR@raw, WORKDIR@average of any run")
    p.add_argument("--output", required=True, type=Path, help="folder of scores and samples; one that has some is gone on with")
    p.add_argument("--against", action="append", default=[], metavar="NAME=DIR", help="a further checkpoint to score; may be repeated")
    p.add_argument("--measures", default="", help=f"of {','.join(MEASURES)} (default: loss, and shapes where the config trains on it)")
    p.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: all eight)")
    p.add_argument("--loss_rows", type=int, default=16, help="samples of each task that the loss is measured on (default 16)")
    p.add_argument("--prompts", type=int, default=200, help="samples of t2i (default 200)")
    p.add_argument("--edits", type=int, default=40, help="samples of each other picture task (default 40)")
    p.add_argument("--clips", type=int, default=20, help="samples of each clip task (default 20)")
    p.add_argument("--steps", type=int, help="of denoising (default: the config's sampling.steps)")
    p.add_argument("--guidance", type=float, help="by the text (default: the config's sampling.guidance_*)")
    p.add_argument("--seed", type=int, default=0, help="of samples and noise (default 0)")
    p.add_argument("--mesh", help="sizes of its axes, as data=2,seq=4 (default: the config's; in one process on a CPU one device)")
    p.add_argument("--batch", type=int, default=20, help="samples in one pass (default 20)")
    p.add_argument("--show", type=int, default=4, help="first and worst samples of each task whose references and ideal are kept (default 4)")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    flags, values = parse(parser(), argv)
    cli.join_processes()
    config = run_config(values)
    check_data(config)
    candidates = read_candidates(flags, config)
    tasks = cli.names("--tasks", flags.tasks, TASKS)
    sampling = build(SamplingConfig, config.sampling, "sampling.")
    measures = cli.names("--measures", flags.measures or ",".join(MEASURES if config.data.source == "shapes" else MEASURES[:1]), MEASURES)
    check_flags(flags, sampling, config, measures)
    scores = Scores(flags.output, settings(flags, config, sampling))
    for name, candidate in candidates.items():
        scores.begin(name, candidate.identity())
    cli.make_output(flags.output)
    waiting = {(name, measure): [task for task in tasks if not scores.has(name, measure, task)] for name in candidates for measure in measures}
    for (name, measure), left in waiting.items():
        for task in (t for t in tasks if t not in left):
            say(f"{name} {task}: kept, {scores.line(name, measure, task)}")
    posed = functools.cache(lambda task: poses(task, flags, sampling))
    losses = functools.cache(lambda model, task: model.held_out.of(model.prompter, [task], list(config.buckets), flags.loss_rows))
    if "shapes" in measures and processes.is_first():
        write_poses(flags.output, {task: posed(task) for task in tasks if any(task in waiting[name, "shapes"] for name in candidates)}, flags.show)
    models = Models(config, evaluation_mesh(flags.mesh, config))
    for name, candidate in candidates.items():
        left = [(measure, task) for measure in measures for task in waiting[name, measure]]
        if not left:
            continue
        model, facts = models.load(candidate)
        scores.describe(name, facts)
        for measure, task in left:
            if measure == "loss":
                result = losses(model, task)(model.sampler.params)["rows"]
            else:
                folder = flags.output / "outputs" / name / task
                result = evaluate(model.sampler, model.prompter, task, posed(task), flags, sampling, folder)
                if name == MAIN and processes.is_first():
                    write_worst(flags.output, task, posed(task), result, flags.show)
            scores.add(name, measure, task, result)
            say(f"{name} {task}: {scores.line(name, measure, task)}")
    say(f"scores: {flags.output / 'scores.json'}")


def say(text: str) -> None:
    if processes.is_first():
        print(text, flush=True)


@dataclass(frozen=True)
class Candidate:
    """A checkpoint to measure: `weights` of the run at `directory` as it stands after `done` (steps by stage), or, where that is "", the
    model checkpoint there."""

    directory: Path
    weights: str = ""
    done: dict[str, int] | None = None

    def check(self, model: Mapping[str, Any]) -> None:
        """Raises UserError where there is no such checkpoint, or the config's `model` table contradicts it."""
        if self.weights:
            run_weights(self.directory, average=False, done=self.done)
        else:
            resolve_model(self.directory, model)

    def identity(self) -> dict[str, Any]:
        """What scores of it belong to."""
        if self.weights:
            return {"checkpoint": f"{self.directory}@{self.weights}", "written": self.done}
        return {"checkpoint": str(self.directory), "written": (self.directory / "model.json").stat().st_mtime_ns}


def named_candidate(text: str) -> Candidate:
    """Of a run that goes on it is its newest checkpoint now. Raises UserError for an address that is no path, and for weights of no run."""
    path, at, weights = text.rpartition("@")
    if at and weights in WEIGHTS:
        directory = cli.local_path(path)
        if not is_run(directory):
            raise UserError(f"{directory} is no training run, of which @{weights} could be read")
        stages = read_json(directory / "config.json")["stages"]
        return Candidate(directory, weights, processes.of_first(lambda: steps_done(directory, stages)))
    return Candidate(model_directory(cli.local_path(text)))


def read_candidates(flags: argparse.Namespace, config: RunConfig) -> dict[str, Candidate]:
    """By name. Raises UserError for a wrong or repeated name, and see Candidate.check."""
    found = {MAIN: flags.checkpoint}
    for entry in flags.against:
        name, equals, directory = entry.partition("=")
        if not equals or not name.replace("_", "").isalnum() or name in found:
            raise UserError(f"--against {entry!r} must be NAME=DIR, each name once, of letters, digits and _ ('{MAIN}' is --checkpoint's)")
        found[name] = directory
    candidates = {name: named_candidate(text) for name, text in found.items()}
    for candidate in candidates.values():
        candidate.check(config.model)
    return candidates


def check_flags(flags: argparse.Namespace, sampling: SamplingConfig, config: RunConfig, measures: Sequence[str]) -> None:
    for name in ("prompts", "edits", "clips", "batch", "steps", "loss_rows"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    for picture in (True, False):
        check_options(options(flags, sampling, picture))
    parse_mesh(flags.mesh or "")
    if "loss" in measures:
        check_held_out(config)


def settings(flags: argparse.Namespace, config: RunConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """What scores depend on beside checkpoint and task; scores of other settings are not mixed. What the held-out files hold is not looked
    at."""
    given = {name: getattr(flags, name) for name in ("loss_rows", "prompts", "edits", "clips", "guidance", "seed")}
    data = {name: getattr(config.data, name) for name in ("source", "held_out", "root", "clips", "processor", "shift_image", "shift_video")}
    tables = {"data": data, "buckets": {name: dataclasses.asdict(bucket) for name, bucket in config.buckets.items()}, "model": config.model,
              "runtime": {name: getattr(config.runtime, name) for name in ("dtype", "quantize")}}
    of_config = {f"config.{path.replace('/', '.')}": value for path, value in by_path(json.loads(json.dumps(tables))).items()}
    return {**given, "steps": flags.steps or sampling.steps, "sampling": dataclasses.asdict(sampling), "fresh_parts_seed": config.seed, **of_config}


def evaluation_mesh(given: str | None, config: RunConfig) -> Mesh:
    if given:
        return make_mesh(parse_mesh(given))
    alone_on_cpu = jax.default_backend() == "cpu" and jax.process_count() == 1
    return make_mesh({}, jax.devices()[:1]) if alone_on_cpu else make_mesh(config.mesh.sizes)


@dataclass(eq=False)
class Model:
    """An architecture with its programs, and in `sampler.params` the weights of one checkpoint."""

    sampler: Sampler
    held_out: HeldOutLoss
    prompter: Prompter


class Models:
    """Models of checkpoints, one at a time on the devices; those of one architecture share their programs, so that nothing is compiled
    twice."""

    def __init__(self, config: RunConfig, mesh: Mesh):
        self._config, self._mesh, self._rules = config, mesh, preset(config.mesh.preset)
        on_cpu = jax.default_backend() == "cpu"
        self._runtime = dataclasses.replace(config.runtime, dtype="float32") if on_cpu else config.runtime
        self._programs: dict[tuple[VinoConfig, Path], Model] = {}

    def load(self, candidate: Candidate) -> tuple[Model, dict[str, Any]]:
        """The model with the candidate's weights, and what the report says of them."""
        config, directory, mesh, rules = self._config, candidate.directory, self._mesh, self._rules
        weights = (run_weights(directory, average=candidate.weights == "average", done=candidate.done) if candidate.weights
                   else checkpoint.weights(directory))
        architecture = weights.info.config if candidate.weights else resolve_model(directory, config.model)
        processor = Path(config.data.processor) if config.data.processor else weights.processor
        if (architecture, processor) not in self._programs:
            vino, prompter = Vino(architecture, self._runtime), Prompter(processor)
            held_out = HeldOutLoss(config, vino, mesh, rules, make_encoder(vino, mesh, rules))
            self._programs[architecture, processor] = Model(Sampler(vino, None, mesh=mesh, rules=rules), held_out, prompter)
        model = self._programs[architecture, processor]
        model.sampler.params = None  # the former one's make room
        vino = model.sampler.vino
        if candidate.weights:
            model.sampler.params = placed(weights, param_structs(vino, [], mesh, rules))
        else:
            model.sampler.params = initial_params(vino, directory, [], mesh, rules, config.seed, config.init.require)
        counts = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in model.sampler.params.items()}
        return model, {"parameters": counts, "fresh": [part for part in counts if part not in weights.info.parts]}


def placed(weights: checkpoint.Weights, structs: Params) -> Params:
    """The weights as `structs` says, a leaf at a time; on several hosts each reads them."""
    params = {}
    for part, tree in structs.items():
        leaves = by_path(tree)
        params[part] = checkpoint.nested({path: _placed(array, leaves[path]) for path, array in weights.arrays(part)})
    return params


def _placed(array: np.ndarray, struct: jax.ShapeDtypeStruct) -> jax.Array:
    array = array.astype(struct.dtype)
    return jax.make_array_from_callback(struct.shape, struct.sharding, lambda index: array[index])


class Scores:
    """scores.json: {"settings", "checkpoints": {name: {"checkpoint", "written", "parameters", "fresh", "loss": see summary of
    vino_jax/evaluation/held_out.py, "tasks": {task: result of "shapes"}}}}.

    What was measured of a checkpoint that has since been written anew is dropped. The same on all processes; the first writes. Raises
    UserError for a file of other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self._path = output / "scores.json"
        self._data: dict[str, Any] = {"settings": settings, "checkpoints": {}}
        kept = processes.of_first(lambda: read_json(self._path) if self._path.exists() else None)
        if kept:
            for name in settings | kept["settings"]:
                before, value = kept["settings"].get(name), settings.get(name)
                if before != value:
                    raise UserError(f"{self._path} was made with {name} = {before}, not {value}; choose another --output")
            self._data = kept

    def begin(self, name: str, identity: dict[str, Any]) -> None:
        kept = self._data["checkpoints"].get(name, {})
        if any(kept.get(key) != value for key, value in identity.items()):
            self._data["checkpoints"][name] = {**identity, "tasks": {}}

    def describe(self, name: str, facts: dict[str, Any]) -> None:
        self._data["checkpoints"][name].update(facts)

    def _measured(self, name: str, measure: str) -> dict[str, Any]:
        """Task -> what was measured."""
        entry = self._data["checkpoints"][name]
        return entry["tasks"] if measure == "shapes" else entry.get("loss", {}).get("tasks", {})

    def has(self, name: str, measure: str, task: str) -> bool:
        return task in self._measured(name, measure)

    def add(self, name: str, measure: str, task: str, result: Any) -> None:
        """result: of "loss" the rows of the task, of "shapes" its scores."""
        entry = self._data["checkpoints"][name]
        if measure == "shapes":
            entry["tasks"][task] = result
        else:
            entry["loss"] = summary([*entry.get("loss", {}).get("rows", []), *result])
        if processes.is_first():
            write_text(self._path, json.dumps(self._data, indent=1) + "\n")

    def line(self, name: str, measure: str, task: str) -> str:
        """One line about a result."""
        result = self._measured(name, measure)[task]
        if measure == "loss":
            return f"loss {result['loss']:.4f} on {result['count']} samples; " + ", ".join(f"{t} {x:.3f}" for t, x in result["by_bin"].items())
        told = [f"{what} {a['mean']:.3f}" + (f" (chance {a['chance']:.3f})" if a["chance"] is not None else "")
                for what, a in result["attributes"].items()]
        return f"{result['count']} samples: {', '.join(told)}"


if __name__ == "__main__":
    cli.run(main)
