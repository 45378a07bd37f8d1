"""Denoising beside diffusers' HunyuanVideoTransformer3DModel: time and memory, in one run (beside.py says how).

    python -m tests.benchmarks.denoise [--rounds N]

Width 768 (6 heads of 128), 4 double and 8 single blocks, all else as published; 2,048 visual tokens (8 latent frames of 32x32), 256 of
context, float32, the same random weights in both. Two steps, one after the other as in a loop: each is the two branches of text guidance,
a pass of two rows in both, and Euler's update. Exit code 1 where a ratio is over 1.
"""
import functools
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from launch import cli
from tests.benchmarks import beside

HEADS, DOUBLE, SINGLE, TEXT, CONTEXT = 6, 4, 8, 4096, 256
LATENTS = (1, 8, 32, 32, 16)
TIMES, GUIDANCE = (0.75, 0.5, 0.25), 7.0
CLOSE = 1e-3


def inputs() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {"latents": rng.standard_normal(LATENTS, np.float32), "context": rng.standard_normal((2, CONTEXT, TEXT), np.float32)}


def diffusers(threads: int) -> beside.Load:
    import torch
    from diffusers import HunyuanVideoTransformer3DModel

    torch.set_num_threads(threads)

    def load(pipe: Connection) -> dict[str, Any]:
        torch.manual_seed(0)
        model = HunyuanVideoTransformer3DModel(num_attention_heads=HEADS, num_layers=DOUBLE, num_single_layers=SINGLE).eval()
        with torch.no_grad():  # VINO has no pooled text: take it out of diffusers
            for parameter in model.time_text_embed.text_embedder.linear_2.parameters():
                parameter.zero_()
        pipe.send({name: value.numpy() for name, value in model.state_dict().items()})
        given = inputs()
        latents, context = torch.from_numpy(np.moveaxis(given["latents"], -1, 1).copy()), torch.from_numpy(given["context"])
        mask, pooled = torch.ones(2, CONTEXT), torch.zeros(2, 768)

        def steps() -> np.ndarray:
            x = latents
            with torch.no_grad():
                for time, after in zip(TIMES, TIMES[1:]):
                    both = model(torch.cat([x] * 2), torch.full((2,), time * 999.0), context, mask, pooled,
                                 guidance=torch.full((2,), 1000.0), return_dict=False)[0]
                    positive, negative = both.chunk(2)
                    x = x - (time - after) * (negative + GUIDANCE * (positive - negative))
            return np.moveaxis(x.numpy(), 1, -1)

        return {"steps": steps}

    return load


def ours(threads: int) -> beside.Load:
    """XLA has as many threads as the process has cores."""
    import jax
    import jax.numpy as jnp

    from tests.parity.conversion import to_params
    from vino_jax.convert.tables.mmdit import MMDIT
    from vino_jax.flow.euler import integrate
    from vino_jax.flow.guidance import guide
    from vino_jax.models.context import References
    from vino_jax.models.mmdit import MMDiT
    from vino_jax.nn.module import Definition
    from vino_jax.nn.runtime import Runtime, compiler_options
    from vino_jax.settings import MMDiTConfig

    config = MMDiTConfig(heads=HEADS, double_blocks=DOUBLE, single_blocks=SINGLE)

    def load(pipe: Connection) -> dict[str, Any]:
        definition = Definition(lambda rngs: MMDiT(config, Runtime(), rngs=rngs))
        params = to_params(MMDIT, pipe.recv(), definition.abstract)
        given = jax.device_put(inputs())
        none = References(jnp.zeros((2, 0, 64)), jnp.zeros((2, 0, config.width)), jnp.zeros((2, 0), jnp.int32), jnp.zeros((2, 0, 3), jnp.int32))

        @functools.partial(jax.jit, compiler_options=compiler_options())
        def steps(params, latents, context):
            def velocity(x, time_B):
                both = definition(params)(jnp.concatenate([x] * 2), jnp.repeat(time_B, 2), none, jnp.zeros(2, jnp.int32), context,
                                          jnp.ones((2, CONTEXT), jnp.bool_))
                return guide(both.reshape(2, *x.shape), jnp.float32(GUIDANCE), jnp.float32(1.0))

            return integrate(velocity, latents, jnp.asarray(TIMES)[:, None])

        return {"steps": lambda: np.asarray(steps(params, given["latents"], given["context"]))}

    return load


def main() -> int:
    parser = cli.Parser(prog="tests.benchmarks.denoise", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=7)
    return beside.run({beside.REFERENCE: diffusers, beside.OURS: ours}, parser.parse_args().rounds, CLOSE, ("steps",))


if __name__ == "__main__":
    cli.run(main)
