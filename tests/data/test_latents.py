"""Precomputed latents: what training reads of them is what it would have encoded, and what is not there or damaged is told."""
import dataclasses
import itertools
import json
import operator
import os
import re
import shutil
import signal
import subprocess
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from data_pipelines.latents import INDEX, RECORDS, Hashes, Latents, LatentWriter, from_record, to_record
from data_pipelines.packing import pack_sample
from data_pipelines.pixels import Patches
from data_pipelines.problems import Problems
from data_pipelines.processes import locked
from data_pipelines.prompts import Prompter
from data_pipelines.samples import Sample
from launch import precompute as command
from launch.data import StageData, precomputed_source
from launch.precompute import precompute
from tests import tolerances
from tests.data.folders import SMALL_VLM
from tests.data.latents import LINES, FakeEncoder, config_of, config_values, make_checkpoint, make_media
from tests.train import tiny
from vino_jax.batch import ROLE_LATENT, BucketSpec
from vino_jax.errors import UserError
from vino_jax.sharding.mesh import make_mesh
from vino_jax.sharding.rules import preset
from vino_jax.train.config import run_config
from vino_jax.train.loop import make_encoder, place_batch

EDIT = BucketSpec("edit", 8, 1, 32, 32, 128, patches=32, images=3, image_height=32, image_width=32)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """(media, model checkpoint, latents of them)."""
    folder = tmp_path_factory.mktemp("latents")
    root, init = make_media(folder), make_checkpoint(folder / "init")
    assert precompute(config_of(root, init), folder / "store", quiet=True) == len(LINES)
    return root, init, folder / "store"


@pytest.fixture
def fake(monkeypatch):
    """No VAE is run."""
    monkeypatch.setattr(command, "Encoder", FakeEncoder)


def copy_media(files, folder):
    """A folder with the same media; made anew, a clip can differ in a bit: swscale's rounding depends on how memory lies."""
    folder.mkdir()
    for file in filter(lambda path: path.is_file(), files[0].iterdir()):
        shutil.copy(file, folder)
    return folder


def stage_data(files, problems=None, **data):
    """Of the config's stage, from latents where `data` names them."""
    config, prompter = config_of(*files[:2], **data), Prompter(SMALL_VLM)
    return StageData(config, config.stages["only"], prompter, problems, precomputed_source(config, files[1], prompter))


def batches(data, steps=8):
    with data.loader(0) as loader:
        return [(name, batch) for _, name, batch in itertools.islice(loader, steps)]


def used(batch, bucket):
    """Which slots of images, and which rows' clips, some token of the row reads: (B, N) and (B,) bool."""
    room = (bucket.image_height // 16) * (bucket.image_width // 16)
    picks = [np.unique(source[role == ROLE_LATENT] // room) for role, source in zip(batch.role, batch.source)]
    slots = np.array([[n in pick for n in range(bucket.images)] for pick in picks])
    return slots, np.array([(pick >= bucket.images).any() for pick in picks])


def stored(folder):
    """{key: arrays} of all that a folder holds."""
    latents = Latents(folder)
    keys = [json.loads(line)["key"] for index in folder.glob("*" + INDEX) for line in index.read_text().splitlines()]
    assert len(keys) == len(set(keys))
    return {key: latents.read(key) for key in keys}


def same(a, b, worst=0.0):
    """Whether two stores hold the same patches, and moments that differ by at most `worst`."""
    assert a.keys() == b.keys()
    for key in a:
        for name in ("target", "images", "video"):
            assert (a[key][name] is None) == (b[key][name] is None)
            if a[key][name] is not None:
                np.testing.assert_allclose(np.stack(a[key][name] or [0]) if name == "images" else a[key][name],
                                           np.stack(b[key][name] or [0]) if name == "images" else b[key][name], rtol=0, atol=worst)
        assert [s.grid for s in a[key]["seen"]] == [s.grid for s in b[key]["seen"]]
        assert all(np.array_equal(s.values, t.values) for s, t in zip(a[key]["seen"], b[key]["seen"]))


def test_a_batch_from_latents_is_the_encoded_batch_of_pixels(files, tmp_path):
    """To the bit, as both were encoded in batches of the bucket's size; all other fields too."""
    precompute(config_of(*files[:2]), tmp_path, batch=2, quiet=True)  # one row a device, here and below: see tests/e2e/test_latents.py
    pixels, latents = stage_data(files), stage_data(files, precomputed=str(tmp_path))
    mesh, rules = make_mesh({"fsdp": 2, "tensor": 4}), preset("fsdp")
    model = tiny.vino()
    encode, params = make_encoder(model, mesh, rules), tiny.params(model)["vae"]
    buckets, tasks, slots_seen = {b.name: b for b in pixels.buckets}, set(), np.zeros(2, int)
    for (name, ours), (other, theirs) in zip(batches(pixels), batches(latents), strict=True):
        assert name == other
        spec = jax.tree.map(lambda x: (x.shape, x.dtype), buckets[name].spec(moments=2 * model.config.vae.latent_channels))
        assert jax.tree.map(lambda x: (x.shape, x.dtype), theirs) == spec
        pairs = [jax.tree.map(operator.itemgetter(slice(i, i + 2)), ours) for i in range(0, len(ours.task), 2)]
        encoded = jax.device_get([encode(params, place_batch(pair, mesh, rules)) for pair in pairs])
        moments = jax.tree.map(lambda *parts: np.concatenate(parts), *encoded)
        images, clips = used(ours, buckets[name])
        np.testing.assert_array_equal(theirs.target, moments.target)
        np.testing.assert_array_equal(theirs.images[images], moments.images[images])
        assert not theirs.images[~images].any()
        if ours.video is not None:
            np.testing.assert_array_equal(theirs.video[clips], moments.video[clips])
            assert not theirs.video[~clips].any()
        for field in set(vars(ours)) - {"target", "images", "video"}:
            np.testing.assert_array_equal(getattr(ours, field), getattr(theirs, field), err_msg=field)
        tasks |= set(ours.task.tolist())
        slots_seen += [images.sum(), clips.sum()]
    assert len(tasks) == 7 and slots_seen.min() > 3


def test_moments_are_not_encoded_again(files):
    """Neither by the training step: with a VAE of NaN the batch stays what it is."""
    name, batch = batches(stage_data(files, precomputed=str(files[2])), 1)[0]
    mesh, rules = make_mesh({"fsdp": 2, "tensor": 4}), preset("fsdp")
    model = tiny.vino()
    spoilt = jax.tree.map(lambda x: x * np.float32("nan"), tiny.params(model)["vae"])
    after = jax.device_get(make_encoder(model, mesh, rules)(spoilt, place_batch(batch, mesh, rules)))
    jax.tree.map(np.testing.assert_array_equal, batch, after)


def test_previews_take_pixels(files):
    ours, theirs = stage_data(files).preview_tasks(), stage_data(files, precomputed=str(files[2])).preview_tasks()
    assert ours and [t.task for t in ours] == [t.task for t in theirs]
    for a, b in zip(ours, theirs):
        assert all(x.dtype == np.uint8 and np.array_equal(x, y) for x, y in zip(a.references, b.references, strict=True))


def test_two_processes_and_other_batches_give_the_same_store(files, tmp_path):
    """Small batches to rounding; patches and keys to the bit."""
    config = config_of(*files[:2])
    assert [precompute(config, tmp_path, shard=(i, 2), batch=2, quiet=True) for i in range(2)] == [5, 4]
    same(stored(tmp_path), stored(files[2]), tolerances.LATENTS_ABS)
    assert precompute(config, tmp_path, quiet=True) == 0


def test_every_window_of_a_clip_has_latents(files, tmp_path, fake):
    config = config_of(*files[:2], clips={"windows": "uniform", "count": 2, "stride": 0, "compat": "reference"})
    assert precompute(config, tmp_path, quiet=True, shard_bytes=1000) == len(LINES) + 4
    assert set(stored(files[2])) < set(stored(tmp_path))  # those that begin at 0
    assert precompute(config_of(*files[:2], clips={"windows": "head", "count": 1, "stride": 0, "compat": "true_rate"}), tmp_path) == 4


KILLED = """
import os, signal, sys
from pathlib import Path
from data_pipelines.latents import LatentWriter
from launch import cli, precompute
from tests.data.latents import FakeEncoder, config_of

add, left = LatentWriter.add, [2]

def dies(self, key, record):
    add(self, key, record)
    left[0] -= self._writer is not None  # as long as a shard is under way
    if not left[0]:
        os.kill(os.getpid(), signal.SIGKILL)

LatentWriter.add, precompute.Encoder = dies, FakeEncoder
cli.common_setup()
precompute.precompute(config_of(Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]), quiet=True, shard_bytes=1000)
"""


def test_after_a_kill_only_what_is_missing_is_encoded(files, tmp_path, fake):
    done = subprocess.run([sys.executable, "-c", KILLED, *map(str, [*files[:2], tmp_path])], capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr[-2000:]
    assert list(tmp_path.glob("*.incomplete"))  # the shard under way
    before = len(stored(tmp_path))
    assert 0 < before < len(LINES) - 1
    assert precompute(config_of(*files[:2]), tmp_path, quiet=True) == len(LINES) - before
    assert not list(tmp_path.glob("*.incomplete"))
    assert stored(tmp_path).keys() == stored(files[2]).keys()


def test_a_shard_without_its_index_does_not_count(files, tmp_path, fake):
    """Killed between the two names that a shard gets."""
    shutil.copytree(files[2], tmp_path / "store")
    next((tmp_path / "store").glob("*" + INDEX)).unlink()
    with pytest.raises(UserError, match="there are no precomputed latents in .*store: run launch.precompute"):
        Latents(tmp_path / "store")
    assert precompute(config_of(*files[:2]), tmp_path / "store", quiet=True) == len(LINES)


def changed_picture(root, init, folder):
    Image.fromarray(np.asarray(Image.open(root / "chelsea.png"))[:, ::-1]).save(root / "chelsea.png")
    return config_values(root, init), 4  # target of one, reference of three


def changed_bucket(root, init, folder):
    values = config_values(root, init)
    values["buckets"]["edit"] |= {"height": 64, "width": 64}
    return values, 5


def changed_vae(root, init, folder):
    return config_values(root, make_checkpoint(folder / "other", seed=1)), len(LINES)


def changed_arithmetic(root, init, folder):
    values = config_values(root, init)
    values["runtime"]["dtype"] = "bfloat16"
    return values, len(LINES)


def changed_batch(root, init, folder):
    values = config_values(root, init)
    values["buckets"]["edit"] |= {"batch": 2, "prompt_tokens": 200}
    values["buckets"]["renamed"] = values["buckets"].pop("clip")
    values["stages"]["only"]["buckets"] = ("edit", "renamed")
    return values, 0


def touched(root, init, folder):
    os.utime(root / "chelsea.png", (0, 0))
    return config_values(root, init), 0


@pytest.mark.parametrize("change", [changed_picture, changed_bucket, changed_vae, changed_arithmetic, changed_batch, touched])
def test_what_has_changed_is_missed(files, tmp_path, change):
    """And what has not is found again: by content, not by name, time or batch."""
    root = copy_media(files, tmp_path / "media")
    values, missing = change(root, files[1], tmp_path)
    values["data"]["precomputed"] = str(files[2])
    config, prompter = run_config(values), Prompter(SMALL_VLM)
    stage, source = config.stages["only"], precomputed_source(config, config.init.checkpoint, prompter)
    if not missing:
        assert StageData(config, stage, prompter, None, source).source.sample("ti2i", config.buckets["edit"], 0).moments == 8
        return
    with pytest.raises(UserError, match=f"{missing} of {len(LINES)} samples have no latents in .*, .*manifest.jsonl:[0-9]+ first: "
                                        "run launch.precompute"):
        StageData(config, stage, prompter, None, source)


def test_missing_ones_are_listed_and_left_out(files, tmp_path, fake):
    config = config_of(*files[:2])
    half = tmp_path / "half"
    assert precompute(config, half, shard=(0, 2), quiet=True) == 5
    problems = Problems(tmp_path / "skipped.jsonl")
    source = stage_data(files, problems, precomputed=str(half)).source
    listed = [json.loads(line) for line in problems.listed()]
    assert len(listed) == len(LINES) // 2 and all("it has no latents in" in line["problem"] for line in listed)
    assert {source.sample("t2i", EDIT, i).id for i in range(3)} < {f"item {i}" for i in range(3)}
    gone = next(line for line in listed if ":4" in line["item"])  # the only ti2i
    with pytest.raises(UserError, match="none of the 1 samples of task ti2i in bucket edit"):
        source.sample("ti2i", EDIT, 0)
    assert len(problems.listed()) == len(listed) and gone  # once, however often it is met


def test_the_known_hash_of_media_is_taken_and_others_are_read_once(files, tmp_path, monkeypatch):
    picture = files[0] / "coffee.png"
    record = tmp_path / "a.hashes.jsonl"
    sha = Hashes(tmp_path, record).of(picture)
    record.write_text(record.read_text() + '{"stamp": "cut of')
    monkeypatch.setattr(type(picture), "read_bytes", lambda self: pytest.fail("it is known"))
    assert Hashes(tmp_path).of(picture) == sha and len(sha) == 64
    monkeypatch.undo()
    other = tmp_path / "other.png"
    other.write_bytes(b"other")
    assert Hashes(tmp_path, record).of(other) != sha  # written behind the line that a kill cut off
    monkeypatch.setattr(type(picture), "read_bytes", lambda self: pytest.fail("it is known"))
    assert Hashes(tmp_path).of(picture) == sha and Hashes(tmp_path).of(other) != sha

    class Ingested:
        sha256 = "written down"

    assert Hashes(tmp_path).of(Ingested()) == "written down"


def test_two_processes_do_not_write_the_same_shard(files, fake, tmp_path):
    config = config_of(*files[:2])
    tmp_path.joinpath("x").mkdir()
    with locked(tmp_path / "x" / "00000-of-00001.lock"), pytest.raises(UserError, match="another launch.precompute is writing shard 0/1"):
        precompute(config, tmp_path / "x", quiet=True)


def damaged(files, folder, how):
    """A copy of the latents with one spoilt record, of the first item."""
    arrays = stored(files[2])
    index = next(files[2].glob("*" + INDEX))
    first = json.loads(index.read_text().splitlines()[0])["key"]
    with LatentWriter(folder, 0, 1) as writer:
        for key, values in arrays.items():
            sample = Sample(key, "t2i", texts={}, **values)
            if key == first and how in ("nan", "inf"):
                sample.target[0, 0, 0, 0] = float(how)
            writer.add(key, b"no record" if key == first and how == "garbage" else to_record(key, sample))
    if how == "cut":
        os.truncate(next(folder.glob("*" + RECORDS)), 1000)


@pytest.mark.parametrize("how, words", [("nan", "the VAE moments of sample 'item 0' are not finite"), ("inf", "are not finite"),
                                        ("garbage", "cannot be read"), ("cut", "cannot be read")])
def test_damaged_latents_stop_the_run_or_are_skipped(files, tmp_path, how, words):
    folder = tmp_path / "store"
    folder.mkdir()
    damaged(files, folder, how)
    source = stage_data(files, precomputed=str(folder)).source
    with pytest.raises(UserError, match=f"manifest.jsonl:1: .*{words}"):
        source.sample("t2i", EDIT, 0)
    problems = Problems(tmp_path / "skipped.jsonl")
    source = stage_data(files, problems, precomputed=str(folder)).source
    if how == "cut":  # all of them
        with pytest.raises(UserError, match="none of the 3 samples"):
            source.sample("t2i", EDIT, 0)
        assert len(problems.listed()) == 3
        return
    assert source.sample("t2i", EDIT, 0).id == "item 1"
    (line,) = problems.listed()
    assert json.loads(line)["item"].endswith("manifest.jsonl:1") and re.search(words, line)


def test_nothing_that_is_not_finite_is_written(files, tmp_path, fake, monkeypatch):
    monkeypatch.setattr(FakeEncoder, "value", float("nan"))
    with pytest.raises(UserError, match="manifest.jsonl:1: the VAE moments of sample 'item 0' are not finite"):
        precompute(config_of(*files[:2]), tmp_path, quiet=True)
    assert precompute(config_of(*files[:2], bad_items="skip"), tmp_path, quiet=True) == 0
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == len(LINES) and not list(tmp_path.glob("*" + INDEX))


@pytest.mark.parametrize("policy", ["stop", "skip"])
def test_media_that_cannot_be_read_are_told_or_left_out(files, tmp_path, policy, capsys, fake):
    root = copy_media(files, tmp_path / "media")
    data = bytearray((root / "astronaut.png").read_bytes())
    (root / "astronaut.png").write_bytes(data[:len(data) // 2])  # its header is whole
    config = config_of(root, files[1], bad_items=policy)
    if policy == "stop":
        with pytest.raises(UserError, match="manifest.jsonl:1: cannot read the image .*astronaut.png"):
            precompute(config, tmp_path / "out", quiet=True)
        return
    assert precompute(config, tmp_path / "out") == len(LINES) - 3
    assert "9 samples, 9 of this process: 6 encoded, 0 there or alike, 3 left out;" in capsys.readouterr().out
    assert len((tmp_path / "out" / "skipped.jsonl").read_text().splitlines()) == 3


def moments_sample(**changes):
    sample = Sample("it", "ti2i", np.zeros((1, 4, 4, 8), np.float32), {}, images=(np.ones((4, 4, 8), np.float32),),
                    seen=(Patches(np.ones((4, 1536), np.float32), (1, 2, 2)),))
    return dataclasses.replace(sample, **changes)


def test_records_hold_what_they_were_given():
    sample = moments_sample(images=(np.moveaxis(np.arange(128, dtype=np.float32).reshape(8, 4, 4), 0, 2),))  # not contiguous
    record = to_record("its key", sample)
    with pytest.raises(ValueError, match="another sample's"):
        from_record("another", record)
    again = from_record("its key", record)
    assert np.array_equal(again["images"][0], sample.images[0]) and again["video"] is None and again["seen"][0].grid == (1, 2, 2)


@pytest.mark.parametrize("changes, words", [
    ({"target": np.zeros((1, 4, 6, 8), np.float32)}, r"its target is \(1, 4, 6, 8\), the bucket takes \(1, 4, 4, 8\)"),
    ({"images": (np.ones((4, 2, 8), np.float32),)}, r"its reference image is \(4, 2, 8\), the bucket takes \(4, 4, 8\)"),
    ({"images": (np.ones((4, 4, 8), np.float64),)}, "its moments are float32 and float64, not float32"),
    ({"seen": ()}, "it has moments of 1 references and VLM patches of 0"),
    ({"video": np.ones((2, 4, 4, 8), np.float32)}, r"its reference video is \(2, 4, 4, 8\), the bucket takes none"),
    ({"target": np.full((1, 4, 4, 8), np.nan, np.float32)}, r"the VAE moments of sample 'it' are not finite \(target\)"),
    ({"images": (np.full((4, 4, 8), np.inf, np.float32),)}, r"the VAE moments of sample 'it' are not finite \(images\)"),
])
def test_moments_that_do_not_fit_are_refused(changes, words):
    prompter = Prompter(SMALL_VLM)
    pack_sample(moments_sample(), "A cup.", EDIT, prompter)
    with pytest.raises(UserError, match=words) as error:
        pack_sample(moments_sample(**changes), "A cup.", EDIT, prompter)
    assert "'it'" in str(error.value)


@pytest.mark.parametrize("flags, words", [
    (["--config", "configs/shapes.py"], "data.source 'shapes' never ends: it cannot be encoded beforehand"),
    (["--config", "configs/media.py", "--shard", "2/2"], "'2/2' is no I/N with I from 0 to N-1"),
    (["--config", "configs/media.py", "--batch", "-1"], "--batch is -1"),
])
def test_wrong_flags_are_told(tmp_path, flags, words):
    with pytest.raises(UserError, match=words):
        command.main([*flags, "--output", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
