"""The shape of the repository: which package may import which, and the names at the top."""
import ast
import re
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

# package -> packages of this repository that its files may import (its own always)
ARROWS = {
    "vino_jax.errors": set(),
    "vino_jax.batch": {"errors"},
    "vino_jax.settings": {"errors"},
    "vino_jax.processes": {"errors"},
    "vino_jax.sharding": {"errors", "settings"},
    "vino_jax.nn": {"errors", "sharding"},
    "vino_jax.flow": {"errors", "nn"},
    "vino_jax.models": {"errors", "batch", "settings", "nn", "sharding"},
    "vino_jax.checkpoint": {"errors", "settings", "nn"},
    "vino_jax.convert": {"errors", "settings", "nn", "models", "checkpoint"},
    "vino_jax.train": {"errors", "processes", "batch", "settings", "sharding", "nn", "flow", "models", "checkpoint"},
    "vino_jax.aot": {"errors", "batch", "settings"},
    "vino_jax.sampling": {"errors", "batch", "settings", "sharding", "nn", "flow", "models", "checkpoint"},
    "vino_jax.evaluation": {"errors", "batch", "settings", "sharding", "nn", "flow", "models", "checkpoint", "sampling"},
}
# third-party package -> where alone it may be imported, as path prefixes
ONLY_IN = {
    "torch": ("vino_jax/convert/io.py", "vino_jax/evaluation/learned.py", "tests/"),
    "diffusers": ("tests/",),
    "transformers": ("data_pipelines/prompts.py", "vino_jax/evaluation/learned.py", "tests/"),
    "cv2": ("vino_jax/evaluation/metrics.py", "tests/"),
    "grain": ("data_pipelines/", "tests/"),
    "tensorflow_datasets": ("data_pipelines/", "tests/"),
    "orbax": ("vino_jax/checkpoint/", "tests/"),
}


def sources():
    return sorted(p for top in ("vino_jax", "configs", "launch", "data_pipelines", "tests") for p in (ROOT / top).rglob("*.py"))


def imports(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("package", ARROWS)
def test_arrows_point_down(package):
    base = ROOT / package.replace(".", "/")
    files = [base.with_suffix(".py")] if base.with_suffix(".py").exists() else sorted(base.rglob("*.py"))
    assert files
    own = package.split(".")[1]
    for path in files:
        for name in imports(path):
            assert name.split(".")[0] not in ("data_pipelines", "launch", "configs"), f"{path.relative_to(ROOT)} imports {name}"
            if name.startswith("vino_jax.") and name.split(".")[1] != own:
                assert name.split(".")[1] in ARROWS[package], f"{path.relative_to(ROOT)} imports {name}"


def test_data_pipelines_import_only_the_contract():
    for path in (ROOT / "data_pipelines").rglob("*.py"):
        for name in imports(path):
            if name.startswith("vino_jax."):
                assert name.split(".")[1] in ("batch", "errors"), f"{path.name} imports {name}"


@pytest.mark.parametrize("package", ONLY_IN)
def test_heavy_packages_stay_in_their_rooms(package):
    for path in sources():
        if any(name.split(".")[0] == package for name in imports(path)):
            assert str(path.relative_to(ROOT)).startswith(ONLY_IN[package]), f"{path.relative_to(ROOT)} imports {package}"


def test_what_setup_py_asks_for_is_imported():
    tree = ast.parse((ROOT / "setup.py").read_text())
    wanted = next(k.value for k in ast.walk(tree) if isinstance(k, ast.keyword) and k.arg == "install_requires").elts
    borrowed = {"importlib-resources"}  # which tensorflow_datasets imports and does not ask for
    modules = {"orbax-checkpoint": "orbax", "pillow": "PIL", "opencv-python-headless": "cv2"}  # where the name is another one
    names = {re.split("[<>=]", entry.value)[0] for entry in wanted}
    imported = {name.split(".")[0] for path in sources() if ROOT / "tests" not in path.parents for name in imports(path)}
    assert {modules.get(name, name.replace("-", "_")) for name in names - borrowed} <= imported


def test_files_stay_short():
    long = {str(p.relative_to(ROOT)): n for p in sources() if (n := len(p.read_text().splitlines())) > 500}
    assert not long


def test_the_top_level_holds_what_it_should():
    try:
        listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split("\n")
    except (OSError, subprocess.CalledProcessError):
        listed = [str(p.relative_to(ROOT)) for p in ROOT.iterdir() if p.name not in ("runs", "build") and not p.name.endswith(".egg-info")]
    top = {name.split("/")[0].strip('"') for name in listed if name}
    assert {name for name in top if not name.startswith(".")} <= {
        "vino_jax", "configs", "launch", "data_pipelines", "tests", "docs", "setup.py", "README.md", "Makefile", "pyproject.toml", "LICENSE"}


def test_the_small_parts_stay_under_12_megabytes():
    parts = ROOT / "data_pipelines" / "shapes_parts"
    assert sum(p.stat().st_size for p in parts.rglob("*") if p.is_file()) < 12e6
