"""Score checkpoints on held-out `shapes`: generate what each task poses, and judge the outputs by program.

    python -m launch.evaluate --checkpoint DIR --config configs/shapes.py --output DIR [--against NAME=DIR ...]
                              [--prompts 200 --edits 40 --clips 20]

Writes OUTPUT/scores.json, outputs/<checkpoint>/<task>/<number>.png|.mp4, and for the first few samples of every task their
references/, ideal/ targets and samples.json, from which vino_jax/evaluation/report.py draws. Finished (checkpoint, task) pairs in
scores.json are kept. The checkpoint of --checkpoint is called "trained"; parts that a checkpoint lacks are made fresh from the
config's seed, as a training run would start with. The same seed gives the same samples and noise.
"""
import argparse
import dataclasses
import functools
import json
import math
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from data_pipelines import shapes
from data_pipelines.packing import SamplingOptions, check_options, pack_example
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample
from launch import cli
from launch.config import parse
from launch.generator import PICTURE_TASKS, model_directory
from vino_jax.batch import TASKS, Batch, PackedTask
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.evaluation import shapes as scorer
from vino_jax.evaluation.metrics import steadiness
from vino_jax.models.vino import Vino
from vino_jax.sampling.pipeline import Sampler
from vino_jax.sampling.video import write_output
from vino_jax.settings import SamplingConfig, VinoConfig, build, nearest, read_json
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import RunConfig, run_config
from vino_jax.train.initial import initial_params, resolve_model

MAIN = "trained"
_PADDED = {"tokens": 1, "prompt_mask": 1, "mrope": 2, "visual_index": 1, "patches": 1, "patch_coords": 1, "patch_segment": 1,
           "role": 1, "source": 1, "position": 1}  # fields of a Batch by the dim that is padded
_PROMPT = ("tokens", "prompt_mask", "mrope", "visual_index")
_ROUND_PROMPT = 32


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="launch.evaluate", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--checkpoint", required=True, type=Path, help="model checkpoint, or the workdir of a finished training run")
    p.add_argument("--output", required=True, type=Path, help="folder of scores and samples; one that has some is gone on with")
    p.add_argument("--against", action="append", default=[], metavar="NAME=DIR", help="a further checkpoint to score; may be repeated")
    p.add_argument("--tasks", default=",".join(TASKS), help="comma-separated (default: all eight)")
    p.add_argument("--prompts", type=int, default=200, help="samples of t2i (default 200)")
    p.add_argument("--edits", type=int, default=40, help="samples of each other picture task (default 40)")
    p.add_argument("--clips", type=int, default=20, help="samples of each clip task (default 20)")
    p.add_argument("--steps", type=int, help="of denoising (default: the config's sampling.steps)")
    p.add_argument("--guidance", type=float, help="by the text (default: the config's sampling.guidance_*)")
    p.add_argument("--seed", type=int, default=0, help="of samples and noise (default 0)")
    p.add_argument("--batch", type=int, default=20, help="samples in one pass (default 20)")
    p.add_argument("--show", type=int, default=4, help="samples of each task whose references and ideal target are kept (default 4)")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    flags, values = parse(parser(), argv)
    config = run_config(values)
    directories = read_candidates(flags)
    tasks = read_task_names(flags.tasks)
    sampling = build(SamplingConfig, config.sampling, "sampling.")
    check_flags(flags, sampling)
    scores = Scores(flags.output, settings(flags, config, sampling))
    for name, directory in directories.items():
        scores.begin(name, directory)
    cli.make_output(flags.output)
    posed = functools.cache(lambda task: poses(task, flags, sampling))
    waiting = {name: [task for task in tasks if not scores.has(name, task)] for name in directories}
    for name in directories:
        for task in (t for t in tasks if t not in waiting[name]):
            print(f"{name} {task}: kept, {scores.line(name, task)}", flush=True)
    write_poses(flags.output, {task: posed(task) for task in sorted({t for names in waiting.values() for t in names})}, flags.show)
    models = Models(config)
    for name, directory in directories.items():
        if waiting[name]:
            sampler, prompter, facts = models.load(directory)
            scores.describe(name, facts)
            for task in waiting[name]:
                folder = flags.output / "outputs" / name / task
                scores.add(name, task, evaluate(sampler, prompter, task, posed(task), flags, sampling, folder))
                print(f"{name} {task}: {scores.line(name, task)}", flush=True)
    print(f"scores: {flags.output / 'scores.json'}", flush=True)


def read_candidates(flags: argparse.Namespace) -> dict[str, Path]:
    """Name -> directory of a model checkpoint. Raises UserError for a wrong or repeated name and where there is no checkpoint."""
    found = {MAIN: flags.checkpoint}
    for entry in flags.against:
        name, equals, directory = entry.partition("=")
        if not equals or not name.replace("_", "").isalnum() or name in found:
            raise UserError(f"--against {entry!r} must be NAME=DIR, each name once, of letters, digits and _ ('{MAIN}' is --checkpoint's)")
        found[name] = cli.local_path(directory)
    found = {name: model_directory(path) for name, path in found.items()}
    for path in found.values():
        checkpoint.read_info(path)
    return found


def read_task_names(text: str) -> list[str]:
    names = [name for name in text.split(",") if name]
    for name in names:
        if name not in TASKS:
            raise UserError(f"--tasks: unknown task {name!r}{nearest(name, TASKS)}")
    return names


def check_flags(flags: argparse.Namespace, sampling: SamplingConfig) -> None:
    for name in ("prompts", "edits", "clips", "batch", "steps"):
        value = getattr(flags, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} {value} must be at least 1")
    for picture in (True, False):
        check_options(options(flags, sampling, picture))


def settings(flags: argparse.Namespace, config: RunConfig, sampling: SamplingConfig) -> dict[str, Any]:
    """What scores depend on beside checkpoint and task; scores of other settings are not mixed."""
    given = {name: getattr(flags, name) for name in ("prompts", "edits", "clips", "guidance", "seed")}
    return {**given, "steps": flags.steps or sampling.steps, "sampling": dataclasses.asdict(sampling), "fresh_parts_seed": config.seed}


def options(flags: argparse.Namespace, sampling: SamplingConfig, picture: bool, number: int = 0) -> SamplingOptions:
    """Of sample `number`: each has its own noise. Little rounding: `level` brings a task's samples to one size."""
    height, width = sampling.size(picture)
    guidance = flags.guidance if flags.guidance is not None else sampling.guidance(picture)
    return SamplingOptions(height=height, width=width, num_frames=1 if picture else sampling.num_frames, seed=flags.seed * 100_003 + number,
                           guidance=guidance, shift=sampling.shift(picture), image_guidance=sampling.image_guidance, negative_prompt="",
                           round_to=8)


# --- what is asked ---


def poses(task: str, flags: argparse.Namespace, sampling: SamplingConfig) -> list[Sample]:
    """The held-out samples of a task."""
    picture = task in PICTURE_TASKS
    count = flags.prompts if task == "t2i" else flags.edits if picture else flags.clips
    size = (1 if picture else sampling.num_frames, *sampling.size(picture))
    return [shapes.sample(shapes.held_out(flags.seed), i, task, *size) for i in range(count)]


def prompt(sample: Sample) -> str:
    """The instruction of an edit, else the long caption."""
    return sample.texts.get("instruction") or sample.texts["long"]


def sources(sample: Sample) -> dict[str, np.ndarray]:
    """File name (without ending) -> pixels (F, H, W, 3) of each reference, in the order of the context."""
    found = {f"image{i + 1}": image[None] for i, image in enumerate(sample.images)}
    return found if sample.video is None else found | {"video": sample.video}


def write_poses(output: Path, posed: dict[str, list[Sample]], show: int) -> None:
    """References and ideal targets of the first samples, and samples.json: task -> [{index, prompt, references, ideal}]."""
    path = output / "samples.json"
    listed = read_json(path) if path.exists() else {}
    for task, samples in posed.items():
        listed[task] = []
        for i, sample in enumerate(samples[:show]):
            files = [write_output(output / "references" / task, f"{i:03d}_{name}", pixels, {}) for name, pixels in sources(sample).items()]
            ideal = write_output(output / "ideal" / task, f"{i:03d}", sample.target, {"prompt": prompt(sample)})
            listed[task].append({"index": f"{i:03d}", "prompt": prompt(sample), "references": [str(f.relative_to(output)) for f in files],
                                 "ideal": str(ideal.relative_to(output))})
    if posed:
        _write_json(path, listed)


# --- generating and scoring ---


class Models:
    """Samplers of checkpoints; those of one architecture share one, so that nothing is compiled twice."""

    def __init__(self, config: RunConfig):
        self._config = config
        devices = jax.devices()[:1] if jax.default_backend() == "cpu" else jax.devices()
        self._mesh, self._rules = make_mesh({"fsdp": -1}, devices), preset("fsdp")
        self._samplers: dict[VinoConfig, Sampler] = {}

    def load(self, directory: Path) -> tuple[Sampler, Prompter, dict[str, Any]]:
        """Sampler, prompter, and what the report says of the checkpoint."""
        config = self._config
        architecture = resolve_model(directory, config.model)
        if architecture not in self._samplers:
            on_cpu = jax.default_backend() == "cpu"
            runtime = dataclasses.replace(config.runtime, dtype="float32") if on_cpu else config.runtime
            self._samplers[architecture] = Sampler(Vino(architecture, runtime), None, mesh=self._mesh, rules=self._rules)
        sampler = self._samplers[architecture]
        sampler.params = initial_params(sampler.vino, directory, [], self._mesh, self._rules, config.seed, config.init.require)
        held = checkpoint.read_info(directory).parts
        counts = {part: sum(x.size for x in jax.tree.leaves(tree)) for part, tree in sampler.params.items()}
        processor = Path(config.data.processor) if config.data.processor else checkpoint.processor_folder(directory)
        return sampler, Prompter(processor), {"parameters": counts, "fresh": [part for part in counts if part not in held]}


def level(tasks: Sequence[PackedTask]) -> list[PackedTask]:
    """Pad the branches of all tasks with equally many references to one size, so that they run as one program. Prompt tokens are
    rounded up, so that other tasks with such references share it."""
    def sizes(number: int) -> dict[str, int]:
        rows = [branch for task in tasks if len(task.references) == number for branch in task.branches]
        found = {name: max(getattr(row, name).shape[axis] for row in rows) for name, axis in _PADDED.items()}
        return {name: -(-size // _ROUND_PROMPT) * _ROUND_PROMPT if name in _PROMPT else size for name, size in found.items()}

    common = {number: sizes(number) for number in {len(task.references) for task in tasks}}

    def padded(branch: Batch, wanted: dict[str, int]) -> Batch:
        changes = {}
        for name, axis in _PADDED.items():
            array = getattr(branch, name)
            width = [(0, 0)] * array.ndim
            width[axis] = (0, wanted[name] - array.shape[axis])
            changes[name] = np.pad(array, width, constant_values=-1 if name == "visual_index" else 0)
        return branch.replace(**changes)

    return [dataclasses.replace(task, branches=tuple(padded(b, common[len(task.references)]) for b in task.branches)) for task in tasks]


def fill(tasks: Sequence[PackedTask], batch: int) -> list[PackedTask]:
    """The tasks, and behind them repeated ones, so that those with equally many references fill whole passes: encoding and decoding
    then have one program for pictures and one for clips."""
    out = list(tasks)
    for number in sorted({len(task.references) for task in tasks}):
        same = [task for task in tasks if len(task.references) == number]
        out += same[-1:] * (-len(same) % batch)
    return out


def evaluate(sampler: Sampler, prompter: Prompter, task: str, samples: Sequence[Sample], flags: argparse.Namespace,
             sampling: SamplingConfig, folder: Path) -> dict[str, Any]:
    """Generate, write and score the samples of one task: {"count", "seconds", "attributes": {name: {"mean", "count", "chance"}}}."""
    start = time.perf_counter()
    packed = [pack_example(sample, prompt(sample), prompter, options(flags, sampling, task in PICTURE_TASKS, i), sample.target.shape[1:3])
              for i, sample in enumerate(samples)]
    results = sampler.generate_many(fill(level(packed), flags.batch), steps=flags.steps or sampling.steps, batch=flags.batch)[:len(packed)]
    gathered: dict[str, list[tuple[float, float | None]]] = {}
    for i, (sample, result) in enumerate(zip(samples, results, strict=True)):
        write_output(folder, f"{i:03d}", result.pixels, {"prompt": prompt(sample), "seed": str(packed[i].seed)})
        for name, value, chance in judge(result.pixels, sample):
            gathered.setdefault(name, []).append((value, chance))
    attributes = {}
    for name, rows in gathered.items():
        values, chances = zip(*rows)
        attributes[name] = {"mean": math.fsum(values) / len(values), "count": len(values),
                            "chance": None if None in chances else math.fsum(chances) / len(chances)}
    return {"count": len(samples), "seconds": round(time.perf_counter() - start, 2), "attributes": attributes}


def judge(pixels: np.ndarray, sample: Sample) -> Iterator[tuple[str, float, float | None]]:
    """(attribute, value, chance or None) of one output: right or wrong; preserved in dB; steadiness of clips."""
    source = None
    if "edit" in sample.expected:
        source = sample.video if sample.video is not None else sample.images[-1][None]
    by_chance = scorer.chance(sample.expected)
    for name, value in scorer.score(pixels, sample.expected, source).items():
        yield name, value, by_chance.get(name)
    if len(pixels) > 1:
        yield "steadiness", steadiness(pixels), None


class Scores:
    """scores.json: {"settings", "checkpoints": {name: {"checkpoint", "written", "parameters", "fresh", "tasks": {task: result}}}}.

    What was scored of a checkpoint that has since been written anew is dropped. Raises UserError for a file of other settings.
    """

    def __init__(self, output: Path, settings: dict[str, Any]):
        self._path = output / "scores.json"
        self._data: dict[str, Any] = {"settings": settings, "checkpoints": {}}
        if self._path.exists():
            kept = read_json(self._path)
            for name, value in settings.items():
                if kept["settings"].get(name) != value:
                    before = kept["settings"].get(name)
                    raise UserError(f"{self._path} was made with {name} = {before}, not {value}; choose another --output")
            self._data = kept

    def begin(self, name: str, directory: Path) -> None:
        entry = {"checkpoint": str(directory), "written": (directory / "model.json").stat().st_mtime_ns}
        kept = self._data["checkpoints"].get(name, {})
        if any(kept.get(key) != value for key, value in entry.items()):
            self._data["checkpoints"][name] = {**entry, "tasks": {}}

    def describe(self, name: str, facts: dict[str, Any]) -> None:
        self._data["checkpoints"][name].update(facts)

    def has(self, name: str, task: str) -> bool:
        return task in self._data["checkpoints"][name]["tasks"]

    def add(self, name: str, task: str, result: dict[str, Any]) -> None:
        self._data["checkpoints"][name]["tasks"][task] = result
        _write_json(self._path, self._data)

    def line(self, name: str, task: str) -> str:
        """One line about a result."""
        result = self._data["checkpoints"][name]["tasks"][task]
        told = [f"{what} {a['mean']:.3f}" + (f" (chance {a['chance']:.3f})" if a["chance"] is not None else "")
                for what, a in result["attributes"].items()]
        return f"{result['count']} samples, {result['seconds']:.0f} s: {', '.join(told)}"


def _write_json(path: Path, data: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.write_text(json.dumps(data, indent=1) + "\n")
    os.replace(temporary, path)


if __name__ == "__main__":
    cli.run(main)
