"""Task files: the reference's own, and one clear line for each thing that is wrong."""
import json

import pytest

from data_pipelines.tasks import read_tasks
from tests.data.folders import SHARED, needs_shared
from vino_jax.errors import UserError

GOOD = {"index": "id_1", "task": "t2i", "caption": "a red circle"}


@pytest.fixture
def write(tmp_path):
    (tmp_path / "a.png").touch(), (tmp_path / "b.png").touch(), (tmp_path / "c.mp4").touch()

    def write(entries):
        path = tmp_path / "tasks.json"
        path.write_text(entries if isinstance(entries, str) else json.dumps(entries))
        return path, tmp_path
    return write


def test_all_kinds(write, tmp_path):
    images, clip = ["a.png", "b.png"], "c.mp4"
    path, root = write([
        GOOD, {"index": 2, "task": "t2v", "caption": "x", "ref_image_paths": [], "ref_video_path": None, "note": "other keys are let be"},
        {"index": "3", "task": "i2v", "caption": "x", "ref_image_paths": images[:1]},
        {"index": "4", "task": "ti2i", "caption": "x", "ref_image_paths": images, "ref_image_have_base": True},
        {"index": "5", "task": "ti2i_baseimg", "caption": "x", "ref_image_paths": images},
        {"index": "6", "task": "tv2v", "caption": "x", "ref_video_path": clip},
        {"index": "7", "task": "tiv2v", "caption": "x", "ref_image_paths": images, "ref_video_path": clip},
        {"index": "8", "task": "ti2i", "caption": "x", "ref_image_paths": images}])
    tasks, problems = read_tasks(path, root)
    assert not problems
    assert [t.task for t in tasks] == ["t2i", "t2v", "i2v", "ti2i_baseimg", "ti2i_baseimg", "tv2v", "tiv2v", "ti2i"]
    assert [t.base_image for t in tasks] == [False, False, False, True, True, False, False, False]
    assert tasks[1].index == "2" and tasks[6].images == (tmp_path / "a.png", tmp_path / "b.png") and tasks[6].video == tmp_path / "c.mp4"


@pytest.mark.parametrize("change, message", [
    ({"task": "t2x"}, "unknown task 't2x'"), ({"caption": " "}, "no caption"), ({"caption": None}, "no caption"),
    ({"caption": "a \ud83d"}, "caption holds half a character"), ({"negative_prompt": "\ud83d"}, "negative_prompt holds half"),
    ({"index": "x" * 300}, "has more than 240 bytes"), ({"task": "i2v", "ref_image_paths": ["x" * 300]}, "no file .*xxx"),
    ({"index": None}, "index is None"), ({"index": "../up"}, "name for the output file"),
    ({"task": "i2v"}, "i2v needs ref_image_paths"), ({"ref_image_paths": ["a.png"]}, "t2i takes no ref_image_paths"),
    ({"task": "tv2v"}, "tv2v needs ref_video_path"), ({"task": "i2v", "ref_image_paths": ["z.png"]}, "no file .*z.png"),
    ({"task": "i2v", "ref_image_paths": "a.png"}, "list of paths"), ({"task": "tv2v", "ref_video_path": ["c.mp4", "c.mp4"]}, "at most one"),
    ({"task": "i2v", "ref_image_path": ["a.png"]}, "did you mean 'ref_image_paths'"),
    ({"ref_image_have_base": "yes"}, "true or false"), ({"index": "good"}, "occurs twice")])
def test_a_bad_task_does_not_stop_the_others(write, change, message):
    path, root = write([{**GOOD, "index": "good"}, {**GOOD, **change}, {**GOOD, "index": "last"}])
    tasks, problems = read_tasks(path, root)
    assert [t.index for t in tasks] == ["good", "last"]
    [problem] = problems
    assert problem.__class__ is UserError and "tasks.json: entry 1" in str(problem) and "\n" not in str(problem)
    with pytest.raises(UserError, match=message):
        raise problem


def test_files_that_are_no_task_files(write, tmp_path):
    with pytest.raises(UserError, match="cannot read the task file .*missing.json"):
        read_tasks(tmp_path / "missing.json")
    for text, message in (("{", "no JSON"), ('{"tasks": []}', "JSON array")):
        with pytest.raises(UserError, match=message):
            read_tasks(write(text)[0])
    assert "not an object" in str(read_tasks(write(["x"])[0])[1][0])


@needs_shared
def test_the_references_own_files():
    root, seen, bad = SHARED / "samples", [], []
    for path in sorted((root / "assets/test_data/tasks").glob("*.json")):
        tasks, problems = read_tasks(path, root)
        seen += [t.task for t in tasks]
        bad += problems
    assert len(seen) == 19 and len(bad) == 1 and "scene1027_10.mp4" in str(bad[0])  # one published file names a clip that does not exist
    assert seen.count("ti2i_baseimg") == 2
