"""Makes the base MMDiT part of configs/shapes.py: pictures, then pictures and clips, from random weights.

It stands for HunyuanVideo, which no demo can train; the connector and queries of this run are thrown away.

    python -m launch.train --config configs/shapes_base.py --workdir DIR
    python -m launch.convert export --checkpoint DIR/model --output DIR/export --format diffusers --dtype bfloat16
    cp DIR/export/transformer/* data_pipelines/shapes_parts/hunyuan/transformer/

The shipped part took an hour on two CPU cores that did other work beside it. Alone, with its connector, 12 sampling steps, 200 unseen
prompts of t2i: colour 0.99, shape 0.79, count 0.82, relation 0.57; 20 of t2v: colour 1.00, shape 0.50, motion 0.70.
"""
from configs import common, models, shapes


def get_config():
    config = shapes.get_config()
    config.seed = 1  # so that the demo's connector does not start where this one did
    config.init.mmdit = ""
    config.model.mmdit = models.shapes()["mmdit"]
    config.init.require = ("vae", "vlm")
    every = {"learning_rate": 2e-3, "rules": common.RULES["stage2"], "texts": {"long": 0.5, "short": 0.5}, "image_dropout": 0.0}
    config.stages = {
        "base1_pictures": common.stage(steps=5000, tasks={"t2i": 1.0}, buckets=("picture",), **every),
        "base2_clips": common.stage(steps=1500, decay_steps=1200, tasks={"t2i": 0.6, "t2v": 0.4}, buckets=("picture", "clip"), **every)}
    config.log.preview_every = 400
    return config
