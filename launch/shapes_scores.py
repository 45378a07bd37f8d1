"""Scores of a checkpoint on held-out `shapes`: generate what each task poses, and judge the outputs by program."""
import argparse
import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data_pipelines import shapes
from data_pipelines.packing import SamplingOptions, pack_example
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample
from launch.generator import PICTURE_TASKS
from vino_jax import processes
from vino_jax.batch import Batch, PackedTask
from vino_jax.checkpoint.atomic import write_text
from vino_jax.evaluation import shapes as scorer
from vino_jax.evaluation.metrics import psnr, steadiness
from vino_jax.sampling.pipeline import Sampler
from vino_jax.sampling.video import write_output
from vino_jax.settings import SamplingConfig, read_json

_PADDED = {"tokens": 1, "prompt_mask": 1, "mrope": 2, "visual_index": 1, "patches": 1, "patch_coords": 1, "patch_segment": 1,
           "role": 1, "source": 1, "position": 1}  # fields of a Batch by the dim that is padded
_PROMPT = ("tokens", "prompt_mask", "mrope", "visual_index")
_ROUND_PROMPT = 32
_DECIDED = ("i2v", "tv2v")  # clips of which references and text leave little open


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
    for task, samples in posed.items():
        _list(output, task, False, [_entry(output, task, i, sample) for i, sample in enumerate(samples[:show])])


def write_worst(output: Path, task: str, samples: Sequence[Sample], result: Mapping[str, Any], show: int) -> None:
    """The same of those that came out worst, with "worst": the rates that are wrong. Least first the mean of a sample's rates, then how well
    the rest of an edit is preserved; samples of which every rate is right are none of them."""
    rates = [name for name, attribute in result["attributes"].items() if attribute["chance"] is not None]
    ranked = []
    for i, values in enumerate(result["samples"]):
        found = [values[name] for name in rates if name in values]
        if found and min(found) < 1.0:
            ranked.append((math.fsum(found) / len(found), values.get("preserved", 0.0), i))
    entries = []
    for _, _, i in sorted(ranked)[:show]:
        values = result["samples"][i]
        entries.append({**_entry(output, task, i, samples[i]), "worst": [name for name in rates if values.get(name, 1.0) < 1.0]})
    _list(output, task, True, entries)


def _list(output: Path, task: str, worst: bool, entries: Sequence[Mapping[str, Any]]) -> None:
    """Put the worst samples of a task, or the first ones, into samples.json in the place of the former ones of that kind."""
    path = output / "samples.json"
    listed = read_json(path) if path.exists() else {}
    listed[task] = [entry for entry in listed.get(task, []) if ("worst" in entry) != worst] + list(entries)
    write_text(path, json.dumps(listed, indent=1) + "\n")


def _entry(output: Path, task: str, i: int, sample: Sample) -> dict[str, Any]:
    files = [write_output(output / "references" / task, f"{i:03d}_{name}", pixels, {}) for name, pixels in sources(sample).items()]
    ideal = write_output(output / "ideal" / task, f"{i:03d}", sample.target, {"prompt": prompt(sample)})
    return {"index": f"{i:03d}", "prompt": prompt(sample), "references": [str(f.relative_to(output)) for f in files],
            "ideal": str(ideal.relative_to(output))}


# --- generating and scoring ---


def packed(samples: Sequence[Sample], prompter: Prompter, flags: argparse.Namespace, sampling: SamplingConfig) -> list[PackedTask]:
    """Samples of one task as they are generated, brought to one size; each with noise of its own."""
    return level([pack_example(sample, prompt(sample), prompter, options(flags, sampling, sample.task in PICTURE_TASKS, i),
                               sample.target.shape[1:3]) for i, sample in enumerate(samples)])


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
    """Generate, write and score the samples of one task: {"count", "attributes": {name: {"mean", "count", "chance"}}, "samples": [{name:
    value, and "edit": kind where it asks for an edit}]}."""
    asked = packed(samples, prompter, flags, sampling)
    results = sampler.generate_many(fill(asked, flags.batch), steps=flags.steps or sampling.steps, batch=flags.batch)[:len(asked)]
    gathered: dict[str, list[tuple[float, float | None]]] = {}
    by_sample: list[dict[str, Any]] = []
    for i, (sample, result) in enumerate(zip(samples, results, strict=True)):
        if processes.is_first():
            write_output(folder, f"{i:03d}", result.pixels, {"prompt": prompt(sample), "seed": str(asked[i].seed)})
        judged = list(judge(result.pixels, sample))
        kind = {"edit": sample.expected["edit"]["kind"]} if "edit" in sample.expected else {}
        by_sample.append({name: round(float(value), 4) for name, value, _ in judged} | kind)
        for name, value, chance in judged:
            gathered.setdefault(name, []).append((value, chance))
    attributes = {}
    for name, rows in gathered.items():
        values, chances = zip(*rows)
        attributes[name] = {"mean": math.fsum(values) / len(values), "count": len(values),
                            "chance": None if None in chances else math.fsum(chances) / len(chances)}
    return {"count": len(samples), "attributes": attributes, "samples": by_sample}


def judge(pixels: np.ndarray, sample: Sample) -> Iterator[tuple[str, float, float | None]]:
    """(attribute, value, chance or None) of one output: right or wrong; preserved in dB; steadiness of clips; and where the references decide on
    every pixel of a clip, PSNR in dB of its first frame and of the later ones against the ideal target."""
    source = None
    if "edit" in sample.expected:
        source = sample.video if sample.video is not None else sample.images[-1][None]
    by_chance = scorer.chance(sample.expected)
    for name, value in scorer.score(pixels, sample.expected, source).items():
        yield name, value, by_chance.get(name)
    if len(pixels) > 1:
        yield "steadiness", steadiness(pixels), None
    if sample.task in _DECIDED:
        for name, frames in (("first_frame", slice(1)), ("later_frames", slice(1, None))):
            yield name, min(psnr(pixels[frames], sample.target[frames]), scorer.PSNR_LIMIT), None
