"""AdamW with clipping, a warm-up, and one rate a parameter."""
import jax
import optax

from vino_jax.nn.module import by_path
from vino_jax.train.stage import StageConfig


def learning_rate(stage: StageConfig, step: int) -> float:
    """Of step `step` (from 0): linear warm-up, then constant; over the last `decay_steps` linear down to a tenth."""
    warm = step / stage.warmup_steps if stage.warmup_steps else 1.0
    fall = 1.0 - 0.9 * (step - (stage.steps - stage.decay_steps)) / stage.decay_steps if stage.decay_steps else 1.0
    return stage.learning_rate * min(warm, fall, 1.0)


def optimizer(stage: StageConfig, path_rates: dict[str, float]) -> optax.GradientTransformation:
    """Clip by the global norm, AdamW (Loshchilov and Hutter, 2019), then each parameter's own rate; updates are those of a learning
    rate of 1. A step multiplies them by its rate, which is no constant of its program: other schedules need no other compilation."""

    def scale_each(updates, params=None):
        leaves, structure = jax.tree.flatten(updates)
        return structure.unflatten([leaf * -path_rates[path] for path, leaf in zip(by_path(updates), leaves, strict=True)])

    return optax.chain(
        optax.clip_by_global_norm(stage.clip),
        optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps),
        optax.add_decayed_weights(stage.weight_decay) if stage.weight_decay else optax.identity(),
        optax.stateless(scale_each))
