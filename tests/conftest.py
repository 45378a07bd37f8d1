"""Test session: eight virtual CPU devices, strict dtypes, matmuls in full float32."""
import os
import tempfile

from launch.cli import roomy_thread_pool

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Little optimisation in LLVM: tests are small, and most of their time is compilation.
_FLAGS = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {_FLAGS}"
roomy_thread_pool(os.environ)
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Tests that build the same program compile it once a worker.
_CACHE = tempfile.TemporaryDirectory(prefix="vino_jax_compiled_")
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", _CACHE.name)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")
