"""Every task file of the reference through launch.sample, with a tiny checkpoint in its own format."""
import json

import jax
import pytest

from launch import sample
from tests.golden.conftest import SHARED
from vino_jax.sampling.video import read_frames, read_metadata

TASKS = SHARED / "samples" / "assets" / "test_data" / "tasks"
pytestmark = pytest.mark.skipif(not TASKS.is_dir(), reason="needs the goldens and samples of ../shared, which is absent")
FRAMES = 5


@pytest.fixture(autouse=True)
def many_programs_that_run_once():
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


def test_every_task_runs(checkpoint, tmp_path, capsys):
    """The clip of tiv2v_camclone.json does not exist, in the published files too: one line, and all others are there."""
    entries = {f"{path.stem}_{entry['index']}": entry for path in sorted(TASKS.glob("*.json")) for entry in json.loads(path.read_text())}
    (tmp_path / "tasks.json").write_text(json.dumps([{**entry, "index": name} for name, entry in entries.items()]))
    flags = {"checkpoint": checkpoint, "tasks": tmp_path / "tasks.json", "output": tmp_path / "out", "root": SHARED / "samples", "height": 32,
             "width": 48, "num_frames": FRAMES, "steps": 1, "image_guidance": 1.5, "batch": 2, "contact_sheet": tmp_path / "sheet.png"}
    assert sample.main([f"--{name}={value}" for name, value in flags.items()]) == 1
    told = capsys.readouterr()
    assert told.err.count("\n") == 1 and "tiv2v_camclone" in told.err and "no file" in told.err
    assert f"{len(entries)} tasks: {len(entries) - 1} written, 0 kept, 1 failed" in told.out
    written = {path.stem: path for path in (tmp_path / "out").iterdir()}
    assert set(written) == {name for name in entries if not name.startswith("tiv2v_camclone")}
    for name, path in written.items():
        picture = "2i" in entries[name]["task"]
        frames = read_frames(path)
        assert path.suffix == (".png" if picture else ".mp4") and len(frames) == (1 if picture else FRAMES)
        assert all(side % 16 == 0 for side in frames[0].shape[:2]) and read_metadata(path)["prompt"] == entries[name]["caption"]
    assert len(read_frames(tmp_path / "sheet.png")) == 1
