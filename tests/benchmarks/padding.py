"""How much of what training computes is padding, in buckets of one family and in a single bucket for all.

    python -m tests.benchmarks.padding

Two sets: the real pictures and clips at hand (tests/data/real.py), and 10,000 items whose sizes, aspect ratios, lengths and texts are
log-normal. The buckets are at the published scale: area 640 squared, clips of 29 and 85 frames, Qwen3-VL's limits for what it sees; in
two families, one with few buckets, each of which is a program to compile, and one with many.
"""
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.common import ALL_TASKS
from configs.data import families
from data_pipelines.buckets import NEEDS, assign, padding_shares
from data_pipelines.files import Facts
from data_pipelines.manifest import Item
from data_pipelines.media import MediaSource, place
from data_pipelines.pixels import PixelLimits
from data_pipelines.problems import Problems
from data_pipelines.prompts import Prompter
from data_pipelines.sources import Usage
from tests.data import real
from tests.data.folders import SHARED, SMALL_VLM
from vino_jax.batch import BucketSpec

ITEMS = 10_000
WORDS = ("a", "red", "blue", "circle", "square", "moves", "to", "the", "left", "right", "of", "and")  # a token each


BUDGET = 150_000  # tokens of a batch: two rows of the largest
FAMILIES = {"few": {"text_tokens": (512,), "frames": (29, 85), "images": (1, 3), "aspects": (2 / 3, 1, 3 / 2)},
            "many": {"text_tokens": (128, 512), "frames": (29, 85), "images": (1, 2, 3)}}


def buckets(family: str) -> tuple[BucketSpec, ...]:
    return tuple(BucketSpec(name, **values) for name, values in families(640, budget=BUDGET, **FAMILIES[family]).items())


@dataclass(frozen=True)
class Described:
    """A picture or clip of which only the facts exist."""

    name: str
    facts: Facts


def log_normal_items(count: int = ITEMS, seed: int = 0) -> list[Item]:
    """Items by the shares of stage 3: area (median 720x1280), aspect ratio (median 1.3), frames (median 90), words (median 40)."""
    rng = np.random.default_rng(seed)

    def media(clip: bool) -> Described:
        area, aspect = 720 * 1280 * np.exp(rng.normal(0, 0.8)), 1.3 * np.exp(rng.normal(0, 0.35))
        frames = max(1, int(90 * np.exp(rng.normal(0, 0.6)))) if clip else 1
        return Described("", Facts(frames, max(1, int((area / aspect) ** 0.5)), max(1, int((area * aspect) ** 0.5)), (frames - 1) / 24))

    items = []
    for task in rng.choice(list(ALL_TASKS), count, p=list(ALL_TASKS.values())):
        needs, target = NEEDS[task], media(NEEDS[task].clip)
        images = tuple(media(False) for _ in range(needs.images and rng.integers(needs.images, 4)))
        words = rng.choice(WORDS, max(1, int(40 * np.exp(rng.normal(0, 0.8)))))
        items.append(Item("", str(task), target, images, target if needs.video else None, {"long": (" ".join(words),)}, False))
    return items


class Placed:
    """What assign and padding_shares need of a source, from items without pixels."""

    def __init__(self, items, buckets, prompter):
        self.tokens, self.left_out = {}, []
        for item in items:
            bucket, tokens, reason = place(item, buckets, prompter)
            if bucket:
                self.tokens.setdefault((item.task, bucket.name), []).append(tokens)
            else:
                self.left_out.append(reason)

    def tasks(self):
        return tuple({task for task, _ in self.tokens})

    def count(self, task, bucket):
        return len(self.tokens.get((task, bucket.name), ()))

    def usage(self, task, bucket):
        tokens = self.tokens.get((task, bucket.name))
        return tokens and Usage(float(np.mean(tokens)))

    def unplaced(self):
        return self.left_out


def measure(source, buckets) -> tuple[float, float, int, float]:
    """Padding with buckets and with one for all, buckets in use, and the largest batch's tokens over the smallest's."""
    assigned = assign({task: weight for task, weight in ALL_TASKS.items() if task in source.tasks()}, buckets, source)
    used = [entry.bucket for entry in assigned if entry.shares]
    costs = [bucket.batch * bucket.tokens for bucket in used]
    return *padding_shares(assigned, source), len(used), max(costs) / min(costs)


def main() -> int:
    prompter, worst = Prompter(SMALL_VLM, PixelLimits()), 0.0
    tokenizer, items = Prompter(SHARED / "qwen3vl_processor") if SHARED.is_dir() else prompter, log_normal_items()
    print("set; family; items left out; buckets in use; largest batch over smallest, in tokens; padding; in a single bucket")
    with tempfile.TemporaryDirectory() as folder:
        manifest = real.write_manifest(Path(folder))
        for family in FAMILIES:
            specs = buckets(family)
            for name, source in (("real pictures and clips", MediaSource(manifest, folder, specs, tokenizer, problems=Problems())),
                                 (f"{ITEMS} log-normal items", Placed(items, specs, prompter))):
                padding, single, used, spread = measure(source, specs)
                worst = max(worst, padding)
                print(f"{name}; {family}; {len(source.unplaced())}; {used}; {spread:.2f}; {100 * padding:.1f} %; {100 * single:.1f} %")
    print(f"under 15 %: {'yes' if worst < 0.15 else 'no'}")
    return worst >= 0.15


if __name__ == "__main__":
    sys.exit(main())
