"""The report: what it says follows from the numbers, all is inside one small file, wrong input is told."""
import json
import re

import numpy as np
import pytest

from launch import report
from vino_jax.errors import UserError
from vino_jax.evaluation import chart
from vino_jax.evaluation.held_out import summary
from vino_jax.evaluation.report import ahead, ends, reading, stage_reading, write_report
from vino_jax.evaluation.report_loss import loss_reading, paired, worst_rows
from vino_jax.evaluation.statistics import interval
from vino_jax.sampling.video import write_output


def rate(mean, count=100, chance=0.125):
    return {"mean": mean, "count": count, "chance": chance}


def scores():
    def tasks(colour, followed):
        return {"t2i": {"count": 100, "attributes": {"colour": rate(colour), "shape": rate(0.17, chance=1 / 6)}},
                "tv2v": {"count": 40, "attributes": {
                    "followed": rate(followed, 40, 0.2), "preserved": {"mean": 21.5, "count": 40, "chance": None},
                    "steadiness": {"mean": 0.98, "count": 40, "chance": None}}}}

    return {"settings": {"steps": 12, "seed": 0, "prompts": 100}, "checkpoints": {
        "trained": {"parameters": {"mmdit": 1_500_000}, "fresh": [], "tasks": tasks(0.5, 0.6)},
        "base": {"parameters": {}, "fresh": ["connector"], "tasks": tasks(0.12, 0.1)},
        "no_stage1": {"parameters": {}, "fresh": [], "tasks": tasks(0.48, 0.55)}}}


@pytest.fixture
def run(tmp_path):
    """Two runs and an evaluation, as launch.train and launch.evaluate leave them."""
    for name, stages in (("train", ("stage1", "stage2")), ("no_stage1", ("stage2",))):
        folder = tmp_path / name
        folder.mkdir()
        mesh = {"preset": "fsdp", "data": 2, "fsdp": 2, "seq": 1, "tensor": 1}
        (folder / "config.json").write_text(json.dumps({"mesh": mesh, "stages": {s: {"steps": 50} for s in stages}}))
        records = [{"stage": s, "step": 10 * i, "total_step": 50 * n + 10 * i, "loss": 2.0 - 0.1 * i, "loss_t0.0": None,
                    "loss_t0.1": 1.5 - 0.1 * i, "loss_t2v": 1.0, "seconds": 3.0, "data_wait_share": 0.01 * i}
                   for n, s in enumerate(stages) for i in range(1, 6)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records) + '{"cut of')
    evaluation, rng = tmp_path / "scores", np.random.default_rng(0)
    evaluation.mkdir()
    (evaluation / "scores.json").write_text(json.dumps(scores()))
    samples = {}
    for task, frames in (("t2i", 1), ("tv2v", 5)):
        pixels = rng.integers(0, 256, (frames, 32, 32, 3), np.uint8)
        places = [evaluation / kind / task for kind in ("ideal", "references", *(f"outputs/{n}" for n in scores()["checkpoints"]))]
        files = [str(write_output(place, "000", pixels, {}).relative_to(evaluation)) for place in places]
        entry = {"index": "000", "prompt": f"a <{task}> prompt", "references": files[1:2], "ideal": files[0]}
        samples[task] = [entry, {**entry, "worst": ["colour", "shape"]}] if task == "t2i" else [entry]
    (evaluation / "samples.json").write_text(json.dumps(samples))
    return tmp_path


def write(run, **changes):
    given = {"title": "A & B", "lead": "what was run", "facts": {"date": "today"}, "evaluation": run / "scores",
             "timings": [("train", 12.0)], "runs": {"trained": run / "train", "no_stage1": run / "no_stage1"}}
    return write_report(run / "report.html", **{**given, **changes})


def test_one_file_without_network_with_everything_in_it(run):
    page = write(run).read_text()
    assert not re.search(r'(src|href)="(?!data:)|https?://|<script', page)
    assert page.count("data:image/png;base64,") == 10 and page.count("data:image/webp;base64,") == 5  # ideal, reference, three outputs
    assert page.index("Worst cases") < page.index("wrong: colour, shape") < page.index("Contact sheets")
    assert "A &amp; B" in page and "a &lt;t2i&gt; prompt" in page and page.count("<svg") == 3  # the whole run, two stages
    assert "data 2, fsdp 2" in page and "21.5 dB" in page and "4.0 ×" in page and len(page) < 3e6
    assert "30 s without compiling, 3.0 % of them waiting for data" in page


def test_readings_are_computed_from_the_numbers():
    text = "\n".join(reading(scores()))
    assert "On 100 unseen text prompts for pictures" in text and "colour in 50 % of the 100 that ask for one (4.0 × chance)" in text
    assert "Clearly above chance (3 standard errors): t2i colour 50 % (4.0 × chance), tv2v instruction followed" in text
    assert "Not clearly above chance: t2i shape" in text
    assert "Against the untrained base, the trained model is ahead in 2 of 3 rates, behind in 0, and even within 2 standard errors" in text
    assert "stage 1 skipped, the full curriculum is ahead in 0 of 3" in text
    assert "tv2v 60 % / 10 %; beyond doubt better in: tv2v" in text

    turned = scores()
    found = turned["checkpoints"]
    found["trained"], found["base"] = found["base"], found["trained"]
    text = "\n".join(reading(turned))
    assert "Nothing is clearly above chance" in text and "behind in 2" in text and "beyond doubt better in: none" in text


def test_difference_in_standard_errors():
    assert ahead(rate(0.5), rate(0.5)) == 0 and ahead(rate(1.0), rate(1.0)) == 0
    assert ahead(rate(0.6), rate(0.4)) == pytest.approx(0.2 / np.sqrt(0.5 * 0.5 * 0.02))


def test_stage_losses_skip_what_was_not_seen():
    records = [{"loss": x} for x in (4.0, None, 3.0, 2.0, 1.0, 0.5)]
    assert ends(records) == (4.0, 0.5) and np.isnan(ends(records, "loss_t0.0")).all()
    assert stage_reading({"trained": {"stage1": records}}) == ["Loss, trained: stage1 4.000 → 0.500 (-88 %)."]


def test_missing_files_are_told(run):
    (run / "scores" / "samples.json").unlink()
    with pytest.raises(UserError, match="samples.json"):
        write(run)
    with pytest.raises(UserError, match="cannot read the metrics of the run"):
        (run / "scores" / "samples.json").write_text("{}")
        write(run, runs={"trained": run / "nowhere"})


def losses(shift, rows=4):
    """Of two tasks, rows far apart among each other; another `shift` moves all of them by nearly the same."""
    return summary([{"task": task, "bucket": "b", "index": i, "losses": [1.0 + 0.3 * i + shift + 0.001 * i * shift] * 10}
                    for task in ("t2i", "tv2v") for i in range(rows)])


def test_losses_are_compared_row_by_row(run):
    ours, theirs = losses(-0.1), losses(0.0)
    mean, error = paired(ours["rows"], theirs["rows"], "t2i")
    apart = [-0.1 - 0.0001 * i for i in range(4)]
    assert (mean, error) == pytest.approx(interval(apart))
    assert error < 0.01 * ours["tasks"]["t2i"]["error"]
    assert paired(ours["rows"], losses(0.0, rows=1)["rows"], "t2i") is None

    given = scores()
    given["checkpoints"]["trained"]["loss"], given["checkpoints"]["base"]["loss"] = ours, theirs
    text = "\n".join(loss_reading(given, "trained"))
    assert "mean over tasks: trained 1.3498, untrained base 1.4500" in text
    assert "Against the untrained base, on the same rows, times and noise, the loss of the trained model is lower in 2 of 2 tasks" in text
    turned = scores()
    turned["checkpoints"]["trained"]["loss"], turned["checkpoints"]["base"]["loss"] = theirs, ours
    assert "lower in 0 of 2 tasks, higher in 2 (t2i, tv2v)" in "\n".join(loss_reading(turned, "trained"))
    (run / "scores" / "scores.json").write_text(json.dumps(given))
    (run / "train" / "held_out.jsonl").write_text('{"stage": "stage1", "step": 0, "total_step": 0, "loss": 2.0}\n{"cut of')
    page = write(run).read_text()
    assert "-0.1001 ± 0.0002" in page and page.count("<svg") == 5  # two more: over the steps, and by flow time
    assert "trained − untrained base" in page and 'class="clear">-0.1001' in page
    told = json.loads((run / "report.json").read_text())
    assert told["curves"]["trained"]["held_out"] == [{"stage": "stage1", "step": 0, "total_step": 0, "loss": 2.0}]
    assert told["worst_rows"] == worst_rows(given, "trained") and "Worst rows of the trained checkpoint" in page
    assert told["scores"] == given and any("lower in 2 of 2" in sentence for sentence in told["sentences"])


def test_worst_rows_lie_highest_above_the_mean_of_their_own_task():
    def rows(task, *losses):
        return [{"task": task, "bucket": "b", "index": i, "losses": [loss - 0.5, loss + 0.5]} for i, loss in enumerate(losses)]

    found = worst_rows({"checkpoints": {"trained": {"loss": {"rows": [*rows("t2i", 10.0, 11.0, 12.0), *rows("i2v", 3.0, 1.0)]}}}}, "trained")
    assert [(row["task"], row["index"]) for row in found] == [("i2v", 0), ("t2i", 2)]
    assert [row["times"] for row in found] == pytest.approx([1.5, 12 / 11])
    assert worst_rows({"checkpoints": {"trained": {"tasks": {}}}}, "trained") == []


def test_the_command(run, capsys):
    given = scores()
    for entry in given["checkpoints"].values():
        entry["tasks"], entry["loss"] = {}, losses(0.0)
    (run / "scores" / "scores.json").write_text(json.dumps(given))
    (run / "scores" / "samples.json").unlink()  # only "loss" was measured
    flags = ["--evaluation", str(run / "scores"), "--output", str(run / "out" / "r.html")]
    report.main([*flags, f"--run=trained={run / 'train'}"])
    assert "Held-out loss" in (run / "out" / "r.html").read_text() and (run / "out" / "r.json").exists()
    for extra, words in ((["--run", "nothing"], "must be NAME=WORKDIR"), (["--run", "a=x", "--run", "a=y"], "each name once"),
                         (["--output", "page"], "must end with .html"), (["--evaluation", str(run / "none")], "scores.json")):
        with pytest.raises(UserError, match=words):
            report.main([*flags, *extra])


def test_charts():
    assert chart.ticks(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0]) and chart.ticks(3, 3) == [3]
    assert chart.smooth([(0, 0.0), (1, 3.0), (2, 6.0)], 3) == [(0, 1.5), (1, 3.0), (2, 4.5)]
    svg = chart.line_chart([chart.Line("a", [(0, 1.0), (10, 2.0), (20, float("nan"))], "#000")], x_name="x", y_name="y")
    x, y = (np.array(p.split(","), float) for p in re.search(r'points="([^"]*)"', svg)[1].split())
    assert x[0] < y[0] and x[1] > y[1]  # rises to the right: smaller y is higher
    assert "no data" in chart.line_chart([], x_name="x", y_name="y")
