"""One HTML file about a training run and its scores: curves, tables, what they say in words, and contact sheets. It needs no network.

Reads metrics.jsonl and config.json of runs (vino_jax/train/logging.py), and scores.json, samples.json and the outputs of
launch.evaluate.
"""
import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from PIL import Image

from vino_jax.checkpoint.atomic import write_text
from vino_jax.errors import UserError
from vino_jax.evaluation.chart import COLOURS, Line, label, legend, line_chart, smooth
from vino_jax.evaluation.report_loss import loss_chart, loss_reading, loss_section, worst_rows
from vino_jax.sampling.video import read_frames
from vino_jax.settings import read_json

MAIN = "trained"  # the checkpoint that the report is about
TITLES = {
    "t2i": "text to picture", "t2v": "text to clip", "i2v": "first frame to clip", "ti2v": "pictured objects into a clip",
    "ti2i": "picture edited", "ti2i_baseimg": "picture edited, with a reference", "tv2v": "clip edited",
    "tiv2v": "clip edited, with a reference",
}
WORDS = {"colour": "colour", "shape": "shape", "count": "count", "relation": "relation", "pair": "both objects", "motion": "motion",
         "followed": "instruction followed", "preserved": "rest preserved (PSNR)", "steadiness": "steadiness",
         "first_frame": "first frame (PSNR)", "later_frames": "later frames (PSNR)"}
_DECIBELS = ("preserved", "first_frame", "later_frames")
_APART = 2.0  # standard errors from which the rates of two models differ
_CLEAR = 3.0  # standard errors from which a difference to chance is called clear
_BETWEEN_FRAMES = 110  # ms, of the clips in the contact sheets

_STYLE = """
:root{color-scheme:light}*{box-sizing:border-box}
body{font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,sans-serif;color:#1f2328;background:#f6f8fa;margin:0}
main{max-width:1120px;margin:0 auto;padding:28px 20px 60px}h1{font-size:27px;margin:0 0 2px}h2{font-size:19px;margin:0 0 10px}
h3{font-size:15px;margin:20px 0 6px}section{background:#fff;border:1px solid #d8dee4;border-radius:10px;padding:18px 22px;margin:18px 0}
p{margin:6px 0}.lead,.axis,.note{color:#59636e}.note{font-size:13px}
.facts{display:grid;grid-template-columns:repeat(auto-fill,minmax(230px,1fr));gap:8px 20px;margin:14px 0 0}
.facts div{border-left:3px solid #d8dee4;padding-left:10px}.facts b{display:block;font-size:12px;color:#59636e;font-weight:500}
.charts{display:grid;grid-template-columns:repeat(auto-fit,minmax(300px,1fr));gap:14px}
svg{width:100%;height:auto;display:block}
.axis{font-size:11px;fill:#59636e}.grid{stroke:#eaeef2}.mark{stroke:#afb8c1;stroke-dasharray:3 3}
.legend{font-size:13px;margin:2px 0}.legend span{margin-right:18px}
.legend i{display:inline-block;width:14px;height:4px;border-radius:2px;margin-right:6px;vertical-align:middle}
table{border-collapse:collapse;width:100%;font-size:14px}
th,td{padding:5px 10px;text-align:right;border-bottom:1px solid #eaeef2;font-variant-numeric:tabular-nums}
th{font-weight:600;font-size:13px;color:#59636e}th:first-child,td:first-child{text-align:left}
tr.task td{background:#f6f8fa;font-weight:600;text-align:left}td.best{font-weight:700}
td.clear{color:#1a7f37;font-weight:600}ul{margin:6px 0;padding-left:20px}li{margin:4px 0}
.sheet{overflow-x:auto}.sheet td,.sheet th{text-align:center;vertical-align:middle;padding:6px}
.sheet td:first-child{text-align:left;width:260px;font-size:13px}
.sheet img{width:84px;height:auto;image-rendering:pixelated;border-radius:4px;border:1px solid #d8dee4;margin:1px;vertical-align:middle}
.sheet td.main{background:#eef5ff}
"""


def write_report(path: Path, *, title: str, lead: str, facts: Mapping[str, str], runs: Mapping[str, Path], evaluation: Path,
                 timings: Sequence[tuple[str, float]] = ()) -> Path:
    """Write the report to `path`, and what it says as JSON beside it (its ending .json in the place of .html).

    facts: label -> value, told at the top. runs: name -> workdir of a training run, "trained" first; may be none. evaluation: what
    launch.evaluate wrote. timings: (phase, seconds). Raises UserError where a file is missing or damaged.
    """
    scores = read_json(evaluation / "scores.json")
    found = scores["checkpoints"]
    samples = read_json(evaluation / "samples.json") if any(entry["tasks"] for entry in found.values()) else {}
    metrics = {name: read_metrics(workdir / "metrics.jsonl") for name, workdir in runs.items()}
    held_out = {name: read_records(workdir / "held_out.jsonl") for name, workdir in runs.items() if (workdir / "held_out.jsonl").exists()}
    facts = {**facts, **_run_facts(runs, metrics, scores)}
    sentences = loss_reading(scores, MAIN) + (reading(scores) if found[MAIN]["tasks"] else []) + stage_reading(metrics)
    body = [
        f"<section><h1>{escape(title)}</h1><p class=lead>{escape(lead)}</p>{_facts(facts)}</section>",
        f"<section><h2>What the numbers say</h2>{_list(sentences)}</section>",
        f"<section><h2>Training</h2>{_training(metrics)}{loss_chart(held_out)}</section>" if runs else "",
        loss_section(scores, _columns(found)),
        f"<section><h2>Scores on unseen samples</h2>{_table(scores)}</section>{_sheets(evaluation, scores, samples)}" if samples else "",
    ]
    if timings:
        every = [*timings, ("all", sum(seconds for _, seconds in timings))]
        rows = "".join(f"<tr><td>{escape(phase)}</td><td>{seconds:.0f} s</td></tr>" for phase, seconds in every)
        body.append(f"<section><h2>Time</h2><table>{rows}</table></section>")
    page = (f'<!doctype html><html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
            f"<title>{escape(title)}</title><style>{_STYLE}</style></head><body><main>{''.join(body)}</main></body></html>\n")
    path.parent.mkdir(parents=True, exist_ok=True)
    curves = {name: {"training": [r for records in stages.values() for r in records], "held_out": held_out.get(name, [])}
              for name, stages in metrics.items()}
    told = {"title": title, "facts": facts, "sentences": sentences, "scores": scores, "worst_rows": worst_rows(scores, MAIN), "curves": curves,
            "seconds": dict(timings)}
    write_text(path.with_suffix(".json"), json.dumps(told, indent=1) + "\n")
    write_text(path, page)
    return path


def read_records(path: Path) -> list[dict[str, Any]]:
    """Whole lines of a run's log; the last may be half written. Raises UserError for a file that cannot be read."""
    try:
        return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    except (OSError, ValueError) as error:
        raise UserError(f"cannot read the metrics of the run {path.parent}: {error}") from None


def read_metrics(path: Path) -> dict[str, list[dict[str, Any]]]:
    """Stage -> its records by step, in the order of the run. Raises UserError where there are none."""
    stages: dict[str, list[dict[str, Any]]] = {}
    for record in read_records(path):
        stages.setdefault(record["stage"], []).append(record)
    if not stages:
        raise UserError(f"the run {path.parent} has no metrics yet")
    return stages


# --- in words ---


def above_chance(attribute: Mapping[str, Any]) -> float:
    """Standard errors (of a guesser's mean) that the mean lies above chance."""
    chance = attribute["chance"]
    return (attribute["mean"] - chance) / math.sqrt(chance * (1 - chance) / attribute["count"])


def ahead(a: Mapping[str, Any], b: Mapping[str, Any]) -> float:
    """Standard errors that share a lies above share b (pooled two-proportion test); 0 where both are all right or all wrong."""
    pooled = (a["mean"] * a["count"] + b["mean"] * b["count"]) / (a["count"] + b["count"])
    error = math.sqrt(pooled * (1 - pooled) * (1 / a["count"] + 1 / b["count"]))
    return (a["mean"] - b["mean"]) / error if error else 0.0


def reading(scores: Mapping[str, Any], main: str = MAIN) -> list[str]:
    """Plain sentences about the scores, computed from them."""
    found = scores["checkpoints"]
    rows = [(task, name, a) for task, result in found[main]["tasks"].items() for name, a in result["attributes"].items()
            if a["chance"] is not None]
    clear = [(task, name, a) for task, name, a in rows if above_chance(a) > _CLEAR]
    rest = [(task, name, a) for task, name, a in rows if above_chance(a) <= _CLEAR]

    def told(entries):
        return ", ".join(f"{task} {WORDS[name]} {_share(a['mean'])} ({a['mean'] / a['chance']:.1f} × chance)" for task, name, a in entries)

    out = []
    first = found[main]["tasks"].get("t2i")
    if first:
        parts = [f"{WORDS[n]} in {_share(a['mean'])} of the {a['count']} that ask for one ({a['mean'] / a['chance']:.1f} × chance)"
                 for n, a in first["attributes"].items() if n in ("colour", "shape")]
        out.append(f"On {first['count']} unseen text prompts for pictures, the {label(main)} model gets right: {'; '.join(parts)}.")
    out.append(f"Clearly above chance ({_CLEAR:.0f} standard errors): {told(clear)}." if clear else "Nothing is clearly above chance.")
    if rest:
        out.append(f"Not clearly above chance: {told(rest)}.")
    for other in (name for name in found if name != main):
        out += _comparison(found, main, other)
    return out


def _comparison(found: Mapping[str, Any], main: str, other: str) -> list[str]:
    better, worse, even = [], [], 0
    for task, name, a, b in _pairs(found, main, other):
        if abs(ahead(a, b)) <= _APART:
            even += 1
        else:
            (better if ahead(a, b) > 0 else worse).append(f"{task} {WORDS[name]} ({_share(a['mean'])} against {_share(b['mean'])})")
    total = len(better) + len(worse) + even
    if not total:
        return []
    who = "the full curriculum" if other == "no_stage1" else f"the {label(main)} model"
    against = "the same number of steps with stage 1 skipped" if other == "no_stage1" else f"the {label(other)}"
    lists = (f" Ahead: {', '.join(better)}." if better else "") + (f" Behind: {', '.join(worse)}." if worse else "")
    out = [f"Against {against}, {who} is ahead in {len(better)} of {total} rates, behind in {len(worse)}, and even within {_APART:.0f} "
           f"standard errors in {even}.{lists}"]
    edits = [(task, a, b) for task, name, a, b in _pairs(found, main, other) if name == "followed"]
    if edits and other == "base":
        wins = [task for task, a, b in edits if ahead(a, b) > _APART]
        out.append(f"Edit instructions followed, {label(main)} against {label(other)}: "
                   + ", ".join(f"{task} {_share(a['mean'])} / {_share(b['mean'])}" for task, a, b in edits)
                   + f"; beyond doubt better in: {', '.join(wins) or 'none'}.")
    return out


def _pairs(found: Mapping[str, Any], main: str, other: str) -> Iterable[tuple[str, str, dict, dict]]:
    """(task, attribute, main's, other's) for every rate that both have."""
    for task, result in found[main]["tasks"].items():
        theirs = found[other]["tasks"].get(task, {"attributes": {}})["attributes"]
        for name, a in result["attributes"].items():
            if a["chance"] is not None and name in theirs:
                yield task, name, a, theirs[name]


def stage_reading(metrics: Mapping[str, Mapping[str, list[dict]]]) -> list[str]:
    """Whether each stage's loss fell: mean of the first and the last fifth of its records."""
    out = []
    for run, stages in metrics.items():
        told = []
        for stage, records in stages.items():
            start, end = ends(records)
            told.append(f"{stage} {start:.3f} → {end:.3f} ({100 * (end / start - 1):+.0f} %)")
        if told:
            out.append(f"Loss, {label(run)}: {', '.join(told)}.")
    return out


def ends(records: Sequence[Mapping[str, Any]], key: str = "loss") -> tuple[float, float]:
    """Mean of a value over the first and over the last fifth of the records that have it (nan where none has)."""
    values = [r[key] for r in records if r.get(key) is not None]
    if not values:
        return math.nan, math.nan
    part = max(1, len(values) // 5)
    return sum(values[:part]) / part, sum(values[-part:]) / part


# --- parts of the page ---


def _share(value: float) -> str:
    return f"{100 * value:.0f} %" if value >= 0.1 or value == 0 else f"{100 * value:.1f} %"


def _list(lines: Iterable[str]) -> str:
    return "<ul>" + "".join(f"<li>{escape(line)}</li>" for line in lines) + "</ul>"


def _facts(facts: Mapping[str, str]) -> str:
    return '<div class="facts">' + "".join(f"<div><b>{escape(k)}</b>{escape(v)}</div>" for k, v in facts.items()) + "</div>"


def _run_facts(runs: Mapping[str, Path], metrics: Mapping[str, Mapping[str, list[dict]]], scores: Mapping[str, Any]) -> dict[str, str]:
    facts = {}
    for name, workdir in runs.items():
        config = read_json(workdir / "config.json")
        if "mesh" not in facts:
            sizes = {k: v for k, v in config["mesh"].items() if k != "preset" and v != 1}
            facts["mesh"] = f"{', '.join(f'{k} {v}' for k, v in sizes.items()) or 'one device'} (preset {config['mesh']['preset']})"
        steps = " + ".join(str(stage["steps"]) for stage in config["stages"].values())
        records = [r for stage in metrics[name].values() for r in stage]
        seconds, waited = sum(r["seconds"] for r in records), sum(r["seconds"] * r["data_wait_share"] for r in records)
        facts[f"steps, {label(name)}"] = f"{steps} ({seconds:.0f} s without compiling, {100 * waited / seconds:.1f} % of them waiting for data)"
    parameters = next((c["parameters"] for c in scores["checkpoints"].values() if "parameters" in c), {})
    if parameters:
        facts["parameters"] = f"{sum(parameters.values()):,} (" + ", ".join(f"{k} {v / 1e6:.2f} M" for k, v in parameters.items()) + ")"
    settings = scores["settings"]
    facts["sampling"] = f"{settings['steps']} Euler steps, seed {settings['seed']}"
    return facts


def _training(metrics: Mapping[str, Mapping[str, list[dict]]]) -> str:
    lines, marks = [], {}
    for number, (run, stages) in enumerate(metrics.items()):
        points = [(r["total_step"], r["loss"]) for records in stages.values() for r in records]
        colour = COLOURS[number % len(COLOURS)]
        lines.append(Line(run, points, colour, faint=True))
        smoothed = []  # within each stage: tasks change between them
        for records in stages.values():
            smoothed += smooth([(r["total_step"], r["loss"]) for r in records], 5)
        lines.append(Line(label(run), smoothed, colour))
        if number == 0:
            marks = {records[0]["total_step"] - records[0]["step"]: stage for stage, records in stages.items()}
    whole = line_chart(lines, x_name="steps since the start", y_name="flow matching loss", size=(1040, 260), marks=marks)
    panels = []
    for stage, records in next(iter(metrics.values()), {}).items():
        bins = sorted(k for k in records[-1] if k.startswith("loss_t") and k[6:].replace(".", "").isdigit())
        both = [[(float(k[6:]) + 0.05, ends(records, k)[i]) for k in bins] for i in (0, 1)]
        pair = [Line("start of the stage", both[0], "#8c959f", dashed=True), Line("end of the stage", both[1], COLOURS[0])]
        svg = line_chart(pair, x_name="flow time (0 data, 1 noise)", y_name="loss", size=(340, 210))
        panels.append(f"<div><h3>{escape(stage)}</h3>{svg}{legend(pair)}</div>")
    return ("<p class=note>Pale: each record; bold: mean of five. A stage changes tasks and texts, so curves may jump at its start.</p>"
            f"{whole}{legend(lines)}<h3>Loss by timestep bin, {escape(label(next(iter(metrics), '')))}</h3>"
            f"<div class=charts>{''.join(panels)}</div>")


def _table(scores: Mapping[str, Any]) -> str:
    found = scores["checkpoints"]
    names = _columns(found)
    head = "".join(f"<th>{escape(label(n))}</th>" for n in names)
    rows = []
    for task, result in found[names[-1]]["tasks"].items():
        words = f"{escape(task)} · {TITLES[task]} · {result['count']} samples"
        rows.append(f'<tr class="task"><td colspan="{len(names) + 3}">{words}</td></tr>')
        by_model = [found[n]["tasks"].get(task, {"attributes": {}})["attributes"] for n in names]
        rows += [_row(name, [attributes.get(name) for attributes in by_model]) for name in result["attributes"]]
    settings = scores["settings"]
    return (f"<p class=note>Right or wrong by program, on scenes that training never draws (seed {settings['seed']}). Chance is what "
            "uniform guessing of well-formed scenes gives; a picture without any object scores 0. "
            f"Green: {_CLEAR:.0f} standard errors above chance. "
            f"Rest preserved: PSNR against the source outside the changed region. First and later frames: PSNR against the ideal target, "
            f"where the references decide on it. Steadiness: 1 − mean change between frames.</p>"
            f"<table><tr><th></th><th>chance</th>{head}<th>trained / chance</th></tr>{''.join(rows)}</table>")


def _columns(found: Mapping[str, Any]) -> list[str]:
    """Checkpoints from the least to the most trained; "trained" last."""
    return sorted(found, key=lambda name: (name == MAIN, name != "base"))


def _row(name: str, attributes: Sequence[Mapping[str, Any] | None]) -> str:
    chance = attributes[-1]["chance"]
    best = max(a["mean"] for a in attributes if a)

    def cell(a):
        if a is None:
            return "<td>–</td>"
        text = _share(a["mean"]) if chance is not None else f"{a['mean']:.1f} dB" if name in _DECIBELS else f"{a['mean']:.3f}"
        kinds = ["best"] * (a["mean"] == best and len(attributes) > 1) + ["clear"] * (chance is not None and above_chance(a) > _CLEAR)
        return f'<td class="{" ".join(kinds)}">{text}</td>'

    ratio = f"{attributes[-1]['mean'] / chance:.1f} ×" if chance else ""
    return f"<tr><td>{WORDS[name]}</td><td>{_share(chance) if chance else ''}</td>{''.join(map(cell, attributes))}<td>{ratio}</td></tr>"


def _sheets(evaluation: Path, scores: Mapping[str, Any], samples: Mapping[str, Any]) -> str:
    """Samples side by side: the worst, told what is wrong with them, and then the first of every task."""
    kinds = (("Worst cases", f"Of every task those that the {label(MAIN)} checkpoint does worst, the worst first.", True),
             ("Contact sheets", "The first unseen samples of every task, not chosen by hand. Clips move.", False))
    out = []
    for title, note, worst in kinds:
        sheets = "".join(_sheet(evaluation, scores, task, [entry for entry in samples.get(task, ()) if ("worst" in entry) == worst])
                         for task in scores["checkpoints"][MAIN]["tasks"])
        if sheets:
            out.append(f"<section><h2>{title}</h2><p class=note>{escape(note)}</p>{sheets}</section>")
    return "".join(out)


def _sheet(evaluation: Path, scores: Mapping[str, Any], task: str, entries: Sequence[Mapping[str, Any]]) -> str:
    names = _columns(scores["checkpoints"])
    rows = []
    for entry in entries:
        references = "".join(_media(evaluation / path) for path in entry["references"])
        outputs = "".join(f'<td class="{"main" if name == MAIN else ""}">{_output(evaluation, name, task, entry["index"])}</td>' for name in names)
        wrong = f"<br><b>wrong: {escape(', '.join(WORDS[name] for name in entry['worst']))}</b>" if "worst" in entry else ""
        rows.append(f'<tr><td>{escape(entry["prompt"])}{wrong}</td><td>{references or "–"}</td>{outputs}'
                    f'<td>{_media(evaluation / entry["ideal"])}</td></tr>')
    head = "".join(f"<th>{escape(label(n))}</th>" for n in names)
    return (f'<h3>{escape(task)} · {TITLES[task]}</h3><div class="sheet"><table><tr><th>prompt</th><th>references</th>{head}'
            f"<th>ideal target</th></tr>{''.join(rows)}</table></div>") if rows else ""


def _output(evaluation: Path, name: str, task: str, index: str) -> str:
    folder = evaluation / "outputs" / name / task
    return next((_media(path) for path in (folder / f"{index}.png", folder / f"{index}.mp4") if path.exists()), "–")


def _media(path: Path) -> str:
    """A picture as it is, a clip as an animated WebP, inline."""
    if path.suffix == ".png":
        kind, data = "png", path.read_bytes()
    else:
        kind, buffer = "webp", io.BytesIO()
        first, *rest = map(Image.fromarray, read_frames(path))
        first.save(buffer, "WEBP", save_all=True, append_images=rest, duration=_BETWEEN_FRAMES, loop=0, quality=85)
        data = buffer.getvalue()
    return f'<img alt="{escape(path.stem)}" src="data:image/{kind};base64,{base64.b64encode(data).decode()}">'
