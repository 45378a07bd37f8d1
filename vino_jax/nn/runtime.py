"""Switches of how a model is computed; none changes what it computes by more than rounding."""
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from vino_jax.errors import UserError
from vino_jax.nn.attention import KERNELS
from vino_jax.nn.quantize import QUANTIZERS
from vino_jax.nn.stack import check_remat

# By platform. On a CPU, by default (jax 0.10), products and convolutions go to YNNPACK, which takes 1.2 to 1.4 times as long for large products
# (tests/benchmarks/products.py) and 2 to 6 times for convolutions as XLA's own code; reductions stay there, and products that XLA fuses into them.
# And operations are ordered by what could run side by side, of which products that fill all cores gain nothing, but the MLP's first product lies
# in memory all through attention.
_COMPILER_OPTIONS = {"cpu": {
    "xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_REDUCE",
    "xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED",
}}
# Besides, where compiled programs need not be kept on disk, which XLA cannot do with these: oneDNN's products take four fifths of the time in
# attention, and about as long or less elsewhere. Each goes there alone: over some that XLA joins with what is around them ("..._TYPE_DOT"), as
# (a * s) @ b + c, it ends the process.
_NOT_KEPT = {"cpu": {"xla_cpu_use_onednn": True, "xla_cpu_experimental_onednn_fusion_type": "LIBRARY_FUSION_TYPE_INDIVIDUAL_DOT"}}
# The same for the VAE alone, once a task. A TPU's compiler looks for the best tiling of every convolution in up to 30 CPU seconds; at its level
# O1 (jax's EffortLevel) a tile's decoding compiles in a third of the time and takes 1.26 times the cycles by its own estimate
# (tests/benchmarks/tile_compile.py).
_ONCE = {**_COMPILER_OPTIONS, "tpu": {"optimization_level": 19}}
_KNOWN = {"dtype": ("float32", "bfloat16"), "attention": KERNELS, "quantize": QUANTIZERS}


@dataclass(frozen=True)
class Runtime:
    """dtype: of activations and products; norms, softmax, RoPE and losses stay float32.
    remat: policy of nn/stack.py ("nothing" saves everything, "full" recomputes each block in the backward pass, "budget:G" saves what G
    gigabytes a device hold). attention: kernel name of nn/attention.py. quantize: name in nn/quantize.py, of products in the MMDiT's
    blocks; "" for none. Raises UserError for an unknown name.
    """

    dtype: str = "float32"
    remat: str = "full"
    attention: str = "auto"
    quantize: str = ""

    def __post_init__(self):
        for name, known in _KNOWN.items():
            if getattr(self, name) not in known:
                raise UserError(f"runtime.{name} {getattr(self, name)!r} is unknown; choose one of {', '.join(known)}")
        check_remat("runtime.remat", self.remat)

    @property
    def compute_dtype(self) -> jnp.dtype:
        return jnp.dtype(self.dtype)


def compiler_options(mesh: Mesh | None = None, *, once: bool = False) -> dict[str, Any]:
    """XLA's, as jax.jit takes them, for programs that hold a VAE or sample, on the mesh or on the default device.
    once: for a VAE that runs so seldom that its compilation counts. On a CPU they depend on whether JAX keeps compiled programs on disk."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    options = (_ONCE if once else _COMPILER_OPTIONS).get(platform, {})
    return options if jax.config.jax_compilation_cache_dir else {**options, **_NOT_KEPT.get(platform, {})}
