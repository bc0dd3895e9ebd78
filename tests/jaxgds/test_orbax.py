"""Restores through jaxgds against the same restores by stock Orbax, bit for bit."""

import asyncio
import dataclasses
import json
import os
import shutil
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from jax.experimental.layout import Format, Layout
from jax.sharding import AxisType, Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxgds
import jaxgds.orbax
from jaxgds.errors import CheckpointError
from jaxgds.index import open_index
from jaxgds.report import publish, total


pytestmark = [
    # Without a target, of stock Orbax and of jaxgds alike; the other one is of stock Orbax.
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:Use `load` instead:DeprecationWarning"),
]
ArrayHandler = ocp.type_handlers.ArrayHandler
BroadcastHandler = ocp.type_handlers.SingleReplicaArrayHandler
NumpyHandler = ocp.type_handlers.NumpyHandler
STOCK = ArrayHandler.deserialize
METHODS = {kind: kind.deserialize for kind in (ArrayHandler, BroadcastHandler, NumpyHandler)}
# All that TensorStore, and so Orbax, stores; nor does it store uint2 and uint4.
KINDS = ("e3m4", "e4m3fn", "e4m3b11fnuz", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
FP8 = [f"float8_{kind}" for kind in KINDS]


@pytest.fixture(autouse=True)
def stock_methods_before_and_after():
    assert {kind: kind.deserialize for kind in METHODS} == METHODS
    yield
    assert {kind: kind.deserialize for kind in METHODS} == METHODS


def mesh(*shape: int, reverse: bool = False) -> Mesh:
    devices = jax.devices()[: int(np.prod(shape))]
    return Mesh(
        np.array(devices[::-1] if reverse else devices).reshape(shape),
        ("x", "y", "z")[: len(shape)],
    )


def put(array, *spec, on: Mesh | None = None):
    return jax.device_put(array, NamedSharding(on or mesh(4, 2), P(*spec)))


def state() -> dict:
    """Every leaf of this one is restored by jaxgds, but the numbers."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return rng.normal(size=shape).astype(np.float32)

    return {
        "f32": put(normal(16, 8), "x", "y"),
        "bf16": put(normal(16, 24).astype(jnp.bfloat16), None, ("x", "y")),
        "f16": put(normal(8, 4, 6).astype(np.float16), "x", None, "y"),
        "replicated": put(normal(24, 10)),
        "partly": put(normal(12, 64), "x"),
        "scalar": put(np.int32(-7)),
        "vector": put(np.arange(32, dtype=np.uint16), "y"),
        "bool": put(rng.integers(0, 2, (8, 8)).astype(bool), "x"),
        "i8": put(rng.integers(-128, 128, (8, 40), np.int8), "x", "y"),
        "c64": put(normal(8, 4) + 1j * normal(8, 4), None, "y"),
        "fp8": {name: put(normal(16, 16).astype(name), "x", "y") for name in FP8},
        "int2": put(rng.integers(-2, 2, (8, 12)).astype(jnp.int2), "x"),
        "fp4": put(normal(16, 4).astype(jnp.float4_e2m1fn), "x", "y"),
        "int4": put(rng.integers(-8, 8, (8, 6)).astype(jnp.int4), "x"),
        "odd int4": put(rng.integers(-8, 8, (8, 3, 5)).astype(jnp.int4), "x"),
        "key": jax.random.key(1),
        "keys": put(jax.random.split(jax.random.key(2), 8), "x"),
        "rbg": put(jax.random.split(jax.random.key(3, impl="rbg"), (2, 8)), None, "y"),
        "one device": jax.device_put(normal(5, 3), jax.devices()[3]),
        "layers": [{"w.x": put(normal(8, 8), "x"), "b/c": put(normal(8))}, {"é": put(normal(4))}],
        "empty": {"dict": {}, "list": [], "none": None},
        "step": 12,
        "rate": 0.1,
        "numpy": np.arange(6).reshape(2, 3),
    }


def abstract(tree, sharding=None):
    """ShapeDtypeStructs of the arrays, with their shardings or what `sharding` gives for each."""

    def leaf(x):
        if not isinstance(x, jax.Array):
            return x
        return jax.ShapeDtypeStruct(
            x.shape, x.dtype, sharding=sharding(x) if sharding else x.sharding
        )

    return jax.tree.map(leaf, tree)


def rows(on: Mesh):
    """Splits the first axis that the mesh divides, over the whole mesh; replicates otherwise."""

    def sharding(x):
        spec = [None] * x.ndim
        for axis, n in enumerate(x.shape):
            if n % on.size == 0:
                spec[axis] = on.axis_names
                break
        return NamedSharding(on, P(*spec))

    return sharding


TARGETS = {
    "as saved": lambda tree: abstract(tree),
    "other mesh": lambda tree: abstract(tree, rows(mesh(2, reverse=True))),
    "more devices": lambda tree: abstract(tree, rows(mesh(2, 2, 2))),
    "replicated": lambda tree: abstract(tree, lambda x: NamedSharding(mesh(8), P())),
    "one device": lambda tree: abstract(tree, lambda x: SingleDeviceSharding(jax.devices()[5])),
    "none": lambda tree: None,
}


class Standard:
    def save(self, path, tree):
        with ocp.StandardCheckpointer() as c:
            c.save(path, tree)

    def restore(self, path, target):
        with ocp.StandardCheckpointer() as c:
            return c.restore(path, target)


class PyTree:
    def save(self, path, tree):
        with ocp.PyTreeCheckpointer() as c:
            c.save(path, tree)

    def restore(self, path, target):
        with ocp.PyTreeCheckpointer() as c:
            if target is None:
                return c.restore(path)
            args = ocp.checkpoint_utils.construct_restore_args(target)
            return c.restore(path, args=ocp.args.PyTreeRestore(item=target, restore_args=args))


class Async:
    def save(self, path, tree):
        with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as c:
            c.save(path, args=ocp.args.StandardSave(tree))
            c.wait_until_finished()

    def restore(self, path, target):
        with ocp.AsyncCheckpointer(ocp.StandardCheckpointHandler()) as c:
            return c.restore(path, args=ocp.args.StandardRestore(target))


class Manager:
    def save(self, path, tree):
        with ocp.CheckpointManager(path) as m:
            m.save(3, args=ocp.args.StandardSave(tree))
            m.wait_until_finished()

    def restore(self, path, target):
        with ocp.CheckpointManager(path) as m:
            return m.restore(3, args=ocp.args.StandardRestore(target))


class V1:
    def save(self, path, tree):
        ocp.v1.save(path, tree)

    def restore(self, path, target):
        return ocp.v1.load(path, target)


class V1PyTree(V1):
    def restore(self, path, target):
        return ocp.v1.load_pytree(path, target)


class V1Checkpointables:
    def save(self, path, tree):
        ocp.v1.save_checkpointables(path, {"weights": tree})

    def restore(self, path, target):
        wanted = None if target is None else {"weights": target}
        return ocp.v1.load_checkpointables(path, wanted)["weights"]


class V1Checkpointer:
    def save(self, path, tree):
        with ocp.v1.training.Checkpointer(path) as c:
            c.save(3, tree)

    def restore(self, path, target):
        with ocp.v1.training.Checkpointer(path) as c:
            return c.load(3, target)


WAYS = {
    way.__name__: way()
    for way in (Standard, PyTree, Async, Manager, V1, V1PyTree, V1Checkpointables, V1Checkpointer)
}


@pytest.fixture(scope="module")
def tree():
    return state()


@pytest.fixture(scope="module", params=WAYS)
def saved(request, tree, tmp_path_factory):
    way = WAYS[request.param]
    path = tmp_path_factory.mktemp("saved") / "checkpoint"
    way.save(path, tree)
    return way, path


@pytest.mark.parametrize("target", TARGETS)
def test_every_way_to_restore(saved, tree, target):
    way, path = saved
    wanted = TARGETS[target](tree)
    stock = way.restore(path, wanted)
    with jaxgds.orbax.installed(strict=True):
        ours = way.restore(path, wanted)
    oracle.assert_same(ours, stock)
    report = oracle.last_report()
    assert (report.path, report.fallbacks) == ("host", {})
    assert report.arrays == count_arrays(stock) > 10
    assert report.bytes_restored == sum(map(distinct_bytes, jax.tree.leaves(stock)))


def distinct_bytes(leaf) -> int:
    """Bytes of the distinct shards of an array; of all of a numpy array; 0 of a number."""
    if not isinstance(leaf, jax.Array):
        return getattr(leaf, "nbytes", 0)
    return sum({str(s.index): s.data.nbytes for s in leaf.addressable_shards}.values())


@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=oracle.format_id)
@pytest.mark.parametrize("kwargs", [{}, {"chunk_bytes": 96}, {"file_bytes": 2048}], ids=str)
def test_every_format(tmp_path, tree, fmt, kwargs):
    path = oracle.save(tmp_path / "item", tree, fmt, **kwargs)
    for target in (TARGETS["as saved"](tree), TARGETS["other mesh"](tree)):
        stock = PyTree().restore(path, target)
        with jaxgds.orbax.installed(strict=True):
            ours = PyTree().restore(path, target)
        oracle.assert_same(ours, stock)


@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("compress", [False, True])
def test_every_v1_format(tmp_path, tree, zarr3, ocdbt, compress):
    path = oracle.save_v1(tmp_path / "v1", tree, zarr3=zarr3, ocdbt=ocdbt, compress=compress)
    stock = ocp.v1.load(path, abstract(tree))
    with jaxgds.orbax.installed(strict=True):
        ours = ocp.v1.load(path, abstract(tree))
    oracle.assert_same(ours, stock)


@pytest.mark.parametrize("ocdbt", [False, True])
@pytest.mark.parametrize("zarr3", [False, True])
@pytest.mark.parametrize("leaf", ["w", "numpy", "keys"])
def test_an_array_that_is_no_tree(tmp_path, tree, leaf, zarr3, ocdbt):
    array = {**tree, "w": put(np.arange(32.0, dtype=np.float32).reshape(8, 4), "x", "y")}[leaf]
    path = oracle.save_v1(tmp_path / "v1", array, zarr3=zarr3, ocdbt=ocdbt)
    for target in (None, abstract(array)):
        stock = ocp.v1.load(path, target)
        with jaxgds.orbax.installed(strict=True):
            ours = ocp.v1.load(path, target)
        oracle.assert_same(ours, stock)
        assert oracle.last_report().arrays == 1
    assert open_index(os.path.join(path, "state")).names() == [""]


@pytest.mark.parametrize("way", ["PyTree", "V1", "V1PyTree", "V1Checkpointables", "V1Checkpointer"])
def test_strings(tmp_path, way, pair):
    """Which a StandardCheckpointer does not save. They stay Orbax's, beside what does not."""
    tree = {**pair, "text": "é", "deep": [{"name": ""}, None], "n": 1.5}
    WAYS[way].save(tmp_path / "c", tree)
    for target in (None, abstract(tree)):
        stock = WAYS[way].restore(tmp_path / "c", target)
        with jaxgds.orbax.installed(strict=True):
            ours = WAYS[way].restore(tmp_path / "c", target)
        oracle.assert_same(ours, stock)
        assert ours["text"] == "é" and oracle.last_report().arrays == 2


def test_several_items_of_one_step(tmp_path, pair, caplog):
    """Each is a restore with a report of its own, and the log has them all, with the reasons."""
    items = {"weights": {**pair, "numpy": np.arange(5)}, "ema": {"w": pair["w"]}}
    targets = {"weights": odd(items["weights"]), "ema": abstract(items["ema"])}
    with ocp.CheckpointManager(tmp_path) as manager:
        saved = {name: ocp.args.StandardSave(item) for name, item in items.items()}
        manager.save(0, args=ocp.args.Composite(**saved, config=ocp.args.JsonSave({"a": 1})))
        manager.wait_until_finished()
        wanted = {name: ocp.args.StandardRestore(target) for name, target in targets.items()}
        args = ocp.args.Composite(**wanted, config=ocp.args.JsonRestore())
        stock = manager.restore(0, args=args)
        with jaxgds.orbax.installed(), caplog.at_level("INFO", "jaxgds"):
            ours = manager.restore(0, args=args)
    assert set(ours) == set(stock) == {"weights", "ema", "config"}
    for name in stock:
        oracle.assert_same(ours[name], stock[name])
    said = [r.getMessage() for r in caplog.records if r.name == "jaxgds"]
    # "w" twice and "numpy", which is in a report of its own beside the device arrays'.
    assert sum(int(text.split()[1]) for text in said if text.startswith("restored ")) == 3
    assert sum(text.startswith("left to Orbax: v: a cast") for text in said) == 1


def both(path, item, restore_args=None, **kwargs):
    """A PyTreeRestore by stock Orbax and by jaxgds: compared; returns the result and the report."""
    if restore_args is None:
        restore_args = ocp.checkpoint_utils.construct_restore_args(item)
    args = ocp.args.PyTreeRestore(item=item, restore_args=restore_args, **kwargs)
    with ocp.PyTreeCheckpointer() as c:
        stock = c.restore(path, args=args)
        with jaxgds.orbax.installed():
            ours = c.restore(path, args=args)
    oracle.assert_same(ours, stock)
    return ours, oracle.last_report()


@pytest.fixture(scope="module")
def item(tree, tmp_path_factory):
    """One v0 item directory, OCDBT and zstd."""
    return oracle.save(tmp_path_factory.mktemp("item") / "item", tree)


def test_partial_restores(item, tree):
    part = {"layers": tree["layers"], "bf16": tree["bf16"]}
    got, report = both(item, abstract(part), partial_restore=True)
    assert report.arrays == 4 and set(got) == {"layers", "bf16"}
    placeholder = {**abstract(tree), "f32": ocp.PLACEHOLDER, "fp8": ocp.PLACEHOLDER}
    with ocp.PyTreeCheckpointer() as c:
        args = ocp.args.PyTreeRestore(
            item={**placeholder, "fp8": dict.fromkeys(tree["fp8"], ocp.PLACEHOLDER)},
            restore_args=ocp.checkpoint_utils.construct_restore_args(abstract(tree)),
        )
        stock = c.restore(item, args=args)
        with jaxgds.orbax.installed(strict=True):
            ours = c.restore(item, args=args)
    oracle.assert_same(ours, stock)
    assert oracle.last_report().arrays == count_arrays(tree) - 1 - len(FP8)


def count_arrays(tree) -> int:
    return sum(isinstance(x, jax.Array | np.ndarray) for x in jax.tree.leaves(tree))


FLOATS = ("float32", "bfloat16", "float16")


def special(dtype) -> np.ndarray:
    """All values of a 16-bit float; for float32 these, neighbours of ties, and random bits."""
    if np.dtype(dtype).itemsize == 2:
        return np.arange(1 << 16, dtype=np.uint16).view(dtype)
    high = np.arange(1 << 16, dtype=np.uint32) << 16
    ties = [high + n for n in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF, 0x1000, 0x1001, 0x0FFF)]
    noise = np.random.default_rng(0).integers(0, 1 << 32, 1 << 16, np.uint32)
    denormal = np.arange(1 << 12, dtype=np.uint32)
    return np.concatenate([*ties, noise, denormal, denormal + (1 << 31)]).view(np.float32)


@pytest.mark.parametrize("source", FLOATS)
def test_casts_between_floats(tmp_path, source):
    """Equal to numpy's, hence to stock Orbax's, for every value; a NaN stays some NaN."""
    values = special(source)
    path = oracle.save(tmp_path / "item", {"w": jnp.asarray(values)})
    for to in FLOATS:
        args = {
            "w": ocp.ArrayRestoreArgs(sharding=NamedSharding(mesh(8), P("x")), dtype=jnp.dtype(to))
        }
        restore = ocp.args.PyTreeRestore(item={"w": 0}, restore_args=args)
        with ocp.PyTreeCheckpointer() as c, np.errstate(all="ignore"):
            stock = c.restore(path, args=restore)["w"]
            with jaxgds.orbax.installed(strict=True):
                ours = c.restore(path, args=restore)["w"]
        assert (ours.dtype, ours.sharding) == (stock.dtype, stock.sharding)
        a, b = np.asarray(ours), np.asarray(stock)
        nan = np.isnan(b)
        assert (np.isnan(a) == nan).all()
        assert a[~nan].tobytes() == b[~nan].tobytes()


@pytest.mark.parametrize(
    "name, dtype",
    [("f32", jnp.int32), ("f32", jnp.float8_e4m3fn), ("i8", jnp.float32), ("scalar", jnp.int8)],
)
def test_other_casts_are_left_to_orbax(item, tree, name, dtype):
    wanted = jax.ShapeDtypeStruct(tree[name].shape, dtype, sharding=tree[name].sharding)
    _, report = both(item, {name: wanted, "vector": abstract(tree["vector"])}, partial_restore=True)
    assert "cast" in report.fallbacks[name] and report.path == "mixed"


@pytest.mark.parametrize("shape", [(16, 8), (20, 8), (8, 16), (4, 2)])
def test_padding_and_truncation(item, tree, shape):
    args = {
        "f32": ocp.ArrayRestoreArgs(sharding=tree["f32"].sharding, global_shape=shape, strict=False)
    }
    _, report = both(item, {"f32": 0}, args, partial_restore=True)
    assert set(report.fallbacks) == (set() if shape == (16, 8) else {"f32"})
    if shape != (16, 8):
        assert "(16, 8)" in report.fallbacks["f32"] and str(shape) in report.fallbacks["f32"]


def test_a_wrong_shape_is_the_error_it_is_in_orbax(item, tree):
    wrong = {"f32": jax.ShapeDtypeStruct((8, 8), jnp.float32, sharding=tree["f32"].sharding)}
    messages = []
    for context in (threading.Lock(), jaxgds.orbax.installed()):
        with context, pytest.raises(ValueError, match="not compatible with the stored shape") as e:
            both_args = ocp.checkpoint_utils.construct_restore_args(wrong)
            args = ocp.args.PyTreeRestore(item=wrong, restore_args=both_args, partial_restore=True)
            with ocp.PyTreeCheckpointer() as c:
                c.restore(item, args=args)
        messages.append(str(e.value))
    assert messages[0] == messages[1]


def test_mesh_and_mesh_axes_come_first(item, tree):
    args = {
        "f32": ocp.ArrayRestoreArgs(
            mesh=mesh(2), mesh_axes=P(None, "x"), sharding=tree["f32"].sharding
        )
    }
    got, report = both(item, {"f32": 0}, args, partial_restore=True)
    assert got["f32"].sharding == NamedSharding(mesh(2), P(None, "x")) and report.path == "host"


def test_sharding_metadata(item):
    with ocp.PyTreeCheckpointer() as c:
        metadata = c.metadata(item).item_metadata["f32"]
    args = {"f32": ocp.ArrayRestoreArgs(sharding=metadata.sharding)}
    _, report = both(item, {"f32": 0}, args, partial_restore=True)
    assert report.path == "host"


def test_layouts_and_memory_kinds_are_left_to_orbax(item, tree):
    sharding = tree["f32"].sharding
    for other in (
        Format(Layout(major_to_minor=(0, 1)), sharding),
        sharding.with_memory_kind("pinned_host"),
    ):
        args = {"f32": ocp.ArrayRestoreArgs(sharding=other)}
        _, report = both(item, {"f32": 0}, args, partial_restore=True)
        assert report.path == "orbax" and set(report.fallbacks) == {"f32"}


# Leaves restored as numpy arrays.


@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=oracle.format_id)
def test_everything_as_numpy(tmp_path, tree, fmt):
    tree = {**tree, "f64": np.arange(5) / 7}
    path = oracle.save(tmp_path / "item", tree, fmt, chunk_bytes=96)
    args = jax.tree.map(
        lambda x: ocp.RestoreArgs(restore_type=np.ndarray if hasattr(x, "dtype") else None), tree
    )
    restore = ocp.args.PyTreeRestore(item=tree, restore_args=args)
    with ocp.PyTreeCheckpointer() as c:
        stock = c.restore(path, args=restore)
        with jaxgds.orbax.installed(strict=True):
            ours = c.restore(path, args=restore)
    oracle.assert_same(ours, stock)
    report = oracle.last_report()
    assert report.path == "host" and report.arrays == count_arrays(tree)
    for leaf in jax.tree.leaves(ours):
        if isinstance(leaf, np.ndarray):
            assert leaf.flags.writeable and leaf.flags.c_contiguous and leaf.flags.aligned


def test_a_key_without_a_sharding_is_its_data_in_numpy(item, tree):
    """Orbax's restore args of a target without shardings are for numpy arrays."""
    target = {n: jax.ShapeDtypeStruct(tree[n].shape, tree[n].dtype) for n in ("keys", "rbg", "f32")}
    got, report = both(item, target, partial_restore=True)
    assert report.path == "host" and isinstance(got["keys"], np.ndarray)


@pytest.mark.parametrize("way", ["PyTree", "Manager", "V1"])
def test_numpy_and_device_arrays_are_in_one_report(tmp_path, way, pair):
    tree = {**pair, "n": np.arange(10), "m": np.ones((4, 4), np.float16), "step": 3}
    WAYS[way].save(tmp_path / "c", tree)
    with jaxgds.orbax.installed(strict=True):
        for _ in range(2):
            oracle.assert_same(WAYS[way].restore(tmp_path / "c", abstract(tree)), tree)
            report = oracle.last_report()
            assert report.arrays == 4 and report.path == "host"
            assert report.bytes_restored == sum(tree[name].nbytes for name in "wvnm")
    bad = {**abstract(tree), "n": np.zeros(10, np.int16)}
    stock = WAYS[way].restore(tmp_path / "c", bad)
    with jaxgds.orbax.installed():
        oracle.assert_same(WAYS[way].restore(tmp_path / "c", bad), stock)
    report = oracle.last_report()
    assert report.path == "mixed" and report.arrays == 3
    assert set(report.fallbacks) == {"n"} and "int64 to int16" in report.fallbacks["n"]


@pytest.mark.parametrize(
    "device, host, path",
    [
        ("gds", "host", "gds"),
        ("pinned", "host", "pinned"),
        ("host", "host", "host"),
        ("mixed", "host", "mixed"),
        ("gds", "orbax", "mixed"),
        ("gds", "mixed", "mixed"),
        ("orbax", "host", "mixed"),
        ("orbax", "orbax", "orbax"),
    ],
)
def test_the_path_of_both(device, host, path):
    a = jaxgds.TransferReport(device, 1, 2, 3.0, 4.0, 5.0, 6.0, 7, {"a": "x"}, "note")
    b = jaxgds.TransferReport(host, 10, 20, 30.0, 40.0, 50.0, 60.0, 70, {"b": "y"})
    expected = (path, 11, 22, 33.0, 44.0, 55.0, 66.0, 77, {"a": "x", "b": "y"}, "note")
    assert dataclasses.astuple(total(a, b)) == expected


def test_a_leaf_saved_from_numpy_restored_as_an_array(item):
    args = {
        "numpy": ocp.ArrayRestoreArgs(
            sharding=NamedSharding(mesh(2), P("x")), dtype=np.dtype(np.int32)
        )
    }
    got, report = both(item, {"numpy": 0}, args, partial_restore=True)
    assert isinstance(got["numpy"], jax.Array) and "int64" in report.fallbacks["numpy"]


def odd(tree) -> dict:
    """A target for {"w", "v"} of which jaxgds leaves "v" to Orbax."""
    v = tree["v"]
    return {**abstract(tree), "v": jax.ShapeDtypeStruct(v.shape, np.int8, sharding=v.sharding)}


@pytest.fixture(scope="module")
def pair():
    return {name: put(np.arange(24, dtype=np.float32), "x") for name in ("w", "v")}


@pytest.mark.parametrize("way", ["PyTree", "Manager", "V1"])
def test_what_is_left_to_orbax(tmp_path, way, pair):
    way = WAYS[way]
    way.save(tmp_path / "c", pair)
    stock = way.restore(tmp_path / "c", odd(pair))
    with jaxgds.orbax.installed():
        ours = way.restore(tmp_path / "c", odd(pair))
    oracle.assert_same(ours, stock)
    report = oracle.last_report()
    assert report.path == "mixed" and report.arrays == 1
    assert set(report.fallbacks) == {"v"} and "cast" in report.fallbacks["v"]


@pytest.mark.parametrize("way", ["PyTree", "Manager", "V1"])
def test_a_key_wanted_as_numbers_and_numbers_as_a_key(tmp_path, way):
    """Whatever stock Orbax makes of it, or raises."""
    tree = {
        "key": put(jax.random.split(jax.random.key(0), 8), "x"),
        "n": put(np.ones((8, 2), np.uint32), "x"),
    }
    sharding = tree["n"].sharding
    WAYS[way].save(tmp_path / "c", tree)
    numbers = jax.ShapeDtypeStruct((8, 2), np.uint32, sharding=sharding)
    key = jax.ShapeDtypeStruct((8,), tree["key"].dtype, sharding=sharding)
    for target in ({"key": numbers, "n": numbers}, {"key": key, "n": key}):
        results = []
        for context in (threading.Lock(), jaxgds.orbax.installed()):
            with context:
                try:
                    results.append(WAYS[way].restore(tmp_path / "c", target))
                except Exception as e:
                    results.append(type(e))
        if isinstance(results[0], type):
            assert results[1] is results[0]
        else:
            oracle.assert_same(results[1], results[0])


def test_64_bit_types(tmp_path):
    with jax.enable_x64(True):
        tree = {
            name: put(np.arange(16).astype(name), "x")
            for name in ("float64", "int64", "uint64", "complex128")
        }
        path = oracle.save(tmp_path / "item", tree)
        _, report = both(path, abstract(tree))
        assert report.path == "host"
        target = abstract(tree)
    shardings = {name: leaf.sharding for name, leaf in target.items()}
    narrow = {name: ocp.ArrayRestoreArgs(sharding=s) for name, s in shardings.items()}
    _, report = both(path, target, narrow)
    assert report.path == "orbax" and all("x64" in why for why in report.fallbacks.values())


@pytest.mark.parametrize("zarr3", [False, True])
def test_chunks_left_out_because_they_equal_the_fill_value(tmp_path, zarr3):
    """Older checkpoints are like this; their metadata says so."""
    tree = {
        "zeros": put(np.zeros((8, 4), np.float32), "x"),
        "w": put(np.ones((8, 4), np.float32), "x"),
        "numpy": np.zeros((2, 2)),
    }
    path = oracle.save(tmp_path / "item", tree, (False, zarr3, True))
    chunks = {
        name: os.path.join(path, name, *(["c", *index.split(".")] if zarr3 else [index]))
        for name, index in (("zeros", "1.0"), ("numpy", "0.0"))
    }
    for name, chunk in chunks.items():
        os.rename(chunk, tmp_path / "away")
        with pytest.raises(CheckpointError, match=f"'{name}'.*missing"), jaxgds.orbax.installed():
            PyTree().restore(path, abstract(tree))
        os.rename(tmp_path / "away", chunk)
    for chunk in chunks.values():
        os.remove(chunk)
    metadata = tmp_path / "item" / "_METADATA"
    text = json.loads(metadata.read_text())
    metadata.write_text(json.dumps({**text, "store_array_data_equal_to_fill_value": False}))
    _, report = both(path, abstract(tree))
    assert set(report.fallbacks) == {"zeros", "numpy"} and report.path == "mixed"
    assert all("missing" in why for why in report.fallbacks.values())


def test_saved_shardings_that_do_not_fit_here(tmp_path):
    """Without a target, from a checkpoint of devices that do not exist: as in Orbax."""
    path = oracle.save(tmp_path / "item", {"w": put(np.ones((8, 4), np.float32), "x")})
    file = tmp_path / "item" / "_sharding"
    file.write_text(file.read_text().replace('\\"id\\": 0', '\\"id\\": 99'))
    errors = []
    for context in (threading.Lock(), jaxgds.orbax.installed()):
        with context:
            try:
                PyTree().restore(path, None)
                errors.append(None)
            except ValueError as e:
                errors.append(str(e))
    assert errors[0] == errors[1]
    file.unlink()
    with pytest.raises(ValueError, match="[Ss]harding"), jaxgds.orbax.installed():
        PyTree().restore(path, None)


@pytest.mark.parametrize("way", ["PyTree", "V1"])
def test_shardings_of_the_save_are_warned_of(tmp_path, way, pair):
    """By jaxgds as by Orbax: one category, and one beginning, which is what filters match."""
    WAYS[way].save(tmp_path / "c", pair)
    seen = []
    for context in (threading.Lock(), jaxgds.orbax.installed(strict=True)):
        with context, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            WAYS[way].restore(tmp_path / "c", None)
            before = len(caught)
            WAYS[way].restore(tmp_path / "c", abstract(pair))
        assert not [w for w in caught[before:] if "harding" in str(w.message)]
        warned = [w for w in caught if "harding" in str(w.message)]
        seen.append({(w.category, str(w.message).partition(".")[0]) for w in warned})
    assert seen[0] == seen[1] and len(seen[0]) == 1


# The report.


def chunk_bytes(path, fmt) -> dict[str, int]:
    """Stored bytes of each array, without the 20 bytes of a one-chunk shard's index."""
    sizes: dict[str, int] = {}
    for key, value in oracle.stored_values(path, fmt[0]).items():
        if not key.endswith((".zarray", "zarr.json")):
            name = key.partition("/c" if fmt[1] else "/")[0]
            sizes[name] = sizes.get(name, 0) + len(value) - 20 * fmt[1]
    return sizes


@pytest.mark.parametrize("fmt", [f for f in oracle.FORMATS if f[0]], ids=oracle.format_id)
def test_bytes_read(tmp_path, fmt):
    names = ("f32", "bf16", "replicated", "partly", "scalar", "fp8")
    tree = {name: leaf for name, leaf in state().items() if name in names}
    path = oracle.save(tmp_path / "item", tree, fmt)
    stored = chunk_bytes(path, fmt)
    for target in ("as saved", "replicated", "one device", "none"):
        with jaxgds.orbax.installed(strict=True):
            PyTree().restore(path, TARGETS[target](tree))
        report = oracle.last_report()
        assert report.bytes_read == sum(stored.values()), "replicas are read once"
        assert report.bytes_restored == sum(x.nbytes for x in jax.tree.leaves(tree))
    with jaxgds.orbax.installed(strict=True):
        args = ocp.args.PyTreeRestore(
            item={"partly": 0},
            restore_args={"partly": ocp.ArrayRestoreArgs(sharding=tree["partly"].sharding)},
            partial_restore=True,
        )
        with ocp.PyTreeCheckpointer() as c:
            c.restore(path, args=args)
    report = oracle.last_report()
    assert report.bytes_read == stored["partly"] and report.arrays == 1
    parts = ("index_seconds", "plan_seconds", "read_seconds")
    assert all(getattr(report, part) >= 0 for part in parts)
    assert report.index_seconds > 0 < report.read_seconds
    assert report.seconds >= sum(getattr(report, part) for part in parts)
    assert json.loads(json.dumps(report.to_dict()))["bytes_read"] == report.bytes_read


# install, uninstall, installed, handler, strict.


def test_install_and_uninstall(item, tree):
    try:
        jaxgds.orbax.install()
        jaxgds.orbax.install(strict=True)
        assert ArrayHandler.deserialize is not STOCK
        PyTree().restore(item, abstract(tree))
        assert oracle.last_report().path == "host"
    finally:
        jaxgds.orbax.uninstall()
    assert ArrayHandler.deserialize is STOCK
    jaxgds.orbax.uninstall()
    assert ArrayHandler.deserialize is STOCK


def test_installed_restores_what_was_there():
    with jaxgds.orbax.installed():
        outer = ArrayHandler.deserialize
        with pytest.raises(KeyError), jaxgds.orbax.installed():
            assert ArrayHandler.deserialize not in (outer, STOCK)
            raise KeyError
        assert ArrayHandler.deserialize is outer


def test_managers_that_exist_already(tmp_path, tree):
    with ocp.CheckpointManager(tmp_path) as manager, ocp.StandardCheckpointer() as checkpointer:
        manager.save(0, args=ocp.args.StandardSave(tree))
        manager.wait_until_finished()
        stock = manager.restore(0, args=ocp.args.StandardRestore(abstract(tree)))
        publish(jaxgds.TransferReport("before"))
        with jaxgds.orbax.installed(strict=True):
            ours = manager.restore(0, args=ocp.args.StandardRestore(abstract(tree)))
            assert oracle.last_report().path == "host"
            publish(jaxgds.TransferReport("before"))
            again = checkpointer.restore(tmp_path / "0" / "default", abstract(tree))
            assert oracle.last_report().path == "host"
    oracle.assert_same(ours, stock)
    oracle.assert_same(again, stock)


def test_saving_is_untouched(tmp_path, tree):
    oracle.save(tmp_path / "stock", tree)
    with jaxgds.orbax.installed():
        oracle.save(tmp_path / "ours", tree)
    ours, stock = (PyTree().restore(tmp_path / by, abstract(tree)) for by in ("ours", "stock"))
    oracle.assert_same(ours, stock)


def test_a_handler_for_one_manager(tmp_path, pair):
    handler = jaxgds.orbax.handler(strict=True)

    def restore(manager, target):
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        return manager.restore(5, args=ocp.args.PyTreeRestore(target, restore_args))

    with ocp.CheckpointManager(tmp_path, item_handlers=handler) as manager:
        manager.save(5, args=ocp.args.PyTreeSave(pair))
        manager.wait_until_finished()
        assert ArrayHandler.deserialize is STOCK
        ours = restore(manager, abstract(pair))
        assert oracle.last_report().path == "host"
        oracle.assert_same(manager.restore(5), ours)
        with pytest.raises(jaxgds.FallbackError, match="v: a cast"):
            restore(manager, odd(pair))
    publish(jaxgds.TransferReport("before"))
    with ocp.CheckpointManager(tmp_path, item_handlers=ocp.PyTreeCheckpointHandler()) as manager:
        oracle.assert_same(ours, restore(manager, abstract(pair)))
    assert oracle.last_report().path == "before", "other managers keep the stock handler"


def test_a_handler_for_one_checkpointer(item, tmp_path, tree):
    files = tmp_path / "files"
    with ocp.Checkpointer(jaxgds.orbax.handler(use_ocdbt=False, use_compression=False)) as c:
        c.save(files, args=ocp.args.PyTreeSave(tree))
        assert (files / "f32" / ".zarray").exists()
        oracle.assert_same(c.restore(item), PyTree().restore(item, None))
        oracle.assert_same(c.restore(files), PyTree().restore(files, None))


def test_load_and_broadcast_is_left_to_orbax_and_said_so(tmp_path, pair):
    ocp.v1.save(tmp_path / "v1", pair)
    target = abstract(pair, lambda x: NamedSharding(mesh(4, 2), P("y")))
    context = ocp.v1.Context()
    context.array.loading.use_load_and_broadcast = True
    with context:
        stock = ocp.v1.load(tmp_path / "v1", target)
        with jaxgds.orbax.installed():
            ours = ocp.v1.load(tmp_path / "v1", target)
        report = oracle.last_report()
        assert report.path == "orbax" and set(report.fallbacks) == {"w", "v"}
        assert "broadcast" in report.fallbacks["w"]
        with jaxgds.orbax.installed(strict=True), pytest.raises(jaxgds.FallbackError):
            ocp.v1.load(tmp_path / "v1", target)
    oracle.assert_same(ours, stock)


def test_strict(tmp_path, monkeypatch, pair):
    path = oracle.save(tmp_path / "item", pair)
    stock = PyTree().restore(path, odd(pair))
    for strict, env, raises in (
        (True, "0", True),
        (True, None, True),
        (None, "1", True),
        (None, "0", False),
        (None, "", False),
        (None, None, False),
        (False, "1", False),
    ):
        monkeypatch.delenv("JAXGDS_STRICT", raising=False)
        if env is not None:
            monkeypatch.setenv("JAXGDS_STRICT", env)
        publish(jaxgds.TransferReport("before"))
        with jaxgds.orbax.installed(strict=strict):
            if not raises:
                oracle.assert_same(PyTree().restore(path, odd(pair)), stock)
                assert oracle.last_report().path == "mixed"
                continue
            with pytest.raises(jaxgds.FallbackError, match="1 array.*v: a cast"):
                PyTree().restore(path, odd(pair))
            assert oracle.last_report().path == "before"


@pytest.mark.parametrize("names, says", [(("v",), "1 array would"), (("v", "w"), "2 arrays would")])
def test_how_many_fall_back(tmp_path, pair, names, says):
    path = oracle.save(tmp_path / "item", {name: pair[name] for name in names})
    target = {name: odd(pair)["v"] for name in names}
    with jaxgds.orbax.installed(strict=True), pytest.raises(jaxgds.FallbackError, match=says):
        PyTree().restore(path, target)


def test_a_handler_does_not_drop_another_one():
    """A registered load-and-broadcast, or a handler of the user's own."""
    for kind in (BroadcastHandler, type("Mine", (ArrayHandler,), {})):
        stock = ocp.type_handlers.get_type_handler(jax.Array)
        ocp.type_handlers.register_type_handler(jax.Array, kind(), override=True)
        try:
            with pytest.raises(NotImplementedError, match=f"{kind.__name__}.*install"):
                jaxgds.orbax.handler()
        finally:
            ocp.type_handlers.register_type_handler(jax.Array, stock, override=True)


# Settings of the caller.


SETTINGS = {
    "mesh of other devices": lambda: jax.set_mesh(Mesh(np.array(jax.devices()[6:]), "z")),
    "explicit mesh": lambda: jax.set_mesh(jax.make_mesh((8,), ("e",), (AxisType.Explicit,))),
    "NaN": lambda: jax.debug_nans(True),
    "infinity": lambda: jax.debug_infs(True),
    "no jit": lambda: jax.disable_jit(),
    "x64": lambda: jax.enable_x64(True),
    "device": lambda: jax.default_device(jax.devices()[5]),
    "transfers": lambda: jax.transfer_guard("disallow"),
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_caller(tmp_path, tree, setting):
    """They are for his programs: those of a restore run on single devices, on any numbers."""
    tree = {name: tree[name] for name in ("f32", "scalar", "int4", "key", "numpy")}
    tree["inf"] = put(np.full((64, 16), np.inf, np.float32), "x")
    path = oracle.save(tmp_path / "item", tree)
    target = abstract(tree)
    target["inf"] = target["inf"].update(dtype=jnp.bfloat16)
    with SETTINGS[setting]():
        stock = Standard().restore(path, target)
        with jaxgds.orbax.installed(strict=True):
            ours = Standard().restore(path, target)
    oracle.assert_same(ours, stock)


@pytest.mark.parametrize("transformed", [jax.vmap, jax.grad, jax.jit])
def test_while_something_is_traced(item, tree, transformed):
    """Constants of a model, say, that it restores when it is first called."""
    target = {name: abstract(tree[name]) for name in ("f32", "replicated", "int4")}
    restored = []

    def call(x):
        with jax.ensure_compile_time_eval():
            args = ocp.checkpoint_utils.construct_restore_args(target)
            args = ocp.args.PyTreeRestore(target, args, partial_restore=True)
            with ocp.PyTreeCheckpointer() as c:
                restored.append(c.restore(item, args=args))
        return x.sum()

    for context in (threading.Lock(), jaxgds.orbax.installed(strict=True)):
        with context:
            transformed(lambda x: call(x))(jnp.ones(3))
    oracle.assert_same(*restored)


def test_memory_that_is_not_written_yet_may_look_like_nan(tmp_path):
    """JAX_DEBUG_NANS, which holds for all threads, looks at what a program returns."""
    tree = {name: put(np.full((512, 64), np.nan, np.float32), "x") for name in ("a", "b")}
    path = oracle.save(tmp_path / "item", tree)
    before = jax.config.jax_debug_nans
    jax.config.update("jax_debug_nans", True)
    try:
        with jaxgds.orbax.installed(strict=True):
            for _ in range(8):  # each has the memory of the one before
                PyTree().restore(path, abstract(tree))
    finally:
        jax.config.update("jax_debug_nans", before)


# Failure, threads.


@pytest.mark.parametrize("way", ["PyTree", "Manager", "V1"])
def test_a_lost_database_is_the_error_it_is_in_orbax(tmp_path, way, pair):
    WAYS[way].save(tmp_path / "c", pair)
    for folder in list((tmp_path / "c").rglob("d")):
        shutil.rmtree(folder)
    # Orbax's own tests, of checkpoints damaged like this, look for these words.
    with jaxgds.orbax.installed(), pytest.raises(ValueError, match="Error opening .* driver:"):
        WAYS[way].restore(tmp_path / "c", abstract(pair))


@pytest.mark.parametrize("way", ["PyTree", "Manager", "V1"])
def test_a_damaged_checkpoint(tmp_path, way):
    tree = {"w": put(np.random.default_rng(0).normal(size=(64, 64)).astype(np.float32), "x")}
    WAYS[way].save(tmp_path / "c", tree)
    files = [f for f in (tmp_path / "c").rglob("ocdbt.process_0/d/*") if f.stat().st_size > 4096]
    assert files
    for file in files:
        os.truncate(file, 3000)
    with jaxgds.orbax.installed(), pytest.raises(CheckpointError, match="'w'") as e:
        WAYS[way].restore(tmp_path / "c", abstract(tree))
    assert any(str(file) in str(e.value) for file in files)
    assert not [t.name for t in threading.enumerate() if "jaxgds" in t.name]


def test_no_args_is_the_error_it_is_in_orbax():
    handler = ocp.type_handlers.get_type_handler(jax.Array)
    with jaxgds.orbax.installed(), pytest.raises(ValueError, match="ArrayRestoreArgs"):
        asyncio.run(handler.deserialize([], None))


def test_restores_from_several_threads(item, tree):
    targets = [TARGETS[name](tree) for name in ("as saved", "other mesh", "replicated")]
    stock = [PyTree().restore(item, target) for target in targets]
    with jaxgds.orbax.installed(strict=True), ThreadPoolExecutor(6) as pool:
        ours = list(pool.map(lambda t: PyTree().restore(item, t), targets * 4))
    for i, got in enumerate(ours):
        oracle.assert_same(got, stock[i % 3])
