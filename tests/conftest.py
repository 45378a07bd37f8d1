"""Test session: eight virtual CPU devices, strict dtypes, matmuls in full float32."""
import os
import tempfile

import pytest

from launch.cli import roomy_thread_pool
from tests.compiling import OLDER_FUSIONS, xla_flags

os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {xla_flags(8)}"
roomy_thread_pool(os.environ)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests that build the same program compile it once a worker.
_CACHE = tempfile.TemporaryDirectory(prefix="vino_jax_compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")

import jax  # noqa: E402

jax.devices()  # XLA reads its flags now, and but once; tests of aot load libtpu, which does not know them all
os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(OLDER_FUSIONS, "")


def pytest_collection_modifyitems(items):
    """Those of e2e and of training, which take longest, come first: files go to the workers in their order."""
    first = ("tests/e2e/", "tests/train/test_training.py", "tests/train/")
    items.sort(key=lambda item: next((i for i, path in enumerate(first) if path in item.nodeid), len(first)))


@pytest.fixture
def nothing_kept():
    """JAX keeps no compiled program on disk, as where nobody asked for it: a CPU's programs may take what cannot be kept."""
    from jax.experimental.compilation_cache import compilation_cache

    def keep(folder):
        jax.config.update("jax_compilation_cache_dir", folder)
        compilation_cache.reset_cache()  # it reads the setting but once

    folder = jax.config.jax_compilation_cache_dir
    keep(None)
    yield
    keep(folder)
