"""How long the TPU compiler takes for one shape of the VAE's tiles, and how good it is then, with and without launch.sample's options.

    python -m tests.benchmarks.tile_compile [--topology v6e:2x4] [--frames 17] [--side 256] [--encode]
"""
import argparse
import time

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vino_jax.aot.chips import GIB, chip_of, topology_devices
from vino_jax.aot.measure import measure
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
        lowered = jax.jit(lambda weights, x: method(vae(weights), x), compiler_options=options).lower(weights, tile)
        used, found = time.process_time(), measure(lowered, chip_of(flags.topology))
        print(f"{name}: {found.seconds:.0f} s, {time.process_time() - used:.0f} of the CPU; temporaries {found.memory.temporaries / GIB:.1f} GiB; "
              f"{found.cost.cycles / 1e6:.0f} million cycles by the compiler's estimate", flush=True)


if __name__ == "__main__":
    main()
