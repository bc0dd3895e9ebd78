"""The plan, carried out by numpy on made-up chunk bytes, must rebuild the array."""

import math

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxgds import plan as plan_lib
from jaxgds import scatter as scatter_lib
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray
from jaxgds.plan import Plan, make_plan
from jaxgds.scatter import Piece, slabs
from jaxgds.zarr import Layout


DTYPES = [np.uint8, np.int16, np.float32, np.complex64, np.complex128]
MIN_RUNS = [1, 16, scatter_lib.MIN_RUN]


def fake(name, data: np.ndarray, chunk, codec, gap=3, inline=False) -> tuple[StoredArray, dict]:
    """`data` cut into chunks, laid out in one file with gaps; and chunk bytes by file offset.

    The made-up zstd chunks are as long as their content; nothing here decodes them.
    """
    layout = Layout(data.shape, data.dtype, chunk, chunk, codec, False, "", ".")
    grid = [-(-n // c) for n, c in zip(data.shape, chunk, strict=True)]
    values, chunks, at = {}, {}, 0
    for index in np.ndindex(*grid):
        padded = np.full(chunk, 0x7F, data.dtype)
        box = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
        part = data[box]
        padded[tuple(map(slice, part.shape))] = part
        at += gap
        chunks[at] = padded.tobytes()
        extent = Extent(f"{name}.bin", at, padded.nbytes)
        values[f"{name}/{layout.key(index)}"] = padded.tobytes() if inline else extent
        at += padded.nbytes
    return StoredArray(name, layout, values), chunks


def carry_out(plan: Plan, files: dict[str, dict], itemsize: int):
    """The destinations' bytes and how often each was written; how often each file byte was read."""
    bytes_of = [math.prod(d.shape) * itemsize for d in plan.destinations]
    out = [np.zeros(n, np.uint8) for n in bytes_of]
    written = [np.zeros(n, np.int32) for n in bytes_of]
    read_count = {
        file: {at: np.zeros(len(data), np.int32) for at, data in chunks.items()}
        for file, chunks in files.items()
    }
    for read in plan.reads:
        if isinstance(read.source, bytes):
            data = read.source
        else:
            chunks = files[read.source.file]
            at = max(start for start in chunks if start <= read.source.offset)
            first, last = read.source.offset - at, read.source.offset - at + read.source.nbytes
            assert last <= len(chunks[at]), "a read outside its chunk"
            assert read.codec == "raw" or (first == 0 and last == len(chunks[at]))
            data = chunks[at][first:last]
            read_count[read.source.file][at][first:last] += 1
        assert sum(s.nbytes for s in read.segments) == len(data)
        start = 0
        for segment in read.segments:
            source = np.frombuffer(data[start : start + segment.nbytes], np.uint8)
            start += segment.nbytes
            for piece in segment.pieces:
                assert piece.shape[-1:] and piece.src_strides[-1] == piece.dst_strides[-1] == 1
                src, dst = places(piece)
                assert 0 <= src.min() and src.max() < segment.nbytes
                assert 0 <= dst.min() and dst.max() < bytes_of[piece.destination]
                out[piece.destination][dst] = source[src]
                np.add.at(written[piece.destination], dst, 1)
    return out, written, read_count


def places(piece: Piece) -> tuple[np.ndarray, np.ndarray]:
    """Source and destination byte numbers of a piece."""
    src, dst = np.array(piece.src_offset), np.array(piece.dst_offset)
    for n, s, d in zip(piece.shape, piece.src_strides, piece.dst_strides, strict=True):
        src = src[..., None] + np.arange(n) * s
        dst = dst[..., None] + np.arange(n) * d
    return src.ravel(), dst.ravel()


@st.composite
def shardings(draw, rank: int):
    """Meshes over some of the 8 devices, in any order, and specs over some of their axes."""
    shape = draw(st.sampled_from([(1,), (2,), (3,), (8,), (2, 2), (4, 2), (2, 4), (2, 2, 2)]))
    devices = draw(st.permutations(jax.devices()))[: math.prod(shape)]
    names = ["x", "y", "z"][: len(shape)]
    mesh = Mesh(np.array(devices).reshape(shape), names)
    free = draw(st.permutations(names))
    spec: list = []
    for _ in range(rank):
        n = draw(st.integers(0, min(2, len(free))))
        used, free = free[:n], free[n:]
        spec.append(tuple(used) if n else None)
    return NamedSharding(mesh, P(*spec)), spec


@st.composite
def cases(draw):
    rank = draw(st.integers(0, 4))
    sharding, spec = draw(shardings(rank))
    shape, chunk = [], []
    for names in spec:
        parts = math.prod(sharding.mesh.shape[name] for name in names or ())
        n = parts * draw(st.integers(1, 4 if parts > 1 else 9))
        shape.append(n)
        chunk.append(draw(st.integers(1, n + 2)))
    return tuple(shape), tuple(chunk), sharding


@settings(max_examples=300, deadline=None)
@given(
    cases(),
    st.sampled_from(DTYPES),
    st.sampled_from(["raw", "zstd"]),
    st.sampled_from([1, 3, 7, 16, 100, plan_lib.MAX_READ]),
    st.sampled_from(MIN_RUNS),
    st.booleans(),
)
def test_a_plan_rebuilds_the_array(case, dtype, codec, max_read, min_run, inline):
    shape, chunk, sharding = case
    itemsize = np.dtype(dtype).itemsize
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, math.prod(shape) * itemsize, np.uint8).view(dtype).reshape(shape)
    stored, chunks = fake("w", data, chunk, codec, inline=inline)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scatter_lib, "MIN_RUN", min_run)
        plan = make_plan([(stored, sharding)], max_read)
    out, written, read_count = carry_out(plan, {"w.bin": chunks}, itemsize)

    # Each distinct shard is one destination, with all of its replicas.
    indices = sharding.addressable_devices_indices_map(shape)
    assert sorted(d.id for t in plan.destinations for d in t.devices) == sorted(
        d.id for d in indices
    )
    assert len({t.box for t in plan.destinations}) == len(plan.destinations)
    for t, got, count in zip(plan.destinations, out, written, strict=True):
        for device in t.devices:
            index = indices[device]
            assert index is not None
            assert got.tobytes() == data[index].tobytes()
        assert (count == 1).all(), "each needed byte is delivered exactly once"

    for read in plan.reads:
        assert any(segment.pieces for segment in read.segments), "a read that nobody needs"
        for segment in read.segments:
            direct = len(segment.pieces) == 1 and segment.pieces[0].nbytes == segment.nbytes
            assert segment.nbytes <= max(max_read, itemsize) or (direct and codec == "zstd")
    if not inline:
        starts = [read.source.offset for read in plan.reads if isinstance(read.source, Extent)]
        assert starts == sorted(starts), "reads are in file order"
        for count in read_count["w.bin"].values():
            assert count.max(initial=0) <= 1, "no byte is read twice"
    assert plan.source_nbytes == sum(read.source_nbytes for read in plan.reads)
    if codec == "raw":
        check_over_read(plan, min_run)


def check_over_read(plan: Plan, min_run: int) -> None:
    """Bytes nobody needs are read only between runs shorter than MIN_RUN, never at an end."""
    for read in plan.reads:
        (segment,) = read.segments
        needed = np.zeros(segment.nbytes, bool)
        for piece in segment.pieces:
            needed[places(piece)[0]] = True
        assert needed[0] and needed[-1]
        if not needed.all():
            assert min(piece.shape[-1] for piece in segment.pieces) < min_run


@pytest.mark.parametrize("spec", [P("x"), P(None, "x"), P()], ids=["rows", "columns", "replicated"])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_restoring_as_saved_needs_no_scatter(spec, codec):
    """A chunk that is a shard is one contiguous piece, read straight to where it belongs."""
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, spec)
    data = np.arange(64 * 32, dtype=np.float32).reshape(64, 32)
    stored, _ = fake("w", data, sharding.shard_shape(data.shape), codec)
    plan = make_plan([(stored, sharding)])
    assert len(plan.reads) == len(plan.destinations) == (1 if spec == P() else 4)
    for read in plan.reads:
        (segment,) = read.segments
        (piece,) = segment.pieces
        assert piece.contiguous and piece.nbytes == segment.nbytes
    assert plan.source_nbytes == data.nbytes


def test_long_columns_are_read_alone_and_short_ones_together():
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    only = SingleDeviceSharding(jax.devices()[0])
    for columns, alone in ((1 << 17, True), (1 << 10, False)):
        data = np.zeros((4, columns), np.uint8)
        stored, _ = fake("w", data, data.shape, "raw")
        halves = make_plan([(stored, NamedSharding(mesh, P(None, "x")))])
        assert len(halves.reads) == (8 if alone else 1)
        assert halves.source_nbytes == data.nbytes
        assert len(make_plan([(stored, only)]).reads) == 1


def test_several_arrays_share_one_plan_in_file_order():
    sharding = SingleDeviceSharding(jax.devices()[0])
    rng = np.random.default_rng(0)
    datas = {name: rng.normal(size=(6, 4)) for name in ("b", "a", "c")}
    fakes = {name: fake(name, data, (4, 3), "raw") for name, data in datas.items()}
    plan = make_plan([(stored, sharding) for stored, _ in fakes.values()], 32)
    assert [d.array for d in plan.destinations] == ["b", "a", "c"]
    files = [r.source.file for r in plan.reads if isinstance(r.source, Extent)]
    assert files == sorted(files) and len(set(files)) == 3
    out, _, _ = carry_out(plan, {f"{n}.bin": chunks for n, (_, chunks) in fakes.items()}, 8)
    for data, got in zip(datas.values(), out, strict=True):
        assert got.tobytes() == data.tobytes()


def test_chunks_outside_the_wanted_shards_are_not_read():
    """One process of a larger mesh: only what its devices hold."""
    data = np.zeros((8, 16), np.float32)
    stored, _ = fake("w", data, (1, 16), "zstd")
    mesh = jax.make_mesh((4,), ("x",), devices=jax.devices()[:4])
    sharding = NamedSharding(mesh, P("x"))

    class FirstHalf(NamedSharding):
        def addressable_devices_indices_map(self, global_shape):
            both = super().addressable_devices_indices_map(global_shape)
            return {d: index for d, index in both.items() if d.id < 2}

    half = FirstHalf(sharding.mesh, sharding.spec)
    assert make_plan([(stored, half)]).source_nbytes == data.nbytes // 2


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_raw_chunk_of_the_wrong_size(difference):
    data = np.zeros((4, 4), np.float32)
    stored, _ = fake("w", data, (4, 4), "raw")
    values = {"w/0.0": Extent("w.bin", 0, data.nbytes + difference)}
    broken = StoredArray("w", stored.layout, values)
    with pytest.raises(CheckpointError, match="'w'.*w.bin.*64 bytes"):
        make_plan([(broken, SingleDeviceSharding(jax.devices()[0]))])


def test_a_sharding_that_does_not_divide_the_shape():
    stored, _ = fake("w", np.zeros((3, 4), np.float32), (3, 4), "raw")
    mesh = jax.make_mesh((2,), ("x",), devices=jax.devices()[:2])
    with pytest.raises(ValueError, match="divi"):
        make_plan([(stored, NamedSharding(mesh, P("x")))])


@given(
    st.lists(st.integers(1, 6), max_size=4).map(tuple),
    st.integers(1, 100),
)
def test_slabs_tile_the_array_in_order(shape, limit):
    order = np.arange(math.prod(shape)).reshape(shape)
    seen = 0
    for slab in slabs(shape, limit):
        inside = order[tuple(slice(a, b) for a, b in slab)].ravel()
        assert 0 < len(inside) <= limit
        assert (inside == np.arange(seen, seen + len(inside))).all()
        seen += len(inside)
    assert seen == math.prod(shape)
