"""Decoding and encoding a clip with the VAE beside diffusers' AutoencoderKLHunyuanVideo: time and memory, in one run.

    python -m tests.benchmarks.vae [--rounds N]

17 frames of 256x256 at a quarter of the published widths (32, 64, 128, 128), all else as published, float32, the same random weights in
both, each in the windows of frames that diffusers takes by default. Each side is a process of its own with as many threads as there are
cores; both compile and run once before anything is measured, then they take turns. Memory is the largest resident size (VmHWM of
Linux, set back after that first run) during a call of one kind, less what the process held with its libraries imported and no weights
loaded; in the table also without that deduction. Exit code 1 where a ratio of decoding is over 1.
"""
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
    """A side's process: sends (kind, what comes out) of each kind of call, then answers each kind that it receives with (seconds, CPU
    seconds of all threads, peak bytes, the bytes with libraries imported)."""
    load = SIDES[side](threads)
    imported = resident("VmRSS")
    calls = load(pipe)
    for kind, call in calls.items():
        pipe.send((kind, call()))
    for kind in iter(pipe.recv, None):
        Path("/proc/self/clear_refs").write_text("5")
        start, computed = time.perf_counter(), time.process_time()
        calls[kind]()
        pipe.send((time.perf_counter() - start, time.process_time() - computed, resident("VmHWM"), imported))


def compare(kind: str, pipes: dict[str, Connection], rounds: int) -> dict[str, float]:
    """Calls of one kind by both sides in turns; the ratios of their figures."""
    answers: dict[str, list] = {side: [] for side in SIDES}
    for i in range(rounds):
        for side in list(SIDES)[::1 if i % 2 else -1]:
            pipes[side].send(kind)
            answers[side].append(pipes[side].recv())
    figures = {}
    for side, measured in answers.items():
        seconds, computed, peaks, imported = zip(*measured)
        figures[side] = {"time": median(seconds), "CPU time": median(computed), "memory": max(peaks) - imported[0], "with imports": max(peaks)}
        took, worked, alone, whole = figures[side].values()
        print(f"{kind}; {side}; {took:.2f} s; {worked:.2f} s; {alone / 1e9:.2f} GB; {whole / 1e9:.2f} GB")
    ratios = {name: value / figures["diffusers"][name] for name, value in figures["ours"].items()}
    ratios["time, median of the rounds' ratios"] = median(a[0] / b[0] for a, b in zip(answers["ours"], answers["diffusers"]))
    print(f"{kind}, times diffusers': " + ", ".join(f"{name} {ratio:.2f}" for name, ratio in ratios.items()), flush=True)
    return ratios


def main() -> int:
    parser = cli.Parser(prog="tests.benchmarks.vae", description=__doc__.split("\n")[0])
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
        first[side] = dict(pipes[side].recv() for _ in inputs())
    apart = {kind: float(np.abs(x - first["diffusers"][kind]).max()) for kind, x in first["ours"].items()}
    print("largest difference: " + ", ".join(f"{kind} {value:.1e}" for kind, value in apart.items()))
    print(f"{rounds} rounds, {threads} threads\nkind; side; seconds; CPU seconds; peak memory without the imports; with them", flush=True)
    ratios = {kind: compare(kind, pipes, rounds) for kind in apart}
    for pipe in pipes.values():
        pipe.send(None)
    within = max(ratios["decode"]["time"], ratios["decode"]["memory"]) <= 1
    print(f"decoding within diffusers' time and memory: {'yes' if within else 'no'}")
    return int(not within or max(apart.values()) > CLOSE)


if __name__ == "__main__":
    cli.run(main)
