"""Makes the base MMDiT part of configs/shapes.py: t2i and t2v from random weights, with a connector that is thrown away.

It stands for HunyuanVideo. `python -m launch.train --config configs/shapes_base.py --workdir DIR`, then
`python -m launch.convert export --checkpoint DIR/model --output DIR/export --format diffusers`: the folder's transformer/ is
data_pipelines/shapes_parts/hunyuan/transformer/.

The shipped part was made in three sittings of this config with other `steps` (528 on an earlier VAE part, 972 and 1000 on the
shipped one), not in one run; it is undertrained.
"""
from configs import common, models, shapes


def get_config():
    config = shapes.get_config()
    config.init.mmdit = ""
    config.model.mmdit = models.shapes()["mmdit"]
    config.init.require = ("vae", "vlm")
    rules = (*common.RULES["stage2"],)
    config.stages = {
        "base": common.stage(steps=3200, learning_rate=2e-3, decay_steps=1200, rules=rules, tasks=dict(common.PLAIN_TASKS, t2i=0.7, t2v=0.3),
                             texts={"long": 0.5, "short": 0.5}, buckets=("picture", "clip"), ema=0.0, image_dropout=0.0)}
    config.log.checkpoint_every = 100
    config.log.preview_every = 400
    return config
