"""launch.train in a finished workdir: more steps give a new model, another config none; what no stage trains stays as it was."""
import dataclasses
import gc
import json
from types import SimpleNamespace

import jax
import ml_dtypes
import numpy as np
import pytest

from configs import common
from configs.data import bucket
from launch import convert, data, evaluate, train
from tests.data.folders import SMALL_VLM
from tests.train import tiny
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.checkpoint.run import complete_steps, read_leaves
from vino_jax.convert.io import open_source
from vino_jax.errors import UserError
from vino_jax.nn.module import by_path
from vino_jax.sharding.mesh import make_mesh
from vino_jax.train.config import run_config

SOURCES = {name: {"source": f"somewhere/{name}", "sha256": name} for name in ("vae", "vlm", "mmdit")}
FROZEN = ("vae", "vlm")
STAGE = {"learning_rate": 1e-3, "warmup_steps": 0, "tasks": {"t2i": 1.0}, "texts": {"long": 1.0}, "buckets": ("picture", "idle")}


def config(initial, processor, steps=2, **entries):
    """Stage 1 trains the connector, stage 2 all else that trains."""
    stages = {"stage1": dict(STAGE, steps=1, rules=common.RULES["stage1"]),
              "stage2": dict(STAGE, steps=steps, rules=(("connector/.*", 0.0), *common.RULES["stage3"]), ema=0.9)}
    return run_config(common.config(
        init={"checkpoint": str(initial)}, model={"queries": 4, "connector_ratio": 2}, runtime={"dtype": "bfloat16", "remat": "nothing"},
        mesh={"data": 4, "fsdp": 2}, data={"processor": str(processor)},
        # an endless source gives t2i to the bucket with the fewest empty slots alone
        buckets={"picture": bucket(8, 1, 32, 32, 72), "idle": bucket(8, 1, 32, 32, 80, patches=32, images=2)},
        stages=stages, log={"every": 1, "checkpoint_every": 0}, **entries).to_dict())


def arrays(directory, part):
    return {path: (x.dtype, x.tobytes()) for path, x in model_checkpoint.iter_arrays(directory, part, model_checkpoint.read_info(directory))}


@pytest.fixture(scope="module")
def initial(tmp_path_factory):
    """A model checkpoint with a part in float32 that bfloat16 does not hold, one in bfloat16, and tensors that are left out."""
    vino = tiny.vino()
    params = tiny.params(vino)
    params["vlm"] = jax.tree.map(lambda x: x.astype(ml_dtypes.bfloat16), params["vlm"])
    del params["queries"]
    left_out = {name: {"left.weight": np.arange(3, dtype=np.float32)} for name in ("vlm", "mmdit")}
    directory = tmp_path_factory.mktemp("initial") / "init"
    model_checkpoint.save(directory, params, vino.config, SOURCES, left_out=left_out)
    return directory


@pytest.fixture(scope="module")
def processor(tmp_path_factory):
    """A Qwen3-VL folder as it is downloaded: weights and a folder beside the processor's files."""
    folder = tmp_path_factory.mktemp("processor")
    for file in SMALL_VLM.iterdir():
        (folder / file.name).write_bytes(file.read_bytes() if file.suffix == ".json" else b"weights")
    (folder / ".cache").mkdir()
    return folder


@pytest.fixture(scope="module")
def finished(initial, processor, tmp_path_factory):
    """A workdir after two steps of stage 2 and, by a second call, one more; and of each call: model.json, the connector, and the bytes
    of arrays that it held at the first batch of stage 2."""
    workdir, calls = tmp_path_factory.mktemp("again") / "run", []

    class Weighed(data.Loader):
        def __next__(self):
            gc.collect()
            weighed.append(sum(x.nbytes for x in jax.live_arrays()) - before)
            return super().__next__()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "Loader", Weighed)
        for steps, at in ((2, 1), (3, 0)):  # of all batches of the call
            gc.collect()
            before, weighed = sum(x.nbytes for x in jax.live_arrays()), []
            model = train.train(config(initial, processor, steps), workdir, quiet=True)
            calls.append(SimpleNamespace(info=model_checkpoint.read_info(model), connector=arrays(model, "connector"), bytes=weighed[at]))
    return SimpleNamespace(workdir=workdir, calls=calls)


def test_more_steps_of_the_last_stage_give_a_new_model(finished, initial):
    first, second = finished.calls
    assert first.info.trained == {"stage1": 1, "stage2": 2} and second.info.trained == {"stage1": 1, "stage2": 3}
    assert first.connector == second.connector != arrays(initial, "connector")  # what a finished stage trained and no later one
    steps = [(r["stage"], r["step"]) for r in map(json.loads, (finished.workdir / "metrics.jsonl").read_text().splitlines())]
    assert steps == [("stage1", 1), ("stage2", 1), ("stage2", 2), ("stage2", 3)]
    assert json.loads((finished.workdir / "config.json").read_text())["stages"]["stage2"]["steps"] == 3


def test_a_resumed_run_needs_no_more_memory(finished):
    fresh, resumed = (call.bytes for call in finished.calls)
    assert 0 < resumed <= fresh


def test_buckets_that_are_never_drawn_are_not_compiled(initial, processor):
    run = config(initial, processor)
    drawn = data.StageData(run, run.stages["stage1"], train.Prompter(processor))
    assert [bucket.name for bucket in drawn.buckets] == ["picture"]


def test_frozen_parts_are_those_of_the_start_to_the_bit(finished, initial):
    model, info = finished.workdir / "model", finished.calls[1].info
    for name in FROZEN:
        assert arrays(model, name) == arrays(initial, name)
        assert (info.parts[name].source, info.parts[name].sha256) == (f"somewhere/{name}", name)
    for name in ("vlm", "mmdit"):
        np.testing.assert_array_equal(model_checkpoint.read_left_out(model, name)["left.weight"], np.arange(3, dtype=np.float32))
    assert info.parts["mmdit"].source == str(finished.workdir) and info.parts["mmdit"].dtype == "float32"
    assert arrays(model, "mmdit") != arrays(initial, "mmdit")


def test_only_the_processor_s_files_are_copied(finished):
    assert {path.name for path in model_checkpoint.processor_folder(finished.workdir / "model").iterdir()} == {
        "preprocessor_config.json", "tokenizer.json", "tokenizer_config.json", "video_preprocessor_config.json"}


def test_the_same_command_leaves_the_model_and_another_config_is_refused(finished, initial, processor):
    workdir = finished.workdir
    config_json, model_json = workdir / "config.json", workdir / "model" / "model.json"
    written = model_json.stat().st_mtime_ns
    train.train(config(initial, processor, 3), workdir, quiet=True)
    stored = config_json.read_text()
    for other, words in ((config(initial, processor, 3, seed=9), "seed was 0, is 9"),
                         (config("elsewhere", processor, 3), "init.checkpoint was .*, is 'elsewhere'"),
                         (config(initial, processor, 2), "stages.stage2.steps was 3, is 2")):
        with pytest.raises(UserError, match=words + "; choose another workdir"):
            train.train(other, workdir, quiet=True)
    assert config_json.read_text() == stored and model_json.stat().st_mtime_ns == written


def test_a_run_is_exported_as_its_model_is(finished, initial, tmp_path):
    """The average as model/ holds it, the raw parameters as the last checkpoint does; what does not train as the start gave it."""
    workdir, exported = finished.workdir, {}
    for name, directory, weights in (("model", workdir / "model", "average"), ("average", workdir, "average"), ("raw", workdir, "raw")):
        convert.export_parts(directory, tmp_path / name, "diffusers", weights=weights)
        exported[name] = {f"{folder.name}/{key}": tensor for folder in (tmp_path / name).iterdir()
                          for source in [open_source(folder)] for key, tensor in ((key, source.read(key)) for key in source.manifest)}
    model, average, raw = exported["model"], exported["average"], exported["raw"]
    assert model.keys() == average.keys() == raw.keys() and any(key.startswith("vlm/") for key in model)
    same = {key for key in model if model[key].dtype == raw[key].dtype and model[key].tobytes() == raw[key].tobytes()}
    assert all(model[key].dtype == average[key].dtype and model[key].tobytes() == average[key].tobytes() for key in model)
    assert {key for key in model if key.startswith(("vlm/", "vae/", "vino/mm_encoder.connector.")) or "left.weight" in key
            or key.startswith("transformer/time_text_embed.text_embedder")} == same
    folder = workdir / "checkpoints" / "stage2"
    (_, kernel), = read_leaves(folder, complete_steps(folder)[-1], ["trainable.mmdit.out.kernel"])
    np.testing.assert_array_equal(raw["transformer/proj_out.weight"], kernel.T)
    assert (tmp_path / "average/vlm/tokenizer.json").exists()


def test_a_run_without_a_checkpoint_has_nothing_to_export(initial, processor, tmp_path):
    train.claim(tmp_path / "run", config(initial, processor))
    with pytest.raises(UserError, match="has no complete checkpoint yet"):
        convert.export_parts(tmp_path / "run", tmp_path / "out", "vino")
    assert not (tmp_path / "out").exists()


def test_a_run_is_evaluated_as_its_model_is(finished, initial, processor):
    """RUN@average as model/ holds it, RUN@raw as the last checkpoint does, on a mesh of its own."""
    models = evaluate.Models(config(initial, processor, 3), make_mesh({"fsdp": 2}, jax.devices()[:2]))
    workdir, weights = finished.workdir, {}
    for weight in ("", "average", "raw"):
        model, facts = models.load(evaluate.named_candidate(f"{workdir}@{weight}" if weight else str(workdir)))
        assert facts["fresh"] == [] and model.sampler.params.keys() == tiny.vino().parts.keys()
        weights[weight] = by_path(jax.device_get(model.sampler.params))
    for path, array in weights[""].items():
        np.testing.assert_array_equal(weights["average"][path], array, err_msg=path)
    trained = {path: array for path, array in weights["raw"].items() if path.startswith("mmdit/double")}
    names = {".".join(("trainable", *path.split("/"))): path for path in trained}
    for name, stored in read_leaves(workdir / "checkpoints" / "stage2", 3, list(names)):
        np.testing.assert_array_equal(stored, trained[names[name]], err_msg=name)
    assert any((weights["average"][path] != array).any() for path, array in trained.items())
    # what is measured is what the candidate says, though the run has gone on since
    folder, candidate = workdir / "checkpoints" / "stage2", evaluate.named_candidate(f"{workdir}@raw")
    before, newest = complete_steps(folder)
    assert candidate.identity()["written"]["stage2"] == newest == 3
    earlier = dataclasses.replace(candidate, done={**candidate.done, "stage2": before})
    (_, stored), = read_leaves(folder, before, ["trainable.mmdit.out.kernel"])
    np.testing.assert_array_equal(models.load(earlier)[0].sampler.params["mmdit"]["out"]["kernel"], stored)
    with pytest.raises(UserError, match="is no training run, of which @raw could be read"):
        evaluate.named_candidate(f"{initial}@raw")
