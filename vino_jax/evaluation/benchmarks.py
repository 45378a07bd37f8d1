"""Public benchmarks of generation and editing: what their prompt files ask for, and where their official scorers look for the outputs.

BENCHMARKS is the table of them, an entry each; nothing here asks which benchmark it is. The scorers themselves run elsewhere, with models of
their own; vino_jax/evaluation/aggregation.py has their last step. Seeds: see `seed_of`; OUTPUT/seeds.json records that of each output.
"""
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vino_jax.checkpoint.atomic import write_text
from vino_jax.errors import UserError
from vino_jax.evaluation import score_files
from vino_jax.evaluation.aggregation import GEDIT_LANGUAGES, GEDIT_TYPES, GENEVAL_TAGS, IMGEDIT_TYPES, Scores
from vino_jax.evaluation.prompt_files import Row, json_array, json_lines, json_object, pictures, table
from vino_jax.sampling.video import UNFINISHED, read_frames, read_metadata, write_png

MAX_SAMPLES = 100  # of a prompt, so that seeds of two prompts cannot meet
SEEDS = "seeds.json"
_NAME_BYTES = 240  # of the 255 that file systems take; the rest is for the name of an unfinished file


@dataclass(frozen=True)
class Item:
    """One prompt of a benchmark."""

    number: int  # from 0, in the order of the prompt file
    where: str  # file and line or key, for messages
    task: str  # of vino_jax.batch.TASKS
    caption: str
    images: tuple[str, ...]  # paths of reference pictures, from the root of pictures on
    outputs: tuple[str, ...]  # paths in the output folder, a sample each
    row: Mapping[str, Any]  # as the file has it


@dataclass(frozen=True)
class Output:
    """One picture or clip to generate."""

    item: Item
    path: str  # in the output folder
    seed: int


@dataclass(frozen=True)
class Benchmark:
    """A benchmark's prompt file and the layout of its outputs. `fields`: name -> what each row must hold there: str, [str] for a list of them,
    or the values that are known."""

    prompts: str  # what the official prompt file is called
    count: int  # its rows
    rows: Callable[[Path], list[Row]]
    fields: Mapping[str, Any]
    task: str
    caption: str  # the field that holds it
    output: Callable[[int, Mapping[str, Any], int], Sequence[str]]  # (number of the item, row, number of the sample) -> folders and file
    scores: Callable[[Path, Path | None], Scores]  # (what the official scorer wrote, prompt file)
    samples: Callable[[Mapping[str, Any]], int] = lambda row: 1
    images: Callable[[Mapping[str, Any]], Sequence[str]] = lambda row: ()
    files: Callable[[Path, Sequence[Item], Path], dict[str, str]] = lambda prompts, items, output: {}  # further files, see write_files
    extra: Callable[[Item], Sequence[str]] = lambda item: ()  # paths of those
    embedded: bool = False  # the prompt file holds the pictures; `files` writes them to the output folder, which is their root
    repeats: bool = False  # a prompt may occur twice and then shares its outputs

    @property
    def is_clip(self) -> bool:
        return self.task.endswith("v")


# --- from a prompt file to what is to be generated ---


def read_items(benchmark: Benchmark, path: Path, samples: int | None = None, partial: bool = False) -> list[Item]:
    """The items of a prompt file; samples: of each, in place of the benchmark's number. Raises UserError, naming the line or key, for what is
    wrong; and where rows or samples are fewer than the benchmark's, unless `partial`."""
    rows, found = benchmark.rows(path), {}
    if len(rows) != benchmark.count and not partial:
        raise UserError(f"{path} has {len(rows)} prompts, the benchmark has {benchmark.count} ({benchmark.prompts}): scores of another set are "
                        "not the benchmark's; --partial takes it all the same")
    if samples is not None and not 1 <= samples <= MAX_SAMPLES:
        raise UserError(f"--samples {samples} must be from 1 to {MAX_SAMPLES}")
    for number, (where, row) in enumerate(rows):
        _check_fields(benchmark.fields, row, where)
        wanted = benchmark.samples(row)
        if samples is not None and samples < wanted and not partial:
            raise UserError(f"--samples {samples} is less than the {wanted} that the benchmark takes of a prompt; --partial takes it all the same")
        images, paths = tuple(benchmark.images(row)), [benchmark.output(number, row, i) for i in range(samples or wanted)]
        for parts in (paths[-1], *(image.split("/") for image in images)):
            _check_path(parts, where)
        outputs = tuple("/".join(parts) for parts in paths)
        item = Item(number, where, benchmark.task, row[benchmark.caption], images, outputs, row)
        former = found.get(outputs[0])
        if former and not benchmark.repeats:
            raise UserError(f"{where}: its output {outputs[0]} is that of {former.where} too")
        if former is None or len(outputs) > len(former.outputs):
            found[outputs[0]] = item
    return list(found.values())


def seed_of(base: int, item: Item, sample: int) -> int:
    """The seed of a sample: (base x 1000003 + 100 x item + sample) mod 2^32, another one for every output of a benchmark."""
    return (base * 1_000_003 + item.number * MAX_SAMPLES + sample) % 2**32


def plan(items: Sequence[Item], base: int) -> list[Output]:
    """Every output of the items, with its seed from the base that the user gives."""
    return [Output(item, path, seed_of(base, item, i)) for item in items for i, path in enumerate(item.outputs)]


def _check_fields(fields: Mapping[str, Any], row: Mapping[str, Any], where: str) -> None:
    for name, wanted in fields.items():
        value = row.get(name)
        if value is None:
            raise UserError(f"{where}: it has no {name}")
        if isinstance(wanted, tuple):
            if value not in wanted:
                raise UserError(f"{where}: unknown {name} {value!r}; known: {', '.join(wanted)}")
        elif wanted is str:
            if not isinstance(value, str) or not value.strip():
                raise UserError(f"{where}: {name} is {value!r}; it must be a text")
        elif not isinstance(value, list) or not value or not all(isinstance(entry, str) and entry for entry in value):
            raise UserError(f"{where}: {name} is {value!r}; it must be a list of texts")


def _check_path(parts: Sequence[str], where: str) -> None:
    """Raises UserError for what cannot be names of folders and a file below a folder."""
    for part in parts:
        if part in ("", ".", "..") or "/" in part or any(ord(character) < 32 for character in part):
            raise UserError(f"{where}: {part!r} can be no name of a file")
        if len(part.encode()) > _NAME_BYTES:
            raise UserError(f"{where}: {part[:40]!r}... is too long for the name of a file: {len(part.encode())} bytes, {_NAME_BYTES} are left")


# --- beside the outputs ---


def write_seeds(output: Path, outputs: Sequence[Output]) -> None:
    """OUTPUT/seeds.json: path -> {seed, prompt}. For an output that is there already what it tells of itself: it may be of another run."""
    found = {}
    for wanted in outputs:
        try:
            own = read_metadata(output / wanted.path) if (output / wanted.path).exists() else {}
        except UserError:
            own = {}
        seed = own.get("seed", "")
        found[wanted.path] = {"seed": int(seed) if seed.isdigit() else wanted.seed, "prompt": own.get("prompt", wanted.item.caption)}
    write_text(output / SEEDS, json.dumps(found, indent=1, ensure_ascii=False))


def remove_unfinished(output: Path, outputs: Sequence[Output]) -> None:
    """Remove what a killed run left half-written of these outputs: OpenS2V's scorer would take it for a video."""
    wanted = {str(output / o.path) for o in outputs}
    for folder in {str(Path(path).parent) for path in wanted}:
        for name in os.listdir(folder) if os.path.isdir(folder) else ():
            match = UNFINISHED.fullmatch(name)
            if match and os.path.join(folder, match[1]) in wanted:
                os.unlink(os.path.join(folder, name))


def check(benchmark: Benchmark, items: Sequence[Item], output: Path) -> list[str]:
    """A line for each file that is missing, cannot be read (every frame is decoded), is of another kind or of another prompt."""
    problems = []
    for item in items:
        for path in item.outputs:
            problems += _wrong(output / path, item.caption, benchmark.is_clip)
        problems += [f"{output / path} is missing" for path in benchmark.extra(item) if not (output / path).is_file()]
    return problems


def _wrong(path: Path, caption: str, clip: bool) -> list[str]:
    if not path.is_file():
        return [f"{path} is missing"]
    try:
        frames, prompt = len(read_frames(path)), read_metadata(path).get("prompt", caption)
    except UserError as error:
        return [str(error)]
    if (frames > 1) != clip:
        return [f"{path} has {frames} frames"]
    return [f"{path} was made from another prompt: {prompt!r}"] if prompt != caption else []


# --- files that some benchmarks want beside the outputs ---


def _geneval_folder(item: Item) -> str:
    return item.outputs[0].split("/")[0]


def _geneval_files(prompts: Path, items: Sequence[Item], output: Path) -> dict[str, str]:
    """<number>/metadata.jsonl: the item's line of the prompt file, which the scorer reads what to look for from."""
    for item in items:
        path = output / _geneval_folder(item) / "metadata.jsonl"
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(item.row))
    return {}


def _gedit_folder(row: Mapping[str, Any]) -> tuple[str, str, str]:
    return "fullset", row["task_type"], row["instruction_language"]


def _gedit_files(prompts: Path, items: Sequence[Item], output: Path) -> dict[str, str]:
    """<key>_SRCIMG.png: the picture that is edited, which the scorer shows beside the edit."""
    problems, wanted = {}, {item.number: item for item in items}
    for number, data in enumerate(pictures(prompts, "input_image")):
        path = output / wanted[number].images[0]
        if path.exists():
            continue
        try:
            with Image.open(BytesIO(data or b"")) as image:
                pixels = np.asarray(image.convert("RGB"))
        except Exception as error:  # broken bytes make PIL's readers raise nearly anything
            problems[wanted[number].outputs[0]] = f"{wanted[number].where}: cannot read its input_image: {' '.join(str(error).split())}"
            continue
        write_png(path, pixels, {})
    return problems


# --- the table ---

_GEDIT_FIELDS = {"key": str, "task_type": GEDIT_TYPES, "instruction": str, "instruction_language": GEDIT_LANGUAGES}
_OPENS2V = dict(rows=json_object, fields={"prompt": str, "img_paths": [str]}, task="ti2v", caption="prompt",
                images=lambda row: row["img_paths"], output=lambda number, row, i: ("videos", f"{row['key']}.mp4"))

BENCHMARKS = {
    # djghosh13/geneval: README.md (folders, 4 images a prompt), evaluation/evaluate_images.py (folders of digits, metadata.jsonl, \d+\.png)
    "geneval": Benchmark(
        prompts="prompts/evaluation_metadata.jsonl", count=553, rows=json_lines, fields={"prompt": str, "tag": GENEVAL_TAGS}, task="t2i",
        caption="prompt", output=lambda number, row, i: (f"{number:05d}", "samples", f"{i:04d}.png"), samples=lambda row: 4,
        files=_geneval_files, extra=lambda item: (f"{_geneval_folder(item)}/metadata.jsonl",), scores=score_files.geneval),
    # Vchitect/VBench: vbench/__init__.py (build_full_info_json: {prompt}-{0..4} and the ending of any one file in the folder, so that nothing
    # else may lie there), prompts/README.md (25 of temporal flickering, for its static filter)
    "vbench": Benchmark(
        prompts="vbench/VBench_full_info.json", count=946, rows=json_array, fields={"prompt_en": str, "dimension": [str]}, task="t2v",
        caption="prompt_en", output=lambda number, row, i: ("videos", f"{row['prompt_en']}-{i}.mp4"),
        samples=lambda row: 25 if "temporal_flickering" in row["dimension"] else 5, repeats=True, scores=score_files.vbench),
    # Vchitect/VBench: vbench2_beta_i2v/README.md (5 a pair), vbench2_beta_i2v/utils.py (pictures at data/crop/RATIO/{image_name})
    "vbench_i2v": Benchmark(
        prompts="vbench2_beta_i2v/vbench2_i2v_full_info.json", count=1118, rows=json_array,
        fields={"prompt_en": str, "dimension": [str], "image_name": str}, task="i2v", caption="prompt_en",
        output=lambda number, row, i: ("videos", f"{row['prompt_en']}-{i}.mp4"), samples=lambda row: 5,
        images=lambda row: (row["image_name"],), scores=score_files.vbench_i2v),
    # PKU-YuanGroup/OpenS2V-Nexus: eval/get_nexusscore.py and its siblings (a flat folder of {key}.mp4, any .mp4 is scored), eval/README.md
    "opens2v": Benchmark(prompts="Open-Domain_Eval.json", count=180, scores=score_files.opens2v, **_OPENS2V),
    "opens2v_human": Benchmark(prompts="Human-Domain_Eval.json", count=60, scores=score_files.opens2v_human, **_OPENS2V),
    "opens2v_single": Benchmark(prompts="Single-Domain_Eval.json", count=90, scores=score_files.opens2v, **_OPENS2V),
    # PKU-YuanGroup/ImgEdit: Benchmark/Basic/basic_bench.py ({key}.png, the picture at ROOT/{id}), basic_edit.json
    "imgedit": Benchmark(
        prompts="Benchmark/Basic/basic_edit.json", count=737, rows=json_object, fields={"id": str, "prompt": str, "edit_type": IMGEDIT_TYPES},
        task="ti2i", caption="prompt", output=lambda number, row, i: ("images", f"{row['key']}.png"), images=lambda row: (row["id"],),
        scores=score_files.imgedit),
    # stepfun-ai/Step1X-Edit: GEdit-Bench/generate_image_example.py and test_gedit_score.py (paths, columns). The data set itself is no
    # stored copy: 606 instructions a language stand in evalscope's documentation of it
    "gedit": Benchmark(
        prompts="the data set GEdit-Bench", count=1212, rows=lambda path: table(path, tuple(_GEDIT_FIELDS)), fields=_GEDIT_FIELDS, task="ti2i",
        caption="instruction", output=lambda number, row, i: (*_gedit_folder(row), f"{row['key']}.png"),
        images=lambda row: ("/".join((*_gedit_folder(row), f"{row['key']}_SRCIMG.png")),),
        files=_gedit_files, extra=lambda item: item.images, embedded=True, scores=score_files.gedit),
}

