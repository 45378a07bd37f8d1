"""Decoding and encoding a clip with the VAE beside diffusers' AutoencoderKLHunyuanVideo: time and memory, in one run.

    python -m tests.benchmarks.vae [--rounds N]

17 frames of 256x256 at a quarter of the published widths (32, 64, 128, 128), all else as published, float32, the same random weights in
both, each in the windows of frames that diffusers takes by default. Each side is a process of its own with as many threads as there are
cores; both compile and run once before anything is measured, then they take turns. Memory is the largest resident size (VmHWM of
Linux, set back after that first run) during a call of one kind, less what the process held with its libraries imported and no weights
loaded; in the table also without that deduction. Exit code 1 where a ratio of decoding is over 1.
"""
import argparse
import os
import time
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median

import numpy as np

from launch import cli

WIDTHS, FRAMES, SIDE, LATENTS = (32, 64, 128, 128), 17, 256, 16
CLOSE = 1e-3  # largest difference of the two sides' results


def resident(name: str) -> float:
    """Bytes: VmRSS, now, or VmHWM, the largest since it was set back."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024.0 for line in lines if line.startswith(name))


def inputs() -> dict[str, np.ndarray]:
    """What each kind of call takes, channels last."""
    rng = np.random.default_rng(0)
    return {"decode": rng.standard_normal((1, 1 + (FRAMES - 1) // 4, SIDE // 8, SIDE // 8, LATENTS), np.float32),
            "encode": rng.uniform(-1, 1, (1, FRAMES, SIDE, SIDE, 3)).astype(np.float32)}


def diffusers(threads: int) -> Callable[[Connection], dict[str, Callable]]:
    """Imports what it needs; what it gives makes the VAE, whose weights it sends, and gives its calls."""
    import torch
    from diffusers import AutoencoderKLHunyuanVideo

    torch.set_num_threads(threads)

    def load(pipe):
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


def ours(threads: int) -> Callable[[Connection], dict[str, Callable]]:
    """The same, which receives the weights; XLA has as many threads as the process has cores."""
    import jax

    from tests.parity.conversion import to_params
    from vino_jax.convert.tables.vae import table
    from vino_jax.models.vae import VAE
    from vino_jax.models.vae_tiling import Tiling, decode_tiled, encode_tiled
    from vino_jax.nn.module import Definition
    from vino_jax.nn.runtime import Runtime
    from vino_jax.settings import VAEConfig

    config, tiling = VAEConfig(block_widths=WIDTHS), Tiling(side=None)

    def load(pipe):
        definition = Definition(lambda rngs: VAE(config, Runtime(), rngs=rngs))
        params = to_params(table(config), pipe.recv(), definition.abstract)
        calls = {"decode": jax.jit(lambda p, z: decode_tiled(definition(p), z, tiling)),
                 "encode": jax.jit(lambda p, x: encode_tiled(definition(p), x, tiling)[..., :LATENTS])}
        given = {kind: jax.device_put(x) for kind, x in inputs().items()}
        return {kind: lambda kind=kind: np.asarray(calls[kind](params, given[kind])) for kind in calls}

    return load


SIDES = {"diffusers": diffusers, "ours": ours}


def serve(side: str, threads: int, pipe: Connection) -> None:
    """A side's process: sends (kind, what comes out) of each kind of call, then answers each kind that it receives with (seconds, peak
    bytes, the bytes with libraries imported)."""
    load = SIDES[side](threads)
    imported = resident("VmRSS")
    calls = load(pipe)
    for kind, call in calls.items():
        pipe.send((kind, call()))
    for kind in iter(pipe.recv, None):
        Path("/proc/self/clear_refs").write_text("5")
        start = time.perf_counter()
        calls[kind]()
        pipe.send((time.perf_counter() - start, resident("VmHWM"), imported))


def main() -> int:
    parser = argparse.ArgumentParser(prog="tests.benchmarks.vae", description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    rounds, threads = parser.parse_args().rounds, len(os.sched_getaffinity(0))
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    context, pipes, first = get_context("spawn"), {}, {}
    for side in SIDES:
        pipes[side], theirs = context.Pipe()
        context.Process(target=serve, args=(side, threads, theirs), daemon=True).start()
        if side == "diffusers":
            weights = pipes[side].recv()
        else:
            pipes[side].send(weights)
        first[side] = dict(pipes[side].recv() for _ in range(2))
    kinds = tuple(first["ours"])
    apart = {kind: float(np.abs(first["ours"][kind] - first["diffusers"][kind]).max()) for kind in kinds}
    print("largest difference: " + ", ".join(f"{kind} {value:.1e}" for kind, value in apart.items()), flush=True)
    figures: dict[tuple[str, str], list] = {(kind, side): [] for kind in kinds for side in SIDES}
    for i in range(rounds):
        for kind in kinds:
            for side in list(SIDES)[::1 if i % 2 else -1]:
                pipes[side].send(kind)
                figures[kind, side].append(pipes[side].recv())
    for pipe in pipes.values():
        pipe.send(None)
    print(f"medians of {rounds} rounds, {threads} threads\nkind; side; seconds; peak memory without the imports; with them")
    missed = max(apart.values()) > CLOSE
    for kind in kinds:
        seconds, alone, whole = {}, {}, {}
        for side in SIDES:
            took, peaks, imported = zip(*figures[kind, side])
            seconds[side], whole[side], alone[side] = median(took), max(peaks), max(peaks) - imported[0]
            print(f"{kind}; {side}; {seconds[side]:.2f} s; {alone[side] / 1e9:.2f} GB; {whole[side] / 1e9:.2f} GB")
        ratios = {name: values["ours"] / values["diffusers"] for name, values in (("time", seconds), ("memory", alone), ("with imports", whole))}
        paired = median(a[0] / b[0] for a, b in zip(figures[kind, "ours"], figures[kind, "diffusers"]))
        print(f"{kind}: time {ratios['time']:.2f} (median of the rounds' ratios {paired:.2f}), memory {ratios['memory']:.2f}, "
              f"with imports {ratios['with imports']:.2f} times diffusers'")
        missed |= kind == "decode" and max(ratios["time"], ratios["memory"]) > 1
    return int(missed)


if __name__ == "__main__":
    cli.run(main)
