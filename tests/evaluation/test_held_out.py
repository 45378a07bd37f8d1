"""The held-out loss: each bin's times, a row that is the same in any company, fixed rows, and the means."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data_pipelines.held_out import HeldOutRows
from data_pipelines.sources import ShapesSource
from tests import tolerances
from tests.train import tiny
from vino_jax.batch import TASKS, BucketSpec
from vino_jax.errors import UserError
from vino_jax.evaluation.held_out import bin_losses, bin_names, summary

PLAIN = BucketSpec("plain", 8, 1, 32, 32, 72)
EDIT = BucketSpec("edit", 8, 1, 32, 32, 96, patches=32, images=2, image_height=32, image_width=32)


class Knows:
    """A model that knows the clean latents (all zero), and returns the true velocity and the flow time on top."""

    def latents(self, moments, keys):
        return jnp.zeros((len(moments), 1, 4, 4, 4))

    def pool(self, batch, keys):
        return None

    def condition(self, params, batch):
        return None

    def velocity(self, params, noisy, t_B, pool, batch, condition):
        t = t_B[:, None, None, None, None]
        return noisy / t + t  # noisy = t noise, and the velocity from noise to zero is the noise


def test_a_row_has_one_time_in_each_bin_and_the_seed_decides():
    batch = PLAIN.fake(moments=8)
    times = np.sqrt(np.asarray(bin_losses(Knows(), {}, batch, 0)))
    assert times.shape == (8, 10)
    low = np.arange(10) / 10
    assert (times > low).all() and (times < low + 0.1).all() and len(np.unique(times.round(6))) == 80
    assert np.ptp(times - low, axis=1).min() > 0.01  # not the same place in each bin
    again = np.sqrt(np.asarray(bin_losses(Knows(), {}, batch, 0)))
    assert (again == times).all() and (np.sqrt(np.asarray(bin_losses(Knows(), {}, batch, 1))) != times).all()


def test_noise_is_another_in_each_row_and_bin():
    still = Knows()
    still.velocity = lambda params, noisy, *_: jnp.zeros_like(noisy)
    assert len(np.unique(np.asarray(bin_losses(still, {}, PLAIN.fake(moments=8), 0)))) == 80  # each its own noise's mean square


def test_a_row_is_the_same_in_any_company():
    model = tiny.vino()
    batch, params = tiny.BUCKET.fake(3, moments=8, vocab=800), tiny.params(model)
    losses = jax.jit(lambda b: bin_losses(model, params, b, 0))
    whole = np.asarray(losses(batch))
    turned = np.asarray(losses(jax.tree.map(lambda x: x[::-1], batch)))
    np.testing.assert_allclose(turned[::-1], whole, atol=tolerances.BATCH_ROW_ABS)
    assert np.abs(whole - whole[:1]).max(1)[1:].min() > 1e-3


class Numbered(ShapesSource):
    """As many samples a (task, bucket) as `counts` says."""

    def __init__(self, counts):
        super().__init__(0)
        self._counts = counts

    def count(self, task, bucket):
        return self._counts.get((task, bucket.name), 0)


def places(rows):
    return [row for step in range(len(rows)) for row in rows.rows(step)]


def test_rows_are_fixed_whatever_else_is_measured():
    few, more = (HeldOutRows(("t2i", "ti2i"), (PLAIN, EDIT), ShapesSource(0), count) for count in (5, 12))
    alone = HeldOutRows(("t2i",), (PLAIN, EDIT), ShapesSource(0), 5)

    def numbers(rows):
        return {(row.task, plan.bucket.name, row.index): row.serial for plan in map(rows.plan, range(len(rows))) for row in plan.rows}

    assert numbers(alone).items() < numbers(few).items() < numbers(more).items()
    assert len(set(numbers(more).values())) == 24
    assert sorted(places(few)) == sorted([(task, bucket, i) for task, bucket in (("t2i", "plain"), ("ti2i", "edit")) for i in range(5)])


def test_rows_fill_whole_batches_that_divide_by_the_shards():
    rows = HeldOutRows(("t2i",), (PLAIN,), ShapesSource(0), 11, shards=3)
    assert [len(rows.plan(step).rows) for step in range(len(rows))] == [9, 9]
    assert {rows.plan(step).bucket.batch for step in range(2)} == {9}
    assert [index for _, _, index in places(rows)] == list(range(11))
    assert [row.index for row in rows.plan(1).rows] == [9, 10] + [10] * 7
    assert len(HeldOutRows(("t2i",), (PLAIN,), ShapesSource(0), 3).plan(0).rows) == 3  # no larger than asked


def test_rows_of_a_source_that_ends_lie_evenly_in_it_and_by_its_buckets():
    large = BucketSpec("large", 8, 1, 64, 64, 72)
    rows = HeldOutRows(("t2i",), (PLAIN, large), Numbered({("t2i", "plain"): 30, ("t2i", "large"): 10}), 8)
    assert places(rows) == [("t2i", "plain", i) for i in (0, 5, 10, 15, 20, 25)] + [("t2i", "large", i) for i in (0, 5)]
    every = HeldOutRows(("t2i",), (PLAIN, large), Numbered({("t2i", "plain"): 3, ("t2i", "large"): 1}), 100)
    assert places(every) == [("t2i", "plain", i) for i in range(3)] + [("t2i", "large", 0)]
    with pytest.raises(UserError, match="no bucket takes task 'ti2i'"):
        HeldOutRows(("ti2i",), (PLAIN,), Numbered({}), 8)


def test_means_are_over_tasks_whatever_their_rows():
    rows = [{"task": "t2i", "losses": [1.0] * 10}, {"task": "t2i", "losses": [3.0] * 10}, {"task": "ti2i", "losses": [6.0] + [7.0] * 9}]
    found = summary(rows)
    assert found["tasks"]["t2i"] == {"loss": 2.0, "error": 1.0, "count": 2, "by_bin": dict.fromkeys(bin_names(), 2.0)}
    assert found["tasks"]["ti2i"]["error"] is None and found["tasks"]["ti2i"]["loss"] == pytest.approx(6.9)
    assert found["loss"] == pytest.approx((2.0 + 6.9) / 2) and found["by_bin"]["t0.0"] == 4.0 and found["by_bin"]["t0.9"] == 4.5
    assert found["rows"] == rows and set(found["tasks"]) <= set(TASKS)
