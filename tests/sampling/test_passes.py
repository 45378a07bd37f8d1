"""Which guidance branches run together."""
import pytest

from vino_jax.sampling.passes import choose, rows_on_a_device, work

WIDTH = 3072


@pytest.mark.parametrize("tokens, copies, shards, passes", [
    ((36000, 36000), 1, 1, ((0, 1),)),
    ((36000, 35000, 34000), 1, 1, ((0, 1, 2),)),  # padding costs less than a pass of its own
    ((8000, 8000, 2000), 1, 1, ((0, 1), (2,))),
    ((8000, 2000), 1, 1, ((0,), (1,))),
    ((600, 600, 200), 1, 1, ((0, 1, 2),)),  # taking the weights once more costs more than these tokens
    ((600, 600, 200), 16, 1, ((0, 1), (2,))),  # but not where many tasks run
    ((8000, 8000, 2000), 1, 4, ((0, 1, 2),)),  # rows that lie on devices of their own wait for the longest all the same
    ((8000, 8000, 2000), 1, 2, ((0, 1), (2,))),
    ((8000,), 1, 1, ((0,),)),
])
def test_the_cheapest_passes(tokens, copies, shards, passes):
    assert choose(tokens, WIDTH, copies=copies, shards=shards) == passes


def test_work_is_that_of_blocks():
    """Products and attention of a double block with 4 x width in its MLP: 24 D^2 and 4 n D FLOPs a token."""
    n = 5000
    assert work(n, WIDTH) / work(1, WIDTH) == pytest.approx(n * (24 * WIDTH**2 + 4 * n * WIDTH) / (24 * WIDTH**2 + 4 * WIDTH))
    assert [rows_on_a_device(rows, 4) for rows in (1, 4, 5)] == [1, 1, 2]
