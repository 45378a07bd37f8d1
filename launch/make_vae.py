"""Trains the small VAE of the embedded default on shapes pictures and clips, and writes it as a diffusers folder.

    python -m launch.make_vae [--output DIR] [--steps N] [--seed S]

The same architecture as HunyuanVideo's VAE with SIZES below. Loss: L1 + KL_WEIGHT * KL (mean over latent elements). Muon for kernels,
Adam for the rest, cosine rate. Two steps of pictures, one of a clip of 9 frames. The part is written every WRITE_EVERY steps, so a usable
one exists early. All randomness comes from the seed.

The shipped part: this command with its defaults, 29 minutes on two busy CPU cores; PSNR on held-out scenes 32.6 dB for pictures, 28.5
and 29.1 dB for clips of 9 and 17 frames.
"""
import argparse
import functools
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
from safetensors.numpy import save_file

from data_pipelines import shapes
from launch import cli
from vino_jax.convert.configs import write_vae
from vino_jax.convert.ops import PATCH
from vino_jax.convert.tables.vae import table
from vino_jax.models.vae import VAE
from vino_jax.nn.module import Definition, Params
from vino_jax.nn.runtime import Runtime, compiler_options
from vino_jax.settings import VAEConfig

SIZES = VAEConfig(block_widths=(16, 24, 32, 40), layers_per_block=1, norm_groups=2, scaling_factor=1.0)
PART = Path("data_pipelines/shapes_parts/hunyuan/vae")
SIDE, CROP = 64, 48  # pixels of a picture, and of the random crops of it that are trained on
PATH, CONSTANTS = 8, slice(6, 8)  # channels of start_params
KL_WEIGHT = 1e-4
PEAK_RATE = 4e-3
WRITE_EVERY = 150
BATCHES = ((10, "t2i", 1), (10, "t2i", 1), (1, "t2v", 9))  # (clips, task, frames) of the steps, in turn

VAE_PART = Definition(lambda rngs: VAE(SIZES, Runtime(), rngs=rngs))


def pixels(seed: int, first: int, count: int, task: str, frames: int) -> np.ndarray:
    """Samples first..first+count-1 of the stream `seed`: (count, frames, SIDE, SIDE, 3) float32 in [-1, 1]."""
    clips = [shapes.sample(seed, first + i, task, frames, SIDE, SIDE).target for i in range(count)]
    return np.stack(clips).astype(np.float32) / 127.5 - 1.0


def start_params(key: jax.Array) -> Params:
    """Random parameters with a path laid through them that averages 8x8 pixels and repeats them, so that training starts from a blurred
    picture in the right colours and not from noise: the network is deep and normalised, and finds colours slowly by itself.

    The path is the first 8 channels: red, green, blue, their negatives, and the constants +4 and -4. So group means are 0 and group norms
    hardly depend on the picture, and silu(u) - silu(-u) = u is linear. Other channels stay random, residual branches start
    small and leave the path alone.
    """
    params = jax.tree.map(np.array, jax.jit(VAE_PART.init)(key))
    colours = np.concatenate([np.eye(3), -np.eye(3), np.zeros((3, 2))], axis=1, dtype=np.float32)  # 3 -> the path
    for half in (params["encoder"], params["decoder"]):
        blocks = half["down_blocks" if half is params["encoder"] else "up_blocks"].values()
        resnets = [resnet for block in (*blocks, half["mid_block"]) for resnet in block["resnets"].values()]
        for resnet in resnets:
            resnet["conv2"]["kernel"] *= 0.1
            resnet["conv2"]["kernel"][..., :PATH] = 0.0
            if "conv_shortcut" in resnet:
                _lay(resnet["conv_shortcut"]["kernel"], np.eye(PATH), (), np.s_[:PATH], np.s_[:PATH])
        half["mid_block"]["attentions"]["0"]["to_out"]["kernel"] *= 0.1
        half["mid_block"]["attentions"]["0"]["to_out"]["kernel"][:, :PATH] = 0.0
        for block in blocks:
            for name, taps in (("downsamplers", (1, 2)), ("upsamplers", (1,))):
                if name in block:
                    _lay(block[name]["0"]["conv"]["kernel"], np.eye(PATH), taps, np.s_[:PATH], np.s_[:PATH])
        half["conv_in"]["kernel"][..., PATH:] *= 0.3
        _lay(half["conv_in"]["kernel"], colours, (1,), np.s_[:3], np.s_[:PATH])
        half["conv_in"]["bias"][CONSTANTS] = 4.0, -4.0
        spread = np.sqrt(32.0 * SIZES.norm_groups / len(half["conv_norm_out"]["scale"]))  # of a group that holds nothing but the constants
        _lay(half["conv_out"]["kernel"], spread * colours.T, (1,), np.s_[:PATH], np.s_[:3])
    latent = SIZES.latent_channels
    params["quant_conv"]["kernel"][:], params["post_quant_conv"]["kernel"][:] = np.eye(2 * latent), np.eye(latent)
    params["encoder"]["conv_out"]["kernel"][..., latent:] *= 0.1
    params["quant_conv"]["bias"][latent:] = -6.0  # noise of standard deviation 1 would drown what untrained latents say
    return jax.tree.map(jnp.asarray, params)


def _lay(kernel: np.ndarray, matrix: np.ndarray, taps: tuple[int, ...], inputs: slice, outputs: slice) -> None:
    """Overwrite `outputs` of a (3, 3, 3, in, out) kernel, or a (in, out) one: the mean over the taps of rows and columns, of the last
    frame, times a matrix. Other outputs do not read the path's constants.
    """
    kernel[..., inputs, :][..., CONSTANTS, :] = 0.0
    kernel[..., outputs] = 0.0
    if kernel.ndim == 2:
        kernel[inputs, outputs] = matrix
        return
    for row in taps:
        for column in taps:
            kernel[2, row, column, inputs, outputs] = matrix / len(taps) ** 2


def loss(params: Params, pixels_BFHWC: jax.Array, key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(L1 + KL_WEIGHT * KL, L1) of one batch, with a sample of the posterior."""
    vae = VAE_PART(params)
    mean, logvar = jnp.split(vae.encode(pixels_BFHWC), 2, axis=-1)
    latents = mean + jnp.exp(0.5 * logvar) * jax.random.normal(key, mean.shape)
    l1 = jnp.mean(jnp.abs(vae.decode(latents) - pixels_BFHWC))
    kl = 0.5 * jnp.mean(jnp.square(mean) + jnp.exp(logvar) - 1.0 - logvar)
    return l1 + KL_WEIGHT * kl, l1


def _matrices(params: Params) -> Params:
    """For Muon: kernels as matrices (taps and inputs, outputs), other parameters None."""
    return jax.tree.map(lambda p: optax.contrib.MuonDimensionNumbers(tuple(range(p.ndim - 1)), p.ndim - 1) if p.ndim > 1 else None, params)


OPTIMIZER = optax.contrib.muon(1.0, beta=0.9, adam_b2=0.99, adam_learning_rate=0.1, muon_weight_dimension_numbers=_matrices)


@functools.cache
def compiled(function: Callable, donate: tuple[int, ...] = ()) -> Callable:
    """Under jit, at the first call: only then is the platform known."""
    return jax.jit(function, donate_argnums=donate, compiler_options=compiler_options())


def train_step(params: Params, state: optax.OptState, pixels_BFHWC: jax.Array, key: jax.Array, rate: jax.Array):
    """One update at the rate: (params, optimizer state, L1)."""
    gradient, l1 = jax.grad(loss, has_aux=True)(params, pixels_BFHWC, key)
    updates, state = OPTIMIZER.update(gradient, state, params)
    return jax.tree.map(lambda p, u: p + rate * u, params, updates), state, l1


def reconstruct(params: Params, pixels_BFHWC: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(mean and standard deviation of the unscaled posterior; the mean's pixels, clipped to [-1, 1])."""
    vae = VAE_PART(params)
    mean, logvar = jnp.split(vae.encode(pixels_BFHWC), 2, axis=-1)
    return mean, jnp.exp(0.5 * logvar), jnp.clip(vae.decode(mean), -1.0, 1.0)


def to_torch(params: Params) -> dict[str, np.ndarray]:
    """diffusers' names and layouts, float16 (under 2.5 MB; its 11 bits of mantissa cost no visible quality)."""
    tensors = {}
    for rule in table(SIZES).rules:
        leaf = params
        for name in rule.jax.split("/"):
            leaf = leaf[name]
        array = np.asarray(leaf)
        shape = (*array.T.shape, 1, 1, 1) if rule.op is PATCH else array.shape
        tensors[rule.torch] = np.ascontiguousarray(rule.op.to_torch(array, shape)).astype(np.float16)
    return tensors


def write(directory: Path, params: Params) -> None:
    """config.json and diffusion_pytorch_model.safetensors, as diffusers' AutoencoderKLHunyuanVideo.from_pretrained reads them."""
    directory.mkdir(parents=True, exist_ok=True)
    config = write_vae(SIZES)
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_file(to_torch(params), directory / "diffusion_pytorch_model.safetensors", metadata={"format": "pt"})
    (directory / "diffusion_pytorch_model.safetensors").chmod(0o644)


@dataclass
class Latents:
    """Of each latent channel: mean and standard deviation, and the mean standard deviation of its posterior."""

    mean_C: np.ndarray
    std_C: np.ndarray
    noise_C: np.ndarray


def measure(params: Params, seed: int, counts: dict[tuple[str, int], int]) -> tuple[dict[str, float], Latents]:
    """Mean PSNR in dB of reconstructions by kind, on `counts` samples of (task, frames); statistics of the latents."""
    psnr, means, noises = {}, [], []
    for (task, frames), count in counts.items():
        values = []
        for i in range(0, count, 4):
            batch = pixels(seed, i, 4, task, frames)
            mean, noise, out = (np.asarray(x) for x in compiled(reconstruct)(params, batch))
            means.append(mean.reshape(-1, mean.shape[-1]))
            noises.append(noise.reshape(-1, noise.shape[-1]))
            values += list(10 * np.log10(4.0 / np.mean(np.square(out - batch), axis=(1, 2, 3, 4))))
        psnr[f"{task}{frames}"] = round(float(np.mean(values)), 2)
    means = np.concatenate(means)
    return psnr, Latents(means.mean(axis=0), means.std(axis=0), np.concatenate(noises).mean(axis=0))


def normalised(params: Params, latents: Latents) -> Params:
    """The same autoencoder with latent channels of mean 0 and standard deviations that say what they matter: 1 for the channel that the
    posterior keeps most exactly, less for others by the square root of how much less exact they are. Equal ones would make a flow spend
    its loss on channels that hardly move a pixel. Both maps at the latents are linear and absorb it.
    """
    params, latent = jax.tree.map(np.array, params), SIZES.latent_channels
    exactness = latents.std_C / latents.noise_C
    divisor_C = latents.std_C / np.sqrt(exactness / exactness.max())
    into, out = params["quant_conv"], params["post_quant_conv"]
    into["kernel"][:, :latent] /= divisor_C
    into["bias"][:latent] = (into["bias"][:latent] - latents.mean_C) / divisor_C
    into["bias"][latent:] -= 2 * np.log(divisor_C)  # of the log variance
    out["bias"] += latents.mean_C @ out["kernel"]
    out["kernel"] *= divisor_C[:, None]
    return jax.tree.map(lambda p: jnp.asarray(p, jnp.float16).astype(jnp.float32), params)  # as stored


def main() -> None:
    parser = cli.Parser(prog="launch.make_vae", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=PART)
    parser.add_argument("--steps", type=int, default=4500)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    key = jax.random.key(args.seed)
    params = start_params(key)
    state = OPTIMIZER.init(params)
    rate = optax.warmup_cosine_decay_schedule(0.0, PEAK_RATE, min(50, args.steps // 4), args.steps, PEAK_RATE / 100)
    start, seen, rng = time.perf_counter(), 0, np.random.default_rng(args.seed)
    for step in range(args.steps):
        count, task, frames = BATCHES[step % len(BATCHES)]
        batch = pixels(args.seed, seen, count, task, frames)
        seen += count
        row, column = rng.integers(0, SIDE - CROP + 1, 2)
        batch = batch[:, :, row:row + CROP, column:column + CROP]
        params, state, l1 = compiled(train_step, (0, 1))(params, state, batch, jax.random.fold_in(key, step), rate(step))
        if step % 30 < len(BATCHES):
            print(f"step {step} {task} l1 {float(l1):.4f} {time.perf_counter() - start:.0f} s", flush=True)
        if (step + 1) % WRITE_EVERY == 0 and step + 1 < args.steps:
            psnr, latents = measure(params, shapes.held_out(args.seed), {("t2i", 1): 16, ("t2v", 9): 4})
            write(args.output, normalised(params, latents))
            print(f"step {step + 1} PSNR {psnr}", flush=True)
    stored = normalised(params, measure(params, args.seed, {("t2i", 1): 64, ("t2v", 9): 8})[1])
    write(args.output, stored)
    psnr, latents = measure(stored, shapes.held_out(args.seed), {("t2i", 1): 64, ("t2v", 9): 32, ("t2v", 17): 16})
    print(json.dumps({"psnr": psnr, "latent_std": [round(float(x), 2) for x in latents.std_C],
                      "seconds": round(time.perf_counter() - start)}))


if __name__ == "__main__":
    cli.run(main)
