"""What step caching costs in quality on trained weights, beside as many runs of the blocks without it: on held-out `shapes`.

    python -m tests.benchmarks.step_cache --checkpoint runs/demo/train [--prompts 60]

Pictures of one prompt and seed are set against those of STEPS steps without caching (PSNR), and all are scored by program.
"""
import argparse
import math
from pathlib import Path

from launch.generator import Generator
from launch.shapes_scores import judge, packed, poses
from vino_jax.evaluation.metrics import psnr

STEPS, BATCH = 24, 20
ROWS = ((STEPS, 1), (STEPS, 2), (STEPS // 2, 1), (STEPS, 3), (STEPS // 3, 1), (STEPS, 4), (STEPS // 4, 1))  # steps, step_cache


def mean(values: list[float]) -> float:
    return math.fsum(values) / len(values)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--checkpoint", type=Path, required=True, help="model checkpoint or finished run, trained on shapes")
    parser.add_argument("--prompts", type=int, default=60)
    flags = parser.parse_args()
    generator = Generator.load(flags.checkpoint)
    asked = argparse.Namespace(seed=0, guidance=None, prompts=flags.prompts)
    samples = poses("t2i", asked, generator.defaults)
    tasks = packed(samples, generator.prompter, asked, generator.defaults)
    print("| steps | step_cache | block runs | PSNR to the first row, dB | change told | colour | shape | count |\n|" + " --- |" * 8)
    exact = None
    for steps, every in ROWS:
        results = generator.sampler.generate_many(tasks, steps=steps, batch=BATCH, step_cache=every)
        exact = exact or results
        near = "-" if exact is results else f"{mean([psnr(ours.pixels, theirs.pixels) for ours, theirs in zip(results, exact)]):.1f}"
        judged = [{name: value for name, value, _ in judge(result.pixels, sample)} for result, sample in zip(results, samples)]
        rates = [mean([found[name] for found in judged if name in found]) for name in ("colour", "shape", "count")]
        print(f"| {steps} | {every} | {-(-steps // every)} | {near} | {max(result.change for result in results):.2f} | "
              + " | ".join(f"{rate:.2f}" for rate in rates) + " |", flush=True)


if __name__ == "__main__":
    main()
