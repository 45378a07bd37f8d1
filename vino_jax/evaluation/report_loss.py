"""The held-out loss in the report: over a run's steps, by flow time and by task, and against another checkpoint on the same rows."""
import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from vino_jax.evaluation.chart import COLOURS, Line, label, legend, line_chart
from vino_jax.evaluation.statistics import interval

_SHOWN = 8  # worst rows


def paired(ours: Sequence[Mapping[str, Any]], theirs: Sequence[Mapping[str, Any]], task: str) -> tuple[float, float] | None:
    """Mean difference (ours - theirs) of a task's losses over the rows that both have, and half of its 95 % interval.

    rows: of vino_jax/evaluation/held_out.py: summary. Times and noise of a row are the same for both, so that the interval is that of the
    difference and much smaller than a loss's own. None where there are fewer than two rows.
    """
    ours, theirs = means(ours, task), means(theirs, task)
    apart = [ours[key] - theirs[key] for key in ours if key in theirs]
    return interval(apart) if len(apart) > 1 else None


def means(rows: Sequence[Mapping[str, Any]], task: str) -> dict[tuple[str, int], float]:
    """(bucket, index) -> mean over the flow times, of the rows of a task."""
    return {(row["bucket"], row["index"]): math.fsum(row["losses"]) / len(row["losses"]) for row in rows if row["task"] == task}


def worst_rows(scores: Mapping[str, Any], main: str) -> list[dict[str, Any]]:
    """{"task", "bucket", "index", "times": its loss over its task's mean} of the rows of the main checkpoint that lie highest above that
    mean, the worst first."""
    rows, found = scores["checkpoints"][main].get("loss", {}).get("rows", ()), []
    for task in dict.fromkeys(row["task"] for row in rows):
        of_task = means(rows, task)
        mean = math.fsum(of_task.values()) / len(of_task)
        found += [{"task": task, "bucket": bucket, "index": index, "times": loss / mean}
                  for (bucket, index), loss in of_task.items() if loss > mean]
    return sorted(found, key=lambda entry: -entry["times"])[:_SHOWN]


def loss_reading(scores: Mapping[str, Any], main: str) -> list[str]:
    """Plain sentences about the held-out losses of the checkpoints, computed from them."""
    found = {name: entry["loss"] for name, entry in scores["checkpoints"].items() if "loss" in entry}
    if main not in found:
        return []
    out = ["Held-out loss, mean over tasks: " + ", ".join(f"{label(name)} {loss['loss']:.4f}" for name, loss in found.items()) + "."]
    for other in (name for name in found if name != main):
        pairs = {task: pair for task in found[main]["tasks"] if (pair := paired(found[main]["rows"], found[other]["rows"], task))}
        lower, higher = ([task for task, (mean, width) in pairs.items() if sign * mean > width] for sign in (-1, 1))
        if pairs:
            out.append(f"Against the {label(other)}, on the same rows, times and noise, the loss of the {label(main)} model is lower in "
                       f"{len(lower)} of {len(pairs)} tasks, higher in {len(higher)}" + f" ({', '.join(higher)})" * bool(higher)
                       + ", and within the 95 % interval in the rest.")
    return out


def loss_section(scores: Mapping[str, Any], columns: Sequence[str]) -> str:
    """A chart by flow time and a table by task; "" where no loss was measured. columns: names of checkpoints, the one that others are set
    against last."""
    found = {name: scores["checkpoints"][name]["loss"] for name in columns if "loss" in scores["checkpoints"][name]}
    if not found:
        return ""
    lines = [Line(label(name), [(float(bin_[1:]) + 0.05, value) for bin_, value in loss["by_bin"].items()], COLOURS[i % len(COLOURS)])
             for i, (name, loss) in enumerate(reversed(found.items()))]
    chart = line_chart(lines, x_name="flow time (0 data, 1 noise)", y_name="held-out loss", size=(1040, 260))
    *others, main = found
    heads = [*map(label, found), *(f"{label(main)} − {label(other)}" for other in others)]
    rows = "".join(f"<tr>{''.join(cells)}</tr>" for task in found[main]["tasks"] for cells in [_row(task, found, main, others)])
    return ("<section><h2>Held-out loss</h2><p class=note>Mean squared velocity error on samples that training never draws, at one time in each "
            "tenth of the flow time. Times and noise are the same for every checkpoint, so that differences are paired. "
            "± one standard error over samples, of differences half of the 95 % interval. Green: lower beyond that interval.</p>"
            f"{chart}{legend(lines)}<table><tr><th></th>{''.join(f'<th>{escape(head)}</th>' for head in heads)}</tr>{rows}</table>"
            f"{_worst(worst_rows(scores, main), found, main)}</section>")


def _worst(entries: Sequence[Mapping[str, Any]], found: Mapping[str, Mapping[str, Any]], main: str) -> str:
    """What `worst_rows` names, with every checkpoint's loss of it; "" for nothing."""
    rows = ""
    for entry in entries:
        losses = (means(loss["rows"], entry["task"]).get((entry["bucket"], entry["index"])) for loss in found.values())
        cells = "".join("<td>–</td>" if loss is None else f"<td>{loss:.4f}</td>" for loss in losses)
        name = escape(f"{entry['task']} · {entry['bucket']} · row {entry['index']}")
        rows += f"<tr><td>{name}</td><td>{entry['times']:.2f} ×</td>{cells}</tr>"
    heads = "".join(f"<th>{escape(label(name))}</th>" for name in found)
    return (f"<h3>Worst rows of the {escape(label(main))} checkpoint</h3><table><tr><th>held-out row</th><th>its task's mean</th>{heads}</tr>{rows}"
            "</table>") if rows else ""


def _row(task: str, found: Mapping[str, Mapping[str, Any]], main: str, others: Sequence[str]) -> list[str]:
    cells = [f"<td>{escape(task)} · {found[main]['tasks'][task]['count']} samples</td>"]
    for loss in found.values():
        entry = loss["tasks"].get(task)
        error = f" ± {entry['error']:.4f}" if entry and entry["error"] is not None else ""
        cells.append(f"<td>{entry['loss']:.4f}{error}</td>" if entry else "<td>–</td>")
    for other in others:
        pair = paired(found[main]["rows"], found[other]["rows"], task)
        clear = pair is not None and pair[0] < -pair[1]
        cells.append(f'<td class="{"clear" if clear else ""}">{pair[0]:+.4f} ± {pair[1]:.4f}</td>' if pair else "<td>–</td>")
    return cells


def loss_chart(held_out: Mapping[str, Sequence[Mapping[str, Any]]]) -> str:
    """The held-out loss over the steps of runs (name -> records of held_out.jsonl); "" where none has measured it."""
    lines = [Line(label(run), [(r["total_step"], r["loss"]) for r in records], COLOURS[i % len(COLOURS)])
             for i, (run, records) in enumerate(held_out.items()) if records]
    if not lines:
        return ""
    return ("<h3>Held-out loss of the averaged weights</h3><p class=note>Each stage measures its own tasks, so curves may jump where one begins."
            f"</p>{line_chart(lines, x_name='steps since the start', y_name='held-out loss', size=(1040, 220))}{legend(lines)}")
