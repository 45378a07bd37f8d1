"""From what the official scorers of public benchmarks give to the numbers that papers print, as pure functions.

Each says which file of which repository its rule comes from. A score that a rule needs and that is not there gives no overall: the official
scripts of VBench count it as zero, GenEval's averages what is left, and neither is the benchmark's number.
"""
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from vino_jax.errors import UserError

GENEVAL_TAGS = ("single_object", "two_object", "counting", "colors", "position", "color_attr")
GEDIT_TYPES = ("background_change", "color_alter", "material_alter", "motion_change", "ps_human", "style_change", "subject-add", "subject-remove",
               "subject-replace", "text_change", "tone_transfer")
GEDIT_LANGUAGES = ("en", "cn")
IMGEDIT_TYPES = ("add", "adjust", "extract", "replace", "remove", "background", "style", "compose", "action")


@dataclass(frozen=True)
class Scores:
    """A table and what it comes to."""

    parts: dict[str, dict[str, float]]  # row -> column -> value
    overall: dict[str, float]  # name -> value; without those that something is missing for
    missing: tuple[str, ...] = ()  # what is not there for the others
    notes: tuple[str, ...] = ()  # what a reader must know of the numbers


def mean(values: Iterable[float]) -> float:
    """The arithmetic mean. Raises ValueError for none."""
    values = list(values)
    return math.fsum(values) / len(values)


# --- GenEval ---


def geneval(images: Iterable[tuple[str, bool]]) -> Scores:
    """From (tag, correct) of each image. Accuracy of a tag: the share of its images that are correct; overall: the mean of the six
    accuracies, so that a tag with few prompts weighs as much as one with many (djghosh13/geneval, evaluation/summary_scores.py)."""
    gathered: dict[str, list[bool]] = defaultdict(list)
    for tag, correct in images:
        if tag not in GENEVAL_TAGS:
            raise UserError(f"unknown tag {tag!r}; GenEval's are {', '.join(GENEVAL_TAGS)}")
        gathered[tag].append(correct)
    parts = {tag: {"accuracy": mean(gathered[tag]), "images": len(gathered[tag])} for tag in GENEVAL_TAGS if tag in gathered}
    missing = tuple(tag for tag in GENEVAL_TAGS if tag not in gathered)
    return Scores(parts, {} if missing else {"overall": mean(row["accuracy"] for row in parts.values())}, missing)


# --- VBench ---


@dataclass(frozen=True)
class Dimension:
    """How a score of VBench counts: (score - low) / (high - low), weighted among those of its group."""

    group: str
    low: float = 0.0
    high: float = 1.0
    weight: float = 1.0


# Vchitect/VBench, scripts/constant.py: NORMALIZE_DIC, DIM_WEIGHT, QUALITY_LIST, SEMANTIC_LIST, QUALITY_WEIGHT, SEMANTIC_WEIGHT
VBENCH_GROUPS = {"quality": 4.0, "semantic": 1.0}
VBENCH = {
    "subject consistency": Dimension("quality", 0.1462),
    "background consistency": Dimension("quality", 0.2615),
    "temporal flickering": Dimension("quality", 0.6293),
    "motion smoothness": Dimension("quality", 0.706, 0.9975),
    "aesthetic quality": Dimension("quality"),
    "imaging quality": Dimension("quality"),
    "dynamic degree": Dimension("quality", weight=0.5),
    "object class": Dimension("semantic"),
    "multiple objects": Dimension("semantic"),
    "human action": Dimension("semantic"),
    "color": Dimension("semantic"),
    "spatial relationship": Dimension("semantic"),
    "scene": Dimension("semantic", 0.0, 0.8222),
    "appearance style": Dimension("semantic", 0.0009, 0.2855),
    "temporal style": Dimension("semantic", 0.0, 0.364),
    "overall consistency": Dimension("semantic", 0.0, 0.364),
}
# the same file: NORMALIZE_DIC_I2V, DIM_WEIGHT_I2V, I2V_LIST, I2V_QUALITY_LIST, I2V_WEIGHT, I2V_QUALITY_WEIGHT; temporal flickering, which
# VBench-I2V's scorer knows too, is in no list
VBENCH_I2V_GROUPS = {"quality": 1.0, "i2v": 1.0}
VBENCH_I2V = {
    "camera motion": Dimension("i2v", weight=0.1),
    "i2v subject": Dimension("i2v", 0.1462),
    "i2v background": Dimension("i2v", 0.2615),
    "subject consistency": Dimension("quality", 0.1462),
    "background consistency": Dimension("quality", 0.2615),
    "motion smoothness": Dimension("quality", 0.706, 0.9975),
    "dynamic degree": Dimension("quality", weight=0.5),
    "aesthetic quality": Dimension("quality"),
    "imaging quality": Dimension("quality"),
}


def vbench(scores: Mapping[str, float], dimensions: Mapping[str, Dimension] = VBENCH, groups: Mapping[str, float] = VBENCH_GROUPS) -> Scores:
    """From the score of each dimension (0..1; `subject_consistency` or `subject consistency`) by Vchitect/VBench, scripts/cal_final_score.py.

    Each score is brought to (score - low) / (high - low), which is not clipped. A group's score: the mean of its dimensions by their weights.
    Total: the mean of the groups by theirs, (4 quality + semantic) / 5. With VBENCH_I2V and VBENCH_I2V_GROUPS that of
    scripts/cal_i2v_final_score.py: (quality + i2v) / 2.
    """
    named = {name.replace("_", " "): value for name, value in scores.items()}
    parts = {name: {"score": named[name], "normalized": (named[name] - d.low) / (d.high - d.low), "weight": d.weight}
             for name, d in dimensions.items() if name in named}
    missing = tuple(name for name in dimensions if name not in named)
    overall = {}
    for group in groups:
        members = [name for name, d in dimensions.items() if d.group == group]
        if not set(members) & set(missing):
            weights = [dimensions[name].weight for name in members]
            overall[group] = _weighted([parts[name]["normalized"] for name in members], weights)
    if not missing:
        overall["total"] = _weighted([overall[group] for group in groups], list(groups.values()))
    others = sorted(set(named) - set(dimensions))
    return Scores(parts, overall, missing, (f"not counted: {', '.join(others)}",) if others else ())


def _weighted(values: list[float], weights: list[float]) -> float:
    return math.fsum(v * w for v, w in zip(values, weights, strict=True)) / math.fsum(weights)


# --- ImgEdit ---


def imgedit(texts: Mapping[str, str], types: Mapping[str, str]) -> Scores:
    """From the judge's text on each item and the edit type of each.

    An item's score: the mean of the whole numbers at the end of lines `words: N`, to 2 decimals; a text without one has none
    (PKU-YuanGroup/ImgEdit, Benchmark/Basic/step1_get_avgscore.py). A type's: the mean of its items, to 2 decimals (step2_typescore.py).
    Overall: the mean of the nine types. The repository's scripts stop at the types; that papers take this mean was not checked.
    """
    gathered: dict[str, list[float]] = defaultdict(list)
    silent = 0
    for key, text in texts.items():
        if key not in types:
            raise UserError(f"item {key!r} is scored and is not in the prompt file")
        numbers = _numbers(text)
        if numbers:
            gathered[types[key]].append(round(mean(numbers), 2))
        silent += not numbers
    parts = {kind: {"score": round(mean(gathered[kind]), 2), "items": len(gathered[kind])} for kind in IMGEDIT_TYPES if kind in gathered}
    missing = tuple(kind for kind in IMGEDIT_TYPES if kind not in gathered)
    overall = {} if missing else {"overall": mean(row["score"] for row in parts.values())}
    return Scores(parts, overall, missing, (f"{silent} items hold no score and are left out",) if silent else ())


def _numbers(text: str) -> list[int]:
    pairs = [line.strip().split(": ") for line in text.splitlines()]
    return [int(pair[1]) for pair in pairs if len(pair) == 2 and pair[1].isdigit()]


# --- GEdit-Bench ---


@dataclass(frozen=True)
class Judged:
    """What VIEScore gives for one edit: the least of its marks for semantics and for quality, 0..10."""

    task_type: str
    language: str
    semantics: float
    quality: float
    intersection: bool  # of the subset that every compared model answered


def gedit(edits: Iterable[Judged]) -> Scores:
    """An edit's overall: sqrt(semantics x quality). Each of the three is averaged over the edits of a type and then over the 11 types, for
    each language by itself, over all edits and over those of the intersection (stepfun-ai/Step1X-Edit, GEdit-Bench/calculate_statistics.py)."""
    gathered: dict[tuple[str, str], list[tuple[float, float, float]]] = defaultdict(list)
    for edit in edits:
        for name, value, known in (("task type", edit.task_type, GEDIT_TYPES), ("language", edit.language, GEDIT_LANGUAGES)):
            if value not in known:
                raise UserError(f"unknown {name} {value!r}; GEdit-Bench's are {', '.join(known)}")
        if not (0 <= edit.semantics <= 10 and 0 <= edit.quality <= 10):
            raise UserError(f"semantics {edit.semantics:g} and quality {edit.quality:g} must lie in 0..10")
        three = edit.semantics, edit.quality, math.sqrt(edit.semantics * edit.quality)
        for subset in (edit.language, *([f"{edit.language} intersection"] if edit.intersection else [])):
            gathered[subset, edit.task_type].append(three)
    parts, overall, missing = {}, {}, []
    for subset in (f"{language}{kind}" for language in GEDIT_LANGUAGES for kind in ("", " intersection")):
        rows = {kind: [mean(column) for column in zip(*gathered[subset, kind])] for kind in GEDIT_TYPES if (subset, kind) in gathered}
        parts |= {f"{subset} {kind}": {**dict(zip(("semantics", "quality", "overall"), row)), "edits": len(gathered[subset, kind])}
                  for kind, row in rows.items()}
        missing += [f"{subset} {kind}" for kind in GEDIT_TYPES if kind not in rows]
        if len(rows) == len(GEDIT_TYPES):
            overall |= {f"{subset} {name}": mean(column) for name, column in zip(("semantics", "quality", "overall"), zip(*rows.values()))}
    return Scores(parts, overall, tuple(missing))


# --- OpenS2V-Eval ---


@dataclass(frozen=True)
class Metric:
    """A metric of OpenS2V-Eval: the scorer's file and key, its range, and what it weighs in the total."""

    file: str
    key: str
    low: float
    high: float
    weight: float
    human_weight: float  # in the human domain, whose total has no NexusScore


# PKU-YuanGroup/OpenS2V-Nexus, eval/merge_result.py (v1.1), read in the fork franciszzj/OpenS2V-Nexus: the stored snapshot of the original is
# older. Its leaderboard/file_v1.1/results_Open-Domain.csv agrees with these weights.
OPENS2V = {
    "aesthetics": Metric("aesthetic_score", "aes_score", 4, 7, 0.16, 0.18),
    "motion smoothness": Metric("motion_smoothness", "motion_smoothness", 0, 1, 0.06, 0.09),
    "motion amplitude": Metric("motion_amplitude", "motion_fb", 0, 1, 0.02, 0.03),
    "FaceSim": Metric("facesim", "cur_score", 0, 1, 0.20, 0.25),
    "GmeScore": Metric("gmescore", "gme_score", 0, 1, 0.12, 0.15),
    "NexusScore": Metric("nexusscore", "nexus_score", 0, 0.05, 0.20, 0.0),
    "NaturalScore": Metric("naturalscore", "", 1, 5, 0.24, 0.30),
}
_ABSOLUTE = ("motion smoothness", "motion amplitude")
_FLOORED = ("aesthetics", "NaturalScore")


def opens2v(values: Mapping[str, Iterable[float]], human: bool = False) -> Scores:
    """From the values of each metric over the videos that have one (NaturalScore: the mean of a video's three marks).

    A value is cut off at the upper end of the metric's range, those of aesthetics and NaturalScore at the lower end too, of motion the
    absolute value counts; NexusScores of 0 are left out. The mean over videos is brought to (mean - low) / (high - low), and the total is
    the sum by weights (eval/merge_result.py). human: the human domain's weights.
    """
    parts, missing = {}, []
    for name, metric in OPENS2V.items():
        weight = metric.human_weight if human else metric.weight
        given = [v for v in values.get(name, ()) if not (name == "NexusScore" and v == 0)]
        if not weight:
            continue
        if not given:
            missing.append(name)
            continue
        cut = [min(abs(v) if name in _ABSOLUTE else max(v, metric.low) if name in _FLOORED else v, metric.high) for v in given]
        parts[name] = {"score": (mean(cut) - metric.low) / (metric.high - metric.low), "weight": weight, "videos": len(cut)}
    total = math.fsum(row["score"] * row["weight"] for row in parts.values())
    return Scores(parts, {} if missing else {"total": total}, tuple(missing))
