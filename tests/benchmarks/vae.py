"""Decoding and encoding a clip with the VAE beside diffusers' AutoencoderKLHunyuanVideo: time and memory, in one run (beside.py says how).

    python -m tests.benchmarks.vae [--rounds N]

17 frames of 256x256 at a quarter of the published widths (32, 64, 128, 128), all else as published, float32, the same random weights in
both, each in the windows of frames that diffusers takes by default. Exit code 1 where a ratio of decoding is over 1.
"""
import functools
from collections.abc import Callable
from multiprocessing.connection import Connection

import numpy as np

from launch import cli
from tests.benchmarks import beside

WIDTHS, FRAMES, SIDE, LATENTS = (32, 64, 128, 128), 17, 256, 16
CLOSE = 1e-3  # largest difference of the two sides' results


def inputs() -> dict[str, np.ndarray]:
    """What each kind of call takes, channels last."""
    rng = np.random.default_rng(0)
    return {"decode": rng.standard_normal((1, 1 + (FRAMES - 1) // 4, SIDE // 8, SIDE // 8, LATENTS), np.float32),
            "encode": rng.uniform(-1, 1, (1, FRAMES, SIDE, SIDE, 3)).astype(np.float32)}


def diffusers(threads: int) -> beside.Load:
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    torch.set_num_threads(threads)

    def load(pipe: Connection) -> dict[str, Callable]:
        torch.manual_seed(0)
        vae = AutoencoderKLHunyuanVideo(block_out_channels=WIDTHS).eval()
        pipe.send({name: value.numpy() for name, value in vae.state_dict().items()})
        given = {kind: torch.from_numpy(np.ascontiguousarray(np.moveaxis(x, -1, 1))) for kind, x in inputs().items()}
        calls = {"decode": lambda: vae.decode(given["decode"]).sample, "encode": lambda: vae.encode(given["encode"]).latent_dist.mode()}

        def apart(call):
            with torch.no_grad():
                return np.moveaxis(call().numpy(), 1, -1)

        return {kind: lambda call=call: apart(call) for kind, call in calls.items()}

    return load


def ours(threads: int) -> beside.Load:
    """XLA has as many threads as the process has cores."""
    import jax

    from tests.parity.conversion import to_params
    from vino_jax.convert.tables.vae import table
    from vino_jax.models.vae import VAE
    from vino_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled
    from vino_jax.nn.module import Definition
    from vino_jax.nn.runtime import Runtime, compiler_options
    from vino_jax.settings import VAEConfig

    config, tiling = VAEConfig(block_widths=WIDTHS), Tiling(side=None)

    def load(pipe: Connection) -> dict[str, Callable]:
        definition = Definition(lambda rngs: VAE(config, Runtime(), rngs=rngs))
        params = to_params(table(config), pipe.recv(), definition.abstract)
        jit = functools.partial(jax.jit, compiler_options=compiler_options())
        calls = {"decode": jit(lambda p, z: decode_tiled(definition(p), z, tiling)),
                 "encode": jit(lambda p, x: encode_tiled(definition(p), x, tiling)[..., :LATENTS])}
        given = {kind: jax.device_put(x) for kind, x in inputs().items()}
        return {kind: lambda kind=kind: np.asarray(calls[kind](params, given[kind])) for kind in calls}

    return load


def main() -> int:
    parser = cli.Parser(prog="tests.benchmarks.vae", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    return beside.run({beside.REFERENCE: diffusers, beside.OURS: ours}, parser.parse_args().rounds, CLOSE, ("decode",))


if __name__ == "__main__":
    cli.run(main)
