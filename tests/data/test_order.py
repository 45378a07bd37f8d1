"""A run whose data changed is not gone on with unknowingly; what fits nowhere is listed whole."""
import json

import pytest
from PIL import Image

from data_pipelines.prompts import Prompter
from launch.data import StageData, check_order, write_unplaced
from tests.data.folders import SMALL_VLM
from tests.data.latents import config_of, make_checkpoint, make_media
from vino_jax.errors import UserError


@pytest.fixture
def datas(tmp_path):
    """() -> the data of the run's one stage, as its files are now."""
    root, init = make_media(tmp_path), make_checkpoint(tmp_path / "init")

    def read():
        config = config_of(root, init)
        return {"only": StageData(config, config.stages["only"], Prompter(SMALL_VLM))}

    return root, read


def test_changed_samples_are_told_while_a_stage_is_under_way(datas, tmp_path):
    root, read = datas
    steps = read()["only"].stage.steps
    check_order(tmp_path, read(), {"only": 0})
    check_order(tmp_path, read(), {"only": 1})
    manifest = next(root.glob("*.jsonl"))
    lines = manifest.read_text().splitlines()
    manifest.write_text("\n".join(lines[::-1]))
    with pytest.raises(UserError, match="the samples of stage 'only' are not those that it began with.*remove .*data.json"):
        check_order(tmp_path, read(), {"only": 1})
    check_order(tmp_path, read(), {"only": steps})  # it draws no more
    manifest.write_text("\n".join(lines))
    check_order(tmp_path, read(), {"only": 0})  # nothing has been made of it
    (tmp_path / "data.json").unlink()
    check_order(tmp_path, read(), {"only": 1})
    assert set(json.loads((tmp_path / "data.json").read_text())) == {"only"}


def test_what_fits_nowhere_is_listed_whole(datas, tmp_path):
    root, read = datas
    write_unplaced(tmp_path, read())
    assert not (tmp_path / "unplaced.txt").exists()
    Image.new("RGB", (1, 1)).save(root / "dot.png")
    manifest = next(root.glob("*.jsonl"))
    dots = [json.dumps({"task": "t2i", "target": "dot.png", "short": "a dot", "id": f"dot {i}"}) for i in range(150)]
    manifest.write_text("\n".join([manifest.read_text().strip(), *dots]))
    write_unplaced(tmp_path, read())
    listed = (tmp_path / "unplaced.txt").read_text().splitlines()
    assert len(listed) == 150 and listed[-1].startswith("only: dot 149 (") and "would be enlarged" in listed[-1]
