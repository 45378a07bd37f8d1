"""launch.measure end to end on small folders, and how it ends on wrong input."""
import dataclasses
import json
import math
import sys

import numpy as np
import pytest

from data_pipelines.files import decoded_frames, frame_pixels
from launch import cli, measure
from tests.evaluation import scripts
from vino_jax.evaluation.frechet import Moments, frechet_distance
from vino_jax.evaluation.metrics import changed_region, motion, psnr, ssim, steadiness
from vino_jax.sampling.video import write_mp4, write_png

PICTURES = ("a", "b", "c", "d")
CLIPS = ("m", "n", "o")
WIDTHS = {"fid": 48, "fvd": 20}


def soft(rng, *shape):
    """Random pixels that codecs keep."""
    return rng.integers(0, 256, (*shape[:-2], shape[-2] // 8, shape[-1] // 8, 3), np.uint8).repeat(8, -3).repeat(8, -2)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """outputs, references, sources (pictures and clips, named alike), captions.json, and the small scripts."""
    root, rng = tmp_path_factory.mktemp("measure"), np.random.default_rng(0)
    for folder in ("outputs", "references", "sources"):
        for i, name in enumerate(PICTURES):
            pixels = soft(np.random.default_rng(i), 32, 48)
            if folder == "outputs" and name != "d":  # "d" is its reference
                pixels = np.clip(pixels + rng.normal(0, 6 * (i + 1), pixels.shape), 0, 255).astype(np.uint8)
            if folder == "sources":
                pixels[:16] = 255 - pixels[:16]
            write_png(root / folder / f"{name}.png", pixels, {})
        for i, name in enumerate(CLIPS):
            still = soft(np.random.default_rng(10 + i), 64, 96)
            step = i if folder == "outputs" else 0
            write_mp4(root / folder / f"{name}.mp4", np.stack([np.roll(still, step * f, 1) for f in range(4)]), {})
    (root / "captions.json").write_text(json.dumps({name: f"a picture of {name}" for name in (*PICTURES, *CLIPS, "unused")}))
    (root / "outputs" / "notes.txt").write_text("no picture")
    (root / "outputs" / ".1.a.png").write_text("half-written")
    scripts.save(root, **WIDTHS)
    return root


@pytest.fixture(scope="module", autouse=True)
def narrow():
    """Few features: of 2048 a distance takes seconds."""
    with pytest.MonkeyPatch.context() as patch:
        for name, width in WIDTHS.items():
            patch.setitem(measure.ALL, name, dataclasses.replace(measure.LEARNED[name], features=width))
        yield


def flags(root, *names, **others):
    given = {"outputs": "outputs", "references": "references", "sources": "sources", "captions": "captions.json", "json": "out/scores.json",
             "lpips": "lpips.pt", "fid": "fid.pt", "fvd": "fvd.pt"}
    found = [f"--{name}={root / given[name]}" for name in ("outputs", *names)]
    return found + [f"--{name}={value}" for name, value in others.items()]


def frames(path):
    return np.stack([frame_pixels(frame) for frame in decoded_frames(path)])


def run(arguments, root):
    measure.main(arguments)
    return json.loads((root / "out" / "scores.json").read_text())


def test_every_value_is_its_functions(folders, capsys):
    report = run(flags(folders, "references", "sources", "json"), folders)
    items, metrics = report["items"], report["metrics"]
    assert set(items) == {*PICTURES, *CLIPS}
    for name in PICTURES:
        out, ref, src = (measure.read_image(folders / f / f"{name}.png") for f in ("outputs", "references", "sources"))
        assert items[name] == {"psnr": psnr(out, ref) if name != "d" else "infinite", "ssim": pytest.approx(ssim(out, ref), abs=1e-12),
                               "changed_region": changed_region(src, out)}
    for name in CLIPS:
        out, ref, src = (frames(folders / f / f"{name}.mp4") for f in ("outputs", "references", "sources"))
        expected = {"ssim": ssim(out, ref), "changed_region": changed_region(src, out), "steadiness": steadiness(out), "motion": motion(out)}
        assert {k: v for k, v in items[name].items() if k != "psnr"} == pytest.approx(expected, abs=1e-9)
    values = [item["ssim"] for item in items.values()]
    assert metrics["ssim"] == {"better": "higher", "count": 7, "infinite": 0, "mean": pytest.approx(np.mean(values)), "notes": [],
                               "standard_error": pytest.approx(np.std(values, ddof=1) / math.sqrt(7))}
    infinite = sum(item["psnr"] == "infinite" for item in items.values())
    assert infinite >= 1 and metrics["psnr"]["infinite"] == infinite and metrics["psnr"]["count"] == 7 - infinite
    assert metrics["psnr"]["mean"] == pytest.approx(np.mean([i["psnr"] for i in items.values() if i["psnr"] != "infinite"]))
    assert metrics["steadiness"]["count"] == 3 and metrics["changed_region"]["better"] == "neither"
    for name in ("clip", "lpips", "fid", "fvd"):
        assert metrics[name]["mean"] is None and len(metrics[name]["absent"]) > 20
    told = capsys.readouterr().out
    assert "lpips: absent, --lpips is not given: vgg16.pt" in told
    assert "clip: absent, --captions is not given; --clip is not given: a folder" in told


def test_the_worst_come_first(folders, capsys):
    report = run(flags(folders, "references", "sources", "json"), folders)
    lines = capsys.readouterr().out.splitlines()
    for name, worst, first in (("psnr", min, "worst"), ("changed_region", max, "largest")):
        values = {item: math.inf if v[name] == "infinite" else v[name] for item, v in report["items"].items()}
        line = lines[next(i for i, told in enumerate(lines) if told.startswith(f"{name}: mean")) + 1]
        assert line.startswith(f"  {first}: {worst(values, key=values.get)} ") and line.count(",") == 4


def test_the_same_input_gives_the_same_bytes(folders):
    given = flags(folders, "references", "sources", "json", "lpips", "fid", "fvd")
    measure.main(given)
    before = (folders / "out" / "scores.json").read_bytes()
    measure.main(given)
    assert (folders / "out" / "scores.json").read_bytes() == before
    assert [p.name for p in (folders / "out").iterdir()] == ["scores.json"]


def test_distances_of_sets_are_of_pictures_or_of_clips(folders, capsys):
    report = run(flags(folders, "references", "json", "lpips", "fid", "fvd", metrics="lpips,fid,fvd"), folders)
    assert set(report["metrics"]) == {"lpips", "fid", "fvd"}
    for name, items, ending in (("fid", PICTURES, "png"), ("fvd", CLIPS, "mp4")):
        score = measure.ALL[name].open(folders / f"{name}.pt")
        found = report["metrics"][name]
        sides = []
        for which in ("outputs", "references"):
            moments = Moments()
            moments.add(np.concatenate([score(measure.read_media(folders / which / f"{item}.{ending}")) for item in items]))
            sides += [moments.mean_D, moments.covariance()]
        assert found["value"] == pytest.approx(frechet_distance(*sides), rel=1e-6) and found["value"] > 0
        assert found["outputs"] == found["references"] == len(items)
        assert [note.split(":")[0] for note in found["notes"]] == ["rank-deficient outputs", "rank-deficient references"]
        assert f"{len(items)} samples for {WIDTHS[name]} features" in found["notes"][0]
    assert report["metrics"]["lpips"]["count"] == 7 and report["items"]["d"] == {"lpips": 0}
    assert "note: rank-deficient outputs: 4 samples for 48 features" in capsys.readouterr().out


def test_sets_need_no_pairs(folders, tmp_path):
    for i, name in enumerate("xyz"):
        write_png(tmp_path / "others" / f"{name}.png", soft(np.random.default_rng(20 + i), 40, 40), {})
    others = f"--references={tmp_path / 'others'}"
    report = run([*flags(folders, "fid", "json", metrics="fid"), others], folders)
    assert report["metrics"]["fid"]["references"] == 3 and report["metrics"]["fid"]["outputs"] == 4


def test_clips_of_several_lengths_are_told(folders, tmp_path):
    for i in range(3):
        write_mp4(tmp_path / "others" / f"{i}.mp4", soft(np.random.default_rng(i), 5, 32, 32), {})
    report = run([*flags(folders, "fvd", "json", metrics="fvd"), f"--references={tmp_path / 'others'}"], folders)
    assert "clips of 4 to 5 frames; the distance sees their length too" in report["metrics"]["fvd"]["notes"]


def test_weights_that_are_not_given_are_absent_and_the_rest_is_measured(folders):
    report = run(flags(folders, "references", "captions", "json", metrics="psnr,clip,fid"), folders)
    assert report["metrics"]["psnr"]["mean"] > 10
    for name in ("clip", "fid"):
        assert report["metrics"][name] == {"mean": None, "absent": f"--{name} is not given: {measure.LEARNED[name].weights}"}


def test_captions_reach_clip(folders, monkeypatch, tmp_path):
    heard = {}

    def opener(path, device):
        return lambda output, caption: heard.setdefault(caption, float(output.shape[0]))

    monkeypatch.setitem(measure.ALL, "clip", dataclasses.replace(measure.LEARNED["clip"], opener=opener))
    report = run(flags(folders, "captions", "json", metrics="clip", clip=tmp_path), folders)
    assert heard == {f"a picture of {name}": 1 if name in PICTURES else 4 for name in (*PICTURES, *CLIPS)}
    assert report["metrics"]["clip"]["count"] == 7
    tasks = [{"index": name, "caption": f"task {name}", "task": "t2i"} for name in (*PICTURES, *CLIPS)]
    (tmp_path / "tasks.json").write_text(json.dumps(tasks))
    heard.clear()
    run(flags(folders, "json", metrics="clip", clip=tmp_path, captions=tmp_path / "tasks.json"), folders)
    assert "task a" in heard and len(heard) == 7


def test_the_threshold_of_changed_region(folders):
    few, many = (run(flags(folders, "sources", "json", metrics="changed_region", changed_threshold=t), folders)["metrics"]["changed_region"]["mean"]
                 for t in (200, 0))
    assert few < many and many > 0.5


# --- wrong input: exit code 2, one line that names it, nothing written ---


@pytest.fixture
def broken(tmp_path, folders):
    """Folders that each have something wrong."""
    write_png(tmp_path / "small" / "a.png", soft(np.random.default_rng(0), 16, 24), {})
    write_png(tmp_path / "tiny" / "a.png", np.zeros((5, 5, 3), np.uint8), {})
    write_mp4(tmp_path / "clip_a" / "a.mp4", soft(np.random.default_rng(0), 2, 32, 48), {})
    write_mp4(tmp_path / "one_frame" / "a.mp4", soft(np.random.default_rng(0), 1, 32, 48), {})
    write_mp4(tmp_path / "twice" / "a.mp4", soft(np.random.default_rng(0), 2, 32, 48), {})
    for folder in ("twice", "only_a", "cut"):
        write_png(tmp_path / folder / "a.png", soft(np.random.default_rng(0), 32, 48), {})
    whole = (tmp_path / "cut" / "a.png").read_bytes()
    (tmp_path / "cut" / "a.png").write_bytes(whole[:len(whole) // 2])
    (tmp_path / "cut_clip").mkdir()
    (tmp_path / "cut_clip" / "a.mp4").write_bytes((tmp_path / "clip_a" / "a.mp4").read_bytes()[:300])
    (tmp_path / "no_clip").mkdir()
    (tmp_path / "no_clip" / "a.mp4").write_text("no clip at all")
    (tmp_path / "empty").mkdir()
    for name, text in (("words.json", "no json"), ("number.json", "7"), ("blank.json", '{"a": " "}'), ("list.json", '[{"index": "a"}]'),
                       ("other.json", '{"b": "x"}'), ("latin.json", None)):
        (tmp_path / name).write_bytes(b'{"a": "\xff"}' if text is None else text.encode())
    return tmp_path


WRONG = {
    "no such folder": ("--outputs {t}/nowhere", "cannot read the folder {t}/nowhere: No such file or directory"),
    "a file for a folder": ("--outputs {t}/words.json", "cannot read the folder {t}/words.json: Not a directory"),
    "an empty folder": ("--outputs {t}/empty", "the folder {t}/empty has no picture and no clip"),
    "one name twice": ("--outputs {t}/twice", "{t}/twice/a.mp4 and {t}/twice/a.png have one name"),
    "no pair": ("--outputs {f}/outputs --references {t}/only_a", "{f}/outputs/b.png has no reference: there is none called 'b' in {t}/only_a"),
    "no source": ("--outputs {f}/outputs --sources {t}/only_a", "{f}/outputs/b.png has no source: there is none called 'b' in {t}/only_a"),
    "no caption": ("--outputs {t}/only_a --captions {t}/other.json --clip {t}", "{t}/only_a/a.png has no caption: there is none called 'a' in"),
    "a clip for a picture": ("--outputs {t}/only_a --references {t}/clip_a", "{t}/only_a/a.png is a picture, its reference {t}/clip_a/a.mp4 a c"),
    "another size": ("--outputs {t}/only_a --references {t}/small", "psnr of {t}/only_a/a.png and {t}/small/a.png: two pictures or clips of one"),
    "another size, lpips": ("--outputs {t}/only_a --references {t}/small --metrics lpips --lpips {f}/lpips.pt", "lpips of {t}/only_a/a.png and"),
    "too small": ("--outputs {t}/tiny --references {t}/tiny", "ssim of {t}/tiny/a.png and {t}/tiny/a.png: ssim needs at least 7 pixels"),
    "one frame": ("--outputs {t}/one_frame", "steadiness of {t}/one_frame/a.mp4: a clip of two frames or more is needed"),
    "half a picture": ("--outputs {t}/cut --references {t}/only_a", "cannot read the image {t}/cut/a.png: "),
    "half a clip": ("--outputs {t}/cut_clip", "{t}/cut_clip/a.mp4 has no video stream"),
    "no clip at all": ("--outputs {t}/no_clip", "cannot read the video {t}/no_clip/a.mp4: "),
    "half a reference": ("--outputs {t}/only_a --references {t}/cut", "cannot read the image {t}/cut/a.png: "),
    "unknown metric": ("--outputs {t}/only_a --metrics psnr,sssim", "--metrics: unknown metric 'sssim', did you mean 'ssim'?"),
    "no metric": ("--outputs {t}/only_a --metrics ,", "--metrics names none"),
    "nothing to compare with": ("--outputs {t}/only_a --metrics psnr", "psnr cannot be measured: --references is not given"),
    "no clip": ("--outputs {t}/only_a --metrics motion", "motion cannot be measured: there is no clip in {t}/only_a"),
    "no reference clip": ("--outputs {t}/clip_a --references {t}/only_a --metrics fvd --fvd {f}/fvd.pt", "fvd cannot be measured: there are not"),
    "nothing at all": ("--outputs {t}/only_a", "nothing can be measured: psnr: --references is not given; "),
    "no weights at all": ("--outputs {f}/outputs --references {f}/references --metrics fid", "nothing can be measured: fid: --fid is not given"),
    "not a number": ("--outputs {t}/only_a --references {t}/only_a --metrics lpips --lpips {f}/nan.pt", "lpips of {t}/only_a/a.png and "),
    "features that are none": ("--outputs {f}/outputs --references {f}/references --metrics fid --fid {f}/fvd.pt", "{f}/fvd.pt failed; is it the"),
    "one sample": ("--outputs {t}/only_a --references {f}/references --metrics fid --fid {f}/fid.pt", "fid cannot be measured: there are not two"),
    "weights that are not there": ("--outputs {f}/outputs --references {f}/references --lpips {t}/no.pt", "there is no file {t}/no.pt; needed is"),
    "weights of another form": ("--outputs {f}/outputs --references {f}/references --lpips {t}/words.json", "{t}/words.json is no Torch"),
    "captions: none": ("--outputs {t}/only_a --captions {t}/no.json", "cannot read the captions {t}/no.json: No such file"),
    "captions: no json": ("--outputs {t}/only_a --captions {t}/words.json", "the captions {t}/words.json must be a JSON object"),
    "captions: a number": ("--outputs {t}/only_a --captions {t}/number.json", "the captions {t}/number.json must be a JSON object"),
    "captions: no utf-8": ("--outputs {t}/only_a --captions {t}/latin.json", "the captions {t}/latin.json must be a JSON object"),
    "captions: half a task": ("--outputs {t}/only_a --captions {t}/list.json", "the captions {t}/list.json must be a JSON object"),
    "captions: blank": ("--outputs {t}/only_a --captions {t}/blank.json", "the caption of 'a' in {t}/blank.json is no text"),
    "threshold": ("--outputs {t}/only_a --changed_threshold nan", "--changed_threshold nan must be within 0..255"),
    "a folder to write": ("--outputs {t}/only_a --references {t}/only_a --json {t}/empty", "--json {t}/empty is a folder"),
    "a place that takes nothing": ("--outputs {t}/only_a --references {t}/only_a --json /proc/none/x.json", "cannot write to the folder /proc/"),
}


@pytest.mark.parametrize("what", WRONG)
def test_wrong_input_is_one_line(what, folders, broken, monkeypatch, capsys):
    arguments, words = (text.format(t=broken, f=folders) for text in WRONG[what])
    given = arguments.split()
    if "--json" not in given:
        given += ["--json", str(broken / "out.json")]
    monkeypatch.setattr(sys, "argv", ["launch.measure", *given])
    with pytest.raises(SystemExit) as ended:
        cli.run(measure.main)
    told = capsys.readouterr().err
    assert ended.value.code == 2 and told.startswith("error: " + words) and told.count("\n") == 1, told
    assert not [p for p in broken.rglob("*") if p.name.startswith("out.json")]
