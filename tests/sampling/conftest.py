"""Strict dtypes; and many small programs that run for a moment, so without XLA's optimizations, which are most of the compile time."""
import jax
import pytest


@pytest.fixture(scope="package", autouse=True)
def jax_settings():
    name = "jax_disable_most_optimizations"
    before = jax.config.read(name)
    jax.config.update(name, True)
    with jax.numpy_dtype_promotion("strict"):
        yield
    jax.config.update(name, before)
