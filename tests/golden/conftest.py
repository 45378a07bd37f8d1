"""The goldens' weights in the published layout, imported once for all tests of this folder."""
import runpy
import sys
from pathlib import Path

import pytest

from launch import convert

SHARED = Path(__file__).resolve().parents[3] / "shared"


@pytest.fixture(scope="package")
def checkpoint(tmp_path_factory):
    golden, folder = SHARED / "golden", tmp_path_factory.mktemp("golden")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["published.py", str(golden / "pipeline.json"), str(folder / "published")])
        runpy.run_path(str(golden / "published.py"))
        source, hunyuan = folder / "published", folder / "published" / "hunyuan"
        patch.setattr(sys, "argv", ["convert", "import", "--output", str(folder / "model"), "--vino", str(source / "vino.ckpt"),
                                    "--mmdit", str(hunyuan), "--vae", str(hunyuan), "--vlm", str(source / "qwen3vl")])
        convert.main()
    return folder / "model"
