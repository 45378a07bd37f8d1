"""Where the tests of the data side find things."""
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SHARED = ROOT.parent / "shared"
SMALL_VLM = ROOT / "data_pipelines" / "shapes_parts" / "qwen3vl"

needs_shared = pytest.mark.skipif(not (SHARED / "golden" / "pipeline.npz").is_file(),
                                  reason="needs ../shared (goldens, samples and Qwen3-VL's processor files), which is absent")
