"""Real pictures and clips from a JSONL manifest (its keys: data_pipelines/media.py), with the small parts of the embedded demo.

    python -m launch.train --config configs/media.py --workdir DIR --config.data.manifest=FILE --config.data.root=DIR

For the published weights set config.init.checkpoint to an imported checkpoint, empty the parts, and raise buckets and steps.
"""
from configs import common, shapes
from configs.data import bucket


def get_config():
    config = shapes.get_config()
    config.data.source = "media"
    config.buckets = {
        # the small tokenizer knows the words of `shapes`; other captions cost it almost a token a letter
        "picture": bucket(4, 1, 96, 96, 512),
        "clip": bucket(2, 9, 64, 96, 512),
        "edit": bucket(4, 1, 96, 96, 512, patches=256, images=2),
        "clip_edit": bucket(2, 9, 64, 96, 512, patches=512, images=3, video_frames=9),
    }
    config.stages = {name: common.stage(**entry) for name, entry in common.curriculum(
        (20, 20, 20), (1e-3, 1e-4, 1e-4), ("picture", "clip"), ("picture", "clip", "edit", "clip_edit"), ema=0.98).items()}
    config.log.checkpoint_every = 10
    config.log.preview_every = 20
    return config
