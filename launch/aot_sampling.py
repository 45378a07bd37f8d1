"""The programs of launch.sample, compiled for a topology: `launch.aot_compile --sampling` calls this."""
from collections.abc import Callable, Iterator, Sequence

import jax
import numpy as np

from launch.generator import TILINGS, placed
from vino_jax.aot import report
from vino_jax.aot.chips import chip_of
from vino_jax.aot.measure import measure
from vino_jax.batch import Batch, BucketSpec, PackedTask
from vino_jax.errors import UserError
from vino_jax.models.vino import Vino
from vino_jax.sampling.pipeline import Sampler
from vino_jax.settings import VinoConfig, nearest
from vino_jax.sharding.resolve import describe
from vino_jax.sharding.rules import preset
from vino_jax.train.config import RunConfig

# Of each program of Sampler.lowered, by the first word of its name, the parts that it takes; all others lie on the chips beside it.
_PARTS = {"encode": ("vae",), "condition": ("vlm", "queries", "connector", "vae_connector"), "denoise": ("mmdit",), "decode": ("vae",)}


def request(bucket: BucketSpec) -> PackedTask:
    """One sample of the bucket's shapes: two branches, and with reference images a third without them."""
    row = _without_pixels(BucketSpec(**{**vars(bucket), "batch": 1}).fake())
    branches = [row, row]
    if bucket.images:
        one = BucketSpec(**{**vars(bucket), "batch": 1, "images": 0, "image_height": 0, "image_width": 0}).fake()
        branches.append(_without_pixels(one))
    images = [(1, bucket.image_height, bucket.image_width)] * bucket.images
    clips = [(bucket.video_frames, bucket.video_height, bucket.video_width)] * bool(bucket.video_frames)
    return PackedTask(bucket.name, "", bucket.frames, bucket.height, bucket.width, tuple(branches),
                      tuple(np.zeros((*shape, 3), np.uint8) for shape in (*images, *clips)), 7.0, 7.0, 2.0, 0)


def _without_pixels(row: Batch) -> Batch:
    return row.replace(target=None, images=None, video=None)


def rows(config: RunConfig, architecture: VinoConfig, topology: str, mesh: jax.sharding.Mesh, buckets: Sequence[BucketSpec], tiling: str,
         kind: str | None, say: Callable[[str], None]) -> Iterator[report.Row]:
    """A row for each program of each bucket, or those of a kind: encode, condition, denoise, decode. Of the denoising loop one step counts,
    as its turns are an argument of the program. Raises UserError for another kind."""
    if kind not in (None, *_PARTS):
        raise UserError(f"unknown stage {kind!r} of sampling{nearest(kind, _PARTS)}")
    rules, chip = preset(config.mesh.preset), chip_of(topology)
    vino = Vino(architecture, config.runtime, TILINGS[tiling])
    structs = placed(vino.abstract, vino.axes, config.runtime.dtype, mesh, rules)
    held = {part: describe(tree, jax.tree.map(lambda x: x.sharding, tree))["bytes_a_device"] for part, tree in structs.items()}
    sampler = Sampler(vino, structs, mesh=mesh, rules=rules)
    for bucket in buckets:
        for name, lowered in sampler.lowered(request(bucket), steps=50):
            if kind not in (None, name.split()[0]):
                continue
            beside = sum(size for part, size in held.items() if part not in _PARTS[name.split()[0]])
            measured = measure(lowered, chip, beside=round(beside))
            row = report.row(measured, chip, stage=name, bucket=bucket.name, remat="-", rows_a_chip=1 / mesh.size, model_flops=None)
            say(f"{bucket.name}, {name}: {report.fit(row)}, compiled in {row['compile_seconds']:.0f} s")
            yield row
