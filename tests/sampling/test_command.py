"""launch.sample with a tiny random checkpoint: what it writes, what it keeps, how it ends."""
import errno
import json
import os
import re
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from PIL import Image

from configs import models
from data_pipelines.tasks import Task
from launch import cli, sample
from tests.data.folders import ROOT, SMALL_VLM
from tests.tolerances import BATCH_ROW_ABS
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.sampling.pipeline import Sampler
from vino_jax.settings import VinoConfig, build

SAMPLING = {"height": 32, "width": 48, "num_frames": 5, "steps": 2, "guidance_image": 3.0}


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    """Looks like a finished training run: the model checkpoint is in model/."""
    folder, rng = tmp_path_factory.mktemp("run"), np.random.default_rng(0)
    config = build(VinoConfig, models.tiny())
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), Vino(config, Runtime()).abstract)
    checkpoint.save(folder / "model", params, config, processor_files=SMALL_VLM.glob("*.json"), sampling=SAMPLING)
    return folder


def run(*argv: object) -> int:
    with pytest.raises(SystemExit) as ended:
        cli.run(lambda: sample.main([str(a) for a in argv]))
    return ended.value.code


def test_tasks_are_written_kept_and_marked_as_failed(workdir, tmp_path, capsys):
    tasks = [{"index": "one", "task": "t2i", "caption": "a red circle"},
             {"index": 2, "task": "ti2i", "caption": "make it blue", "ref_image_paths": ["no.png"]},
             {"index": "three", "task": "t2i", "caption": "a blue square"}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    out = tmp_path / "out"
    command = ("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", out, "--save_latents", "--batch", 2)
    assert run(*command) == 1
    told = capsys.readouterr()
    assert "index 2" in told.err and "no.png" in told.err and told.err.count("\n") == 1
    assert "3 tasks: 2 written, 0 kept, 1 failed" in told.out and "three: t2i 1x32x48" in told.out
    assert sorted(p.name for p in out.iterdir()) == ["one.npz", "one.png", "three.npz", "three.png"]
    with Image.open(out / "one.png") as image:
        assert image.size == (48, 32) and image.text["prompt"] == "a red circle" and image.text["seed"] == "0"
        assert image.text["steps"] == "2" and image.text["guidance"] == "3" and "vino_jax " in image.text["software"]
    latents = np.load(out / "one.npz")["latents"]
    assert latents.shape == (1, 4, 1, 4, 6) and latents.dtype == np.float32

    written = (out / "one.png").stat().st_mtime_ns
    (out / "three.npz").unlink()  # without its latents it is not finished
    assert run(*command, "--batch", 1) == 1
    assert "3 tasks: 1 written, 1 kept, 1 failed" in capsys.readouterr().out
    assert (out / "one.png").stat().st_mtime_ns == written and (out / "three.npz").exists()


def test_initial_noise_and_overwrite(workdir, tmp_path, capsys):
    tasks = [{"index": i, "task": "t2i", "caption": "a red circle"} for i in ("a", "b", "c")]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    noise = np.random.default_rng(0).standard_normal((1, 4, 1, 4, 6)).astype(np.float32)
    np.savez(tmp_path / "noise.npz", a=noise, b=noise[..., ::-1])
    out = tmp_path / "out"
    command = ("--checkpoint", workdir / "model", "--tasks", tmp_path / "tasks.json", "--output", out, "--save_latents", "--steps", 1)
    assert run(*command, "--initial_noise", tmp_path / "noise.npz") == 1
    assert "task c: " in capsys.readouterr().err
    a, b = (np.load(out / f"{i}.npz")["latents"] for i in "ab")
    assert np.abs(a - b).max() > 0.1
    assert run(*command, "--overwrite", "--seed", 1) == 0
    assert "3 written, 0 kept, 0 failed" in capsys.readouterr().out
    assert np.abs(np.load(out / "a.npz")["latents"] - a).max() > 0.1


def test_seeds_progress_and_the_contact_sheet(workdir, tmp_path, capsys):
    """A task's own seed is that of the flag; tasks of one shape run side by side, also where another one lies between them."""
    tasks = [{"index": "a", "task": "t2i", "caption": "a red circle", "seed": 7}, {"index": "clip", "task": "t2v", "caption": "a ball"},
             {"index": "b", "task": "t2i", "caption": "a red circle"}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    command = ("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--steps", 3, "--save_latents")
    assert run(*command, "--output", tmp_path / "one", "--batch", 2, "--contact_sheet", tmp_path / "sheet.png") == 0
    told = capsys.readouterr().out
    assert "    a, b: 3 steps, 1 passes a step: positive + negative\n" in told and "clip: step 2 of 3, " in told and " s of denoising left" in told
    assert run(*command, "--output", tmp_path / "two", "--seed", 7) == 0
    a, b, again, other = (np.load(tmp_path / name)["latents"] for name in ("one/a.npz", "one/b.npz", "two/b.npz", "one/clip.npz"))
    assert np.abs(a - again).max() < BATCH_ROW_ABS * np.abs(a).max() and np.abs(a - b).max() > 0.1 and other.shape[2] == 2
    with Image.open(tmp_path / "sheet.png") as sheet:
        pixels = np.asarray(sheet.convert("RGB"))
    thirds = [part[:, 320:].std() for part in np.split(pixels[:len(pixels) // 3 * 3], 3)]
    assert min(thirds) > 5  # a picture in every row

    tasks[2]["caption"] = "a blue square"
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    assert run(*command, "--output", tmp_path / "one", "--seed", 3) == 0
    told = capsys.readouterr().out
    assert "a: kept" in told and "b: kept" in told and "b.png, made with another prompt and seed (--overwrite" in told


def test_a_result_takes_the_place_of_one_of_another_task(tmp_path):
    flags = SimpleNamespace(output=tmp_path, save_latents=False, step_cache=1, seed=0)
    packed = dict(index="1.5", prompt="a red circle", seed=0, guidance=1.0, image_guidance=1.0, shift=1.0)
    for task, frames, ending, other in (("t2i", 1, ".png", ".mp4"), ("t2v", 5, ".mp4", ".png"), ("t2i", 1, ".png", ".mp4")):
        result = SimpleNamespace(pixels=np.zeros((frames, 16, 16, 3), np.uint8))
        assert sample._write(SimpleNamespace(task=task, **packed), result, flags, 2) == tmp_path / f"1.5{ending}"
        assert not (tmp_path / f"1.5{other}").exists()
    told = sample.kept(flags, [Task("1.5", "t2v", "a red circle")])
    assert told == {"1.5": (str(tmp_path / "1.5.png"), ["task"])}


def test_step_caching_is_told_and_stands_in_the_output(workdir, tmp_path, capsys):
    (tmp_path / "tasks.json").write_text(json.dumps([{"index": "a", "task": "t2i", "caption": "a red circle"}]))
    command = ("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "out", "--steps", 4, "--step_cache", 2)
    assert run(*command) == 0
    (told,) = re.findall(r"what the blocks add changed by up to ([0-9.]+)% in the 2 steps", capsys.readouterr().out)
    assert float(told) > 0
    with Image.open(tmp_path / "out" / "a.png") as image:
        assert image.text["step_cache"] == "2"


def test_the_documented_script_runs(workdir):
    """docs/sampling.md: the same from Python; here with another checkpoint, and fewer steps."""
    (script,) = re.findall(r"```python\n(.*?)```", (ROOT / "docs" / "sampling.md").read_text(), re.DOTALL)
    made = {}
    exec(script.replace("runs/demo/train", str(workdir)).replace("steps=12", "steps=1"), made)
    assert made["picture"].pixels.shape == (1, 32, 48, 3) and made["picture"].latents.shape == (1, 1, 4, 6, 4)
    assert [clip.shape for clip in made["clips"]] == 3 * [(5, 32, 48, 3)] and np.abs(made["clips"][0].astype(int) - made["clips"][1]).max() > 0


def test_an_output_that_cannot_be_read_is_kept(workdir, tmp_path, capsys):
    """It is no reason to leave the other tasks undone, nor to write over it."""
    tasks = [{"index": name, "task": "t2i", "caption": "a red circle"} for name in ("broken", "fine")]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "broken.png").write_bytes(b"no picture")
    assert run("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "out", "--steps", 1) == 0
    assert "1 written, 1 kept, 0 failed" in capsys.readouterr().out and (tmp_path / "out" / "broken.png").read_bytes() == b"no picture"


def test_image_guidance_without_an_image_to_leave_out_fails_its_task(workdir, tmp_path, capsys):
    Image.new("RGB", (48, 32), "red").save(tmp_path / "red.png")
    tasks = [{"index": "base", "task": "ti2i", "caption": "x", "ref_image_paths": ["red.png"], "ref_image_have_base": True},
             {"index": "nan", "task": "t2i", "caption": "x", "seed": float("nan")}, {"index": "fine", "task": "t2i", "caption": "x"}]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    command = ("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "out", "--root", tmp_path, "--steps", 1)
    assert run(*command, "--image_guidance", 2) == 1
    told = capsys.readouterr()
    assert "task base: image guidance 2 has no image to leave out" in told.err and "(index nan): seed is nan" in told.err
    assert told.err.count("\n") == 2 and "1 written, 0 kept, 2 failed" in told.out


@pytest.mark.parametrize("extra, words", [
    (("--stepz", 3), "unrecognized arguments: --stepz 3"),
    (("--steps", "many"), "invalid int value: 'many'"),
    (("--steps", 0), "--steps 0 must be at least 1"),
    (("--step_cache", 0), "--step_cache 0 must be at least 1"),
    (("--height", 50), "height 50 and width 48 must be multiples of 16"),
    (("--num_frames", 8), "num_frames 8 must be 4k+1"),
    (("--num_frames", 93), "num_frames 93 must be 4k+1 and at most 89"),
    (("--guidance", "nan"), "guidance nan must be a finite number"),
    (("--image_guidance", "inf"), "image_guidance inf must be a finite number"),
    (("--seed", -1), "seed -1 must be a whole number from 0 to 4294967295"),
    (("--contact_sheet", "sheet.jpg"), "--contact_sheet sheet.jpg must end with .png"),
    (("--contact_sheet", "README.md/sheet.png"), "cannot write to the folder README.md"),
    (("--dtype", "float8"), "invalid choice: 'float8'"),
    (("--mesh", "date=2"), "unknown mesh axis 'date'"),
    (("--initial_noise", "nothing.npz"), "cannot read the initial noise nothing.npz"),
    (("--initial_noise", "README.md"), "cannot read the initial noise README.md"),
    (("--tasks", "nothing.json"), "cannot read the task file nothing.json"),
    (("--checkpoint", "nothing"), "nothing is no model checkpoint"),
])
def test_wrong_flags_and_files_end_with_2_and_one_line(extra, words, workdir, tmp_path, capsys):
    (tmp_path / "tasks.json").write_text(json.dumps([{"index": 1, "task": "t2i", "caption": "x"}]))
    assert run("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "out", *extra) == 2
    told = capsys.readouterr()
    assert told.err.startswith("error: ") and told.err.count("\n") == 1 and words in told.err
    assert not (tmp_path / "out").exists()


def damaged(path):
    np.savez(path, a=np.zeros((1, 4, 1, 4, 6), np.float32))
    path.write_bytes(path.read_bytes()[:-30])


NOISE = {
    "an array": (lambda p: np.save(p.with_suffix(".npy"), np.zeros((1, 4, 1, 4, 6))) or p.with_suffix(".npy").rename(p), "is no .npz"),
    "damaged": (damaged, "cannot read the initial noise"),
    "empty": (lambda p: p.touch(), "cannot read the initial noise"),
    "words": (lambda p: np.savez(p, a=np.full((1, 4, 1, 4, 6), "x")), "must be floating-point (1, C, T, H, W)"),
    "flat": (lambda p: np.savez(p, a=np.zeros(9)), "is float64 of the shape (9,)"),
}


@pytest.mark.parametrize("kind", NOISE)
def test_noise_of_a_wrong_kind(kind, tmp_path):
    write, words = NOISE[kind]
    write(tmp_path / "noise.npz")
    with pytest.raises(UserError, match=re.escape(words)):
        sample.read_noise(tmp_path / "noise.npz")


def test_an_output_that_takes_nothing_is_told_before_the_model_is_loaded(workdir, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sample.Generator, "load", None)
    (tmp_path / "tasks.json").write_text(json.dumps([{"index": 1, "task": "t2i", "caption": "x"}]))
    assert run("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "tasks.json") == 2
    told = capsys.readouterr().err
    assert told.startswith("error: cannot write to the folder ") and told.count("\n") == 1


def test_a_disk_that_fills_up_fails_its_tasks(workdir, tmp_path, capsys, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(sample, "write_output", full)
    (tmp_path / "tasks.json").write_text(json.dumps([{"index": 1, "task": "t2i", "caption": "x"}]))
    assert run("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "out", "--steps", 1) == 1
    told = capsys.readouterr()
    assert "task 1: cannot write to" in told.err and "No space left on device" in told.err and "0 written, 0 kept, 1 failed" in told.out


def test_a_task_without_memory_fails_and_what_takes_less_is_told(workdir, tmp_path, capsys, monkeypatch):
    def no_memory(*_, **__):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: out of\nmemory")

    monkeypatch.setattr(Sampler, "generate_many", no_memory)
    (tmp_path / "tasks.json").write_text(json.dumps([{"index": "one", "task": "t2i", "caption": "a red circle"}]))
    assert run("--checkpoint", workdir, "--tasks", tmp_path / "tasks.json", "--output", tmp_path / "out") == 1
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "task one: RESOURCE_EXHAUSTED: out of memory; --vae_tiling full" in told


def test_a_missing_flag_is_named(capsys):
    assert run("--tasks", "x.json") == 2
    assert capsys.readouterr().err == "error: the following arguments are required: --checkpoint, --output; see --help\n"
