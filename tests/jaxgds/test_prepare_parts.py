"""Reading boxes of stored arrays and writing boxes of prepared ones, against numpy."""

import itertools
import tempfile
from pathlib import Path
from unittest import mock

import ml_dtypes
import numpy as np
import pytest
import xxhash
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgds import prepare, prepared, quantize
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray, open_index
from jaxgds.output import Writer
from jaxgds.prepared import Array
from jaxgds.rules import Mesh, Rule, Rules
from jaxgds.scatter import slabs
from jaxgds.sources import Model, Tensor, read_box
from jaxgds.zarr import Layout


def chunk_of(x: np.ndarray, at: tuple[int, ...], chunk: tuple[int, ...]) -> np.ndarray:
    """One chunk, padded with sevens where the array ends before it."""
    padded = np.full(chunk, 7, x.dtype)
    part = x[tuple(slice(i * c, (i + 1) * c) for i, c in zip(at, chunk, strict=True))]
    padded[tuple(map(slice, part.shape))] = part
    return padded


@st.composite
def stored(draw) -> tuple[np.ndarray, tuple[int, ...], str]:
    shape = tuple(draw(st.lists(st.integers(1, 7), max_size=4)))
    chunk = tuple(draw(st.integers(1, n + 2)) for n in shape)
    x = np.arange(int(np.prod(shape)), dtype=np.int16).reshape(shape)
    return x, chunk, draw(st.sampled_from(("raw", "zstd")))


@settings(deadline=None)
@given(stored(), st.integers(1, 60), st.booleans())
def test_slabs_of_a_stored_array_make_the_array(case, limit, in_file):
    x, chunk, codec = case
    with tempfile.NamedTemporaryFile() as file:
        values, end = {}, 0
        counts = [range(-(-n // c)) for n, c in zip(x.shape, chunk, strict=True)]
        for at in itertools.product(*counts):
            data = chunk_of(x, at, chunk).tobytes()
            if codec == "zstd":
                data = zstandard.ZstdCompressor().compress(data)
            key = "w/" + (".".join(map(str, at)) or "0")
            file.write(data)
            values[key] = Extent(file.name, end, len(data)) if in_file else data
            end += len(data)
        file.flush()
        layout = Layout(x.shape, x.dtype, chunk, chunk, codec, False, "", ".")
        read = read_box(StoredArray("w", layout, values))
        for _ in range(2):  # the second time, a compressed chunk is begun anew
            for box in slabs(x.shape, limit):
                assert np.array_equal(read(box), x[tuple(slice(*r) for r in box)]), box


def test_damaged_chunks_are_noticed():
    x = np.arange(100, dtype=np.int32)
    whole = ((0, 100),)

    def read(codec, data: bytes):
        layout = Layout((100,), x.dtype, (100,), (100,), codec, False, "", ".")
        return read_box(StoredArray("w", layout, {"w/0": data}))(whole)

    packed = zstandard.ZstdCompressor().compress(x.tobytes())
    assert np.array_equal(read("zstd", packed), x)
    for codec, data, why in (
        ("raw", x.tobytes()[:-1], "has 399 bytes, not 400"),
        ("zstd", packed[:-9], "too few bytes"),
        ("zstd", b"1234" + packed, "cannot be decompressed"),
        ("zstd", zstandard.ZstdCompressor().compress(b"12"), "too few bytes"),
    ):
        with pytest.raises(CheckpointError, match=f"'w'.*{why}"):
            read(codec, data)


@st.composite
def sharded(draw) -> tuple[Array, Mesh]:
    """An array whose dimensions are split over some of the axes of a mesh."""
    mesh = Mesh({axis: draw(st.integers(1, 3)) for axis in "abc"})
    axes = draw(st.permutations("abc"))
    dims = draw(st.integers(0, 3))
    spec: list[list[str]] = [[] for _ in range(dims)]
    for axis in axes if dims else []:
        where = draw(st.integers(0, dims))
        if where < dims:
            spec[where].append(axis)
    fixed = tuple(map(tuple, spec))
    parts = mesh.parts(fixed)
    shape = tuple(p * draw(st.integers(1, 4)) for p in parts)
    dtype = draw(st.sampled_from((np.int8, np.int32, ml_dtypes.bfloat16)))
    return Array((("w", 2),), "jax.Array", shape, np.dtype(dtype), fixed, parts), mesh


@settings(deadline=None)
@given(sharded(), st.integers(1, 40), st.integers(0, 60))
def test_boxes_that_are_written_make_the_shards(case, limit, inline):
    array, mesh = case
    x = np.arange(np.prod(array.shape, dtype=int)).reshape(array.shape).astype(array.dtype)
    with tempfile.TemporaryDirectory() as folder:
        places = {}
        if array.chunk_nbytes > inline:
            for i, chunk in enumerate(array.chunks()):
                file = f"d/rank{mesh.owner(array.spec, chunk):05d}-00000"
                places[array.key(chunk)] = Extent(file, i * 4096, array.chunk_nbytes)
        with Writer(folder, places) as writer:
            for box in slabs(array.shape, limit):
                writer.put(array, box, x[tuple(slice(*r) for r in box)])
            values = writer.finish()
        for chunk in array.chunks():
            expected, value = chunk_of(x, chunk, array.chunk).tobytes(), values[array.key(chunk)]
            assert writer.checksums[array.key(chunk)] == xxhash.xxh3_128_hexdigest(expected)
            if isinstance(value, Extent):
                content = Path(folder, value.file).read_bytes()[value.offset :]
                assert content[: len(expected)] == expected
                assert len(content) >= 4096 and not any(content[len(expected) : 4096])
            else:
                assert value == expected


@settings(deadline=None)
@given(st.lists(sharded(), min_size=1, max_size=6), st.integers(1, 5))
def test_places_do_not_overlap(cases, pages):
    mesh = Mesh({"a": 3, "b": 3, "c": 3})
    arrays = []
    for i, (a, _) in enumerate(cases):
        parts = mesh.parts(a.spec)
        shape = tuple(700 * p for p in parts)
        arrays.append(Array(((f"w{i}", 2),), "jax.Array", shape, a.dtype, a.spec, parts))
    places = prepared.place(arrays, mesh, pages * 4096)
    small = {a.key(c) for a in arrays for c in a.chunks() if a.chunk_nbytes <= 1024}
    assert places.keys() | small == {a.key(c) for a in arrays for c in a.chunks()}
    assert not places.keys() & small
    by_file: dict[str, list[Extent]] = {}
    for place in places.values():
        assert place.offset % 4096 == 0
        by_file.setdefault(place.file, []).append(place)
    for inside in by_file.values():
        inside.sort(key=lambda e: e.offset)
        ends = [e.offset + prepared.padded(e.nbytes) for e in inside]
        assert [e.offset for e in inside] == [0, *ends[:-1]]
        assert len(inside) == 1 or inside[-1].offset + inside[-1].nbytes <= pages * 4096


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 9), min_size=2, max_size=4),
    st.data(),
    st.sampled_from((2, 64, 1 << 20)),
)
def test_fp8_in_blocks_is_fp8_of_the_whole(shape, data, block):
    """Whatever the dimension that scales are shared along, and however the blocks cut it."""
    contract = data.draw(st.integers(0, len(shape) - 1))
    x = np.random.default_rng(0).normal(size=shape).astype(ml_dtypes.bfloat16)
    tensor = Tensor((("w", 2),), x.shape, x.dtype, lambda box: x[tuple(slice(*r) for r in box)])
    model = Model("test", "nowhere", (tensor,), {}, None, {}, {})
    rules = Rules("test", (Rule(("w",), (), contract),))
    with tempfile.TemporaryDirectory() as folder, mock.patch.object(prepare, "BLOCK_BYTES", block):
        out = Path(folder, "out")
        prepare.prepare(model, out, mesh=Mesh({"tp": 1}), rules=rules, method="fp8")
        index = open_index(out)
        for name, expected in zip(("w", "w_scale"), quantize.quantize(x, contract), strict=True):
            found = read_box(index.array(name))(tuple((0, n) for n in expected.shape))
            assert (found.shape, found.dtype) == (expected.shape, expected.dtype)
            assert found.tobytes() == expected.tobytes()


@pytest.mark.parametrize("contract", [0, 1])
@pytest.mark.parametrize("dtype", [np.float32, np.float16, ml_dtypes.bfloat16, np.float64])
def test_quantised_numbers_are_the_nearest(dtype, contract):
    """Against float64, with every e4m3 number as a candidate; ties may fall either way."""
    x = (np.random.default_rng(1).standard_t(2, (48, 40)) * 1e-3).astype(dtype)
    x[3] = 0
    q, scale = quantize.quantize(x, contract)
    assert scale.shape == ((1, 40), (48, 1))[contract]
    levels = np.arange(256, dtype=np.uint8).view(ml_dtypes.float8_e4m3fn).astype(np.float64)
    levels = levels[np.isfinite(levels)]
    ratio = x.astype(np.float64) / scale.astype(np.float64)
    nearest = np.abs(ratio[..., None] - levels).min(-1)
    assert (np.abs(ratio - q.astype(np.float64)) <= nearest + 1e-4 * np.abs(ratio)).all()
    empty = ~x.any(axis=contract)
    assert (np.abs(q.astype(np.float32)).max(contract)[~empty] == 448).all()
    assert (scale.squeeze()[empty] == 1).all()


def test_what_is_not_finite_is_not_quantised():
    for bad in (np.inf, -np.inf, np.nan):
        x = np.ones((4, 4), np.float32)
        x[1, 2] = bad
        with pytest.raises(quantize.NotFiniteError):
            quantize.quantize(x, 1)
