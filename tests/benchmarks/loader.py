"""What the pipeline costs beside the decoding of clips that it cannot do without, on one core.

    python -m tests.benchmarks.loader

Real clips (tests/data/real.py) become batches of 29 and 85 frames at about 480x848, for each task that makes a clip; in turn, the same
frames and reference images are decoded, scaled and cut by PyAV, PIL and numpy alone. What is left is the prompt, what the VLM sees of
references, and the batch. The tasks together count by their shares in stage 3.
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
from PIL import Image

from configs.common import ALL_TASKS
from configs.data import families
from data_pipelines.buckets import NEEDS
from data_pipelines.loader import Loader
from data_pipelines.media import MediaSource, cover_size
from data_pipelines.mixture import Mixture
from data_pipelines.pixels import letterbox
from data_pipelines.prompts import Prompter
from tests.data import real
from tests.data.folders import SHARED, SMALL_VLM
from vino_jax.batch import BucketSpec

ROUNDS, LIMIT = 7, 0.25
TASKS = ("t2v", "i2v", "ti2v", "tv2v", "tiv2v")


def touch_memory() -> None:
    """More memory than a round takes is written to: see tests/benchmarks/convert.py."""
    np.ones(2 << 30, np.uint8)


def plain(path: Path, frames: int, height: int, width: int) -> np.ndarray:
    """The first frames of a clip, scaled to cover height x width and cut, with nothing around it."""
    kept = []
    with av.open(str(path)) as container:
        container.streams.video[0].thread_type = "AUTO"
        for frame in container.decode(video=0):
            high, wide = cover_size((frame.height, frame.width), height, width)
            image = frame.to_ndarray(format="rgb24", height=high, width=wide, interpolation="LANCZOS")
            kept.append(image[(high - height) // 2:(high + height) // 2, (wide - width) // 2:(wide + width) // 2])
            if len(kept) == frames:
                return np.stack(kept)
    raise AssertionError(f"{path} has {len(kept)} frames")


def plain_image(path: Path, height: int, width: int) -> np.ndarray:
    """A reference image, letterboxed, as PIL alone does it."""
    with Image.open(path) as image:
        return letterbox(np.asarray(image.convert("RGB")), height, width)


def measure(task: str, frames: int, folder: Path, prompter) -> tuple[float, float]:
    """Prints the overhead and returns the seconds of plain decoding and of the pipeline. Every clip is taken once a round."""
    clips = ["assets/test_data/videos/tiv2v_1.mp4", "assets/test_data/videos/tiv2v_2.mp4"] if SHARED.is_dir() else []
    clips += ["scikit/bigbuckbunny.mp4", "scikit/bikes.mp4"]
    images, video = ["skimage/astronaut.png"] * (task in ("ti2v", "tiv2v")), NEEDS[task].video
    entry = {"task": task, "short": "The clip becomes an oil painting.", **({"images": images} if images else {})}
    lines = [json.dumps({**entry, "target": clip, **({"video": clip} if video else {})}) for clip in clips]
    (folder / "clips.jsonl").write_text("\n".join(lines))
    table = families(640, (384,), 1, frames=(frames,), images=(1,), aspects=(16 / 9,))
    specs = tuple(BucketSpec(name, **values) for name, values in table.items())
    source = MediaSource(folder / "clips.jsonl", folder, specs, prompter)
    (spec,) = (spec for spec in specs if source.count(task, spec) == len(clips))
    mixture, times = Mixture({task: 1.0}, {"short": 1.0}, 0, 0), {"plain": [], "pipeline": []}
    for _ in range(ROUNDS):
        touch_memory()
        start = time.perf_counter()
        for clip in clips:
            for _ in range(1 + video):
                plain(folder / clip, frames, spec.height, spec.width)
            for image in images:
                plain_image(folder / image, spec.height, spec.width)
        times["plain"].append(time.perf_counter() - start)
        touch_memory()
        start = time.perf_counter()
        with Loader(source, mixture, [spec], prompter, 0, stop_step=len(clips)) as batches:
            for _ in batches:
                pass
        times["pipeline"].append(time.perf_counter() - start)
    decoding, whole = (statistics.median(values) for values in times.values())
    print(f"{task}: {len(clips)} clips of {frames} frames, {spec.height}x{spec.width}, medians of {ROUNDS} rounds: "
          f"plain {decoding:.2f} s, pipeline {whole:.2f} s, overhead {100 * (whole / decoding - 1):.1f} %", flush=True)
    return decoding, whole


def main() -> int:
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    prompter, worst = Prompter(SHARED / "qwen3vl_processor" if SHARED.is_dir() else SMALL_VLM), 0.0
    with tempfile.TemporaryDirectory() as folder:
        real.write_manifest(Path(folder))
        for frames in (29, 85):
            seconds = np.array([measure(task, frames, Path(folder), prompter) for task in TASKS])
            decoding, whole = np.array([ALL_TASKS[task] for task in TASKS]) @ seconds
            print(f"clip tasks of stage 3 by their shares, {frames} frames: overhead {100 * (whole / decoding - 1):.1f} %")
            worst = max(worst, whole / decoding - 1)
    print(f"under {100 * LIMIT:.0f} %: {'yes' if worst < LIMIT else 'no'}")
    return int(worst >= LIMIT)


if __name__ == "__main__":
    sys.exit(main())
