"""Zarr metadata against TensorStore, which wrote it; and metadata nobody should write."""

import json
import pathlib

import numpy as np
import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgds import zarr
from jaxgds.errors import CheckpointError


DTYPES = [
    *("bool", "int4", "uint8", "int16", "uint32", "int64", "bfloat16", "float16", "float32"),
    *("float64", "float8_e4m3fn", "float8_e5m2", "float8_e4m3b11fnuz", "complex64", "complex128"),
]


def write(path, driver: str, metadata: dict, **spec) -> ts.TensorStore:
    """Creates an array of zeros whose every chunk is stored."""
    spec = {
        "driver": driver,
        "kvstore": {"driver": "file", "path": f"{path}/w/"},
        "metadata": metadata,
        "store_data_equal_to_fill_value": True,
        **spec,
    }
    array = ts.open(spec, create=True).result()
    array.write(np.zeros(array.shape, array.dtype.numpy_dtype)).result()
    return array


def parse(path) -> zarr.Layout:
    v2, v3 = (path / "w" / name for name in (".zarray", "zarr.json"))
    return zarr.parse(
        v2.read_bytes() if v2.exists() else None, v3.read_bytes() if v3.exists() else None, "w"
    )


def keys(path: pathlib.Path) -> set[str]:
    files = (f for f in (path / "w").rglob("*") if f.is_file())
    return {str(f.relative_to(path / "w")) for f in files} - {".zarray", "zarr.json"}


def check(path, array: ts.TensorStore, sharded: bool = False) -> zarr.Layout:
    """The layout says what TensorStore says, and its keys are the files that are there."""
    layout = parse(path)
    assert layout.shape == array.shape
    assert layout.dtype == array.dtype.numpy_dtype
    assert layout.chunk == (array.chunk_layout.read_chunk.shape or ())
    assert layout.stored == (array.chunk_layout.write_chunk.shape or ())
    assert layout.sharded == sharded
    grid = [range(-(-n // c)) for n, c in zip(layout.shape, layout.stored, strict=True)]
    assert {layout.key(i) for i in np.ndindex(*map(len, grid))} == keys(path)
    return layout


def grid(chunk_shape) -> dict:
    return {"name": "regular", "configuration": {"chunk_shape": chunk_shape}}


def sharding(chunk_shape, codecs=({"name": "bytes"},), **more) -> dict:
    configuration = {"chunk_shape": chunk_shape, "codecs": list(codecs), **more}
    return {"name": "sharding_indexed", "configuration": configuration}


LITTLE = {"name": "bytes", "configuration": {"endian": "little"}}
ZSTD = {"name": "zstd", "configuration": {"level": 1}}
V2 = {"dtype": "<f4", "shape": [7, 6], "chunks": [3, 2], "compressor": None}
V3 = {"data_type": "float32", "shape": [7, 6], "chunk_grid": grid([3, 2]), "codecs": [LITTLE]}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("driver", ["zarr", "zarr3"])
def test_dtypes(tmp_path, driver, dtype):
    shape = {"shape": [5, 4]}
    v2 = {"chunks": [2, 4], "compressor": None}
    metadata = {**shape, **(v2 if driver == "zarr" else {"chunk_grid": grid([2, 4])})}
    array = write(tmp_path, driver, metadata, dtype=dtype)
    layout = check(tmp_path, array)
    assert layout.chunk_nbytes == 8 * layout.dtype.itemsize


@pytest.mark.parametrize(
    "shape, chunks", [([], []), ([1], [1]), ([5], [2]), ([2, 3, 4], [1, 3, 3])]
)
@pytest.mark.parametrize("zstd", [True, False])
@pytest.mark.parametrize("separator", [".", "/"])
def test_v2(tmp_path, shape, chunks, zstd, separator):
    compressor = {"id": "zstd", "level": 3} if zstd else None
    metadata = {**V2, "shape": shape, "chunks": chunks, "compressor": compressor}
    array = write(tmp_path, "zarr", {**metadata, "dimension_separator": separator})
    assert check(tmp_path, array).codec == ("zstd" if zstd else "raw")


@pytest.mark.parametrize(
    "shape, chunks", [([], []), ([1], [1]), ([5], [2]), ([2, 3, 4], [1, 3, 3])]
)
@pytest.mark.parametrize("zstd", [True, False])
@pytest.mark.parametrize("encoding", ["default", "v2"])
@pytest.mark.parametrize("separator", [".", "/", None])
def test_v3(tmp_path, shape, chunks, zstd, encoding, separator):
    keys: dict = {"name": encoding}
    if separator:
        keys["configuration"] = {"separator": separator}
    metadata = {
        **V3,
        "shape": shape,
        "chunk_grid": grid(chunks),
        "chunk_key_encoding": keys,
        "codecs": [LITTLE, ZSTD] if zstd else [LITTLE],
    }
    array = write(tmp_path, "zarr3", metadata)
    assert check(tmp_path, array).codec == ("zstd" if zstd else "raw")


@pytest.mark.parametrize("inner", [[1, 1], [3, 2], [6, 4], [2, 4]])
@pytest.mark.parametrize("zstd", [True, False])
def test_v3_sharding(tmp_path, inner, zstd):
    codecs = [LITTLE, ZSTD] if zstd else [LITTLE]
    metadata = {**V3, "chunk_grid": grid([6, 4]), "codecs": [sharding(inner, codecs)]}
    layout = check(tmp_path, write(tmp_path, "zarr3", metadata), sharded=True)
    assert layout.per_stored == (6 // inner[0], 4 // inner[1])


UNREAD_V2 = {
    "gzip": {"compressor": {"id": "gzip", "level": 1}},
    "zlib": {"compressor": {"id": "zlib", "level": 1}},
    "blosc": {"compressor": {"id": "blosc", "cname": "lz4", "clevel": 5, "shuffle": 1}},
    "bz2": {"compressor": {"id": "bz2", "level": 1}},
    "order F": {"order": "F"},
    "big endian": {"dtype": ">f4"},
    "big endian complex": {"dtype": ">c8"},
    "structured": {"dtype": [["x", "<f4"], ["y", "<i2"]], "field": "x"},
    "bytes": {"dtype": "|S4"},
}


@pytest.mark.parametrize("case", UNREAD_V2)
def test_v2_encodings_that_are_not_read(tmp_path, case):
    metadata = {**V2, **UNREAD_V2[case]}
    field = metadata.pop("field", None)
    if case == "bytes":  # TensorStore reads it as an array of bytes with one more dimension
        text = {**metadata, "zarr_format": 2, "filters": None, "order": "C", "fill_value": None}
        (tmp_path / "w").mkdir()
        (tmp_path / "w" / ".zarray").write_text(json.dumps(text))
    else:
        write(tmp_path, "zarr", metadata, **({"field": field} if field else {}))
    with pytest.raises(NotImplementedError, match="array 'w'"):
        parse(tmp_path)


def test_v2_filters_are_not_read(tmp_path):
    write(tmp_path, "zarr", V2)
    file = tmp_path / "w" / ".zarray"
    file.write_text(json.dumps({**json.loads(file.read_text()), "filters": [{"id": "delta"}]}))
    with pytest.raises(NotImplementedError, match="'w'.*filters"):
        parse(tmp_path)


UNREAD_V3 = {
    "gzip": [LITTLE, {"name": "gzip", "configuration": {"level": 1}}],
    "blosc": [
        LITTLE,
        {
            "name": "blosc",
            "configuration": {"cname": "lz4", "clevel": 5, "shuffle": "noshuffle", "typesize": 4},
        },
    ],
    "crc32c": [LITTLE, {"name": "crc32c"}],
    "transpose": [{"name": "transpose", "configuration": {"order": [1, 0]}}, LITTLE],
    "big endian": [{"name": "bytes", "configuration": {"endian": "big"}}],
    "index at the start": [sharding([3, 2], index_location="start")],
    "index without checksum": [sharding([3, 2], index_codecs=[LITTLE])],
    "big endian index": [
        sharding(
            [3, 2],
            index_codecs=[
                {"name": "bytes", "configuration": {"endian": "big"}},
                {"name": "crc32c"},
            ],
        )
    ],
    "sharding within sharding": [sharding([3, 2], [sharding([1, 1])])],
    "big endian in a shard": [
        sharding([3, 2], [{"name": "bytes", "configuration": {"endian": "big"}}])
    ],
}


def test_v3_codecs_around_a_shard_are_not_read():
    """TensorStore refuses to write these."""
    metadata = {**GOOD_V3, "codecs": [*GOOD_V3["codecs"], ZSTD]}
    with pytest.raises(NotImplementedError, match="array 'w'"):
        zarr.parse(None, json.dumps(metadata).encode(), "w")


@pytest.mark.parametrize("case", UNREAD_V3)
def test_v3_encodings_that_are_not_read(tmp_path, case):
    write(tmp_path, "zarr3", {**V3, "chunk_grid": grid([6, 4]), "codecs": UNREAD_V3[case]})
    with pytest.raises(NotImplementedError, match="array 'w'"):
        parse(tmp_path)


GOOD_V2 = {
    "zarr_format": 2,
    "shape": [4, 6],
    "chunks": [2, 3],
    "dtype": "<f4",
    "compressor": {"id": "zstd", "level": 1},
    "filters": None,
    "order": "C",
    "fill_value": None,
    "dimension_separator": ".",
}
GOOD_V3 = {
    "zarr_format": 3,
    "node_type": "array",
    "shape": [4, 6],
    "data_type": "float32",
    "chunk_grid": grid([2, 6]),
    "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
    "fill_value": 0.0,
    "codecs": [
        sharding([1, 2], [LITTLE, ZSTD], index_codecs=[LITTLE, {"name": "crc32c"}]),
    ],
}


DAMAGED_V2 = [
    b"",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe",
    json.dumps(GOOD_V2).encode()[:-1],
    *(
        json.dumps({**GOOD_V2, **change}).encode()
        for change in (
            {"shape": None},
            {"shape": 4},
            {"shape": [4]},
            {"shape": [4, -6]},
            {"shape": [4, 6.5]},
            {"shape": ["4", 6]},
            {"shape": [True, 6]},
            {"chunks": [2, 0]},
            {"chunks": None},
            {"compressor": {}},
            {"compressor": 3},
            {"dtype": None},
            {"dimension_separator": 3},
        )
    ),
]


@pytest.mark.parametrize("text", DAMAGED_V2, ids=lambda t: t.decode("latin1")[:80])
def test_damaged_v2(text):
    with pytest.raises(CheckpointError, match="'w'"):
        zarr.parse(text, None, "w")


def paths(value, at=()):
    yield at
    if not isinstance(value, dict | list):
        return
    for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
        yield from paths(inner, (*at, key))


def changed(value, at, new):
    if not at:
        return new
    copy = dict(value) if isinstance(value, dict) else list(value)
    if len(at) == 1 and new is KeyError:
        del copy[at[0]]
    else:
        copy[at[0]] = changed(value[at[0]], at[1:], new)  # type: ignore[index]
    return copy


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=4,
)


@settings(max_examples=400, deadline=None)
@given(st.data())
def test_metadata_with_anything_in_any_place(data):
    """A layout, CheckpointError or NotImplementedError; never another exception."""
    good = data.draw(st.sampled_from([GOOD_V2, GOOD_V3]))
    at = data.draw(st.sampled_from([p for p in paths(good)]))
    new = data.draw(JSON | st.just(KeyError) if at else JSON)
    text = json.dumps(changed(good, at, new)).encode()
    try:
        layout = zarr.parse(*((text, None) if good is GOOD_V2 else (None, text)), "w")
    except (CheckpointError, NotImplementedError) as e:
        assert "'w'" in str(e)
        return
    assert len(layout.shape) == len(layout.chunk) == len(layout.stored)
    assert isinstance(layout.key((0,) * len(layout.shape)), str)
