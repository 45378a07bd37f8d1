"""What the official scorers write, read for vino_jax/evaluation/aggregation.py. All raise UserError, naming the file and the line or key.

Each takes the path of the scores and the benchmark's prompt file, which ImgEdit's alone need.
"""
import math
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from vino_jax.errors import UserError
from vino_jax.evaluation import aggregation
from vino_jax.evaluation.aggregation import OPENS2V, Judged, Scores
from vino_jax.evaluation.prompt_files import json_lines, read_csv, read_object

GENEVAL_IMAGES, IMGEDIT_ITEMS, GEDIT_EDITS = 2212, 737, 606  # of the whole benchmarks; GEdit-Bench's a language


def geneval(path: Path, prompts: Path | None = None) -> Scores:
    """The results.jsonl of evaluation/evaluate_images.py: an image a line, with tag and correct."""
    images = []
    for where, row in json_lines(path):
        if not isinstance(row.get("tag"), str) or not isinstance(row.get("correct"), bool):
            raise UserError(f"{where}: it must have tag, a text, and correct, true or false")
        images.append((row["tag"], row["correct"]))
    return _counted(aggregation.geneval(images), len(images), GENEVAL_IMAGES, "images")


def vbench(path: Path, prompts: Path | None = None) -> Scores:
    """The <name>_eval_results.json of vbench/__init__.py, or a folder of them: dimension -> [score, what each video got]."""
    return aggregation.vbench(_dimensions(path))


def vbench_i2v(path: Path, prompts: Path | None = None) -> Scores:
    """The same of vbench2_beta_i2v/__init__.py."""
    return aggregation.vbench(_dimensions(path), aggregation.VBENCH_I2V, aggregation.VBENCH_I2V_GROUPS)


def imgedit(path: Path, prompts: Path | None) -> Scores:
    """The result.json of Benchmark/Basic/basic_bench.py: key -> the judge's text, or an object that tells of an error."""
    if prompts is None:
        raise UserError("ImgEdit's scores go by edit type, which the prompt file holds: give it as --prompts")
    types = {key: row.get("edit_type") if isinstance(row, Mapping) else None for key, row in read_object(prompts).items()}
    for key, kind in types.items():
        if kind not in aggregation.IMGEDIT_TYPES:
            raise UserError(f"{prompts}: {key!r}: unknown edit_type {kind!r}; known: {', '.join(aggregation.IMGEDIT_TYPES)}")
    texts = {key: text if isinstance(text, str) else "" for key, text in read_object(path).items()}
    return _counted(aggregation.imgedit(texts, types), len(texts), IMGEDIT_ITEMS, "items")


def gedit(path: Path, prompts: Path | None = None) -> Scores:
    """The <model>_<type>_gpt_score.csv of GEdit-Bench/test_gedit_score.py, one or their folder. The type of an edit is read from its path,
    which ends with TYPE/LANGUAGE/KEY.png."""
    # <model>_combined_gpt_score.csv holds all rows a second time
    files = sorted(f for f in path.glob("*_gpt_score.csv") if not f.name.endswith("_combined_gpt_score.csv")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no *_gpt_score.csv")
    edits: dict[str, Judged] = {}
    for file in files:
        for where, row in read_csv(file):
            # "sementics_score" is how the scorer spells it
            semantics, quality = (_number(row.get(name), where, name) for name in ("sementics_score", "quality_score"))
            edited = row.get("edited_image") or ""
            parts = edited.split("/")
            if len(parts) < 3:
                raise UserError(f"{where}: edited_image is {edited!r}; it must end with TYPE/LANGUAGE/KEY.png")
            if edited in edits:
                raise UserError(f"{where}: {edited} is scored twice")
            edits[edited] = Judged(parts[-3], row.get("instruction_language") or "", semantics, quality, row.get("intersection_exist") == "True")
    scores = aggregation.gedit(edits.values())
    for language in aggregation.GEDIT_LANGUAGES:
        scores = _counted(scores, sum(edit.language == language for edit in edits.values()), GEDIT_EDITS, f"edits of {language}")
    return scores


def opens2v(path: Path, prompts: Path | None = None) -> Scores:
    """The folder of files that eval/get_*.py write (open or single domain): aesthetic_score.json, facesim.json, ..., naturalscore_1..3.json,
    each video -> its score."""
    return aggregation.opens2v(_opens2v_values(path))


def opens2v_human(path: Path, prompts: Path | None = None) -> Scores:
    """The same of the human domain."""
    return aggregation.opens2v(_opens2v_values(path), human=True)


def _opens2v_values(path: Path) -> dict[str, list[float]]:
    if not path.is_dir():
        raise UserError(f"{path} is no folder; OpenS2V-Eval's scorers write one file a metric into one")
    values: dict[str, list[float]] = {}
    for name, metric in OPENS2V.items():
        marks: dict[str, list[float]] = {}
        files = sorted(f for f in path.glob("*.json") if re.fullmatch(rf"{metric.file}(_[123])?\.json", f.name))
        for file in files:
            for video, entry in read_object(file).items():
                value = entry.get(metric.key) if isinstance(entry, Mapping) else entry
                marks.setdefault(video, []).append(_number(value, f"{file}: {video!r}", metric.key or "its score"))
        values[name] = [aggregation.mean(given) for given in marks.values()]
    return values


def _dimensions(path: Path) -> dict[str, float]:
    """Dimension -> score. Files that hold no object (<name>_full_info.json) are no scores."""
    files = sorted(f for f in path.rglob("*.json") if not f.name.endswith("_full_info.json")) if path.is_dir() else [path]
    if not files:
        raise UserError(f"{path} holds no .json")
    found: dict[str, float] = {}
    for file in files:
        for name, entry in read_object(file).items():
            where = f"{file}: {name}"
            value = entry[0] if isinstance(entry, list) and entry else entry
            if name in found:
                raise UserError(f"{where} stands in two files")
            found[name] = _number(value, where, "its score")
    return found


def _number(value: Any, where: str, name: str) -> float:
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise UserError(f"{where}: {name} is {value!r}; it must be a number")
    return number


def _counted(scores: Scores, count: int, whole: int, what: str) -> Scores:
    if count == whole:
        return scores
    return replace(scores, notes=(*scores.notes, f"{count} {what} are scored, the benchmark has {whole}"))
