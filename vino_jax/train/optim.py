"""AdamW with clipping, a warm-up, and one rate a parameter."""
import jax
import optax

from vino_jax.nn.module import by_path
from vino_jax.train.stage import StageConfig


def learning_rate(stage: StageConfig) -> optax.Schedule:
    """Linear warm-up, then constant; over the last `decay_steps` linear down to a tenth."""
    warm = optax.linear_schedule(0.0 if stage.warmup_steps else stage.learning_rate, stage.learning_rate, max(stage.warmup_steps, 1))
    if not stage.decay_steps:
        return warm
    fall = optax.linear_schedule(stage.learning_rate, 0.1 * stage.learning_rate, stage.decay_steps)
    return optax.join_schedules([warm, fall], [stage.steps - stage.decay_steps])


def optimizer(stage: StageConfig, path_rates: dict[str, float]) -> optax.GradientTransformation:
    """Clip by the global norm, AdamW (Loshchilov and Hutter, 2019), the schedule, then each parameter's own rate."""

    def scale_each(updates, params=None):
        leaves, structure = jax.tree.flatten(updates)
        return structure.unflatten([leaf * path_rates[path] for path, leaf in zip(by_path(updates), leaves, strict=True)])

    return optax.chain(
        optax.clip_by_global_norm(stage.clip),
        optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps),
        optax.add_decayed_weights(stage.weight_decay) if stage.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(learning_rate(stage)),
        optax.stateless(scale_each))
