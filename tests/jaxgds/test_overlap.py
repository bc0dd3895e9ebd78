"""Loading beside compiling: results, errors, and that they really run at once."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding
from safetensors.flax import save_file

import jaxgds


@pytest.fixture
def checkpoint(tmp_path):
    w = jnp.asarray(np.random.default_rng(0).normal(size=(16, 8)), jnp.bfloat16)
    save_file({"w": w}, tmp_path / "model.safetensors")
    where = SingleDeviceSharding(jax.devices()[0])
    return tmp_path, w, {"w": jax.ShapeDtypeStruct(w.shape, w.dtype, sharding=where)}


def test_the_compiled_step_takes_the_loaded_weights(checkpoint):
    path, w, target = checkpoint
    x = jnp.ones(16, jnp.bfloat16)

    def compile():
        return jax.jit(lambda weights, x: x @ weights["w"]).lower(target, x).compile()

    weights, step = jaxgds.load_and_compile(path, target, compile)
    np.testing.assert_array_equal(weights["w"], w)
    np.testing.assert_array_equal(step(weights, x), jax.jit(jnp.matmul)(x, w))


def test_both_run_at_once(checkpoint):
    """`rename`, which the restore calls, and `compile` each wait for the other to be running."""
    path, w, target = checkpoint
    both = threading.Barrier(2, timeout=30)

    def rename(name):
        both.wait()
        return name

    tree, _ = jaxgds.load_and_compile(path, target, both.wait, rename=rename)
    np.testing.assert_array_equal(tree["w"], w)


def test_errors_of_either_are_raised(checkpoint):
    path, _, target = checkpoint

    def fails():
        raise ArithmeticError("does not compile")

    with pytest.raises(ArithmeticError, match="does not compile") as caught:
        jaxgds.load_and_compile(path, target, fails)
    assert not hasattr(caught.value, "__notes__")
    with pytest.raises(jaxgds.CheckpointError, match="nowhere"):
        jaxgds.load_and_compile(path / "nowhere", target, lambda: 1)
    with pytest.raises(ArithmeticError) as caught:
        jaxgds.load_and_compile(path / "nowhere", target, fails)
    assert "nowhere" in caught.value.__notes__[0]
