"""launch.evaluate with tiny random checkpoints: what it scores, keeps, makes fresh, and that the seed decides."""
import json

import jax
import numpy as np
import pytest
from PIL import Image

from configs import models
from data_pipelines import shapes
from launch import evaluate
from tests.data.folders import SMALL_VLM
from vino_jax.checkpoint import model as checkpoint
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.nn.runtime import Runtime
from vino_jax.settings import VinoConfig, build

CONFIG = """
from configs import shapes
def get_config():
    config = shapes.get_config()
    config.model.queries, config.model.connector_ratio = 4, 2
    config.sampling.height, config.sampling.width, config.sampling.num_frames, config.sampling.steps = 32, 32, 5, 1
    return config
"""


@pytest.fixture(scope="module", autouse=True)
def quick_compile():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """full/ with all parts, base/ without connectors and queries, and a config."""
    folder, rng = tmp_path_factory.mktemp("evaluate"), np.random.default_rng(0)
    config = build(VinoConfig, models.tiny())
    params = jax.tree.map(lambda x: (0.1 * rng.standard_normal(x.shape)).astype(np.float32), Vino(config, Runtime()).abstract)
    files = sorted(SMALL_VLM.glob("*.json"))
    checkpoint.save(folder / "full", params, config, processor_files=files)
    checkpoint.save(folder / "base", {name: params[name] for name in ("mmdit", "vae", "vlm")}, config, processor_files=files)
    (folder / "config.py").write_text(CONFIG)
    return folder


def run(folder, output, *extra: object):
    evaluate.main([str(a) for a in ("--checkpoint", folder / "full", "--config", folder / "config.py", "--output", output, "--prompts", 3,
                                    "--loss_rows", 3, "--edits", 3, "--clips", 2, "--batch", 2, "--show", 1, *extra)])
    return json.loads((output / "scores.json").read_text())["checkpoints"]


def test_scores_samples_and_what_is_kept(folder, tmp_path, capsys):
    alone = run(folder, tmp_path / "a", "--tasks", "t2i")
    assert list(alone) == ["trained"] and alone["trained"]["fresh"] == []
    capsys.readouterr()
    found = run(folder, tmp_path / "a", "--against", f"base={folder / 'base'}", "--tasks", "t2i,tv2v")
    told = capsys.readouterr().out
    assert "trained t2i: kept, 3 samples" in told and "trained t2i: 3" not in told and "trained tv2v: 2 samples" in told
    trained, base = found["trained"], found["base"]
    assert trained["tasks"]["t2i"] == alone["trained"]["tasks"]["t2i"]
    assert base["fresh"] == ["connector", "vae_connector", "queries"] and base["parameters"] == trained["parameters"]
    t2i, tv2v = (base["tasks"][task] for task in ("t2i", "tv2v"))
    assert t2i["count"] == 3 and t2i["attributes"]["colour"]["chance"] == 1 / 8
    assert tv2v["attributes"]["followed"]["count"] == 2 and tv2v["attributes"]["preserved"]["mean"] > 0
    assert 0 < tv2v["attributes"]["steadiness"]["mean"] <= 1
    posed = [shapes.sample(shapes.held_out(0), i, "tv2v", 5, 32, 32) for i in range(2)]
    assert [values["edit"] for values in tv2v["samples"]] == [sample.expected["edit"]["kind"] for sample in posed]
    assert not any("edit" in values for values in t2i["samples"])
    made = {str(p.relative_to(tmp_path / "a" / "outputs")) for p in (tmp_path / "a" / "outputs").rglob("*.*")}
    names = ("t2i/000.png", "t2i/001.png", "t2i/002.png", "tv2v/000.mp4", "tv2v/001.mp4")
    assert made == {f"{checkpoint}/{name}" for checkpoint in ("base", "trained") for name in names}
    first, worst = json.loads((tmp_path / "a" / "samples.json").read_text())["tv2v"]
    assert "worst" not in first and worst["worst"] == ["followed"]  # random weights follow nothing
    assert all((tmp_path / "a" / f).exists() for sample in (first, worst) for f in [sample["ideal"], *sample["references"]])
    assert trained["loss"]["tasks"].keys() == {"t2i", "tv2v"} and len(trained["loss"]["rows"]) == 6
    assert [(r["task"], r["index"]) for r in base["loss"]["rows"]] == [(r["task"], r["index"]) for r in trained["loss"]["rows"]]
    assert base["loss"]["loss"] != trained["loss"]["loss"]
    with pytest.raises(UserError, match="seed = 0, not 1"):
        run(folder, tmp_path / "a", "--tasks", "t2i", "--seed", 1)
    with pytest.raises(UserError, match="config.data.shift_image = 2.0, not 3.0"):
        run(folder, tmp_path / "a", "--tasks", "t2i", "--config.data.shift_image=3.0")

    anew = run(folder, tmp_path / "b", "--tasks", "t2i", "--batch", 3)  # the seed decides, the batch does not
    assert anew == alone  # the whole of it: losses, scores, and no times
    a, b = (np.asarray(Image.open(tmp_path / name / "outputs/trained/t2i/001.png"), int) for name in "ab")
    assert np.abs(a - b).max() <= 1


@pytest.mark.parametrize("extra, words", [
    (("--config.model.queries=5",), "queries"), (("--config.model.boundary_tokens=False",), "boundary_tokens"),  # not as it was trained
    (("--against", "base"), "must be NAME=DIR"), (("--against", "trained=x"), "is --checkpoint's"),
    (("--tasks", "ti2vi"), "--tasks: unknown name 'ti2vi', did you mean 'ti2v'"), (("--steps", "0"), "--steps 0 must be at least 1"),
    (("--against", "other=nowhere"), "nowhere is no model checkpoint"),
])
def test_wrong_flags(folder, tmp_path, extra, words):
    with pytest.raises(UserError, match=words):
        run(folder, tmp_path / "out", *extra)
    assert not (tmp_path / "out").exists()
