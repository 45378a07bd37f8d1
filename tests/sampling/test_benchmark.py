"""launch.benchmark with a tiny random checkpoint: what it generates, keeps, checks, sums up, and how it ends."""
import json

import numpy as np
import pytest
from PIL import Image

from launch import benchmark, cli, sample
from tests.data.folders import SMALL_VLM
from tests.evaluation.benchmark_files import GENEVAL, VBENCH, VBENCH_I2V, fake, gedit_rows, write_prompts, write_table
from tests.train import tiny
from vino_jax.checkpoint import model as checkpoint
from vino_jax.sampling.video import read_frames, read_metadata


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder, vino = tmp_path_factory.mktemp("model") / "model", tiny.vino()
    checkpoint.save(folder, tiny.params(vino), vino.config, processor_files=sorted(SMALL_VLM.iterdir()),
                    sampling={"height": 32, "width": 32, "num_frames": 5, "steps": 1})
    return folder


@pytest.fixture(scope="module", autouse=True)
def loaded_once():
    """The commands share what they compile: each would load the checkpoint into a sampler of its own."""
    load, made = sample.Generator.load, {}

    def once(directory, *, tell, **options):
        key = directory, *options.items()
        made[key] = made.get(key) or load(directory, tell=tell, **options)
        return made[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sample.Generator, "load", once)
        yield


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: benchmark.main([str(a) for a in argv]))
    return ended.value.code


def outputs(folder):
    return {str(path.relative_to(folder)): path.stat().st_mtime_ns for path in folder.rglob("*") if path.suffix in (".png", ".mp4")}


def test_pictures_are_generated_kept_and_made_again_where_one_is_gone(model, tmp_path, capsys):
    prompts, out = write_prompts(tmp_path, "geneval"), tmp_path / "out"
    command = ("generate", "--benchmark", "geneval", "--prompts", prompts, "--checkpoint", model, "--output", out, "--partial",
               "--samples", 2, "--seed", 5)
    assert run(*command) == 0
    assert "4 tasks: 4 written, 0 kept, 0 failed" in capsys.readouterr().out
    made = outputs(out)
    assert sorted(made) == [f"0000{i}/samples/000{j}.png" for i in (0, 1) for j in (0, 1)]
    assert json.loads((out / "00001" / "metadata.jsonl").read_text()) == GENEVAL[1]
    recorded = json.loads((out / "seeds.json").read_text())
    assert {path: (int(read_metadata(out / path)["seed"]), read_metadata(out / path)["prompt"]) for path in made} == {
        path: (entry["seed"], entry["prompt"]) for path, entry in recorded.items()}
    assert [recorded[path]["seed"] - 5 * 1_000_003 for path in sorted(made)] == [0, 1, 100, 101]
    pixels = [read_frames(out / path)[0].astype(int) for path in sorted(made)]
    assert np.abs(pixels[0] - pixels[1]).max() > 0  # samples of one prompt have noise of their own

    (out / "00001/samples/0000.png").unlink()
    assert run(*command[:-1], 6) == 0  # with another seed: those that are there are told of
    told = capsys.readouterr().out
    assert "4 tasks: 1 written, 3 kept, 0 failed" in told and told.count("made with another seed") == 3
    again = outputs(out)
    assert [path for path in made if made[path] != again[path]] == ["00001/samples/0000.png"]
    recorded = json.loads((out / "seeds.json").read_text())
    assert [recorded[path]["seed"] for path in sorted(made)] == [5 * 1_000_003, 5 * 1_000_003 + 1, 6 * 1_000_003 + 100, 5 * 1_000_003 + 101]


def test_an_interrupted_run_is_gone_on_with(model, tmp_path, capsys, monkeypatch):
    prompts, out, write = write_prompts(tmp_path, "geneval"), tmp_path / "out", sample.write_output

    def interrupted(directory, index, pixels, metadata):
        if index == "00001/samples/0000":
            (out / "00001" / "samples").mkdir()
            (out / "00001" / "samples" / ".77.0000.png").write_bytes(b"half")  # as a kill leaves it
            raise KeyboardInterrupt
        return write(directory, index, pixels, metadata)

    command = ("generate", "--benchmark", "geneval", "--prompts", prompts, "--checkpoint", model, "--output", out, "--partial", "--samples", 1)
    with monkeypatch.context() as patch:
        patch.setattr(sample, "write_output", interrupted)
        assert run(*command) == 130
    assert sorted(json.loads((out / "seeds.json").read_text())) == ["00000/samples/0000.png", "00001/samples/0000.png"]
    first = outputs(out)["00000/samples/0000.png"]
    check = ("check", "--benchmark", "geneval", "--prompts", prompts, "--output", out, "--partial", "--samples", 1)
    assert run(*check) == 1
    told = capsys.readouterr()
    assert told.err.splitlines()[-1] == f"{out}/00001/samples/0000.png is missing" and "2 prompts, 2 outputs, 1 problems" in told.out
    assert run(*command) == 0 and run(*check) == 0
    assert "2 tasks: 1 written, 1 kept" in capsys.readouterr().out
    assert outputs(out)["00000/samples/0000.png"] == first and sorted(outputs(out)) == ["00000/samples/0000.png", "00001/samples/0000.png"]


def test_edits_of_a_table_and_one_whose_picture_is_broken(model, tmp_path, capsys):
    rows = gedit_rows()[:2]
    rows[1]["input_image"]["bytes"] = b"no picture"
    prompts, out = write_table(tmp_path / "gedit.parquet", rows), tmp_path / "results" / "vino"
    command = ("generate", "--benchmark", "gedit", "--prompts", prompts, "--checkpoint", model, "--output", out)
    assert run(*command, "--partial") == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "row 1: cannot read its input_image" in told.err and "2 tasks: 1 written, 0 kept, 1 failed" in told.out
    beside = out / "fullset" / "background_change" / "en"
    assert sorted(path.name for path in beside.iterdir()) == ["4c30.png", "4c30_SRCIMG.png"]
    with Image.open(beside / "4c30.png") as edited:
        assert edited.text["task"] == "ti2i" and edited.text["prompt"] == "to the sea en" and edited.width > edited.height
    assert run("check", "--benchmark", "gedit", "--prompts", prompts, "--output", out, "--partial") == 1
    assert "_SRCIMG.png is missing" in capsys.readouterr().err


def test_clips_from_pictures_and_one_whose_picture_is_gone(model, tmp_path, capsys):
    (tmp_path / "crop").mkdir()
    Image.new("RGB", (48, 32), "red").save(tmp_path / "crop" / "a goat.jpg")
    prompts = tmp_path / "info.json"
    prompts.write_text(json.dumps([VBENCH_I2V[0], {**VBENCH_I2V[1], "image_name": "gone.jpg"}]))
    out = tmp_path / "out"
    assert run("generate", "--benchmark", "vbench_i2v", "--prompts", prompts, "--images", tmp_path / "crop", "--checkpoint", model, "--output", out,
               "--partial", "--samples", 1) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "gone.jpg" in told.err and "videos/a goat-0" in told.err
    assert [path.name for path in (out / "videos").iterdir()] == [f"{VBENCH_I2V[0]['prompt_en']}-0.mp4"]
    assert len(read_frames(out / "videos" / f"{VBENCH_I2V[0]['prompt_en']}-0.mp4")) == 5


GENERATE = ("generate", "--benchmark", "geneval")


@pytest.mark.parametrize("extra, words", [
    ((*GENERATE, "--prompts", "nothing.jsonl"), "cannot read nothing.jsonl: No such file"),
    ((*GENERATE, "--prompts", "wrong"), "wrong: line 2: it has no tag"),
    ((*GENERATE, "--prompts", "geneval.json"), "geneval.json has 2 prompts, the benchmark has 553 (prompts/evaluation_metadata.jsonl)"),
    ((*GENERATE, "--prompts", "geneval.json", "--partial", "--samples", 0), "--samples 0 must be from 1 to 100"),
    ((*GENERATE, "--prompts", "geneval.json", "--partial", "--seed", -1), "seed -1 must be a whole number"),
    ((*GENERATE, "--prompts", "geneval.json", "--partial", "--steps", 0), "--steps 0 must be at least 1"),
    (("generate", "--benchmark", "vbench", "--prompts", "vbench.json", "--partial", "--num_frames", 1), "vbench takes clips"),
    (("generate", "--benchmark", "imgedit", "--prompts", "imgedit.json", "--partial"), "imgedit has reference pictures: --images says where"),
    (("generate", "--benchmark", "imgedit", "--prompts", "imgedit.json", "--partial", "--images", "no"),
     "the first would be no/animal/000342021.jpg"),
    (("generate", "--benchmark", "gen_eval", "--prompts", "geneval.json"), "invalid choice: 'gen_eval'"),
])
def test_wrong_flags_and_files_end_with_2_one_line_and_nothing_written(extra, words, model, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("geneval", "vbench", "imgedit"):
        write_prompts(tmp_path, name)
    (tmp_path / "wrong").write_text(f'{json.dumps(GENEVAL[0])}\n{{"prompt": "a photo"}}\n')
    assert run(*extra, "--checkpoint", model, "--output", "out", *(("--partial",) if "wrong" in extra else ())) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and words in told.err and not told.out
    assert not (tmp_path / "out").exists()


def test_check_of_a_folder(tmp_path, capsys):
    prompts = write_prompts(tmp_path, "vbench")
    command = ("check", "--benchmark", "vbench", "--prompts", prompts, "--partial", "--samples", 2)
    assert run(*command, "--output", tmp_path / "out") == 2 and "there is no folder" in capsys.readouterr().err
    fake("vbench", prompts, tmp_path / "out", 2)
    assert run(*command, "--output", tmp_path / "out") == 0
    assert capsys.readouterr().out == "vbench: 3 prompts, 6 outputs, 0 problems\n"
    (tmp_path / "out" / "videos" / f"{VBENCH[0]['prompt_en']}-1.mp4").write_bytes(b"no clip")
    assert run(*command, "--output", tmp_path / "out") == 1
    assert capsys.readouterr().err.startswith(f"cannot read {tmp_path}/out/videos/A house, 1800s. Victorian.-1.mp4")


def test_aggregate_prints_the_table_and_writes_it(tmp_path, capsys):
    marks = [("single_object", 1), ("two_object", 1), ("counting", 0), ("colors", 1), ("position", 0), ("color_attr", 0)]
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(json.dumps({"tag": tag, "correct": bool(correct)}) for tag, correct in marks))
    command = ("aggregate", "--benchmark", "geneval", "--scores", path)
    assert run(*command, "--json", tmp_path / "out.json") == 0
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "single_object  accuracy 1.0000  images 1" and told[-2] == "overall        0.5000"
    assert told[-1] == "note: 6 images are scored, the benchmark has 2212"
    assert json.loads((tmp_path / "out.json").read_text())["overall"] == {"overall": 0.5}
    path.write_text("\n".join(path.read_text().split("\n")[:-1]))
    assert run(*command) == 1
    told = capsys.readouterr().out
    assert "no score: color_attr: " in told and "overall" not in told
    assert run(*command, "--json", tmp_path / "no" / "out.json") == 2 and "cannot write" in capsys.readouterr().err
    path.write_text('{"tag": "colors"}')
    assert run(*command) == 2
    assert capsys.readouterr().err == f"error: {path}: line 1: it must have tag, a text, and correct, true or false\n"
