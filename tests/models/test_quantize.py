"""Products in int8: where they are and where not, and how near the loss and its gradient stay."""
import jax
import jax.numpy as jnp
import numpy as np

from tests import tolerances
from tests.train import tiny
from vino_jax.nn.module import by_path
from vino_jax.nn.quantize import QUANTIZERS


def loss(quantize):
    """params of the MMDiT -> a loss of its velocity."""
    model = tiny.vino()
    call = QUANTIZERS[quantize]
    return lambda mmdit: jnp.mean(jnp.square(tiny.velocity(call(model.parts["mmdit"](mmdit)), model.config.mmdit.text_width) - 1.0))


def products(jaxpr, scans=0):
    """(depth in scans, dtypes of both sides) of all products."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield scans, tuple(variable.aval.dtype.name for variable in equation.invars)
        for value in equation.params.values():
            for inner in value if isinstance(value, (tuple, list)) else (value,):
                if hasattr(inner, "eqns") or hasattr(inner, "jaxpr"):
                    yield from products(getattr(inner, "jaxpr", inner), scans + (equation.primitive.name == "scan"))


def test_products_of_the_blocks_are_int8_forward_and_backward():
    mmdit = tiny.params(tiny.vino())["mmdit"]
    found = list(products(jax.make_jaxpr(jax.grad(loss("int8")))(mmdit).jaxpr))
    # of each Linear: forward, forward again under remat, gradient of activations, gradient of the kernel
    linears = 2 * 6 + 4  # of both streams q k v out up down; of single blocks q k v mlp
    assert found.count((1, ("int8", "int8"))) == 4 * linears
    assert all("int8" not in pair for depth, pair in found if depth == 0)
    assert not [pair for _, pair in products(jax.make_jaxpr(jax.grad(loss("")))(mmdit).jaxpr) if "int8" in pair]


def test_the_loss_and_its_gradient_stay_near():
    mmdit = tiny.params(tiny.vino())["mmdit"]
    (rounded, ours), (exact, theirs) = (jax.jit(jax.value_and_grad(loss(quantize)))(mmdit) for quantize in ("int8", ""))
    assert rounded != exact
    np.testing.assert_allclose(rounded, exact, rtol=tolerances.INT8_LOSS_REL)
    ours, theirs = by_path(ours), by_path(theirs)
    for path in ("double/visual/attention/value/kernel", "single/mlp/kernel", "double/context/mlp/down/kernel"):
        assert np.linalg.norm(ours[path] - theirs[path]) < tolerances.INT8_GRADIENT_REL * np.linalg.norm(theirs[path]), path
