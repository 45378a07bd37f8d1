"""How long the TPU compiler takes for one shape of the VAE's tiles, and what it takes of memory, with and without launch.sample's options.

    python -m tests.benchmarks.tile_compile [--topology v6e:2x4] [--frames 17] [--side 256] [--encode]
"""
import argparse
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.aot.chips import GIB, topology_devices
from vino_jax.models.vae import VAE
from vino_jax.nn.module import Definition
from vino_jax.nn.runtime import Runtime, compiler_options
from vino_jax.settings import VAEConfig


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--topology", default="v6e:2x4", help="one chip of it")
    parser.add_argument("--frames", type=int, default=17)
    parser.add_argument("--side", type=int, default=256, help="pixels")
    parser.add_argument("--encode", action="store_true", help="in the place of decoding")
    flags = parser.parse_args()
    jax.config.update("jax_platforms", "cpu")
    config = VAEConfig()
    mesh = Mesh(topology_devices(flags.topology)[:1], ("x",))
    here = NamedSharding(mesh, PartitionSpec())
    vae = Definition(lambda rngs: VAE(config, Runtime(dtype="bfloat16"), rngs=rngs))
    weights = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, jnp.bfloat16, sharding=here), vae.abstract)
    pixels = (1, flags.frames, flags.side, flags.side, config.in_channels)
    latents = (1, 1 + (flags.frames - 1) // config.temporal_compression, *[flags.side // config.spatial_compression] * 2, config.latent_channels)
    tile = jax.ShapeDtypeStruct(pixels if flags.encode else latents, jnp.float32, sharding=here)
    method = VAE.encode if flags.encode else VAE.decode
    for name, options in (("launch.sample's options", compiler_options(mesh, once=True)), ("the default", compiler_options(mesh))):
        start, used = time.perf_counter(), time.process_time()
        compiled = jax.jit(lambda weights, x: method(vae(weights), x), compiler_options=options).lower(weights, tile).compile()
        memory = compiled.memory_analysis().temp_size_in_bytes / GIB
        print(f"{name}: {time.perf_counter() - start:.0f} s, {time.process_time() - used:.0f} of the CPU; temporaries {memory:.1f} GiB", flush=True)


if __name__ == "__main__":
    main()
