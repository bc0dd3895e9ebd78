"""The byte index against TensorStore, which reads the same store by its own code."""

import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import tensorstore as ts
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, open_index


NAMES = ["plain", "with.dot", "with/slash", "a space", "été", "日本", "50%", "%41", "a:b", "a+b&c"]


def tree():
    mesh = jax.make_mesh((4, 2), ("x", "y"))

    def put(array, *spec):
        return jax.device_put(array, NamedSharding(mesh, P(*spec)))

    rng = np.random.default_rng(0)
    return {
        "matrix": put(rng.normal(size=(64, 60)).astype(np.float32), "x", "y"),
        "columns": put(rng.normal(size=(24, 64)).astype(jnp.bfloat16), None, "x"),
        "replicated": put(np.arange(640, dtype=np.int32).reshape(64, 10)),
        "cube": put(rng.integers(0, 255, (8, 6, 10), np.uint8), "x", None, "y"),
        "scalar": put(np.float32(3.5)),
        "names": {name: put(rng.normal(size=400)) for name in NAMES},
    }


@pytest.fixture(scope="module", params=oracle.FORMATS, ids=oracle.format_id)
def fmt(request):
    return request.param


@pytest.fixture(scope="module", params=["whole", "subchunked", "many-files"])
def saved(request, fmt, tmp_path_factory):
    kwargs = {
        "whole": {},
        "subchunked": {"chunk_bytes": 256},
        "many-files": {"file_bytes": 4096},
    }[request.param]
    path = tmp_path_factory.mktemp("index") / "item"
    return oracle.save(path, tree(), fmt, **kwargs)


def test_every_stored_value_is_what_tensorstore_reads(saved, fmt):
    expected = oracle.stored_values(saved, fmt[0])
    index = open_index(saved)
    for key, value in expected.items():
        assert oracle.content(index._values[key]) == value, key
    if fmt[0]:
        assert set(index._values) == set(expected)


def test_every_chunk_is_what_tensorstore_decodes(saved, fmt):
    index = open_index(saved)
    leaves = [f"names.{name}" for name in NAMES] + ["matrix", "columns", "replicated", "cube"]
    assert index.names() == sorted([*leaves, "scalar"])
    for name in index.names():
        assert name in index
        array = index.array(name)
        whole = oracle.zarr_array(saved, name, ocdbt=fmt[0], zarr3=fmt[1])
        assert (array.layout.shape, array.layout.dtype) == (whole.shape, whole.dtype)
        seen = np.zeros(whole.shape, np.int32)
        for at, source in array.chunks():
            box = tuple(
                slice(i * c, min((i + 1) * c, n))
                for i, c, n in zip(at, array.layout.chunk, whole.shape, strict=True)
            )
            inner = tuple(slice(0, s.stop - s.start) for s in box)
            got = oracle.decoded(array, source)[inner]
            assert got.tobytes() == whole[box].tobytes(), (name, at)
            seen[box] += 1
        assert (seen == 1).all(), name


def test_a_save_makes_what_these_tests_are_about(saved, fmt, request):
    """Subchunks, inline values and several data files do occur."""
    kind = request.node.callspec.params["saved"]
    index = open_index(saved)
    files = {v.file for v in index._values.values() if isinstance(v, Extent)} if fmt[0] else set()
    if kind == "subchunked":
        assert index.array("replicated").layout.chunk_nbytes <= 256
        assert index.array("matrix").layout.sharded == fmt[1]
    if kind == "many-files" and fmt[0]:
        assert len(files) > 2
    if fmt[0]:
        assert isinstance(index.array("scalar").chunk(()), bytes)


@pytest.mark.parametrize("prefix", ["v/", "a b%20/", "ü:1/", "x'y/"])
def test_deep_trees_overwrites_and_odd_file_names(tmp_path, prefix):
    path = tmp_path / "deep %41 é"
    spec = {
        "driver": "ocdbt",
        "base": {"driver": "file", "path": f"{path}/"},
        "config": {"max_decoded_node_bytes": 400, "max_inline_value_bytes": 16},
        "value_data_prefix": prefix,
        "target_data_file_size": 600,
    }
    store = ts.KvStore.open(spec).result()
    for generation in range(2):
        with ts.Transaction() as transaction:
            for i in range(generation, 150, 1 + generation):
                value = b"%d:" % generation + bytes([i]) * (i % 40)
                store.with_transaction(transaction)[f"arr.{i}/{'k' * (i % 7)}{i}"] = value
    for i in range(0, 150, 10):
        del store[f"arr.{i}/{'k' * (i % 7)}{i}"]
    base = ts.KvStore.open(spec["base"]).result()
    dump = ts.ocdbt.dump(base).result()
    assert dump["versions"][-1]["root_height"] >= 2
    expected = {k.decode(): store[k] for k in store.list().result()}
    values = open_index(path)._values
    assert {k: oracle.content(v) for k, v in values.items()} == expected
    assert any(isinstance(v, Extent) and prefix in v.file for v in values.values())


def test_an_empty_database(tmp_path):
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    store.write("a", b"1").result()
    store.delete_range(ts.KvStore.KeyRange()).result()
    index = open_index(tmp_path)
    assert index.names() == [] and "a" not in index


def test_an_array_that_is_not_there(saved):
    with pytest.raises(CheckpointError, match="no array 'nothing'.*'matrix'"):
        open_index(saved).array("nothing")
    assert "nothing" not in open_index(saved)


def test_not_a_directory(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    for path in (file, tmp_path / "missing"):
        with pytest.raises(CheckpointError, match=str(path)):
            open_index(path)


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    path = tmp_path_factory.mktemp("small") / "item"
    return oracle.save(path, {"w": jnp.arange(3000, dtype=jnp.float32)}, (True, True, False))


def copy(path, tmp_path):
    return shutil.copytree(path, tmp_path / "copy")


@pytest.mark.parametrize("where", ["manifest.ocdbt", "d"])
@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "remove"])
def test_a_damaged_database(small, tmp_path, where, damage):
    path = copy(small, tmp_path)
    (file,) = [path / where] if where != "d" else list((path / "d").iterdir())
    data = file.read_bytes()
    if damage == "remove":
        file.unlink()
        if where == "manifest.ocdbt":  # then it is a checkpoint without OCDBT, and without arrays
            with pytest.raises(CheckpointError, match="no array 'w'"):
                open_index(path).array("w")
            return
    for at in range(0, len(data), max(1, len(data) // 20)):
        if damage == "truncate":
            file.write_bytes(data[:at])
        elif damage == "flip":
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x55]) + data[at + 1 :])
        elif damage == "empty":
            file.write_bytes(b"")
        with pytest.raises(CheckpointError, match=str(path)):
            open_index(path)


def shard_index_file(path) -> Extent:
    array = open_index(path).array("w")
    assert array.layout.sharded
    source = array._value((0,))
    assert isinstance(source, Extent)
    return source


@pytest.mark.parametrize("back", [1, 4, 5, 12, 20])
def test_a_damaged_shard_index(small, tmp_path, back):
    path = copy(small, tmp_path)
    shard = shard_index_file(path)
    with open(shard.file, "r+b") as f:
        f.seek(shard.offset + shard.nbytes - back)
        byte = f.read(1)[0]
        f.seek(-1, 1)
        f.write(bytes([byte ^ 0x10]))
    with pytest.raises(CheckpointError, match="'w'.*checksum") as e:
        open_index(path).array("w").chunk((0,))
    assert shard.file in str(e.value)


def test_a_truncated_shard(small, tmp_path):
    path = copy(small, tmp_path)
    shard = shard_index_file(path)
    with open(shard.file, "r+b") as f:
        f.truncate(shard.offset + shard.nbytes - 3)
    with pytest.raises(CheckpointError, match="'w'.*truncated") as e:
        open_index(path).array("w").chunk((0,))
    assert shard.file in str(e.value)


@pytest.mark.parametrize("ocdbt", [True, False])
def test_a_missing_chunk(tmp_path, ocdbt):
    """As a save that was cut off, or with chunks equal to the fill value left out."""
    spec = {
        "driver": "zarr",
        "kvstore": {"driver": "ocdbt", "base": f"file://{tmp_path}/", "path": "w/"}
        if ocdbt
        else f"file://{tmp_path}/w/",
        "metadata": {"shape": [4], "chunks": [2], "dtype": "<f4", "compressor": None},
    }
    array = ts.open(spec, create=True).result()
    array[:2].write(np.ones(2, np.float32)).result()
    stored = open_index(tmp_path).array("w")
    assert len(oracle.content(stored.chunk((0,)))) == 8
    with pytest.raises(CheckpointError, match="'w'.*'w/1' is missing"):
        stored.chunk((1,))


def test_a_shard_that_lacks_a_chunk(tmp_path):
    sharding = {"chunk_shape": [2], "codecs": [{"name": "bytes"}]}
    spec = {
        "driver": "zarr3",
        "kvstore": f"file://{tmp_path}/w/",
        "metadata": {
            "shape": [4],
            "data_type": "float32",
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4]}},
            "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
        },
    }
    array = ts.open(spec, create=True).result()
    array[:2].write(np.ones(2, np.float32)).result()
    stored = open_index(tmp_path).array("w")
    assert len(oracle.content(stored.chunk((0,)))) == 8
    with pytest.raises(CheckpointError, match="'w'.*lacks chunk"):
        stored.chunk((1,))
