"""How fast precomputed records become batches on one core, beside what the train step of the demo takes, in one run.

    python -m tests.benchmarks.latents

The demo's three stages (configs/shapes.py) train for a few steps on all cores and log their tokens a second; then the real pictures and
clips at hand (tests/data/real.py) are ingested and encoded for configs/media.py, and the batches of its stage 3 are loaded on one core
by one thread, from pixels and from the records.
"""
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from data_pipelines.prompts import Prompter
from launch import cli
from launch.config import parse
from launch.data import StageData, precomputed_source
from tests.data import real
from vino_jax.checkpoint import model as model_checkpoint
from vino_jax.train.config import run_config

STEPS, BATCHES, TIMES = 20, {"pixels": 40, "records": 300}, 50


def command(*words) -> None:
    done = subprocess.run([sys.executable, "-m", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-2000:])


def demo_tokens(workdir: Path) -> dict[str, float]:
    """Tokens a second of each stage of the demo, the last record of STEPS steps."""
    command("launch.train", "--config", "configs/shapes.py", "--workdir", workdir, "--quiet", "--config.log.preview_every=0",
            "--config.log.every=10", *(f"--config.stages.stage{i}.{key}" for i in (1, 2, 3) for key in (f"steps={STEPS}", "decay_steps=0")))
    records = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {record["stage"]: record["tokens_a_second"] for record in records if record["step"] == STEPS}


def loaded_tokens(data: StageData, batches: int) -> float:
    """Tokens a second of the loader alone."""
    sizes = {bucket.name: bucket.batch * bucket.tokens for bucket in data.buckets}
    with data.loader(0) as loader:
        next(loader)
        start, tokens = time.perf_counter(), 0
        for (_, bucket, _), _ in zip(loader, range(batches)):
            tokens += sizes[bucket]
    return tokens / (time.perf_counter() - start)


def main() -> int:
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        demo = demo_tokens(folder / "demo")
        print("; ".join(f"{stage} of the demo: {tokens:,.0f} tokens/s" for stage, tokens in demo.items()), flush=True)
        manifest = real.write_manifest(folder)
        command("launch.ingest", "--manifest", manifest, "--root", folder, "--output", folder / "ingested")
        words = ["--config", "configs/media.py", f"--config.data.manifest={folder / 'ingested'}", "--config.data.prefetch=1",
                 f"--config.init.checkpoint={folder / 'demo' / 'init'}", "--config.stages.stage3.steps=100000"]
        command("launch.precompute", *words, "--output", folder / "latents")
        parser = cli.Parser(prog="latents", allow_abbrev=False)
        _, values = parse(parser, [*words, f"--config.data.precomputed={folder / 'latents'}"])
        config, init = run_config(values), folder / "demo" / "init"
        prompter = Prompter(model_checkpoint.processor_folder(init))
        os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
        data = {kind: StageData(config, config.stages["stage3"], prompter, precomputed=source)
                for kind, source in (("pixels", None), ("records", precomputed_source(config, init, prompter)))}
        speeds = {kind: loaded_tokens(one, BATCHES[kind]) for kind, one in data.items()}
    fastest = max(demo.values())
    for kind, tokens in speeds.items():
        print(f"{kind}, one core: {tokens:,.0f} tokens/s, {tokens / fastest:.0f} times the fastest stage of the demo")
    print(f"records over {TIMES} times: {'yes' if speeds['records'] > TIMES * fastest else 'no'}")
    return speeds["records"] <= TIMES * fastest


if __name__ == "__main__":
    sys.exit(main())
