"""Measure pictures and clips that lie in folders, against references, sources and captions; with weights from local paths.

    python -m launch.measure --outputs DIR [--references DIR] [--sources DIR] [--captions FILE.json] [--metrics psnr,ssim,...]
                             [--clip DIR] [--lpips FILE] [--fid FILE] [--fvd FILE] [--json OUT.json]

Files are paired by their names without endings. --references: what the outputs should be; --sources: what was edited; --captions: a JSON
object {name: caption}, or a task file of launch.sample. Without --metrics: all that the given folders and weights allow; the others are told
as absent, with the reason. docs/metrics.md says what each metric is. The same input gives the same file.
"""
import argparse
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_pipelines.files import decoded_frames, frame_pixels, read_image
from data_pipelines.manifest import TASK_OF_SUFFIX
from launch import cli
from vino_jax.checkpoint.atomic import write_text
from vino_jax.errors import UserError
from vino_jax.evaluation.frechet import Moments, distance
from vino_jax.evaluation.learned import LEARNED, Learned
from vino_jax.evaluation.metrics import CHANGED, METRICS, Metric
from vino_jax.evaluation.statistics import standard_error

ALL: dict[str, Metric | Learned] = {**METRICS, **LEARNED}
FLAG = {"reference": "references", "source": "sources", "caption": "captions"}  # what a metric needs -> the flag that gives it
WORST = 5  # items told for each metric
KIND = {"t2i": "picture", "t2v": "clip"}
INFINITE = "infinite"  # in the file: JSON has no such number


def parser() -> argparse.ArgumentParser:
    p = cli.Parser(prog="launch.measure", description=__doc__.split("\n")[0], allow_abbrev=False)
    p.add_argument("--outputs", required=True, type=Path, help="folder of pictures and clips to measure")
    p.add_argument("--references", type=Path, help="folder of what they should be")
    p.add_argument("--sources", type=Path, help="folder of what was edited")
    p.add_argument("--captions", type=Path, help="JSON {name: caption}, or a task file of launch.sample")
    p.add_argument("--metrics", help=f"comma-separated, of {','.join(ALL)} (default: all that the rest allows)")
    p.add_argument("--changed_threshold", type=float, default=CHANGED, help=f"grey levels, of changed_region (default {CHANGED:g})")
    for name, metric in LEARNED.items():
        p.add_argument(f"--{name}", type=Path, help=metric.weights)
    p.add_argument("--device", default="cpu", help="that PyTorch runs the weights on (default cpu)")
    p.add_argument("--json", type=Path, help="file to write all values to")
    return p


def main(argv: Sequence[str] | None = None) -> None:
    flags = parser().parse_args(argv)
    if not 0 <= flags.changed_threshold <= 255:
        raise UserError(f"--changed_threshold {flags.changed_threshold:g} must be within 0..255")
    asked = None if flags.metrics is None else cli.names("--metrics", flags.metrics, ALL, "metric")
    outputs = read_folder(flags.outputs)
    given = {"reference": flags.references and read_folder(flags.references), "source": flags.sources and read_folder(flags.sources),
             "caption": flags.captions and read_captions(flags.captions)}
    chosen, absent = choose(asked, outputs, given, flags)
    check_pairs(chosen, outputs, given, flags)
    if flags.json:
        check_json(flags.json)
    results = measure({name: open_metric(name, metric, flags) for name, metric in chosen.items()}, outputs, given)
    summaries = {name: summary(result) for name, result in results.items()}
    report = build_report(results, summaries, absent, flags)
    for line in told(results, summaries, absent):
        print(line, flush=True)
    if flags.json:
        try:
            write_text(flags.json, json.dumps(report, indent=1, sort_keys=True, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"cannot write {flags.json}: {error.strerror}") from None


# --- what is given ---


def kind(path: Path) -> str:
    """"picture" or "clip", by the ending; "" for neither."""
    return KIND.get(TASK_OF_SUFFIX.get(path.suffix.lower(), ""), "")


def read_folder(folder: Path) -> dict[str, Path]:
    """Name without ending -> picture or clip that lies in the folder, sorted; other files, hidden ones and folders are left alone. Raises
    UserError where there is no such folder, none of them in it, or two of one name."""
    try:
        files = sorted(path for path in folder.iterdir() if kind(path) and not path.name.startswith(".") and path.is_file())
    except OSError as error:
        raise UserError(f"cannot read the folder {folder}: {error.strerror}") from None
    if not files:
        raise UserError(f"the folder {folder} has no picture and no clip ({' '.join(TASK_OF_SUFFIX)})")
    found: dict[str, Path] = {}
    for path in files:
        if path.stem in found:
            raise UserError(f"{found[path.stem]} and {path} have one name; files are paired by it")
        found[path.stem] = path
    return found


def read_captions(path: Path) -> dict[str, str]:
    """Name -> caption. Raises UserError for a file that has none, or one that is no text."""
    try:
        data = json.loads(path.read_text())
        if isinstance(data, list):  # a task file
            data = {str(entry["index"]): entry["caption"] for entry in data}
    except OSError as error:
        raise UserError(f"cannot read the captions {path}: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        data = None
    if not isinstance(data, dict):
        raise UserError(f"the captions {path} must be a JSON object {{name: caption}}, or a task file whose tasks have an index and a caption")
    for name, caption in data.items():
        if not isinstance(caption, str) or not caption.strip():
            raise UserError(f"the caption of {name!r} in {path} is no text")
    return data


def read_media(path: Path) -> np.ndarray:
    """A picture (1, H, W, 3) or a clip (F, H, W, 3), uint8 RGB. Raises UserError."""
    if kind(path) == "picture":
        return read_image(path)[None]
    frames = [frame_pixels(frame) for frame in decoded_frames(path)]
    if len({frame.shape for frame in frames}) > 1:
        raise UserError(f"the frames of {path} differ in size")
    return np.stack(frames)


def serves(metric: Metric | Learned, path: Path) -> bool:
    return metric.media in ("any", kind(path))


def of_set(metric: Metric | Learned) -> bool:
    return isinstance(metric, Learned) and metric.features > 0


def lacking(name: str, metric: Metric | Learned, outputs: Mapping[str, Path], given: Mapping[str, Any], flags: argparse.Namespace) -> str:
    """What a metric lacks of folders and captions; "" for nothing."""
    needed = given.get(metric.needs)
    if metric.needs and needed is None:
        return f"--{FLAG[metric.needs]} is not given"
    fewest, sets = (2, ((flags.outputs, outputs), (flags.references, needed))) if of_set(metric) else (1, ((flags.outputs, outputs),))
    for folder, files in sets:
        if sum(serves(metric, path) for path in files.values()) < fewest:
            return f"there is no {metric.media} in {folder}" if fewest == 1 else f"there are not two {metric.media}s in {folder}"
    return ""


def choose(asked: Sequence[str] | None, outputs: Mapping[str, Path], given: Mapping[str, Any],
           flags: argparse.Namespace) -> tuple[dict[str, Metric | Learned], dict[str, str]]:
    """The metrics to measure, and those that are absent with the reason. Raises UserError where one that was asked for by name lacks
    anything but its weights, and where none is left."""
    chosen, absent = {}, {}
    for name in asked or ALL:
        metric = ALL[name]
        reason = lacking(name, metric, outputs, given, flags)
        if reason and asked:
            raise UserError(f"{name} cannot be measured: {reason}")
        if isinstance(metric, Learned) and getattr(flags, name) is None:
            reason += ("; " if reason else "") + f"--{name} is not given: {metric.weights}"
        if reason:
            absent[name] = reason
        else:
            chosen[name] = metric
    if not chosen:
        raise UserError("nothing can be measured: " + "; ".join(f"{name}: {reason}" for name, reason in absent.items()))
    return chosen, absent


def check_pairs(chosen: Mapping[str, Metric | Learned], outputs: Mapping[str, Path], given: Mapping[str, Any],
                flags: argparse.Namespace) -> None:
    """Raises UserError for an output without its partner, before anything is decoded."""
    for needs in sorted({m.needs for m in chosen.values() if m.needs and not of_set(m)}):
        for name, path in outputs.items():
            partner = given[needs].get(name)
            if partner is None:
                raise UserError(f"{path} has no {needs}: there is none called {name!r} in {getattr(flags, FLAG[needs])}")
            if isinstance(partner, Path) and kind(partner) != kind(path):
                raise UserError(f"{path} is a {kind(path)}, its {needs} {partner} a {kind(partner)}")


def check_json(path: Path) -> None:
    """Raises UserError where the file could not be written, before hours of work are lost."""
    if path.is_dir():
        raise UserError(f"--json {path} is a folder")
    cli.make_output(path.parent)


def open_metric(name: str, metric: Metric | Learned, flags: argparse.Namespace) -> "Result":
    """A result to fill. Raises UserError for weights that cannot be loaded."""
    if isinstance(metric, Learned):
        return Result(metric, metric.open(getattr(flags, name), flags.device))
    return Result(metric, metric.score, {"threshold": flags.changed_threshold} if name == "changed_region" else {})


# --- measuring ---


@dataclass
class Result:
    """A metric, its loaded score, and what it gave: a value for each item, or two sets of features."""

    metric: Metric | Learned
    score: Callable[..., Any]
    options: Mapping[str, Any] = field(default_factory=dict)
    values: dict[str, float] = field(default_factory=dict)
    sets: dict[str, Moments] = field(default_factory=lambda: {"outputs": Moments(), "references": Moments()})
    frames: set[int] = field(default_factory=set)  # lengths of the clips in the sets

    def notes(self) -> list[str]:
        notes = getattr(self.score, "notes", list)()
        if len(self.frames) > 1:
            notes = [*notes, f"clips of {min(self.frames)} to {max(self.frames)} frames; the distance sees their length too"]
        return notes


def measure(results: dict[str, Result], outputs: Mapping[str, Path], given: Mapping[str, Any]) -> dict[str, Result]:
    """Fills the results. One item is in memory at a time. Raises UserError for a file that cannot be read or measured."""
    needed = {r.metric.needs for r in results.values() if not of_set(r.metric)}
    for name, path in tqdm(outputs.items(), desc="outputs", disable=None):
        pixels = read_media(path)
        partners = {needs: given[needs][name] for needs in needed if needs}
        read = {needs: read_media(found) if isinstance(found, Path) else found for needs, found in partners.items()}
        for metric, result in applying(results, path):
            if of_set(result.metric):
                add_features(metric, result, "outputs", path, pixels)
            else:
                named = f"{metric} of {path}" + (f" and {partners[result.metric.needs]}" if result.metric.needs in ("reference", "source") else "")
                extra = [read[result.metric.needs]] if result.metric.needs else []
                result.values[name] = checked(named, result.score, pixels, *extra, **result.options)
    if any(of_set(r.metric) for r in results.values()):
        for path in tqdm(given["reference"].values(), desc="references", disable=None):
            sets = [(metric, result) for metric, result in applying(results, path) if of_set(result.metric)]
            pixels = read_media(path) if sets else None
            for metric, result in sets:
                add_features(metric, result, "references", path, pixels)
    return results


def applying(results: Mapping[str, Result], path: Path) -> Iterator[tuple[str, Result]]:
    return ((name, result) for name, result in results.items() if serves(result.metric, path))


def checked(named: str, score: Callable[..., float], *inputs: Any, **options: Any) -> float:
    """A value. Raises UserError where the score refuses its inputs, or gives NaN."""
    try:
        value = float(score(*inputs, **options))
    except ValueError as error:
        raise UserError(f"{named}: {error}") from None
    if math.isnan(value):
        raise UserError(f"{named} is not a number")
    return value


def add_features(metric: str, result: Result, which: str, path: Path, pixels: np.ndarray) -> None:
    try:
        result.sets[which].add(result.score(pixels))
    except ValueError as error:
        raise UserError(f"{metric} of {path}: {error}") from None
    result.frames.add(len(pixels))


# --- telling ---


def summary(result: Result) -> dict[str, Any]:
    """What is written of a metric."""
    common = {"better": result.metric.better, "notes": result.notes()}
    if of_set(result.metric):
        value, notes = distance(result.sets["outputs"], result.sets["references"])
        return {**common, "notes": common["notes"] + notes, "value": value, **{which: m.count for which, m in result.sets.items()}}
    finite = [value for value in result.values.values() if math.isfinite(value)]
    mean = math.fsum(finite) / len(finite) if finite else None
    spread = standard_error(finite) if len(finite) > 1 else None
    return {**common, "mean": mean, "standard_error": spread, "count": len(finite), "infinite": len(result.values) - len(finite)}


def build_report(results: Mapping[str, Result], summaries: Mapping[str, dict[str, Any]], absent: Mapping[str, str],
                 flags: argparse.Namespace) -> dict[str, Any]:
    """{"settings", "metrics": {name: summary, or mean None with the reason}, "items": {name: {metric: value}}}."""
    items: dict[str, dict[str, float | str]] = {}
    for metric, result in results.items():
        for name, value in result.values.items():
            items.setdefault(name, {})[metric] = value if math.isfinite(value) else INFINITE
    metrics = {**summaries, **{name: {"mean": None, "absent": reason} for name, reason in absent.items()}}
    settings = {name: value if value is None or isinstance(value, float) else str(value) for name, value in vars(flags).items() if name != "json"}
    return {"settings": settings, "metrics": metrics, "items": items}


def told(results: Mapping[str, Result], summaries: Mapping[str, dict[str, Any]], absent: Mapping[str, str]) -> Iterator[str]:
    """Lines for the terminal: each metric, its worst items, what is absent."""
    for name, result in results.items():
        found, metric = summaries[name], result.metric
        if of_set(metric):
            yield f"{name}: {found['value']:.4f} ({metric.better} is better), {found['outputs']} outputs, {found['references']} references"
        else:
            way = "no better or worse" if metric.better == "neither" else f"{metric.better} is better"
            mean = "none finite" if found["mean"] is None else f"{found['mean']:.4f}"
            error = "" if found["standard_error"] is None else f" ± {found['standard_error']:.4f}"
            more = f", {found['infinite']} infinite left out" if found["infinite"] else ""
            yield f"{name}: mean {mean}{error} ({way}), {found['count']} items{more}"
            ranked = sorted(result.values.items(), key=lambda item: (item[1] * (1 if metric.better == "higher" else -1), item[0]))
            first = "largest" if metric.better == "neither" else "worst"
            yield f"  {first}: " + ", ".join(f"{item} {value:.4f}" for item, value in ranked[:WORST])
        yield from (f"  note: {note}" for note in found["notes"])
    yield from (f"{name}: absent, {reason}" for name, reason in absent.items())


if __name__ == "__main__":
    cli.run(main)
