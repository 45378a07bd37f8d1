"""attend(): queries in chunks give what they give at once, whatever their number."""
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from tests.tolerances import BATCH_ROW_ABS
from vino_jax.errors import UserError
from vino_jax.nn import attention


def _inputs(length):
    rng = np.random.default_rng(length)
    q, k, v = (jnp.asarray(rng.normal(size=(2, n, heads, 8)), jnp.float32) for n, heads in ((length, 4), (10, 2), (10, 2)))
    mask = rng.random((2, 1, length, 10)) < 0.7
    mask[..., 0] = True
    return q, k, v, jnp.asarray(mask)


@pytest.mark.parametrize("rows", ["none", "one", "each"])
@pytest.mark.parametrize("length", [7, 12, 13])
def test_chunks_of_queries_change_nothing(monkeypatch, length, rows):
    q, k, v, mask = _inputs(length)
    mask = {"none": None, "one": mask[:, :, :1], "each": mask}[rows]

    def loss(q, k, v):
        return jnp.sum(jnp.sin(attention.attend(q, k, v, mask=mask)))

    whole = attention.attend(q, k, v, mask=mask), jax.grad(loss, (0, 1, 2))(q, k, v)
    monkeypatch.setattr(attention, "_MAX_SCORES", 200)  # of 2 x 4 x length x 10
    assert "while" in jax.jit(loss).lower(q, k, v).as_text()
    parts = attention.attend(q, k, v, mask=mask), jax.grad(loss, (0, 1, 2))(q, k, v)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=BATCH_ROW_ABS), whole, parts)


def test_an_unknown_kernel_is_told():
    q, k, v, _ = _inputs(4)
    with pytest.raises(UserError, match="'splesh' is unknown; choose one of xla"):
        attention.attend(q, k, v, kernel="splesh")
