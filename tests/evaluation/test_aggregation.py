"""Aggregations of public benchmarks, against tables worked out by hand, and the files of their scorers that they are read from."""
import csv
import json
import re

import pytest

from vino_jax.errors import UserError
from vino_jax.evaluation import aggregation, score_files
from vino_jax.evaluation.aggregation import GEDIT_TYPES, VBENCH, VBENCH_I2V, VBENCH_I2V_GROUPS, Judged, gedit, geneval, imgedit, opens2v, vbench

# --- GenEval ---

TAGS = [("single_object", [True] * 4), ("two_object", [True, False]), ("counting", [False] * 3 + [True]), ("colors", [True]),
        ("position", [False, False]), ("color_attr", [True, True, False, True])]


def test_geneval_is_the_mean_of_its_tags_and_not_of_its_images():
    scores = geneval((tag, correct) for tag, marks in TAGS for correct in marks)
    assert {tag: row["accuracy"] for tag, row in scores.parts.items()} == {
        "single_object": 1.0, "two_object": 0.5, "counting": 0.25, "colors": 1.0, "position": 0.0, "color_attr": 0.75}
    assert scores.overall == {"overall": pytest.approx(3.5 / 6)}  # of images it would be 10 / 17


def test_geneval_without_a_tag_has_no_overall():
    scores = geneval([("colors", True)])
    assert scores.overall == {} and scores.missing == ("single_object", "two_object", "counting", "position", "color_attr")
    with pytest.raises(UserError, match="unknown tag 'color'"):
        geneval([("color", True)])


# --- VBench ---

# score, and (score - low) / (high - low) by hand
QUALITY = {"subject_consistency": (0.5731, 0.5), "background_consistency": (0.815375, 0.75), "temporal_flickering": (0.963, 0.900189),
           "motion_smoothness": (0.9975, 1.0), "aesthetic_quality": (0.6, 0.6), "imaging_quality": (0.7, 0.7), "dynamic_degree": (0.4, 0.4)}
SEMANTIC = {"object_class": (0.9, 0.9), "multiple_objects": (0.6, 0.6), "human_action": (0.95, 0.95), "color": (0.85, 0.85),
            "spatial_relationship": (0.65, 0.65), "scene": (0.4111, 0.5), "appearance_style": (0.1432, 0.5), "temporal_style": (0.091, 0.25),
            "overall_consistency": (0.273, 0.75)}


def test_vbench():
    scores = vbench({name: score for name, (score, _) in (QUALITY | SEMANTIC).items()})
    for name, (_, normalized) in (QUALITY | SEMANTIC).items():
        assert scores.parts[name.replace("_", " ")]["normalized"] == pytest.approx(normalized, abs=1e-6), name
    quality = (0.5 + 0.75 + 0.900189 + 1.0 + 0.6 + 0.7 + 0.5 * 0.4) / 6.5
    semantic = (0.9 + 0.6 + 0.95 + 0.85 + 0.65 + 0.5 + 0.5 + 0.25 + 0.75) / 9
    assert scores.overall == {"quality": pytest.approx(quality, abs=1e-6), "semantic": pytest.approx(semantic, abs=1e-6),
                              "total": pytest.approx((4 * quality + semantic) / 5, abs=1e-6)}
    assert scores.overall["total"] == pytest.approx(0.704553, abs=1e-6)


def test_vbench_of_some_dimensions_has_the_group_that_is_whole():
    scores = vbench({name: score for name, (score, _) in QUALITY.items()} | {"color": 0.5, "sharpness": 1.0})
    assert set(scores.overall) == {"quality"} and "color" not in scores.missing and len(scores.missing) == 8
    assert scores.notes == ("not counted: sharpness",)


def test_vbench_i2v():
    given = {"camera_motion": 0.5, "i2v_subject": 0.5731, "i2v_background": 0.815375, "subject_consistency": 0.5731, "background_consistency": 1.0,
             "motion_smoothness": 0.85175, "dynamic_degree": 0.2, "aesthetic_quality": 0.6, "imaging_quality": 0.7, "temporal_flickering": 0.9}
    scores = vbench(given, VBENCH_I2V, VBENCH_I2V_GROUPS)
    i2v, quality = (0.1 * 0.5 + 0.5 + 0.75) / 2.1, (0.5 + 1.0 + 0.5 + 0.5 * 0.2 + 0.6 + 0.7) / 5.5
    assert scores.overall == {"i2v": pytest.approx(i2v), "quality": pytest.approx(quality), "total": pytest.approx((i2v + quality) / 2)}
    assert scores.overall["total"] == pytest.approx((0.619048 + 0.618182) / 2, abs=1e-6)
    assert scores.notes == ("not counted: temporal flickering",)


def test_the_groups_hold_seven_and_nine_dimensions():
    assert [sum(d.group == group for d in VBENCH.values()) for group in ("quality", "semantic")] == [7, 9]


# --- ImgEdit ---


def judged(*marks):
    return "Brief reasoning: fine.\n" + "\n".join(f"Criterion {i}: {mark}" for i, mark in enumerate(marks))


def test_imgedit_rounds_as_its_scripts_do_and_averages_the_nine_types():
    texts = {"a1": judged(5, 4, 4), "a2": judged(1, 1, 2), "x": "no number: here", "y": judged(3, 3, 3), "e": judged("four", 5)}
    types = {"a1": "add", "a2": "add", "x": "add", "y": "style", "e": "extract"}
    scores = imgedit(texts, types)
    assert scores.parts == {"add": {"score": 2.83, "items": 2}, "extract": {"score": 5.0, "items": 1}, "style": {"score": 3.0, "items": 1}}
    assert scores.overall == {} and len(scores.missing) == 6 and scores.notes == ("1 items hold no score and are left out",)
    for i, kind in enumerate(("adjust", "replace", "remove", "background", "compose", "action")):
        texts[kind], types[kind] = judged(1, 2, i % 3), kind
    # 1.0 1.33 1.67 1.0 1.33 1.67 of the six
    assert imgedit(texts, types).overall == {"overall": pytest.approx((2.83 + 5.0 + 3.0 + 8.0) / 9)}
    of_rounded = imgedit({"p": judged(2, 2, 1), "q": judged(2, 2, 1), "r": judged(1, 1, 1)}, dict.fromkeys("pqr", "add"))
    assert of_rounded.parts["add"]["score"] == 1.45  # (1.67 + 1.67 + 1) / 3; of the marks as they are 1.44
    with pytest.raises(UserError, match="'z' is scored and is not in the prompt file"):
        imgedit({"z": judged(1)}, types)


# --- GEdit-Bench ---


def edits(language, intersection=True):
    """Two edits of each type: (9, 4) and (1, 1), but of tone transfer (16/9, 9) and (0, 10)."""
    for kind in GEDIT_TYPES:
        first, second = ((16 / 9, 9.0), (0.0, 10.0)) if kind == "tone_transfer" else ((9.0, 4.0), (1.0, 1.0))
        yield Judged(kind, language, *first, intersection)
        yield Judged(kind, language, *second, False)


def test_gedit_takes_the_root_of_each_edit_before_any_mean():
    scores = gedit(edits("en"))
    assert scores.parts["en background_change"] == {"semantics": 5.0, "quality": 2.5, "overall": 3.5, "edits": 2}  # (6 + 1) / 2, not sqrt(12.5)
    assert scores.parts["en tone_transfer"]["overall"] == pytest.approx(2.0)
    assert scores.overall["en overall"] == pytest.approx((10 * 3.5 + 2.0) / 11)
    assert scores.overall["en semantics"] == pytest.approx((10 * 5.0 + 8 / 9) / 11)
    assert scores.overall["en intersection overall"] == pytest.approx((10 * 6.0 + 4.0) / 11)
    assert not any(name.startswith("cn") for name in scores.overall) and "cn ps_human" in scores.missing


def test_gedit_averages_types_and_keeps_languages_apart():
    more = [Judged("ps_human", "en", 10.0, 10.0, False)] * 7  # a type with many edits weighs as much as one with few
    scores = gedit([*edits("en"), *more, *edits("cn", False)])
    assert scores.overall["en overall"] == pytest.approx((9 * 3.5 + (6 + 1 + 70) / 9 + 2.0) / 11)
    assert scores.overall["cn overall"] == pytest.approx((10 * 3.5 + 2.0) / 11)
    assert {name for name in scores.missing} == {f"cn intersection {kind}" for kind in GEDIT_TYPES}


@pytest.mark.parametrize("wrong, words", [(("portrait", "en", 1, 1), "unknown task type 'portrait'"), (("ps_human", "zh", 1, 1), "language 'zh'"),
                                          (("ps_human", "en", -1, 1), "must lie in 0..10"), (("ps_human", "en", 1, 11), "must lie in 0..10")])
def test_gedit_refuses(wrong, words):
    with pytest.raises(UserError, match=words):
        gedit([Judged(*wrong, True)])


# --- OpenS2V-Eval ---

VALUES = {"aesthetics": [4.75, 9.0, 1.0],  # cut to 4.75, 7 and 4, whose mean 5.25 is 1.25 / 3 of the range
          "motion smoothness": [0.9, -0.7], "motion amplitude": [0.3, 5.0], "FaceSim": [0.4, -0.2], "GmeScore": [0.6],
          "NexusScore": [0.0, 0.02, 0.07], "NaturalScore": [4.0, 2.0]}


def test_opens2v():
    scores = opens2v(VALUES)
    want = {"aesthetics": 1.25 / 3, "motion smoothness": 0.8, "motion amplitude": 0.65, "FaceSim": 0.1, "GmeScore": 0.6, "NexusScore": 0.7,
            "NaturalScore": 0.5}
    assert {name: row["score"] for name, row in scores.parts.items()} == {name: pytest.approx(value) for name, value in want.items()}
    total = 0.16 * 1.25 / 3 + 0.06 * 0.8 + 0.02 * 0.65 + 0.2 * 0.1 + 0.12 * 0.6 + 0.2 * 0.7 + 0.24 * 0.5
    assert scores.overall == {"total": pytest.approx(total)}
    human = 0.18 * 1.25 / 3 + 0.09 * 0.8 + 0.03 * 0.65 + 0.25 * 0.1 + 0.15 * 0.6 + 0.3 * 0.5
    assert opens2v(VALUES, human=True).overall == {"total": pytest.approx(human)}
    assert opens2v({**VALUES, "FaceSim": []}).missing == ("FaceSim",) and opens2v({**VALUES, "NexusScore": [0.0]}).overall == {}


def test_opens2v_agrees_with_its_leaderboard():
    """VINO's row of leaderboard/file_v1.1/results_Open-Domain.csv, in percent, and VACE-14B's of the human domain."""
    weights = [metric.weight for metric in aggregation.OPENS2V.values()]
    assert sum(w * x for w, x in zip(weights, (45.92, 94.73, 12.30, 52.00, 69.69, 42.67, 71.99))) == pytest.approx(57.85, abs=0.01)
    human = [metric.human_weight for metric in aggregation.OPENS2V.values()]
    assert sum(w * x for w, x in zip(human, (52.78, 94.96, 11.76, 64.65, 69.53, 0, 69.31))) == pytest.approx(65.78, abs=0.01)
    assert sum(weights) == pytest.approx(1) and sum(human) == pytest.approx(1)


# --- the scorers' files ---


def write(path, content):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_geneval_results(tmp_path):
    rows = [{"filename": "x", "tag": tag, "prompt": "p", "correct": correct} for tag, marks in TAGS for correct in marks]
    scores = score_files.geneval(write(tmp_path / "results.jsonl", "\n".join(map(json.dumps, rows)) + "\n"))
    assert scores.overall == {"overall": pytest.approx(3.5 / 6)} and scores.notes == ("17 images are scored, the benchmark has 2212",)


def test_vbench_results_in_one_file_or_many(tmp_path):
    both = {name: [score, [{"video_path": "x", "video_results": 1}]] for name, (score, _) in (QUALITY | SEMANTIC).items()}
    one = score_files.vbench(write(tmp_path / "one_eval_results.json", both))
    for name, value in both.items():
        write(tmp_path / "many" / f"{name}_eval_results.json", {name: value})
        write(tmp_path / "many" / f"{name}_full_info.json", [{"prompt_en": "x"}])
    assert one == score_files.vbench(tmp_path / "many") and one.overall["total"] == pytest.approx(0.704553, abs=1e-6)
    write(tmp_path / "many" / "again.json", {"color": [0.1, []]})
    with pytest.raises(UserError, match="color stands in two files"):
        score_files.vbench(tmp_path / "many")


def test_imgedit_results(tmp_path):
    prompts = write(tmp_path / "basic_edit.json", {key: {"id": "x", "prompt": "y", "edit_type": "add"} for key in "12"})
    scores = score_files.imgedit(write(tmp_path / "result.json", {"1": judged(2, 3, 4), "2": {"error": "no answer"}}), prompts)
    assert scores.parts == {"add": {"score": 3.0, "items": 1}}
    assert scores.notes == ("1 items hold no score and are left out", "2 items are scored, the benchmark has 737")
    with pytest.raises(UserError, match="give it as --prompts"):
        score_files.imgedit(tmp_path / "result.json", None)


def write_gedit(path, judgements):
    with path.open("w", newline="") as stream:
        writer = csv.writer(stream)
        writer.writerow(["source_image", "edited_image", "instruction", "sementics_score", "quality_score", "intersection_exist",
                         "instruction_language"])
        for i, e in enumerate(judgements):
            stem = f"/results/vino/fullset/{e.task_type}/{e.language}/{i}"
            writer.writerow([f"{stem}_SRCIMG.png", f"{stem}.png", "make it, blue", e.semantics, e.quality, e.intersection, e.language])


def test_gedit_results(tmp_path):
    everything = [*edits("en"), *edits("cn")]
    for kind in GEDIT_TYPES:
        write_gedit(tmp_path / f"vino_{kind}_gpt_score.csv", [e for e in everything if e.task_type == kind])
    write_gedit(tmp_path / "vino_combined_gpt_score.csv", everything)
    scores = score_files.gedit(tmp_path)
    assert scores.overall == gedit(everything).overall and len(scores.overall) == 12
    assert scores.notes == tuple(f"22 edits of {language} are scored, the benchmark has 606" for language in ("en", "cn"))
    assert score_files.gedit(tmp_path / "vino_combined_gpt_score.csv").overall == scores.overall
    write_gedit(tmp_path / "again_ps_human_gpt_score.csv", everything[8:9])
    write_gedit(tmp_path / "twice_ps_human_gpt_score.csv", everything[8:9])
    with pytest.raises(UserError, match="is scored twice"):
        score_files.gedit(tmp_path)


def test_opens2v_results(tmp_path):
    values = {"aesthetic_score": {"a": {"aes_score": 5.5}}, "motion_smoothness": {"a": {"motion_smoothness": 1.0}},
              "motion_amplitude": {"a": {"motion_fb": -0.5, "motion_lk": 7.2}}, "facesim": {"a": {"cur_score": 0.5, "arc_score": 0.9}},
              "gmescore": {"a": {"gme_score": 0.7}}, "nexusscore": {"a": {"nexus_score": 0.01}},
              "naturalscore_1": {"a": "4", "b": "3"}, "naturalscore_2": {"a": "5", "b": "3"}, "naturalscore_3": {"a": "3"}}
    for name, content in values.items():
        write(tmp_path / f"{name}.json", content)
    total = 0.16 * 0.5 + 0.06 + 0.02 * 0.5 + 0.2 * 0.5 + 0.12 * 0.7 + 0.2 * 0.2 + 0.24 * (3.5 - 1) / 4  # NaturalScore: 4 of a, 3 of b
    assert score_files.opens2v(tmp_path).overall == {"total": pytest.approx(total)}
    (tmp_path / "nexusscore.json").unlink()
    assert score_files.opens2v(tmp_path).missing == ("NexusScore",) and score_files.opens2v_human(tmp_path).overall


WRONG = {
    "not there": (score_files.vbench, None, "cannot read"),
    "no JSON": (score_files.vbench, "{", "is no JSON"),
    "a text": (score_files.vbench, {"color": ["high", []]}, "color: its score is 'high'; it must be a number"),
    "no number": (score_files.vbench, {"color": [float("nan"), []]}, "color: its score is nan; it must be a number"),
    "no score": (score_files.vbench, {"color": []}, "color: its score is []; it must be a number"),
    "empty": (score_files.geneval, "", "is empty"),
    "a mark that is no truth": (score_files.geneval, {"tag": "colors", "correct": 1}, "line 1: it must have tag, a text, and correct, true"),
    "a file, no folder": (score_files.opens2v, "{}", "is no folder"),
    "a csv without marks": (score_files.gedit, "edited_image\na/b/c.png\n", "row 1: sementics_score is None; it must be a number"),
    "a csv with a short path": (score_files.gedit, "edited_image,sementics_score,quality_score\nc.png,1,2\n",
                                "it must end with TYPE/LANGUAGE/KEY.png"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_score_files(what, tmp_path):
    read, content, words = WRONG[what]
    path = tmp_path / "scores" if content is None else write(tmp_path / "scores", content)
    with pytest.raises(UserError, match=re.escape(words)) as told:
        read(path)
    assert str(path) in str(told.value) and "\n" not in str(told.value)
