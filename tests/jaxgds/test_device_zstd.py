"""Frames that GPUs decode: on a real one, or by zstd.cu as C++ and driver.c (test_stand_in.py)."""

import dataclasses
import types

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import stand_in
import zstandard
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from test_gpu_engines import GPUS, one, restored, stored

import jaxgds
from jaxgds.allocation import Allocation
from jaxgds.engines import PinnedEngine, cuda, device_zstd, gpu_frames, zstd_kernels
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray
from jaxgds.plan import make_plan


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not GPUS, reason="no GPU"),
    pytest.mark.skipif(
        bool(stand_in.LIBRARY) and not stand_in.KERNELS, reason="no C++ compiler for the kernels"
    ),
]
stand_ins = pytest.mark.skipif(not stand_in.LIBRARY, reason="fails on command: a stand-in only")


@pytest.fixture(autouse=True)
def decoding(monkeypatch):
    """All frames are for the GPU, in small pieces."""
    monkeypatch.setenv("JAXGDS_ZSTD", "gpu")
    monkeypatch.setattr(gpu_frames, "MIN_BYTES", 1)
    monkeypatch.setattr(gpu_frames, "MIN_RATIO", 0.0)
    monkeypatch.setattr(device_zstd, "PIECE", 128 << 10)


@pytest.fixture
def no_memory_is_kept():
    before = stand_in.held() if stand_in.LIBRARY else {}
    yield
    if stand_in.LIBRARY:
        after = stand_in.held()
        assert after["allocated"] == before["allocated"] and after["queued"] == 0


def weights(nbytes: int, seed: int = 0) -> bytes:
    x = np.random.default_rng(seed).standard_normal(nbytes // 2, np.float32) * 0.02
    return x.astype(jnp.bfloat16).tobytes().ljust(nbytes, b"\0")


def data(kind: str, nbytes: int) -> bytes:
    rng = np.random.default_rng(1)
    match kind:
        case "weights":
            return weights(nbytes)
        case "zeros":
            return bytes(nbytes)
        case "random":
            return rng.bytes(nbytes)
        case "repeated":  # a few long matches
            return (weights(70_000) * (nbytes // 70_000 + 1))[:nbytes]
        case "mixed":
            parts = [weights(nbytes // 4), bytes(nbytes // 4), rng.bytes(nbytes // 4)]
            return b"".join(parts).ljust(nbytes, b"-")
    raise AssertionError(kind)


def frames(folder, chunks: list[bytes], compressor=None) -> StoredArray:
    """An array of bytes whose chunks are one frame each."""
    rows = np.stack([np.frombuffer(chunk, np.uint8) for chunk in chunks])
    return stored(folder, rows, (1, rows.shape[1]), "zstd", compressor=compressor)


def told(engine: PinnedEngine) -> str:
    """The note, without what the GPUs' memory was, which is less than the goal of 256 MiB."""
    note, _, memory = engine.note.partition(", with ")
    assert not memory or 0 < int(memory.removesuffix(" MB of memory each")) < 268
    return note


def assert_restored(array: StoredArray, chunks: list[bytes], note: str) -> None:
    engine = PinnedEngine()
    ((_, content),) = restored(array, one(), engine)
    for i, chunk in enumerate(chunks):
        assert content[i].tobytes() == chunk, i
    assert told(engine) == note


@pytest.mark.parametrize("kind", ["weights", "zeros", "random", "repeated", "mixed"])
@pytest.mark.parametrize("count", [1, 5, 40])
def test_frames_of_all_kinds(tmp_path, no_memory_is_kept, kind, count):
    chunk = data(kind, 1 << 20 if count == 1 else 300_001)
    chunks = [chunk[i:] + chunk[:i] for i in range(count)]
    array = frames(tmp_path, chunks)
    assert_restored(array, chunks, f"{count} zstd frames decoded on GPUs")


@pytest.mark.parametrize("piece", [4 << 10, 64 << 10, 1 << 20, 4 << 20])
def test_pieces_of_all_sizes(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(device_zstd, "PIECE", piece)
    chunks = [weights(3_000_000, seed) for seed in range(2)]
    assert_restored(frames(tmp_path, chunks), chunks, "2 zstd frames decoded on GPUs")


def test_frames_of_all_lengths(tmp_path):
    """Lanes and groups that have nothing to do wait for the others."""
    chunks = [
        weights(length * 1000, i).ljust(900_000, b"\0")
        for i, length in enumerate([10, 900, 20, 5, 800, 1, 1, 500, 30, 2, 900, 7])
    ]
    assert_restored(frames(tmp_path, chunks), chunks, "12 zstd frames decoded on GPUs")


LEFT = {
    "a checksum": zstandard.ZstdCompressor(level=1, write_checksum=True),
    "no content size": zstandard.ZstdCompressor(level=1, write_content_size=False),
    "many matches": zstandard.ZstdCompressor(
        compression_params=zstandard.ZstdCompressionParameters.from_level(19, min_match=3)
    ),
}


@pytest.mark.parametrize("kind", ["a checksum", "many matches"])
def test_what_is_left_to_the_cpu(tmp_path, monkeypatch, no_memory_is_kept, kind):
    monkeypatch.setattr(device_zstd, "PIECE", 4 << 20)
    words = np.random.default_rng(0).integers(0, 1 << 30, (300, 7)).astype(np.uint8)
    text = words[np.random.default_rng(1).integers(0, 300, 100_000)].tobytes()
    chunks = [text, weights(700_000)]
    array = frames(tmp_path, chunks, LEFT[kind])
    engine = PinnedEngine()
    ((_, content),) = restored(array, one(), engine)
    assert [x.tobytes() for x in content] == chunks
    assert "left to the CPU" in engine.note


def test_a_frame_that_does_not_say_its_size(tmp_path):
    chunks = [weights(700_000)]
    array = frames(tmp_path, chunks, LEFT["no content size"])
    assert_restored(array, chunks, "1 zstd frames decoded on GPUs")


@pytest.mark.skipif(len(GPUS) < 2, reason="one GPU")
def test_two_gpus_of_which_one_helps_the_other(tmp_path):
    """One that has decoded its frames takes raw reads of the other."""
    (tmp_path / "raw").mkdir()
    chunks = [weights(300_000, i) for i in range(6)]
    raw = np.random.default_rng(0).integers(0, 255, (64, 200_000), np.uint8)
    a = frames(tmp_path, chunks)
    b = stored(tmp_path / "raw", raw, (1, 200_000))
    b = dataclasses.replace(b, name="raw", _values={f"raw{k[1:]}": v for k, v in b._values.items()})
    pairs = [(a, SingleDeviceSharding(GPUS[0])), (b, SingleDeviceSharding(GPUS[1]))]
    plan = make_plan(pairs)
    types = [np.dtype("uint8")] * len(plan.destinations)
    allocation, engine = Allocation(plan.destinations, types), PinnedEngine()
    allocation.start()
    engine.read(lambda: plan.reads, allocation.buffers)
    first, second = map(np.asarray, allocation.arrays())
    assert [x.tobytes() for x in first] == chunks
    np.testing.assert_array_equal(second, raw)
    assert told(engine) == "6 zstd frames decoded on GPUs"


@pytest.mark.skipif(len(GPUS) < 2, reason="one GPU: no column shards")
def test_what_is_not_one_run_of_bytes_is_the_cpus(tmp_path):
    x = np.frombuffer(weights(4 << 20), np.uint16).reshape(1024, 2048)
    array = stored(tmp_path, x, (512, 2048), "zstd")
    mesh = Mesh(np.array(GPUS[:2]), "x")
    engine = PinnedEngine()
    for box, content in restored(array, NamedSharding(mesh, P(None, "x")), engine):
        np.testing.assert_array_equal(content, x[tuple(slice(a, b) for a, b in box)])
    assert engine.note == ""
    for box, content in restored(array, NamedSharding(mesh, P("x")), engine):
        np.testing.assert_array_equal(content, x[tuple(slice(a, b) for a, b in box)])
    assert told(engine) == "2 zstd frames decoded on GPUs"


@pytest.mark.parametrize("at", [0.0, 0.3, 0.9])
def test_a_damaged_frame(tmp_path, no_memory_is_kept, at):
    """It is the CPU that says so; a wrong bit of a literal it does not find either."""
    chunks = [weights(700_000, i) for i in range(3)]
    array = frames(tmp_path, chunks)
    where = array.chunk((1, 0))
    assert isinstance(where, Extent)
    blob = bytearray((tmp_path / "data.bin").read_bytes())
    blob[where.offset + int(at * where.nbytes)] ^= 0xFF
    (tmp_path / "data.bin").write_bytes(blob)
    encoded = bytes(blob[where.offset : where.offset + where.nbytes])
    try:
        expected = zstandard.ZstdDecompressor().decompress(encoded)
    except zstandard.ZstdError:
        with pytest.raises(CheckpointError, match=r"data.bin.*'w'.*damaged zstd data"):
            restored(array, one(), PinnedEngine())
    else:
        ((_, content),) = restored(array, one(), PinnedEngine())
        assert [x.tobytes() for x in content] == [chunks[0], expected, chunks[2]]


def test_a_file_that_is_cut_off(tmp_path, no_memory_is_kept):
    array = frames(tmp_path, [weights(700_000, i) for i in range(3)])
    size = (tmp_path / "data.bin").stat().st_size
    with open(tmp_path / "data.bin", "r+b") as file:
        file.truncate(size - 10_000)
    with pytest.raises(CheckpointError, match="data.bin"):
        restored(array, one(), PinnedEngine())


@stand_ins
@pytest.mark.parametrize(
    ("call", "after", "times"),
    [
        ("cuMemAlloc_v2", 0, 1),
        ("cuModuleLoadData", 0, 2),
        ("cuModuleGetFunction", 3, 9),
        ("cuMemHostRegister_v2", 0, 1),
        ("cuStreamCreate", 1, 1),
        ("cuEventCreate", 4, 1),
    ],
)
def test_a_gpu_that_cannot(tmp_path, no_memory_is_kept, call, after, times):
    """Too little memory, or a driver that does not take the kernels; nothing is left then."""
    zstd_kernels.kernels.cache_clear()
    chunks = [weights(700_000, i) for i in range(3)]
    array = frames(tmp_path, chunks)
    engine = PinnedEngine()
    restored(array, one(), engine)  # the ring is pinned
    zstd_kernels.kernels.cache_clear()
    before = stand_in.held()
    stand_in.fail(call, after, times)
    ((_, content),) = restored(array, one(), engine)
    assert stand_in.driver().stand_in_failed() > 0
    assert {**stand_in.held(), "events": 0} == {**before, "events": 0}  # a slot's comes late
    assert [x.tobytes() for x in content] == chunks
    assert engine.note == f"3 zstd frames left to the CPU: {call}: CUDA_ERROR_OUT_OF_MEMORY " + (
        "(out of memory)"
    )


def test_a_gpu_that_decodes_to_something_else(tmp_path, monkeypatch, no_memory_is_kept):
    """It is not trusted with frames."""

    class Other:
        def __init__(self, level: int):
            self.compressor = zstandard.ZstdCompressor(level=level)

        def compress(self, data: bytes) -> bytes:
            return self.compressor.compress(data[1:] + data[:1])

    chunks = [weights(700_000, i) for i in range(3)]
    array, engine = frames(tmp_path, chunks), PinnedEngine()
    monkeypatch.setattr(device_zstd, "_proven", set())
    monkeypatch.setattr(device_zstd, "zstandard", types.SimpleNamespace(ZstdCompressor=Other))
    ((_, content),) = restored(array, one(), engine)
    assert [x.tobytes() for x in content] == chunks
    assert engine.note.startswith("3 zstd frames left to the CPU: a trial frame was not decoded")
    assert not device_zstd._proven


@stand_ins
@pytest.mark.parametrize("call", ["cuLaunchKernel", "cuStreamWaitEvent", "cuMemcpy3DAsync_v2"])
@pytest.mark.parametrize("after", [0, 9])
def test_a_launch_that_fails(tmp_path, no_memory_is_kept, call, after):
    array = frames(tmp_path, [weights(700_000, i) for i in range(40)])
    stand_in.fail(call, after, 1)
    with pytest.raises(cuda.CudaError, match=call):
        restored(array, one(), PinnedEngine())
    stand_in.fail("")
    restored(array, one(), PinnedEngine())


def test_a_checkpoint_of_orbax(tmp_path):
    """Arrays of all kinds, zstd and raw and inline, on one GPU and over several."""
    rng = np.random.default_rng(0)
    tree = {
        "w": np.frombuffer(weights(2 << 20), jnp.bfloat16).reshape(1024, 1024),
        "f32": rng.standard_normal((512, 600)).astype(np.float32),
        "f8": rng.standard_normal((512, 600)).astype(jnp.float8_e4m3fn),
        "zeros": np.zeros((512, 512), np.int32),
        "small": np.arange(7),
        "scalar": np.float32(3),
    }
    path = oracle.save(tmp_path / "c", jax.tree.map(jnp.asarray, tree))
    for devices in {1, len(GPUS)}:
        where = NamedSharding(Mesh(np.array(GPUS[:devices]), "x"), P())
        target = jax.tree.map(
            lambda x, where=where: jax.ShapeDtypeStruct(
                np.shape(x), jnp.asarray(x).dtype, sharding=where
            ),
            tree,
        )
        for name, x in jaxgds.load(path, target, strict=True).items():
            assert oracle.raw(x) == np.asarray(tree[name], x.dtype).tobytes(), name
        assert "zstd frames decoded on GPUs" in oracle.last_report().note


def test_the_environment_variable(tmp_path, monkeypatch):
    chunks = [weights(700_000)]
    array = frames(tmp_path, chunks)
    monkeypatch.setenv("JAXGDS_ZSTD", "both")
    with pytest.raises(ValueError, match="JAXGDS_ZSTD='both': expected auto, cpu or gpu"):
        restored(array, one(), PinnedEngine())
    for text in ("cpu", "", "auto"):  # these are few bytes
        monkeypatch.setenv("JAXGDS_ZSTD", text)
        assert_restored(array, chunks, "")


def test_without_the_environment_variable(tmp_path, monkeypatch):
    """A GPU decodes what is worth it."""
    monkeypatch.delenv("JAXGDS_ZSTD")
    chunks = [weights(700_000, i) for i in range(3)]
    array = frames(tmp_path, chunks)
    for least, note in [(2_100_001, ""), (2_100_000, "3 zstd frames decoded on GPUs")]:
        monkeypatch.setattr(gpu_frames, "MIN_TOTAL", least)
        assert_restored(array, chunks, note)


def test_a_gpu_without_machine_code(tmp_path, monkeypatch):
    """The driver compiles PTX for it."""
    monkeypatch.setattr(cuda, "compute_capability", lambda ordinal: (99, 0))
    zstd_kernels.kernels.cache_clear()
    chunks = [weights(700_000)]
    assert_restored(frames(tmp_path, chunks), chunks, "1 zstd frames decoded on GPUs")
    zstd_kernels.kernels.cache_clear()


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    level=st.sampled_from([-5, 1, 3]),
    runs=st.lists(
        st.tuples(st.sampled_from(["weights", "zeros", "random", "repeated"]), st.integers(1, 90)),
        min_size=1,
        max_size=5,
    ),
    piece=st.sampled_from([64, 4096, 64 << 10]),
    count=st.integers(1, 4),
)
def test_any_data(tmp_path_factory, monkeypatch, level, runs, piece, count):
    monkeypatch.setattr(device_zstd, "PIECE", piece)
    whole = b"".join(data(kind, length * 1000) for kind, length in runs)
    chunks = [whole[i:] + whole[:i] for i in range(count)]
    folder = tmp_path_factory.mktemp("frames")
    array = frames(folder, chunks, zstandard.ZstdCompressor(level=level))
    ((_, content),) = restored(array, one(), PinnedEngine())
    assert [x.tobytes() for x in content] == chunks
