"""The host engine on real files: whole, and damaged in every way a disk or a copy can."""

import os
import struct
import threading

import jax
import numpy as np
import pytest
import zstandard
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

from jaxgds.engines import Buffer
from jaxgds.engines.host import HostEngine
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray
from jaxgds.plan import Plan, make_plan
from jaxgds.zarr import Layout


ROWS, COLUMNS, CHUNK = 60, 500, (20, 500)


@pytest.fixture
def leaks_nothing():
    """Threads and file descriptors after the test are those before it."""

    def held():
        return {t.name for t in threading.enumerate()}, sorted(os.listdir("/proc/self/fd"))

    before = held()
    yield
    assert held() == before


def data(rows=ROWS, columns=COLUMNS) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 1000, (rows, columns), np.int32)


def store(folder, codec: str, array: np.ndarray, chunk=CHUNK) -> StoredArray:
    """Chunks one after the other in one file, with other bytes before, between and after."""
    layout = Layout(array.shape, array.dtype, chunk, chunk, codec, False, "", ".")  # type: ignore
    file, values, blob = str(folder / "data.bin"), {}, b"before"
    for i, j in np.ndindex(*(-(-n // c) for n, c in zip(array.shape, chunk, strict=True))):
        part = array[i * chunk[0] : (i + 1) * chunk[0], j * chunk[1] : (j + 1) * chunk[1]]
        padded = np.zeros(chunk, array.dtype)
        padded[: part.shape[0], : part.shape[1]] = part
        encoded = padded.tobytes()
        if codec == "zstd":
            encoded = zstandard.ZstdCompressor(level=1).compress(encoded)
        values[f"w/{i}.{j}"] = Extent(file, len(blob), len(encoded))
        blob += encoded + b"between"
    with open(file, "wb") as f:
        f.write(blob)
    return StoredArray("w", layout, values)


def read(plan: Plan, threads: int | None = None) -> list[np.ndarray]:
    """Runs the engine into numpy memory with guard bytes around it."""
    guard = 64
    memory = [
        np.full(4 * int(np.prod(d.shape)) + 2 * guard, 0xA5, np.uint8) for d in plan.destinations
    ]
    buffers = [
        Buffer(m.ctypes.data + guard, m.nbytes - 2 * guard, d.devices[0])
        for m, d in zip(memory, plan.destinations, strict=True)
    ]
    try:
        HostEngine(threads).read(lambda: plan.reads, buffers)
    finally:
        for m in memory:
            assert (m[:guard] == 0xA5).all() and (m[-guard:] == 0xA5).all(), "wrote outside"
    return [
        m[guard:-guard].view(np.int32).reshape(d.shape)
        for m, d in zip(memory, plan.destinations, strict=True)
    ]


def one() -> SingleDeviceSharding:
    return SingleDeviceSharding(jax.devices()[0])


def columns(n: int) -> NamedSharding:
    return NamedSharding(Mesh(np.array(jax.devices()[:n]), ("x",)), P(None, "x"))


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("threads", [1, 5, None])
@pytest.mark.parametrize("max_read", [100, 4096, 1 << 20])
@pytest.mark.parametrize("sharding", [one, lambda: columns(5)], ids=["whole", "columns"])
@pytest.mark.usefixtures("leaks_nothing")
def test_whole_files(tmp_path, codec, threads, max_read, sharding):
    plan = make_plan([(store(tmp_path, codec, data()), sharding())], max_read)
    for destination, got in zip(plan.destinations, read(plan, threads), strict=True):
        expected = data()[tuple(slice(a, b) for a, b in destination.box)]
        np.testing.assert_array_equal(got, expected)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_padded_edges_and_inline_bytes(tmp_path, codec):
    array = data(33, 17)
    stored = store(tmp_path, codec, array, (10, 8))
    with open(tmp_path / "data.bin", "rb") as f:
        blob = f.read()
    inline = {k: blob[v.offset : v.offset + v.nbytes] for k, v in stored._values.items()}  # type: ignore
    for values in (stored._values, inline):
        (got,) = read(make_plan([(StoredArray("w", stored.layout, values), one())], 64))
        np.testing.assert_array_equal(got, array)


def test_many_fetches_of_one_frame(tmp_path):
    """A compressed chunk several times as long as the engine's fetch size."""
    array = np.random.default_rng(0).integers(-(2**31), 2**31, (1000, 1100), np.int32)
    (got,) = read(make_plan([(store(tmp_path, "zstd", array, array.shape), one())]))
    np.testing.assert_array_equal(got, array)


def test_no_reads():
    HostEngine().read(list, [])


def fails(plan: Plan, *names: str) -> None:
    with pytest.raises(CheckpointError) as e:
        read(plan)
    for name in ("'w'", "data.bin", *names):
        assert name in str(e.value)


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("sharding", [one, lambda: columns(5)], ids=["whole", "columns"])
@pytest.mark.usefixtures("leaks_nothing")
def test_a_file_truncated_anywhere(tmp_path, codec, sharding):
    stored = store(tmp_path, codec, data())
    plan = make_plan([(stored, sharding())], 4096)
    last = stored.chunk((2, 0))
    assert isinstance(last, Extent)
    stop = last.offset + last.nbytes
    for size in [*range(0, stop, stop // 17), 1, 6, last.offset, stop - 1]:
        os.truncate(tmp_path / "data.bin", size)
        fails(plan, "restore another checkpoint")
        store(tmp_path, codec, data())


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.usefixtures("leaks_nothing")
def test_a_file_that_is_missing_or_a_directory(tmp_path, codec):
    plan = make_plan([(store(tmp_path, codec, data()), one())])
    os.remove(tmp_path / "data.bin")
    fails(plan, "No such file")
    os.mkdir(tmp_path / "data.bin")
    fails(plan, "Is a directory")


def with_chunk(tmp_path, encoded: bytes) -> Plan:
    """A plan for one zstd chunk of 30 000 bytes whose stored bytes are `encoded`."""
    layout = Layout((7500,), np.dtype(np.int32), (7500,), (7500,), "zstd", False, "", ".")
    (tmp_path / "data.bin").write_bytes(encoded + b"next")
    extent = Extent(str(tmp_path / "data.bin"), 0, len(encoded))
    return make_plan([(StoredArray("w", layout, {"w/0": extent}), one())])


def compress(content: bytes, **kwargs) -> bytes:
    return zstandard.ZstdCompressor(level=1, **kwargs).compress(content)


CONTENT = np.random.default_rng(0).integers(0, 50, 7500, np.int32).tobytes()
GOOD = compress(CONTENT)
SKIPPABLE = struct.pack("<II", 0x184D2A50, 4) + b"skip"


@pytest.mark.parametrize(
    "encoded",
    [
        GOOD,
        compress(CONTENT, write_checksum=True),
        compress(CONTENT, write_content_size=False),
        compress(CONTENT[:4000]) + compress(CONTENT[4000:]),
        SKIPPABLE + GOOD,
        GOOD + SKIPPABLE,
        GOOD + compress(b""),
    ],
    ids=["plain", "checksum", "no size", "two frames", "skip first", "skip last", "empty last"],
)
def test_valid_zstd_streams(tmp_path, encoded):
    (got,) = read(with_chunk(tmp_path, encoded))
    assert got.tobytes() == CONTENT


def flipped(encoded: bytes, at: int) -> bytes:
    return encoded[:at] + bytes([encoded[at] ^ 0xFF]) + encoded[at + 1 :]


@pytest.mark.parametrize(
    "encoded",
    [
        b"",
        b"garbage, not zstd",
        CONTENT,
        flipped(GOOD, 0),
        flipped(GOOD, 4),
        flipped(compress(CONTENT, write_checksum=True), 5000),
        GOOD[:-1],
        GOOD[: len(GOOD) // 2],
        compress(CONTENT[:-4]),
        compress(CONTENT + b"more"),
        compress(CONTENT + CONTENT),
        GOOD + GOOD,
        GOOD + b"\0",
        GOOD + b"trailing garbage",
        compress(b""),
    ],
)
@pytest.mark.usefixtures("leaks_nothing")
def test_damaged_zstd_streams(tmp_path, encoded):
    fails(with_chunk(tmp_path, encoded))


@pytest.mark.usefixtures("leaks_nothing")
def test_the_first_error_of_many_threads(tmp_path):
    """With every chunk damaged, one error is raised and the pool ends."""
    stored = store(tmp_path, "zstd", np.zeros((2000, 50), np.int32), (2, 50))
    plan = make_plan([(stored, one())])
    assert len(plan.reads) == 1000
    os.truncate(tmp_path / "data.bin", 3)
    fails(plan)
