"""Held-out loss of a model on its mesh: in a training run at its cadence, and by launch.evaluate alone."""
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from data_pipelines.held_out import HeldOutRows
from data_pipelines.loader import Packer
from data_pipelines.prompts import Prompter
from launch.data import held_out_source
from vino_jax.batch import Batch
from vino_jax.evaluation.held_out import bin_losses, summary
from vino_jax.models.vino import Vino
from vino_jax.nn.module import Params
from vino_jax.nn.runtime import compiler_options
from vino_jax.sharding.constrain import use_sharding
from vino_jax.sharding.resolve import data_shards
from vino_jax.sharding.rules import for_rows
from vino_jax.train.config import RunConfig
from vino_jax.train.loop import place_batch

SEED = 0  # of times, noise and posterior samples


class HeldOutLoss:
    """Measures models of one architecture on one mesh, so that a shape compiles once. On several processes call it on every one.

    encode: vino_jax/train/loop.py: make_encoder.
    """

    def __init__(self, config: RunConfig, vino: Vino, mesh: Mesh, rules: dict, encode: Callable[[Params, Batch], Batch]):
        self._config, self._mesh, self._rules, self._encode = config, mesh, rules, encode
        whole = NamedSharding(mesh, PartitionSpec())  # so that every process can read them
        self._losses = jax.jit(functools.partial(bin_losses, vino, seed=SEED), out_shardings=whole, compiler_options=compiler_options(mesh))

    def of(self, prompter: Prompter, tasks: Sequence[str], buckets: Sequence[str], count: int) -> Callable[[Params], dict[str, Any]]:
        """measure(params) -> vino_jax/evaluation/held_out.py: summary, of `count` rows of each task in the config's `buckets` (names).

        Raises UserError where the config has no samples that training does not draw, and where a task has none, or no bucket.
        """
        config, specs = self._config, [self._config.buckets[name] for name in buckets]
        source = held_out_source(config, specs, tasks, prompter)
        shards, shard_count = data_shards(self._mesh, self._rules)
        rows = HeldOutRows(tasks, specs, source, count, shard_count)
        packer = Packer(source, rows, prompter, shards, shard_count, (config.data.shift_image, config.data.shift_video))
        return lambda params: summary([row for step in range(len(rows)) for row in self._measured(params, rows, packer, step)])

    def _measured(self, params: Params, rows: HeldOutRows, packer: Packer, step: int) -> list[dict[str, Any]]:
        batch = self._encode(params["vae"], place_batch(packer.batch(step)[2], self._mesh, self._rules))
        with use_sharding(self._mesh, for_rows(self._rules, self._mesh, rows.plan(step).bucket.batch)):
            losses = np.asarray(self._losses(params, batch))
        return [{"task": task, "bucket": bucket, "index": index, "losses": row.tolist()}
                for (task, bucket, index), row in zip(rows.rows(step), losses)]  # rows that only fill the batch are behind


def record(found: dict[str, Any]) -> dict[str, float]:
    """The means of a summary as a training run logs them: loss, loss by bin ("loss_t0.0") and by task."""
    by_task = {task: entry["loss"] for task, entry in found["tasks"].items()}
    return {"loss": found["loss"]} | {f"loss_{name}": loss for name, loss in (found["by_bin"] | by_task).items()}
