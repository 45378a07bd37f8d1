"""Ingested data: what launch.ingest writes, how training and TFDS read it, and what becomes of damage."""
import dataclasses
import io
import json
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import tarfile
import time

import numpy as np
import pytest
from PIL import Image

from data_pipelines.files import Facts
from data_pipelines.manifest import read_items
from data_pipelines.media import MediaSource
from data_pipelines.problems import Problems
from data_pipelines.records import INFO, folder_of, read_index, shard_path
from launch import ingest as command
from launch.ingest import Summary, ingest, main
from tests.data.folders import ROOT
from tests.data.test_media import BUCKETS, LINES, PICTURES, write_clip
from vino_jax.batch import TASKS
from vino_jax.errors import UserError

SEVERAL = {"task": "t2i", "target": "chelsea.png", "short": ["A cat.", "Eine Katze mit grünen Augen."], "long": "A tabby cat."}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pictures of at most 200 pixels, clips of up to 12 frames."""
    root = tmp_path_factory.mktemp("media")
    for name in ("astronaut", "coffee", "chelsea"):
        image = Image.open(PICTURES / f"{name}.png").convert("RGB")
        image.resize((image.width // 3, image.height // 3)).save(root / f"{name}.png")
    coffee = np.asarray(Image.open(PICTURES / "coffee.png").convert("RGB"))
    for name, frames in (("long.mp4", 12), ("mid.mp4", 6), ("tiny.mp4", 3)):
        write_clip(root / name, coffee, frames)
    return root


@pytest.fixture(scope="module")
def ingested(root, tmp_path_factory):
    """(manifest, what was made of it); not to be changed."""
    folder = tmp_path_factory.mktemp("ingested")
    manifest = listed(folder, [*LINES, SEVERAL])
    assert ingest(manifest, root, folder / "out") == Summary(14, 2, 0, 0)
    return manifest, folder / "out"


def listed(folder, lines):
    manifest = folder / "manifest.jsonl"
    manifest.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return manifest


def groups(source):
    return {(task, b.name): [source.sample(task, b, i) for i in range(source.count(task, b))] for task in TASKS for b in BUCKETS}


def same(a, b):
    """Whether two samples are equal, pixels to the bit."""
    arrays = [[x for x in (s.target, *s.images, s.video) if x is not None] for s in (a, b)]
    return ((a.id, a.task, a.texts, a.base_image, len(a.images)) == (b.id, b.task, b.texts, b.base_image, len(b.images))
            and len(arrays[0]) == len(arrays[1]) and all(np.array_equal(x, y) for x, y in zip(*arrays)))


def ids(output):
    """Of all items that training sees."""
    return [item.id for _, item in read_items(output, output, Problems())]


def files(output):
    found = [f for f in output.rglob("*") if f.is_file() and f.name != ".lock"]
    return {str(f.relative_to(output)): (f.stat().st_ino, f.stat().st_mtime_ns) for f in found}


def copy_of(output, to):
    for file in files(output):
        (to / file).parent.mkdir(parents=True, exist_ok=True)
        (to / file).write_bytes((output / file).read_bytes())
    return to


def test_training_sees_what_the_manifest_lists(ingested, root):
    """All eight tasks: the same groups, order, tokens, speeds and samples as without ingest, and the same items without a bucket."""
    manifest, output = ingested
    direct, read = MediaSource(manifest, root, BUCKETS), MediaSource(output, "elsewhere", BUCKETS)
    wanted, got = groups(direct), groups(read)
    assert {task for (task, _), samples in got.items() if samples} == set(TASKS) == set(read.tasks())
    for place, samples in wanted.items():
        assert len(samples) == len(got[place]) and all(map(same, samples, got[place])), place
    assert not same(got["t2i", "wide"][0], got["t2i", "wide"][1])
    for task in TASKS:
        for bucket in BUCKETS:
            assert read.usage(task, bucket) == direct.usage(task, bucket)
    names = [[x.partition(" (")[0] for x in source.unplaced()] for source in (read, direct)]
    assert names == [["tiny.mp4", "coffee.png"]] * 2


def test_media_know_their_facts_and_travel_to_other_processes(ingested, root):
    items = {item.id: item for _, item in read_items(ingested[1], ingested[1], Problems())}
    clip, image = items["mid.mp4"].video, items["mid.mp4"].images[0]  # of tiv2v, the last of that name
    assert (clip.name, image.name) == ("long.mp4", "astronaut.png")
    assert clip.facts == Facts(12, 96, 144, 11 / 24) and image.facts == Facts(1, 170, 170)
    again = pickle.loads(pickle.dumps(clip))
    assert again == clip and hash(again) == hash(clip) and again.read_bytes() == (root / "long.mp4").read_bytes()
    with pytest.raises(dataclasses.FrozenInstanceError):
        clip.sha256 = ""


def test_tfds_loads_it_without_tensorflow(ingested, root):
    import tensorflow_datasets as tfds

    source = tfds.data_source("vino_media", data_dir=ingested[1], split="train")
    assert "tensorflow" not in sys.modules and len(source) == len(LINES) + 1
    for found, line in zip(source, [*LINES, SEVERAL]):
        assert found["id"].decode() == line.get("id", line["target"]) and found["task"].decode() == line["task"]
        for kind in ("long", "short", "instruction"):
            texts = line.get(kind, [])
            assert [text.decode() for text in found[kind]] == ([texts] if isinstance(texts, str) else texts)
        assert found["target"]["bytes"] == (root / line["target"]).read_bytes() and found["target"]["name"].decode() == line["target"]
        assert found["images"]["bytes"] == [(root / name).read_bytes() for name in line.get("images", [])]
        assert found["video"]["bytes"] == ((root / line["video"]).read_bytes() if "video" in line else b"")
        assert found["base_image"] == (line["task"] == "ti2i_baseimg")
    assert (found["target"]["height"], found["target"]["width"], found["target"]["frames"]) == (100, 150, 1)


def test_a_second_run_writes_only_what_is_new_and_drops_what_is_gone(root, tmp_path, capsys):
    output, arguments = tmp_path / "out", ["--manifest", str(tmp_path / "manifest.jsonl"), "--root", str(root), "--output",
                                           str(tmp_path / "out"), "--workers", "1", "--quiet"]
    lines = [{**LINES[0], "id": f"item {i}"} for i in range(20)]
    listed(tmp_path, lines[:17])
    main(arguments)
    assert "17 items written in 3 shards, 0 were there already, 0 dropped" in capsys.readouterr().out
    before = files(output)
    main(arguments)
    assert "nothing to write, 17 were there already, 0 dropped" in capsys.readouterr().out and files(output) == before

    listed(tmp_path, [lines[19], *lines[:17]])  # one more; its place in the manifest does not matter
    main(arguments)
    assert "1 items written in 1 shards, 17 were there already" in capsys.readouterr().out
    assert {f: s for f, s in files(output).items() if f in before and "train" in f} == {f: s for f, s in before.items() if "train" in f}
    assert ids(output) == [f"item {i}" for i in (*range(17), 19)]

    gone = range(0, 9)  # the whole first shard and one of the second
    listed(tmp_path, [*(line for i, line in enumerate(lines[:16]) if i not in gone), {**lines[16], "short": "Changed."}, lines[17]])
    main(arguments)
    assert "2 items written in 1 shards, 7 were there already, 11 dropped" in capsys.readouterr().out
    assert ids(output) == [f"item {i}" for i in (*range(9, 16), 16, 17)]
    assert sorted(f.name for f in folder_of(output).glob("train*.array_record")) == ["train-00000.array_record", "train-00001.array_record"]
    source = MediaSource(output, output, BUCKETS)
    assert same(source.sample("t2i", BUCKETS[0], 8), MediaSource(listed(tmp_path, [lines[17]]), root, BUCKETS).sample("t2i", BUCKETS[0], 0))
    import tensorflow_datasets as tfds
    assert [x["id"].decode() for x in tfds.data_source("vino_media", data_dir=output, split="train")] == ids(output)


def test_an_entry_that_is_listed_twice_is_there_twice(root, tmp_path):
    manifest = listed(tmp_path, [LINES[0], LINES[1], LINES[0]])
    assert ingest(manifest, root, tmp_path / "out").written == 3
    assert ids(tmp_path / "out") == ["astronaut.png", "coffee.png", "astronaut.png"]
    assert ingest(manifest, root, tmp_path / "out") == Summary(0, 0, 3, 0)


def test_the_content_of_files_counts_and_not_their_place(root, tmp_path):
    media, manifest = tmp_path / "media", listed(tmp_path, [LINES[0]])
    media.mkdir()
    (media / "astronaut.png").write_bytes((root / "astronaut.png").read_bytes())
    ingest(manifest, root, tmp_path / "out")
    assert ingest(manifest, media, tmp_path / "out") == Summary(0, 0, 1, 0)
    (media / "astronaut.png").write_bytes((root / "coffee.png").read_bytes())
    assert ingest(manifest, media, tmp_path / "out") == Summary(1, 1, 0, 1)
    (_, item), = read_items(tmp_path / "out", tmp_path, Problems())
    assert item.target.read_bytes() == (root / "coffee.png").read_bytes()


SLOW = """
import sys, time
from pathlib import Path
from launch import ingest
read = ingest.read_image
ingest.read_image = lambda media: (time.sleep(0.1), read(media))[1]
ingest.ingest(*map(Path, sys.argv[1:]))
"""


def test_a_run_that_was_killed_is_gone_on_with(root, tmp_path):
    output, manifest = tmp_path / "out", listed(tmp_path, [{**LINES[0], "id": f"item {i}"} for i in range(40)])
    with subprocess.Popen([sys.executable, "-c", SLOW, manifest, root, output], cwd=ROOT) as run:
        deadline = time.monotonic() + 60
        while not shard_path(folder_of(output), 1).with_suffix(".jsonl").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(0.3)  # into the third shard
        with pytest.raises(UserError, match="another launch.ingest is writing"):
            ingest(manifest, root, output)
        run.send_signal(signal.SIGKILL)
    assert run.returncode == -signal.SIGKILL and list(folder_of(output).glob(".*.array_record"))
    with pytest.raises(UserError, match="not complete: run launch.ingest again"):
        MediaSource(output, output, BUCKETS)
    done = ingest(manifest, root, output)
    assert done.kept in (16, 24) and done.written == 40 - done.kept
    assert ids(output) == [f"item {i}" for i in range(40)] and not list(folder_of(output).glob(".*.array_record"))


@pytest.mark.parametrize("cut", ["before the index", "before the shard", "the shard short", "the index damaged", "the metadata"])
def test_what_counts_is_a_whole_shard_with_its_index(ingested, root, tmp_path, cut):
    manifest, output = ingested[0], copy_of(ingested[1], tmp_path / "out")
    shard = shard_path(folder_of(output), 0)
    index = shard.with_suffix(".jsonl")
    {"before the index": index.unlink, "before the shard": shard.unlink, "the metadata": (folder_of(output) / INFO).unlink,
     "the shard short": lambda: os.truncate(shard, 70000),
     "the index damaged": lambda: index.write_text(index.read_text().replace("A cup", "A cop"))}[cut]()
    whole = ids(ingested[1])
    with pytest.raises(UserError, match="launch.ingest again"):
        ids(output)
    assert ingest(manifest, root, output) == (Summary(0, 0, 14, 0) if cut == "the metadata" else Summary(8, 1, 6, 0))
    assert sorted(ids(output)) == sorted(whole)


def test_two_workers_write_the_same_bytes(ingested, root, tmp_path, monkeypatch):
    monkeypatch.setattr(command, "encode", None)  # this process writes nothing itself
    monkeypatch.setenv("JAX_PLATFORMS", "none_such")  # and the others start no device
    assert ingest(ingested[0], root, tmp_path / "out", workers=2) == Summary(14, 2, 0, 0)
    assert not multiprocessing.active_children()
    names = sorted(files(ingested[1]))
    assert names == sorted(files(tmp_path / "out")) and len(names) == 6
    assert [f for f in names if (ingested[1] / f).read_bytes() != (tmp_path / "out" / f).read_bytes()] == []


def damage_record(output, root, name, how):
    """Damage the bytes of a file within the first shard; where in the shard its item is."""
    shard = shard_path(folder_of(output), 0)
    data = bytearray(shard.read_bytes())
    at = data.find((root / name).read_bytes()[100:164])  # incompressible bytes are stored as they are
    assert at > 0
    data[at:at + 4] = how(data[at:at + 4])
    shard.write_bytes(data)
    return shard, [line["target"]["name"] for line in read_index(shard)[0]].index(name)


def test_flipped_bytes_are_found_when_they_are_read(root, tmp_path):
    manifest, output = listed(tmp_path, LINES[:3]), tmp_path / "out"
    ingest(manifest, root, output)
    shard, record = damage_record(output, root, "coffee.png", lambda data: bytes(255 - x for x in data))
    source = MediaSource(output, output, BUCKETS)  # reads no media
    bad = next((b, i) for b in BUCKETS for i in range(source.count("t2i", b)) if source.window("t2i", b, i).item.id == "coffee.png")
    with pytest.raises(UserError, match=rf"{shard}:{record}: cannot read record {record} of {shard} .*damaged") as error:
        source.sample("t2i", *bad)
    assert "\n" not in str(error.value)
    skipping = MediaSource(output, output, BUCKETS, problems=Problems(tmp_path / "skipped.jsonl"))
    assert skipping.sample("t2i", *bad).id == "the cat"  # the next of its group
    (line,) = map(json.loads, (tmp_path / "skipped.jsonl").read_text().splitlines())
    assert line["item"] == f"{shard}:{record}" and "damaged" in line["problem"]
    shard.unlink()  # as the message says
    assert ingest(manifest, root, output) == Summary(3, 1, 0, 0)
    assert MediaSource(output, output, BUCKETS).sample("t2i", *bad).id == "coffee.png"


def test_bytes_that_were_replaced_are_found_by_their_hash(root, tmp_path):
    """A shard whose own checksums are right but that is not the one that was ingested is no silently wrong sample."""
    outputs = []
    for name, lines in (("a", LINES[:2]), ("b", LINES[1::-1])):
        (tmp_path / name).mkdir()
        outputs.append(tmp_path / name / "out")
        ingest(listed(tmp_path / name, lines), root, outputs[-1])
    first, second = (shard_path(folder_of(output), 0) for output in outputs)
    assert first.stat().st_size == second.stat().st_size  # which are multiples of 64 KiB
    first.write_bytes(second.read_bytes())
    source = MediaSource(outputs[0], outputs[0], BUCKETS)
    with pytest.raises(UserError, match=r"train-00000.array_record:0:astronaut.png is not what was ingested \(its SHA-256 differs\)"):
        source.sample("t2i", BUCKETS[0], 0)


@pytest.mark.parametrize("file", ["train-00000.array_record", "train-00001.jsonl", INFO])
def test_damage_of_any_kind_is_told_or_harms_nothing(ingested, tmp_path, file):
    output, random = copy_of(ingested[1], tmp_path / "out"), np.random.default_rng(0)
    file = folder_of(output) / file
    data = np.frombuffer(file.read_bytes(), np.uint8)
    def content():
        return [(item.id, item.texts, part, media.read_bytes()) for _, item in read_items(output, output, Problems())
                for part, (media, _) in command.parts_of(item).items()]
    wanted, told = content(), 0
    for trial in range(40):
        at, length = random.integers(len(data)), random.choice([1, 1, 2, 64, 70000])
        damaged = np.array(data)
        damaged[at:at + length] ^= random.integers(1, 256, len(damaged[at:at + length]), np.uint8)
        file.write_bytes((damaged[:at] if trial % 10 == 0 else damaged).tobytes())
        try:
            assert content() == wanted
        except UserError as error:
            told += 1
            assert str(output) in str(error) and "launch.ingest" in str(error), error
    assert told > 15


def test_a_shard_that_is_cut_off_is_told_before_the_run(ingested, tmp_path):
    output = copy_of(ingested[1], tmp_path / "out")
    shard = shard_path(folder_of(output), 1)
    os.truncate(shard, shard.stat().st_size - 1)
    with pytest.raises(UserError, match=rf"{shard}:0: the shard {shard} has \d+ bytes and not the \d+ that were written"):
        MediaSource(output, output, BUCKETS)
    source = MediaSource(output, output, BUCKETS, problems=Problems(tmp_path / "skipped.jsonl"))
    assert sum(source.count(t, b) for t in TASKS for b in BUCKETS) == 7  # of the first shard's eight, less the clip that is too short
    told = [json.loads(line)["item"] for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert told == [f"{shard}:{record}" for record in range(6)]


@pytest.mark.parametrize("workers", [1, 2])
def test_broken_media_are_found_while_they_are_ingested(root, tmp_path, workers, capsys):
    (tmp_path / "broken.mp4").write_bytes((root / "long.mp4").read_bytes()[:-2000])
    (tmp_path / "broken.png").write_bytes((root / "coffee.png").read_bytes()[:-2000])
    for name in ("coffee.png", "long.mp4"):
        (tmp_path / name).write_bytes((root / name).read_bytes())
    good = [{**LINES[1], "id": f"item {i}"} for i in range(9)]
    lines = [*good[:5], {"task": "t2v", "target": "broken.mp4", "short": "x"}, {"task": "t2i", "target": "none.png", "short": "x"},
             *good[5:], {"task": "t2i", "target": "broken.png", "short": "x"}, LINES[3]]
    output = tmp_path / "out"
    arguments = ["--manifest", str(listed(tmp_path, lines)), "--root", str(tmp_path), "--output", str(output), "--workers", str(workers)]
    with pytest.raises(UserError, match=r"manifest.jsonl:7: there is no file .*none.png"):
        main(arguments)
    listed(tmp_path, [line for line in lines if line["target"] != "none.png"])
    with pytest.raises(UserError, match=r"manifest.jsonl:6: cannot read the video .*broken.mp4") as error:
        main(arguments)
    assert "\n" not in str(error.value)
    listed(tmp_path, lines)
    for again in (False, True):
        main([*arguments, "--skip"])
        told = [json.loads(line) for line in (output / "skipped.jsonl").read_text().splitlines()]
        assert sorted(x["item"].rpartition(":")[2] for x in told) == ["12", "6", "7"]
        assert any("cannot read the image" in x["problem"] and "broken.png" in x["problem"] for x in told)
        assert ("nothing to write, 10" if again else "10 items written") in capsys.readouterr().out
    assert ids(output) == [*(f"item {i}" for i in range(9)), "long.mp4"]
    listed(tmp_path, [lines[5]])
    with pytest.raises(UserError, match="no item of the manifest .* can be used"):
        main([*arguments, "--skip"])


def test_tars_and_folders_are_ingested(root, tmp_path):
    folder = tmp_path / "folder"
    (folder / "deep").mkdir(parents=True)
    for name, file in (("a.png", "coffee.png"), ("deep/a.png", "chelsea.png"), ("b.mp4", "long.mp4")):
        (folder / name).write_bytes((root / file).read_bytes())
        (folder / name).with_suffix(".txt").write_text(f"Caption of {name}")
    archive = tmp_path / "items.tar"
    with tarfile.open(archive, "w") as tar:
        for name in sorted(f for f in folder.rglob("*") if f.is_file()):
            tar.add(name, str(name.relative_to(folder)))
        entry = json.dumps({"task": "ti2i", "target": "target.png", "images": ["a.png"], "instruction": "Edit."}).encode()
        for name, data in (("c.json", entry), ("c.target.png", (root / "astronaut.png").read_bytes())):
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    for manifest, count in ((folder, 3), (archive, 4)):
        output = tmp_path / f"out of {manifest.name}"
        assert ingest(manifest, tmp_path, output).written == count
        wanted, got = groups(MediaSource(manifest, tmp_path, BUCKETS)), groups(MediaSource(output, tmp_path, BUCKETS))
        assert sum(map(len, got.values())) == count
        for place, samples in wanted.items():
            assert len(samples) == len(got[place]) and all(map(same, samples, got[place])), place


def test_nothing_is_lost_or_left_behind_by_a_run_with_problems(root, tmp_path, monkeypatch):
    """Items that cannot be read today are not dropped, and shards that were not put in place are removed."""
    for name in ("astronaut", "coffee", "chelsea"):
        (tmp_path / f"{name}.png").write_bytes((root / f"{name}.png").read_bytes())
    manifest, out = listed(tmp_path, LINES[:3]), tmp_path / "out"
    assert ingest(manifest, tmp_path, out) == Summary(3, 1, 0, 0)
    (tmp_path / "coffee.png").rename(tmp_path / "elsewhere.png")
    assert ingest(manifest, tmp_path, out, skip=True) == Summary(0, 0, 3, 0, 1) and len(ids(out)) == 3
    (tmp_path / "elsewhere.png").rename(tmp_path / "coffee.png")
    before = {name: state for name, state in files(out).items() if name.startswith("vino_media")}
    monkeypatch.setattr(command, "MIN_ITEMS", 1)
    cut = (root / "coffee.png").read_bytes()[:3000]
    (tmp_path / "cut.png").write_bytes(cut)
    broken = listed(tmp_path, [*LINES[:3], *({**LINES[0], "id": str(i)} for i in range(6)), {**LINES[0], "target": "cut.png"}])
    with pytest.raises(UserError, match="cut.png"):
        ingest(broken, tmp_path, out, workers=2)
    assert not [f for f in folder_of(out).glob(".*.*")] and before.items() <= files(out).items()
    with pytest.raises(UserError, match="there is no such file"):
        ingest(tmp_path / "none.jsonl", tmp_path, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_wrong_uses_are_told(ingested, root, tmp_path):
    with pytest.raises(UserError, match="are the same folder"):
        ingest(ingested[1], root, ingested[1])
    with pytest.raises(UserError, match="--workers is 0"):
        main(["--manifest", "x", "--output", str(tmp_path), "--workers", "0"])
    with pytest.raises(UserError, match="cannot read the manifest"):
        ingest(tmp_path / "none.jsonl", root, tmp_path / "out")


def test_shards_are_bounded(monkeypatch):
    jobs = [command.Job("", None, "", size, {}) for size in (3, 3, 3, 20, 1, 1)]
    monkeypatch.setattr(command, "MAX_BYTES", 8)
    assert [[job.size for job in shard] for shard in command.divide(jobs)] == [[3, 3], [3], [20], [1, 1]]
    many = [command.Job("", None, "", 0, {})] * 40000
    sizes = {n: {len(shard) for shard in command.divide(many[:n])} for n in (1, 9, 1600, 40000)}
    assert sizes == {1: {1}, 9: {8, 1}, 1600: {100}, 40000: {1024, 64}}
