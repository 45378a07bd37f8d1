"""Flow-matching loss by bins of the flow time on rows that training never draws.

A row's losses depend on its sample, the seed and the weights alone: on no mesh, no batch and no other row. So two checkpoints are
compared on the same times and noise, and what differs between them is the model.

Dims: B rows, F H W C latents of the target.
"""
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vino_jax.batch import Batch
from vino_jax.evaluation.statistics import standard_error
from vino_jax.flow.path import TIME_BINS, interpolate, velocity_loss
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params


def bin_losses(vino: Vino, params: Params, batch: Batch, seed: int) -> jax.Array:
    """Mean squared velocity error of each row at one time in each bin, (B, TIME_BINS) float32 (arXiv 2209.03003, eq. 1).

    batch: with moments; its `sample` numbers decide, with the seed, on posterior samples, times (uniform in their bin) and noise. Prompts are
    read once for all bins.
    """
    keys_B = jax.vmap(lambda number: jax.random.fold_in(jax.random.key(seed), number))(batch.sample)
    posterior, references, time, noise = jnp.unstack(jax.vmap(lambda key: jax.random.split(key, 4))(keys_B), axis=1)
    clean = vino.latents(batch.target, posterior)
    pool, condition = vino.pool(batch, references), vino.condition(params, batch)

    def losses(i):
        t_B = (i + jax.vmap(lambda key: jax.random.uniform(jax.random.fold_in(key, i)))(time)) / TIME_BINS
        noise_BFHWC = jax.vmap(lambda key: jax.random.normal(jax.random.fold_in(key, i), clean.shape[1:], clean.dtype))(noise)
        velocity = vino.velocity(params, interpolate(clean, noise_BFHWC, t_B), t_B, pool, batch, condition)
        return velocity_loss(velocity, clean, noise_BFHWC)

    return jax.lax.map(losses, jnp.arange(TIME_BINS)).T


def bin_names() -> list[str]:
    """Of the bins, by their least time: "t0.0" .. "t0.9"."""
    return [f"t{i / TIME_BINS:.1f}" for i in range(TIME_BINS)]


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Means of rows {"task", "losses": TIME_BINS floats, ...}, with every row, as JSON holds them.

    {"loss", "by_bin": {name: loss}: means over tasks, whatever their numbers of rows; "tasks": {task: {"loss", "error" (standard error of the
    mean over rows; None for one row), "count", "by_bin"}}, "rows"}.
    """
    tasks = {}
    for task in dict.fromkeys(row["task"] for row in rows):
        losses = np.asarray([row["losses"] for row in rows if row["task"] == task], np.float64)
        each = losses.mean(1)
        tasks[task] = {"loss": float(each.mean()), "error": standard_error(each) if len(each) > 1 else None,
                       "count": len(each), "by_bin": dict(zip(bin_names(), losses.mean(0).tolist()))}
    return {"loss": math.fsum(t["loss"] for t in tasks.values()) / len(tasks),
            "by_bin": {name: math.fsum(t["by_bin"][name] for t in tasks.values()) / len(tasks) for name in bin_names()},
            "tasks": tasks, "rows": list(rows)}
