"""Restored arrays are XLA's own: donated, copied, deleted and counted like any other."""

import ctypes
import gc
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxgds
from jaxgds.allocation import Allocation
from jaxgds.scatter import Destination


def mesh(n: int = 4) -> Mesh:
    return Mesh(np.array(jax.devices()[:n]), ("x",))


def values() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    alike = {f"alike {i}": rng.normal(size=(64, 32)).astype(np.float32) for i in range(6)}
    return {
        **alike,
        "large": rng.normal(size=(512, 2048)).astype(np.float32),
        "zeros": np.zeros((64, 32), np.float32),
        "ones": np.ones((), np.float32),
        "one": np.ones((), np.float32),
        "bf16": rng.normal(size=(32, 16)).astype(jnp.bfloat16),
        "int4": rng.integers(-8, 8, (32, 16)).astype(jnp.int4),
    }


SHARDINGS = {
    "sharded": lambda x: NamedSharding(mesh(), P("x") if x.ndim else P()),
    "replicated": lambda x: NamedSharding(mesh(), P()),
    "one device": lambda x: SingleDeviceSharding(jax.devices()[2]),
}


@pytest.fixture(
    scope="module", params=[(True, False, False), (True, False, True)], ids=oracle.format_id
)
def path(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("arrays") / "item"
    return oracle.save(folder, jax.tree.map(jnp.asarray, values()), request.param)


def load(path, sharding: str) -> dict[str, jax.Array]:
    target = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=SHARDINGS[sharding](x))
        for name, x in values().items()
    }
    return jaxgds.load(path, target, strict=True)


def check(tree) -> None:
    for name, expected in values().items():
        assert oracle.raw(tree[name]) == expected.tobytes(), name


def pointers(array: jax.Array) -> list[int]:
    return [s.data.unsafe_buffer_pointer() for s in array.addressable_shards]


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_no_array_aliases_another(path, sharding):
    first, second = load(path, sharding), load(path, sharding)
    spans = sorted(
        (s.data.unsafe_buffer_pointer(), s.data.on_device_size_in_bytes())
        for array in (*first.values(), *second.values())
        for s in array.addressable_shards
    )
    for (a, n), (b, _) in zip(spans, spans[1:], strict=False):
        assert a + n <= b
    doubled = jax.jit(lambda t: jax.tree.map(lambda x: x * 2, t), donate_argnums=0)(first)
    check(second)
    del doubled, second
    check(load(path, sharding))


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_donation_reuses_the_buffer(path, sharding):
    tree = load(path, sharding)
    before = {name: pointers(x) for name, x in tree.items()}
    # A donated buffer that cannot be used is a warning, hence an error here.
    updated = jax.jit(lambda t: jax.tree.map(lambda x: x + x, t), donate_argnums=0)(tree)
    assert all(x.is_deleted() for x in tree.values())
    for name, expected in values().items():
        np.testing.assert_array_equal(np.asarray(updated[name]), expected + expected, err_msg=name)
        if expected.ndim:
            assert pointers(updated[name]) == before[name], name


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_arrays_outlive_the_checkpoint_and_what_else_was_restored(path, tmp_path, sharding):
    copy = shutil.copytree(path, tmp_path / "copy")
    tree = load(copy, sharding)
    shutil.rmtree(copy)
    for _ in range(3):
        load(path, sharding)
        gc.collect()
        np.full((1 << 20,), 7.0)  # what was freed is written over
        jnp.full((512, 2048), 7.0).block_until_ready()
    check(tree)


@pytest.mark.parametrize("sharding", SHARDINGS)
def test_arrays_work_in_every_jax_operation(path, sharding):
    tree = load(path, sharding)
    x, expected = tree["alike 0"], values()["alike 0"]
    np.testing.assert_allclose(np.asarray(jax.jit(jnp.sum)(x)), expected.sum(), rtol=1e-4)
    moved = jax.device_put(x, NamedSharding(mesh(8), P(None, "x")))
    np.testing.assert_array_equal(np.asarray(moved), expected)
    np.testing.assert_array_equal(np.asarray(x.at[3].set(0)[4]), expected[4])
    grad = jax.grad(lambda x: (x**2).sum())(x)
    np.testing.assert_array_equal(np.asarray(grad), 2 * expected)
    x.delete()
    check(load(path, sharding))


def test_loads_do_not_leak_device_memory(path):
    gc.collect()
    before = len(jax.live_arrays())
    tree = load(path, "sharded")
    assert len(jax.live_arrays()) == before + len(tree)
    del tree
    gc.collect()
    assert len(jax.live_arrays()) == before


@pytest.mark.parametrize("dtype", [np.uint8, np.float32, jnp.bfloat16, np.complex64, bool])
def test_allocated_memory_is_the_arrays(dtype):
    """What is written to the pointers is in the arrays; several of one shape on one device too."""
    devices = jax.devices()
    destinations = [
        Destination(f"{shape} {i}", tuple((0, n) for n in shape), (devices[i % 3],))
        for shape in ((), (1,), (7,), (3, 5), (2, 3, 4))
        for i in range(49)
    ]
    allocation = Allocation(destinations, [np.dtype(dtype)] * len(destinations))
    arrays, buffers = allocation.arrays(), allocation.buffers
    for number, (d, array, buffer) in enumerate(zip(destinations, arrays, buffers, strict=True)):
        assert (array.shape, array.dtype) == (d.shape, np.dtype(dtype))
        assert array.devices() == {buffer.device} == {d.devices[0]}
        assert buffer.nbytes == array.nbytes
        ctypes.memset(buffer.pointer, number % 2, buffer.nbytes)
    for number, array in enumerate(arrays):
        assert set(np.asarray(array).tobytes()) == {number % 2}


def test_an_interrupted_restore_holds_no_memory(tmp_path, monkeypatch):
    """Though Orbax keeps the task that was interrupted, and its traceback."""
    path = oracle.save(tmp_path / "c", {"w": jnp.arange(1000.0)})
    jaxgds.load(path)
    gc.collect()
    before = len(jax.live_arrays())

    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("jaxgds.restore.make_plan", interrupted)
    with pytest.raises(KeyboardInterrupt) as kept:
        jaxgds.load(path)
    gc.collect()
    assert len(jax.live_arrays()) == before, kept
