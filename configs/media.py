"""Real pictures and clips from a manifest (its forms: data_pipelines/manifest.py), with the small parts of the embedded demo.

    python -m launch.train --config configs/media.py --workdir DIR --config.data.manifest=FILE --config.data.root=DIR

For the published weights set config.init.checkpoint to an imported checkpoint, empty the parts, take the model, dtype, shifts and sampling
sizes of configs/vino_13b.py, and raise side, frames, budget and steps; `limits` are then the published ones. What fits no bucket is listed
before the first step.
"""
from configs import common, shapes
from configs.data import families
from data_pipelines.pixels import PixelLimits


def get_config():
    config = shapes.get_config()
    config.data.source = "media"
    # the small tokenizer knows the words of `shapes`; others cost it almost a token a letter
    buckets = families(80, (384,), 2400, frames=(9,), images=(3,), aspects=(2 / 3, 1, 3 / 2),
                       limits=PixelLimits.from_folder(shapes.PARTS / "qwen3vl"))
    config.buckets = buckets
    plain = tuple(name for name, one in buckets.items() if not (one["images"] or one["video_frames"]))
    config.stages = {name: common.stage(**entry) for name, entry in common.curriculum(
        (20, 20, 20), (1e-3, 1e-4, 1e-4), plain, tuple(buckets), ema=0.98).items()}
    config.log.checkpoint_every = 10
    config.log.preview_every = 20
    return config
