"""The embedded default with its third stage alone, for comparison: from an untrained connector, for as many tokens as all three stages."""
from configs import shapes
from data_pipelines.mixture import Mixture, Schedule
from data_pipelines.sources import ShapesSource
from vino_jax.batch import BucketSpec

_DRAWN = 2000  # steps of which the mean is taken


def tokens_a_step(config, name: str) -> float:
    """Mean tokens (BucketSpec.tokens times rows) that a step of a stage draws."""
    stage = config.stages[name]
    buckets = [BucketSpec(name=bucket, **config.buckets[bucket]) for bucket in stage.buckets]
    schedule = Schedule(0, Mixture(dict(stage.tasks), dict(stage.texts)), buckets, ShapesSource(0))
    drawn = (schedule.plan(step).bucket for step in range(_DRAWN))
    return sum(bucket.tokens * bucket.batch for bucket in drawn) / _DRAWN


def get_config():
    config = shapes.get_config()
    cost = {name: tokens_a_step(config, name) for name in config.stages}
    spent = sum(cost[name] * config.stages[name].steps for name in config.stages)
    config.stages.stage3.steps = round(spent / cost["stage3"])
    del config.stages.stage1, config.stages.stage2
    return config
