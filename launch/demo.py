"""The whole of VINO at a small size, start to end on a CPU: what `make demo` runs.

    python -m launch.demo --output runs/demo [--short]

Trains the three stages of configs/shapes.py on a mesh of virtual devices (stopped once on the way and gone on with), trains the
same number of steps with stage 1 skipped, samples a task file, scores, and writes OUTPUT/report.html. --short takes a few steps of
everything: all files, no model worth the name. Started again on the same output, it goes on where it stopped.
"""
import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any

from data_pipelines import shapes
from launch import cli
from vino_jax.batch import TASKS
from vino_jax.errors import UserError
from vino_jax.evaluation.report import write_report
from vino_jax.sampling.video import write_output
from vino_jax.train.preemption import EXIT_PREEMPTED
from vino_jax.train.workdir import steps_done

ROOT = Path(__file__).resolve().parent.parent
CONFIG, WITHOUT_STAGE1 = "configs/shapes.py", "configs/shapes_no_stage1.py"
MESH = {"data": 1, "fsdp": 2}
STOPPED_IN = "stage2"  # the stage in which the run is stopped once
TELL_EVERY = 50  # steps
TASK_FILE_SAMPLE = 1000  # index of the held-out samples in the task file: beyond those that are scored


@dataclass(frozen=True)
class Size:
    """How much of everything; the steps of the stages are the config's unless given."""

    stage_steps: tuple[int, int, int] | None
    overrides: dict[str, int]  # of the config's log table
    sampling_steps: int
    prompts: int
    edits: int
    clips: int
    loss_rows: int
    show: int
    environment: Mapping[str, str]


# Of every command. XLA's first level of optimisation compiles a training step in 23 instead of 39 CPU seconds, and it runs as fast;
# huge pages spare a step the page faults of its temporary memory, a tenth of its CPU time (glibc only; elsewhere nothing happens).
COMPILER_FLAGS, ALLOCATOR = "--xla_backend_optimization_level=1", {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
QUICK_COMPILE = {"JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}  # for programs that run only a few times
FULL = Size(None, {"preview_every": 0}, 12, 200, 40, 10, 8, 4, {})
SHORT = Size((2, 6, 2), {"every": 1, "checkpoint_every": 2, "preview_every": 0}, 2, 4, 2, 2, 2, 2, QUICK_COMPILE)


@dataclass
class Demo:
    """The phases, each told with its seconds."""

    output: Path
    size: Size
    timings: list[tuple[str, float]] = field(default_factory=list)
    error: UserError | None = None  # of the first command that failed; it ends what runs beside it
    start: float = field(default_factory=time.perf_counter)

    @contextmanager
    def phase(self, name: str, about: str):
        print(f"== {name}: {about}", flush=True)
        start = time.perf_counter()
        yield
        self.timings.append((name, time.perf_counter() - start))
        print(f"   {name}: {self.timings[-1][1]:.0f} s", flush=True)

    def environment(self, devices: int) -> dict[str, str]:
        """Of a command: virtual CPU devices, and one compile cache for all, so that no program is compiled twice."""
        return {**os.environ, **ALLOCATOR, "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {COMPILER_FLAGS}",
                "JAX_COMPILATION_CACHE_DIR": str(self.output / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.2",
                "HF_HUB_OFFLINE": "1", **self.size.environment}

    def command(self, module: str, *flags: object, log: str, devices: int = 1,
                watch: Callable[[subprocess.Popen], None] | None = None, settings: Mapping[str, str] | None = None) -> int:
        """Run a command of launch/ to its end; its lines go to OUTPUT/<log>.log, and without a `watch` here too. Returns the exit code."""
        path, environment = self.output / f"{log}.log", {**self.environment(devices), **(settings or {})}
        with path.open("a") as file:
            watch = watch or Echo(path)
            process = subprocess.Popen([sys.executable, "-m", module, *map(str, flags)], cwd=ROOT, env=environment, stdout=file,
                                       stderr=subprocess.STDOUT)
            try:
                while process.poll() is None:
                    if self.error:
                        raise self.error
                    watch(process)
                    time.sleep(0.2)
                watch(process)
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        return process.returncode

    def done(self, code: int, log: str, allowed: Sequence[int] = (0,)) -> None:
        """Raises UserError with the last line of the log where the exit code is not an allowed one."""
        if code not in allowed:
            path = self.output / f"{log}.log"
            last = next((line for line in reversed(path.read_text().splitlines()) if line.strip()), "")
            self.error = UserError(f"launch.{log.split('_')[0]} ended with {code}; the end of {path}: {last}")
            raise self.error


class Echo:
    """Prints the whole lines that a log gets."""

    def __init__(self, path: Path):
        self.path, self._at = path, path.stat().st_size

    def __call__(self, process: subprocess.Popen) -> None:
        with self.path.open() as file:
            file.seek(self._at)
            lines, end, _ = file.read().rpartition("\n")
        self._at += len((lines + end).encode())
        for line in lines.splitlines():
            print(f"   {line}", flush=True)


# --- training ---


def records(workdir: Path) -> list[str]:
    """The whole lines of a run's metrics.jsonl, of which the last may be half written."""
    path = workdir / "metrics.jsonl"
    return [line for line in path.read_text().splitlines() if line.endswith("}")] if path.exists() else []


class Watch:
    """Tells a training run's loss while it runs, and once stops it (SIGTERM) a little after a checkpoint of STOPPED_IN."""

    def __init__(self, workdir: Path, stop: bool):
        self.workdir, self.stop = workdir, stop
        self._told: tuple[str, int] = ("", 0)

    def __call__(self, process: subprocess.Popen) -> None:
        lines = records(self.workdir)
        if not lines:
            return
        last = json.loads(lines[-1])
        stage, step = last["stage"], last["step"]
        if stage != self._told[0] or step >= self._told[1] + TELL_EVERY:
            self._told = (stage, step)
            print(f"   {self.workdir.name}: {stage} step {step}, loss {last['loss']:.4f}, {last['samples_a_second']:.0f} samples a second",
                  flush=True)
        if self.stop and stage == STOPPED_IN and 0 < steps_done(self.workdir, [stage])[stage] < step:
            saved = steps_done(self.workdir, [stage])[stage]
            print(f"   {self.workdir.name}: SIGTERM at {stage} step {step}, after the checkpoint of step {saved}", flush=True)
            process.send_signal(signal.SIGTERM)
            self.stop = False


def train(demo: Demo, name: str, config: str, *, stop: bool = False) -> None:
    """A training run in OUTPUT/<name>; with `stop` it is stopped on the way and started again."""
    workdir, size = demo.output / name, demo.size
    if (workdir / "model" / "model.json").exists():
        print(f"   kept {workdir / 'model'}", flush=True)
        return
    settings = {**{f"mesh.{k}": v for k, v in MESH.items()}, **{f"log.{k}": v for k, v in size.overrides.items()}}
    if size.stage_steps:
        first, second, third = size.stage_steps
        steps = {"stage1": first, "stage2": second, "stage3": third} if config == CONFIG else {"stage2": first + second, "stage3": third}
        settings |= {f"stages.{stage}.{key}": value for stage, count in steps.items() for key, value in (("steps", count), ("decay_steps", 0))}
    devices = MESH["data"] * MESH["fsdp"]
    command = ("--config", config, "--workdir", workdir, *(f"--config.{k}={v}" for k, v in settings.items()))
    code = demo.command("launch.train", *command, log=f"train_{name}", devices=devices, watch=Watch(workdir, stop))
    demo.done(code, f"train_{name}", (0, EXIT_PREEMPTED, -signal.SIGTERM) if stop else (0,))
    if code:
        saved = steps_done(workdir, [STOPPED_IN])[STOPPED_IN]
        print(f"   {name}: it ended with exit code {code}, saved at {STOPPED_IN} step {saved}; the same command again goes on there", flush=True)
        code = demo.command("launch.train", *command, log=f"train_{name}", devices=devices, watch=Watch(workdir, False))
        demo.done(code, f"train_{name}")
    elif stop:
        print(f"   {name}: it came to its end before it could be stopped", flush=True)


def train_both(demo: Demo) -> None:
    """The run, and from its second stage on its comparison beside it: so that one compiles, which is mostly one thread, while the other
    trains, and what the first has compiled the second finds in the cache."""
    with ThreadPoolExecutor(2) as pool:
        run = pool.submit(train, demo, "train", CONFIG, stop=True)
        while not run.done() and all(json.loads(line)["stage"] != STOPPED_IN for line in records(demo.output / "train")):
            time.sleep(0.5)
        if not run.done() or run.exception() is None:
            pool.submit(train, demo, "no_stage1", WITHOUT_STAGE1).result()
    run.result()


# --- sampling and scoring ---


def write_task_file(folder: Path) -> Path:
    """A task file with one held-out sample of each task, its references beside it; in the format of the published task files."""
    entries: list[dict[str, Any]] = []
    for task in TASKS:
        frames = 1 if task in ("t2i", "ti2i", "ti2i_baseimg") else 9
        sample = shapes.sample(shapes.held_out(0), TASK_FILE_SAMPLE, task, frames, 64, 64)
        images = [write_output(folder, f"{task}_{i + 1}", image[None], {}).name for i, image in enumerate(sample.images)]
        entry = {"index": task, "task": task, "caption": sample.texts.get("instruction") or sample.texts["long"], "ref_image_paths": images}
        if sample.video is not None:
            entry["ref_video_path"] = write_output(folder, f"{task}_video", sample.video, {}).name
        entries.append(entry)
    path = folder / "tasks.json"
    path.write_text(json.dumps(entries, indent=1))
    return path


def sample_task_file(demo: Demo) -> None:
    tasks = write_task_file(demo.output / "tasks")
    code = demo.command("launch.sample", "--checkpoint", demo.output / "train", "--tasks", tasks, "--root", tasks.parent,
                        "--output", demo.output / "samples", "--steps", demo.size.sampling_steps, "--negative_prompt", "",
                        log="sample", settings=QUICK_COMPILE)
    demo.done(code, "sample")


def evaluate(demo: Demo) -> None:
    size, output = demo.size, demo.output
    against = {"base": output / "train" / "init", "no_stage1": output / "no_stage1"}
    counts = {"prompts": size.prompts, "edits": size.edits, "clips": size.clips, "steps": size.sampling_steps, "show": size.show,
              "loss_rows": size.loss_rows, "batch": min(20, size.clips)}
    code = demo.command("launch.evaluate", "--checkpoint", output / "train", "--config", CONFIG, "--output", output / "scores",
                        *(f"--against={name}={directory}" for name, directory in against.items()),
                        *(f"--{name}={count}" for name, count in counts.items()), log="evaluate")
    demo.done(code, "evaluate")


def sample_and_score(demo: Demo) -> None:
    """At the same time: of both, much is one thread that compiles."""
    with ThreadPoolExecutor(1) as pool:
        sampling = pool.submit(sample_task_file, demo)
        evaluate(demo)
    sampling.result()


def report(demo: Demo) -> Path:
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6
    facts = {"config": CONFIG, "date": date.today().isoformat(), "peak memory of a process": f"{peak:.1f} GB",
             "devices": f"{MESH['data'] * MESH['fsdp']} virtual, on {os.cpu_count()} CPU cores"}
    lead = ("Three stages of training, resumed once on the way; then every task on samples that training never drew, next to the base that "
            "training started from and to a run that skipped stage 1.")
    if demo.size is SHORT:
        lead = "A short run: every file is written, the scores mean nothing. " + lead
    return write_report(demo.output / "report.html", title="VINO at a small size, on shapes", lead=lead, facts=facts,
                        runs={"trained": demo.output / "train", "no_stage1": demo.output / "no_stage1"}, evaluation=demo.output / "scores",
                        timings=demo.timings)


def same_as_before(output: Path, short: bool) -> None:
    """Raises UserError where the output holds a demo of the other length."""
    path, now = output / "demo.json", {"short": short}
    if path.exists() and json.loads(path.read_text()) != now:
        raise UserError(f"{output} holds a {'full' if short else 'short'} demo; remove it or choose another --output")
    output.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(now))


def main(argv: Sequence[str] | None = None) -> None:
    parser = cli.Parser(prog="launch.demo", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--output", type=Path, default=Path("runs/demo"), help="folder of everything that is made (default runs/demo)")
    parser.add_argument("--short", action="store_true", help="a few steps and samples of everything, for CI")
    flags = parser.parse_args(argv)
    output = flags.output.absolute()
    same_as_before(output, flags.short)
    demo = Demo(output, SHORT if flags.short else FULL)
    with demo.phase("train", f"three stages of {CONFIG} on a mesh of {MESH}, stopped once in {STOPPED_IN} and gone on with; at the same time "
                             f"{WITHOUT_STAGE1}: as many steps, from the same parts"):
        train_both(demo)
    size = demo.size
    with demo.phase("evaluate", f"three checkpoints on unseen samples: {size.prompts} of t2i, {size.edits} of each other picture task, "
                                f"{size.clips} of each clip task; at the same time a task file of all eight tasks, by launch.sample"):
        sample_and_score(demo)
    with demo.phase("report", "curves, scores and contact sheets in one HTML file"):
        path = report(demo)
    print(f"report: {path} ({time.perf_counter() - demo.start:.0f} s in all)", flush=True)


if __name__ == "__main__":
    cli.run(main)
