"""Optimizers as a table: how gradients become updates, and what they remember; clipping, a warm-up and one rate a parameter are of all."""
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from vino_jax.nn.module import Params, by_path
from vino_jax.train.stage import StageConfig

_ADAFACTOR_EPS, _ADAFACTOR_DECAY, _ADAFACTOR_RMS = 1e-30, 0.8, 1.0  # of the paper


def learning_rate(stage: StageConfig, step: int) -> float:
    """Of step `step` (from 0): linear warm-up, then constant; over the last `decay_steps` linear down to a tenth."""
    warm = step / stage.warmup_steps if stage.warmup_steps else 1.0
    fall = 1.0 - 0.9 * (step - (stage.steps - stage.decay_steps)) / stage.decay_steps if stage.decay_steps else 1.0
    return stage.learning_rate * min(warm, fall, 1.0)


def optimizer(stage: StageConfig, path_rates: dict[str, float]) -> optax.GradientTransformation:
    """Clip by the global norm, the stage's entry of OPTIMIZERS, decoupled weight decay, then each parameter's own rate; updates are those
    of a learning rate of 1. A step multiplies them by its rate, which is no constant of its program: other schedules need no other
    compilation."""

    def scale_each(updates, params=None):
        leaves, structure = jax.tree.flatten(updates)
        return structure.unflatten([leaf * -path_rates[path] for path, leaf in zip(by_path(updates), leaves, strict=True)])

    return optax.chain(
        optax.clip_by_global_norm(stage.clip),
        OPTIMIZERS[stage.optimizer](stage),
        optax.add_decayed_weights(stage.weight_decay) if stage.weight_decay else optax.identity(),
        optax.stateless(scale_each))


def _adam(stage: StageConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(b1=stage.b1, b2=stage.b2, eps=stage.eps)


def _adam_bf16(stage: StageConfig) -> optax.GradientTransformation:
    """Adam whose moments are kept in bfloat16, rounded up or down by chance so that what is added to them is right on average. To the nearest,
    a moment would not move where a step changes it by less than 1/256 of it."""
    adam = _adam(stage)

    def init(params):
        state = adam.init(params)
        return state._replace(**{name: optax.tree.cast(getattr(state, name), jnp.bfloat16) for name in ("mu", "nu")})

    def update(grads, state, params=None):
        wide = state._replace(mu=optax.tree.cast(state.mu, jnp.float32), nu=optax.tree.cast(state.nu, jnp.float32))
        updates, new = adam.update(grads, wide, params)
        key = jax.random.fold_in(jax.random.key(0), state.count)  # of the step alone: a resumed run rounds as the unbroken one
        leaves, structure = jax.tree.flatten(new.mu)
        bits = structure.unflatten([jax.random.bits(jax.random.fold_in(key, i), leaf.shape) for i, leaf in enumerate(leaves)])
        return updates, new._replace(mu=jax.tree.map(stochastic_bf16, new.mu, bits),
                                     nu=jax.tree.map(lambda nu, b: stochastic_bf16(nu, b >> 16), new.nu, bits))

    return optax.GradientTransformation(init, update)


def stochastic_bf16(x: jax.Array, bits: jax.Array) -> jax.Array:
    """float32 -> bfloat16: up or down with the odds that make it right on average. bits: uint32, whose low 16 are the dice; x is finite."""
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & 0xFFFF)
    return jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


class AdafactorState(NamedTuple):
    """count: int32, steps done. rows: float32, of kernels (..., inputs, 1), of other parameters their own shape. columns: of kernels
    (..., 1, outputs), of others one value. Dims of size 1 stay, so that each dim of a moment is its parameter's or whole."""

    count: jax.Array
    rows: Params
    columns: Params


def _adafactor(stage: StageConfig) -> optax.GradientTransformation:
    """Adafactor (Shazeer and Stern, 2018) without its own learning rate: no first moment, and of a kernel's second moment the means over
    its outputs and over its inputs. b1, b2 and eps of the stage do not enter."""

    def init(params):
        zeros = lambda shape: jax.tree_util.tree_map_with_path(lambda path, p: jnp.zeros(shape(path, p), jnp.float32), params)  # noqa: E731
        return AdafactorState(jnp.zeros((), jnp.int32),
                              zeros(lambda path, p: (*p.shape[:-1], 1) if _is_kernel(path) else p.shape),
                              zeros(lambda path, p: (*p.shape[:-2], 1, p.shape[-1]) if _is_kernel(path) else (1,) * p.ndim))

    def update(grads, state, params=None):
        decay = 1.0 - (state.count + 1.0) ** -_ADAFACTOR_DECAY

        def one(path, grad, rows, columns):
            square, kernel = jnp.square(grad) + _ADAFACTOR_EPS, _is_kernel(path)
            rows = decay * rows + (1.0 - decay) * (jnp.mean(square, axis=-1, keepdims=True) if kernel else square)
            columns = decay * columns + (1.0 - decay) * jnp.mean(square, axis=-2, keepdims=True) if kernel else columns
            second = rows * (columns / jnp.mean(rows, axis=-2, keepdims=True)) if kernel else rows
            scaled = grad * jax.lax.rsqrt(second)
            rms = jnp.sqrt(jnp.mean(jnp.square(scaled), axis=(-2, -1) if kernel else None, keepdims=True))
            return scaled / jnp.maximum(1.0, rms / _ADAFACTOR_RMS), rows, columns

        found = jax.tree_util.tree_map_with_path(one, grads, state.rows, state.columns)
        updates, rows, columns = jax.tree.transpose(jax.tree.structure(grads), jax.tree.structure((0, 0, 0)), found)
        return updates, AdafactorState(state.count + 1, rows, columns)

    return optax.GradientTransformation(init, update)


def _is_kernel(path: tuple[Any, ...]) -> bool:
    """Whether a parameter is a product's: its last two dims are inputs and outputs."""
    return path[-1].key == "kernel"


# Bytes of state a parameter: 8, 4, and of kernels next to nothing.
OPTIMIZERS: dict[str, Callable[[StageConfig], optax.GradientTransformation]] = {
    "adamw": _adam,  # Loshchilov and Hutter, 2019
    "adamw_bf16": _adam_bf16,
    "adafactor": _adafactor,
}
