"""What the pipeline costs beside the decoding of clips that it cannot do without, on one core.

    python -m tests.benchmarks.loader

Real clips (tests/data/real.py) become batches of 29 frames at about 480x848, as text to video and as edits of a clip; in turn, the same
frames are decoded, scaled and cut by PyAV and numpy alone. What is left is the prompt, what the VLM sees of references, and the batch.
"""
import json
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

import av
import numpy as np

from configs.data import families
from data_pipelines.loader import Loader
from data_pipelines.media import MediaSource, cover_size
from data_pipelines.mixture import Mixture
from data_pipelines.prompts import Prompter
from tests.data import real
from tests.data.folders import SHARED, SMALL_VLM
from vino_jax.batch import BucketSpec

FRAMES, ROUNDS, LIMIT = 29, 5, 0.25


def plain(path: Path, height: int, width: int) -> np.ndarray:
    """The first frames of a clip, scaled to cover height x width and cut, with nothing around it."""
    kept = []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            high, wide = cover_size((frame.height, frame.width), height, width)
            image = frame.to_ndarray(format="rgb24", height=high, width=wide, interpolation="LANCZOS")
            kept.append(image[(high - height) // 2:(high + height) // 2, (wide - width) // 2:(wide + width) // 2])
            if len(kept) == FRAMES:
                return np.stack(kept)
    raise AssertionError(f"{path} has {len(kept)} frames")


def pipeline(source, task: str, specs, prompter, steps: int) -> None:
    with Loader(source, Mixture({task: 1.0}, {"short": 1.0}, 0, 0), specs, prompter, 0, stop_step=steps) as batches:
        for _ in batches:
            pass


def measure(task: str, folder: Path, prompter) -> float:
    """Prints and returns the overhead: seconds of the pipeline over those of plain decoding, less 1."""
    clips = ["assets/test_data/videos/tiv2v_2.mp4"] if SHARED.is_dir() else []
    clips += ["scikit/bigbuckbunny.mp4", "scikit/bikes.mp4"]
    entry = {"task": task, "short": "The clip becomes an oil painting."}
    lines = [json.dumps({**entry, "target": clip, **({"video": clip} if task == "tv2v" else {})}) for clip in clips]
    (folder / "clips.jsonl").write_text("\n".join(lines))
    table = families(640, (384,), 1, frames=(FRAMES,), aspects=(16 / 9, 2))
    specs = tuple(BucketSpec(name, **values) for name, values in table.items())
    source = MediaSource(folder / "clips.jsonl", folder, specs, prompter)
    groups = [(spec, index) for spec in specs for index in range(source.count(task, spec))]
    sizes = [(source.window(task, spec, index).item.target, spec.height, spec.width) for spec, index in groups]
    times = {"plain": [], "pipeline": []}
    for _ in range(ROUNDS):
        start = time.perf_counter()
        for path, height, width in sizes * (2 if task == "tv2v" else 1):
            plain(path, height, width)
        times["plain"].append(time.perf_counter() - start)
        start = time.perf_counter()
        for spec, index in groups:  # every clip once, as the plain decoding has it
            pipeline(_Alone(source, task, spec, index), task, [spec], prompter, 1)
        times["pipeline"].append(time.perf_counter() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    overhead = statistics.median(b / a for a, b in zip(times["plain"], times["pipeline"], strict=True)) - 1
    print(f"{task}: {len(groups)} clips of {FRAMES} frames, medians of {ROUNDS} rounds: plain {seconds['plain']:.2f} s, "
          f"pipeline {seconds['pipeline']:.2f} s, overhead {100 * overhead:.1f} %")
    return overhead


class _Alone:
    """A source of one sample of another."""

    def __init__(self, source, task, spec, index):
        self.source, self.task, self.spec, self.index = source, task, spec, index

    def tasks(self):
        return (self.task,)

    def count(self, task, bucket):
        return 1

    def usage(self, task, bucket):
        return None

    def unplaced(self):
        return []

    def sample(self, task, bucket, index):
        return self.source.sample(self.task, self.spec, self.index)


def main() -> int:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    prompter = Prompter(SHARED / "qwen3vl_processor" if SHARED.is_dir() else SMALL_VLM)
    with tempfile.TemporaryDirectory() as folder:
        real.write_manifest(Path(folder))
        worst = max(measure(task, Path(folder), prompter) for task in ("t2v", "tv2v"))
    print(f"under {100 * LIMIT:.0f} %: {'yes' if worst < LIMIT else 'no'}")
    return worst >= LIMIT


if __name__ == "__main__":
    sys.exit(main())
