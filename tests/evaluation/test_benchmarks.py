"""Layouts of public benchmarks, read back by the rules of their own scorers (each named in vino_jax/evaluation/benchmarks.py), and prompt files
that are wrong."""
import json
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.evaluation.benchmark_files import GENEVAL, IMGEDIT, OPENS2V, VBENCH, VBENCH_I2V, fake, gedit_rows, write_prompts, write_table
from vino_jax.errors import UserError
from vino_jax.evaluation.benchmarks import BENCHMARKS, check, plan, read_items, remove_unfinished, write_seeds
from vino_jax.sampling.video import read_frames


def made(name, tmp_path):
    prompts = write_prompts(tmp_path, name)
    items = fake(name, prompts, tmp_path / "out")
    write_seeds(tmp_path / "out", plan(items, 7))
    return tmp_path / "out", items


def test_geneval(tmp_path):
    output, _ = made("geneval", tmp_path)
    found = []
    for folder in os.listdir(output):
        if not (output / folder).is_dir() or not folder.isdigit():
            continue
        metadata = json.loads((output / folder / "metadata.jsonl").read_text())
        images = [name for name in os.listdir(output / folder / "samples") if re.match(r"\d+\.png", name)]
        found.append((int(folder), metadata, sorted(images)))
    names = ["0000.png", "0001.png", "0002.png", "0003.png"]
    assert sorted(found, key=lambda entry: entry[0]) == [(0, GENEVAL[0], names), (1, GENEVAL[1], names)]
    assert (output / "00001" / "metadata.jsonl").exists()  # five digits, as in its README


def vbench_videos(folder, info):
    """Path by (entry, index): the ending is that of whichever file is listed first, the name is the exact prompt and the index."""
    names = os.listdir(folder)
    ending = Path(names[0]).suffix
    return {(number, i): folder / f"{entry['prompt_en']}-{i}{ending}" for number, entry in enumerate(info) for i in range(5)
            if f"{entry['prompt_en']}-{i}{ending}" in names}


def test_vbench(tmp_path):
    output, items = made("vbench", tmp_path)
    assert len(vbench_videos(output / "videos", VBENCH)) == 4 * 5  # the prompt that stands twice in the file finds its videos twice
    still = [f"{VBENCH[2]['prompt_en']}-{i}.mp4" for i in range(25)]  # for the static filter, whose glob is *.mp4
    assert set(still) < {path.name for path in (output / "videos").glob("*.mp4")}
    assert {path.suffix for path in (output / "videos").iterdir()} == {".mp4"}  # any other file there could set the ending
    assert len(list((output / "videos").iterdir())) == 5 + 5 + 25 and len(items) == 3


def test_vbench_i2v(tmp_path):
    output, items = made("vbench_i2v", tmp_path)
    assert len(vbench_videos(output / "videos", VBENCH_I2V)) == 2 * 5 == len(list((output / "videos").iterdir()))
    asked = [("i2v", entry["prompt_en"], (entry["image_name"],)) for entry in VBENCH_I2V]
    assert [(item.task, item.caption, item.images) for item in items] == asked


@pytest.mark.parametrize("name", ["opens2v", "opens2v_human", "opens2v_single"])
def test_opens2v(name, tmp_path):
    output, items = made(name, tmp_path)
    prefixes = [os.path.splitext(file)[0] for file in os.listdir(output / "videos") if file.endswith(".mp4")]
    assert sorted(prefixes) == sorted(OPENS2V)
    for item in items:
        entry = OPENS2V[os.path.basename(item.outputs[0])[:-4]]
        assert (item.task, item.caption, list(item.images)) == ("ti2v", entry["prompt"], entry["img_paths"])


def test_imgedit(tmp_path):
    output, items = made("imgedit", tmp_path)
    for key, entry in IMGEDIT.items():
        assert len(read_frames(output / "images" / f"{key}.png")) == 1
        assert (entry["prompt"], (entry["id"],)) in [(item.caption, item.images) for item in items]
    assert {item.task for item in items} == {"ti2i"}


@pytest.mark.parametrize("ending", ["parquet", "arrow"])
def test_gedit(ending, tmp_path):
    (tmp_path / "data").mkdir()
    write_table(tmp_path / "data" / f"a.{ending}", gedit_rows()[:3])
    write_table(tmp_path / "data" / f"b.{ending}", gedit_rows()[3:])
    items = fake("gedit", tmp_path / "data", tmp_path / "out")
    for row, item in zip(gedit_rows(), items, strict=True):
        beside = f"{tmp_path}/out/fullset/{row['task_type']}/{row['instruction_language']}/{row['key']}"
        with Image.open(f"{beside}_SRCIMG.png") as source, Image.open(f"{beside}.png") as edited:
            assert source.size == (24, 16) and edited.convert("RGB").resize(source.size)
            assert source.getpixel((0, 0)) == (row["key"] == "77aa", 0, 0)  # its own picture, not that of another row
        assert item.caption == row["instruction"] and f"{tmp_path}/out/{item.images[0]}" == f"{beside}_SRCIMG.png"


@pytest.mark.parametrize("name", BENCHMARKS)
def test_seeds_are_recorded_and_no_two_are_equal(name, tmp_path):
    output, items = made(name, tmp_path)
    recorded = json.loads((output / "seeds.json").read_text())
    assert sorted(recorded) == sorted(path for item in items for path in item.outputs)
    assert len({entry["seed"] for entry in recorded.values()}) == len(recorded)
    assert recorded == {o.path: {"seed": o.seed, "prompt": o.item.caption} for o in plan(items, 7)}
    assert not {o.seed for o in plan(items, 7)} & {o.seed for o in plan(items, 8)}


def test_the_rule_of_seeds(tmp_path):
    items = read_items(BENCHMARKS["geneval"], write_prompts(tmp_path, "geneval"), partial=True)
    assert [o.seed for o in plan(items, 0)] == [0, 1, 2, 3, 100, 101, 102, 103]
    assert plan(items, 3)[5].seed == 3 * 1_000_003 + 101 and plan(items, 2**32 - 1)[0].seed == (2**32 - 1) * 1_000_003 % 2**32


def test_an_output_of_another_run_keeps_its_seed_in_the_record(tmp_path):
    output, items = made("geneval", tmp_path)
    write_seeds(output, plan(items, 99))
    assert json.loads((output / "seeds.json").read_text())["00001/samples/0002.png"]["seed"] == 7 * 1_000_003 + 102
    (output / "00001/samples/0002.png").unlink()
    write_seeds(output, plan(items, 99))
    assert json.loads((output / "seeds.json").read_text())["00001/samples/0002.png"]["seed"] == 99 * 1_000_003 + 102


@pytest.mark.parametrize("name", BENCHMARKS)
def test_check_finds_nothing_wrong_and_then_what_is_wrong(name, tmp_path):
    output, items = made(name, tmp_path)
    assert check(BENCHMARKS[name], items, output) == []
    (output / items[0].outputs[0]).unlink()
    (output / items[1].outputs[0]).write_bytes((output / items[1].outputs[0]).read_bytes()[:60])
    first, second = check(BENCHMARKS[name], items, output)
    assert first == f"{output / items[0].outputs[0]} is missing" and second.startswith(f"cannot read {output / items[1].outputs[0]}")


def test_check_finds_a_missing_file_beside_and_another_prompt(tmp_path):
    output, items = made("geneval", tmp_path)
    (output / "00001" / "metadata.jsonl").unlink()
    os.replace(output / "00001/samples/0000.png", output / "00000/samples/0003.png")
    told = check(BENCHMARKS["geneval"], items, output)
    assert [line.replace(str(output), "") for line in told] == ["/00000/samples/0003.png was made from another prompt: 'a photo of three buses'",
                                                                "/00001/samples/0000.png is missing", "/00001/metadata.jsonl is missing"]


def test_half_written_files_of_a_killed_run_go_and_others_stay(tmp_path):
    output, items = made("opens2v", tmp_path)
    for name in (".123.faceobj_14.mp4", ".123.other.mp4", "notes.mp4"):
        (output / "videos" / name).write_bytes(b"")
    remove_unfinished(output, plan(items, 0))
    assert {path.name for path in (output / "videos").iterdir()} == {"faceobj_14.mp4", "singleobj_1.mp4", ".123.other.mp4", "notes.mp4"}


def test_a_picture_that_cannot_be_read_fails_its_edit_alone(tmp_path):
    rows = gedit_rows()
    rows[1]["input_image"]["bytes"] = b"no picture"
    rows[2]["input_image"] = None
    path = write_table(tmp_path / "gedit.parquet", rows)
    items = read_items(BENCHMARKS["gedit"], path, partial=True)
    problems = BENCHMARKS["gedit"].files(path, items, tmp_path / "out")
    assert sorted(problems) == ["fullset/background_change/cn/4c30.png", "fullset/subject-add/en/77aa.png"]
    assert "gedit.parquet: row 1: cannot read its input_image" in problems["fullset/background_change/cn/4c30.png"]
    assert len(list((tmp_path / "out").rglob("*_SRCIMG.png"))) == 2


def test_a_whole_prompt_file_needs_no_flag_and_samples_fewer_than_the_benchmarks_do(tmp_path):
    path = tmp_path / "evaluation_metadata.jsonl"
    path.write_text("\n".join(json.dumps({**GENEVAL[0], "prompt": f"a photo of {i}"}) for i in range(553)))
    assert len(plan(read_items(BENCHMARKS["geneval"], path), 0)) == 2212
    with pytest.raises(UserError, match="--samples 3 is less than the 4 that the benchmark takes of a prompt"):
        read_items(BENCHMARKS["geneval"], path, samples=3)
    assert len(plan(read_items(BENCHMARKS["geneval"], path, samples=6), 0)) == 553 * 6


@pytest.mark.parametrize("name, count", [("geneval", 553), ("vbench", 946), ("vbench_i2v", 1118), ("opens2v", 180), ("opens2v_human", 60),
                                         ("opens2v_single", 90), ("imgedit", 737), ("gedit", 1212)])
def test_a_part_of_the_prompts_needs_the_flag(name, count, tmp_path):
    path = write_prompts(tmp_path, name)
    with pytest.raises(UserError, match=rf"has [234] prompts, the benchmark has {count} .*--partial"):
        read_items(BENCHMARKS[name], path)


def changed(rows, number, **fields):
    rows = [dict(row) for row in rows]
    rows[number] |= fields
    return [{name: value for name, value in row.items() if value is not ...} for row in rows]


WRONG = {
    "empty": ("geneval", "", "is empty"),
    "blank lines": ("geneval", "\n \n", "is empty"),
    "no JSON": ("geneval", '{"prompt": "a"', "line 1 is no JSON"),
    "no object": ("geneval", '{"prompt": "a", "tag": "colors"}\n[1]', "line 2 is list, not an object"),
    "no prompt": ("geneval", changed(GENEVAL, 1, prompt=...), "line 2: it has no prompt"),
    "a prompt of another type": ("geneval", changed(GENEVAL, 0, prompt=3), "line 1: prompt is 3; it must be a text"),
    "an empty prompt": ("geneval", changed(GENEVAL, 0, prompt=" "), "line 1: prompt is ' '; it must be a text"),
    "unknown tag": ("geneval", changed(GENEVAL, 1, tag="colours"), "line 2: unknown tag 'colours'; known: single_object,"),
    "an object, not an array": ("vbench", {}, "must be a JSON array"),
    "no dimension": ("vbench", changed(VBENCH, 2, dimension=[]), "entry 2: dimension is []; it must be a list of texts"),
    "a name with a slash": ("vbench", changed(VBENCH, 1, prompt_en="black/white"), "entry 1: 'black/white-4.mp4' can be no name of a file"),
    "a name with a line break": ("vbench", changed(VBENCH, 1, prompt_en="a\nb"), "can be no name of a file"),
    "a long name": ("vbench", changed(VBENCH, 1, prompt_en="ä" * 130), "is too long for the name of a file: 266 bytes"),
    "a prompt twice": ("vbench_i2v", changed(VBENCH_I2V, 0, prompt_en="a goat"), "its output videos/a goat-0.mp4 is that of"),
    "a picture elsewhere": ("vbench_i2v", changed(VBENCH_I2V, 1, image_name="../goat.jpg"), "entry 1: '..' can be no name of a file"),
    "an absolute picture": ("opens2v", {"a": {"prompt": "x", "img_paths": ["/etc/a.png"]}}, "'a': '' can be no name of a file"),
    "no pictures": ("opens2v", {"a": {"prompt": "x", "img_paths": []}}, "'a': img_paths is []; it must be a list of texts"),
    "an array, not an object": ("imgedit", [], "must be a JSON object"),
    "unknown edit type": ("imgedit", {"7": {**IMGEDIT["673"], "edit_type": "hybrid"}}, "'7': unknown edit_type 'hybrid'; known: add,"),
    "a key twice": ("imgedit", '{"7": {}, "7": {}}', "the key '7' occurs twice"),
    "half a character": ("geneval", '{"prompt": "a \\ud83d", "tag": "colors"}', "line 1 is no JSON: 'utf-8' codec can't encode"),
    "deep": ("imgedit", "[" * 99_999, "is no JSON"),
    "bytes": ("imgedit", b"\xff\xfe", "cannot read"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_prompt_files(what, tmp_path):
    name, content, words = WRONG[what]
    path = tmp_path / "prompts.json"
    if not isinstance(content, (str, bytes)):
        content = "\n".join(map(json.dumps, content)) if name == "geneval" else json.dumps(content)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError, match=re.escape(words)) as told:
        read_items(BENCHMARKS[name], path, partial=True)
    assert str(path) in str(told.value) and "\n" not in str(told.value)


@pytest.mark.parametrize("rows, words", [
    (changed(gedit_rows(), 1, task_type="portrait"), "row 1: unknown task_type 'portrait'"),
    (changed(gedit_rows(), 1, instruction_language="en"), "row 1: its output fullset/background_change/en/4c30.png is that of"),
    ([{"key": "a"}], "has no column task_type, instruction, instruction_language; it has key"),
    (changed(gedit_rows(), 0, key="a/b"), "row 0: 'a/b.png' can be no name of a file"),
])
def test_wrong_tables(rows, words, tmp_path):
    path = write_table(tmp_path / "gedit.parquet", rows)
    with pytest.raises(UserError, match=re.escape(words)):
        read_items(BENCHMARKS["gedit"], path, partial=True)


@pytest.mark.parametrize("name", ["a.parquet", "a.arrow", "a.json", "folder"])
def test_what_is_no_table(name, tmp_path):
    if name == "folder":
        (tmp_path / name).mkdir()
    else:
        (tmp_path / name).write_bytes(np.arange(99, dtype=np.uint8).tobytes())
    with pytest.raises(UserError, match="cannot read|is no .parquet or .arrow file"):
        read_items(BENCHMARKS["gedit"], tmp_path / name, partial=True)


def test_a_file_that_is_not_there(tmp_path):
    for name in BENCHMARKS:
        with pytest.raises(UserError, match="cannot read .*nothing.* No such file|is no .parquet or .arrow"):
            read_items(BENCHMARKS[name], tmp_path / "nothing", partial=True)
