"""One training step: flow matching on the target's tokens.

Dims: B rows, F H W C latents of the target.
"""
from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax

from vino_jax.batch import TASKS, Batch
from vino_jax.flow.path import TIME_BINS, interpolate, logit_normal, velocity_loss, warp
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params
from vino_jax.train.stage import StageConfig, merge
from vino_jax.train.state import TrainState


def row_losses(vino: Vino, params: Params, batch: Batch, keys_B: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Mean squared velocity error of each row and its flow time, both (B,) float32. The batch holds moments (`encode_batch`).

    A row's randomness (posterior, time, noise) comes from its own key, so the same row gives the same loss in any batch or mesh.
    """
    posterior, references, time, noise = jnp.split(jax.vmap(lambda key: jax.random.split(key, 4))(keys_B), 4, axis=1)
    clean = vino.latents(batch.target, posterior[:, 0])
    t_B = warp(jax.vmap(lambda key: logit_normal(key, ()))(time[:, 0]), batch.shift)
    noise_BFHWC = jax.vmap(lambda key: jax.random.normal(key, clean.shape[1:], clean.dtype))(noise[:, 0])
    velocity = vino.velocity(params, interpolate(clean, noise_BFHWC, t_B), t_B, vino.pool(batch, references[:, 0]), batch,
                             vino.condition(params, batch))
    return velocity_loss(velocity, clean, noise_BFHWC), t_B


def encode_batch(vino: Vino, vae: Params, batch: Batch) -> Batch:
    """The batch with VAE moments where it has pixels. A program of its own: it is the same for all stages, and precomputed moments
    come in here too."""
    params = {"vae": vae}
    images = batch.images
    if images is not None and images.dtype == jnp.uint8:
        b, n = images.shape[:2]
        flat = vino.encode(params, images.reshape(b * n, 1, *images.shape[2:]))
        images = flat.reshape(b, n, *flat.shape[2:])
    video = None if batch.video is None else vino.encode(params, batch.video)
    return batch.replace(target=vino.encode(params, batch.target), images=images, video=video)


def _loss(vino: Vino, trainable: Params, frozen: Params, batch: Batch, keys_B: jax.Array, total_weight: jax.Array):
    """Weighted loss of some of a batch's rows, over the weight of all of them; and its parts by time bin and by task."""
    losses, t_B = row_losses(vino, merge(frozen, trainable), batch, keys_B)
    weighted = losses * batch.weight
    by_bin = jax.nn.one_hot(jnp.minimum((t_B * TIME_BINS).astype(jnp.int32), TIME_BINS - 1), TIME_BINS)
    by_task = jax.nn.one_hot(batch.task, len(TASKS))
    parts = {"bin_loss": weighted @ by_bin, "bin_weight": batch.weight @ by_bin,
             "task_loss": weighted @ by_task, "task_weight": batch.weight @ by_task}
    return jnp.sum(weighted) / total_weight, parts


def _microbatches(tree, count: int):
    """(B, ...) -> (count, B/count, ...), taking every count-th row, so that rows stay on their devices."""
    return jax.tree.map(lambda x: jnp.swapaxes(x.reshape(x.shape[0] // count, count, *x.shape[1:]), 0, 1), tree)


def make_train_step(vino: Vino, stage: StageConfig, tx: optax.GradientTransformation) -> Callable:
    """step(state, frozen, batch, learning rate) -> (state, metrics). A step whose loss or gradient is not finite changes nothing but the counter
    in its metrics, so the state stays good for saving."""

    def gradients(trainable, frozen, batch, keys):
        total_weight = jnp.maximum(jnp.sum(batch.weight), 1e-6)
        grad = jax.value_and_grad(lambda p, b, k: _loss(vino, p, frozen, b, k, total_weight), has_aux=True)
        if stage.accumulate == 1:
            return grad(trainable, batch, keys)

        def body(carry, micro):
            return jax.tree.map(jnp.add, carry, grad(trainable, *micro)), None

        micros = _microbatches((batch, keys), stage.accumulate)
        zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(grad, trainable, *jax.tree.map(lambda x: x[0], micros)))
        return jax.lax.scan(body, zeros, micros)[0]

    def step(state: TrainState, frozen: Params, batch: Batch, learning_rate: jax.Array) -> tuple[TrainState, dict[str, jax.Array]]:
        keys = jax.random.split(jax.random.fold_in(jax.random.wrap_key_data(state.rng), state.step), batch.tokens.shape[0])
        (loss, parts), grads = gradients(state.trainable, frozen, batch, keys)
        norm = optax.global_norm(grads)
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = tx.update(grads, state.opt_state, state.trainable)
        trainable = optax.apply_updates(state.trainable, jax.tree.map(lambda update: learning_rate * update, updates))
        ema = jax.tree.map(lambda a, p: stage.ema * a + (1.0 - stage.ema) * p, state.ema, trainable) if state.ema else {}
        new = TrainState(state.step + 1, state.rng, trainable, opt_state, ema)
        new = jax.tree.map(lambda a, b: jnp.where(finite, a, b), new, state)
        metrics = {"loss": loss, "gradient_norm": norm, "finite": finite, **parts}
        if "queries" in grads:
            metrics["gradient_norm_queries"] = optax.global_norm(grads["queries"])
        return new, metrics

    return step
