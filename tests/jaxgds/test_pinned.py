"""The pinned engine, all of it but the driver: run by test_stand_in.py, with CPU devices as GPUs.

Most of it fills numpy arrays, which need no program of XLA: what is compared is every byte that
the engine wrote, and that it wrote no others.
"""

import gc
import gzip
import os
import re
import signal
import threading
import time
from collections.abc import Sequence

import jax
import numpy as np
import oracle
import pytest
import stand_in
from faulty_process import fault, shim
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, Sharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from safetensors.numpy import save_file
from test_gpu_engines import numbers, stored

import jaxgds
from jaxgds.engines import Buffer, PinnedEngine, cuda
from jaxgds.engines.cuda import CudaError
from jaxgds.engines.pinned_memory import Pinned
from jaxgds.engines.posix import BLOCK
from jaxgds.engines.ring import READ_BYTES, SLOT_BYTES, Ring
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray
from jaxgds.plan import make_plan
from jaxgds.scatter import MAX_STAGED
from jaxgds.zarr import Layout


pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not stand_in.LIBRARY, reason="run by test_stand_in.py"),
]
MESH = Mesh(np.array(jax.devices("cpu")[:8]).reshape(4, 2), ("a", "b"))
ONE = SingleDeviceSharding(jax.devices("cpu")[0])
EDGE = 64  # bytes around each destination that nobody may write
SMALL = (300, 700)


def sharded(*axes) -> NamedSharding:
    return NamedSharding(MESH, P(*axes))


class Memory:
    """Destinations in host memory, for arrays with their shardings."""

    def __init__(self, pairs: Sequence[tuple[StoredArray, Sharding]]):
        self.plan = make_plan(pairs)
        self._dtypes = {array.name: array.layout.dtype for array, _ in pairs}
        self._made = []
        for d in self.plan.destinations:
            nbytes = int(np.prod(d.shape)) * self._dtypes[d.array].itemsize
            self._made.append(np.full(nbytes + 2 * EDGE, 0xA5, np.uint8))
        self.buffers = [
            Buffer(made.ctypes.data + EDGE, made.nbytes - 2 * EDGE, d.devices[0])
            for d, made in zip(self.plan.destinations, self._made, strict=True)
        ]

    def read(self, engine: PinnedEngine) -> None:
        engine.read(lambda: self.plan.reads, self.buffers)

    def assert_holds(self, **arrays: np.ndarray) -> None:
        for destination, made in zip(self.plan.destinations, self._made, strict=True):
            want = arrays[destination.array][tuple(slice(a, b) for a, b in destination.box)]
            assert made[EDGE:-EDGE].tobytes() == want.tobytes(), destination
            assert (made[:EDGE] == 0xA5).all() and (made[-EDGE:] == 0xA5).all(), destination


def assert_restored(
    array: StoredArray,
    data: np.ndarray,
    sharding: Sharding = ONE,
    engine: PinnedEngine | None = None,
) -> None:
    memory = Memory([(array, sharding)])
    memory.read(engine or PinnedEngine())
    memory.assert_holds(w=data)


@pytest.fixture(scope="module", autouse=True)
def nothing_older():
    """What is there before is not looked at by each collection of garbage, which takes long."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def ring():
    """One of few slots. Nothing is left of it, whatever the test does, nor of the test itself."""

    def held():
        gc.collect()
        threads = sorted(t.name for t in threading.enumerate())
        return stand_in.held(), threads, sorted(os.listdir("/proc/self/fd"))

    PinnedEngine()
    before = held()
    ring = Ring(1, 2)
    yield ring
    fault("none")
    stand_in.fail("")
    for thread in threading.enumerate():
        if thread.name == "jaxgds":
            thread.join(10)
    queued = stand_in.held()["queued"]
    ring.close()
    assert held() == before and queued == 0


LARGE = (8, 800_000)  # rows of 3.2 MB
SHARDINGS = {
    "one": ONE,
    "rows": sharded("a"),
    "columns": sharded(None, "a"),
    "both": sharded("b", "a"),
    "replicated": sharded(),
    "all rows": sharded(("a", "b")),
}


@pytest.mark.parametrize("sharding", SHARDINGS)
@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("chunk", [(512, 512), (64, 4096), (512, 64)])
def test_onto_eight_gpus(tmp_path, ring, chunk, codec, sharding):
    """Chunks that are scattered over several, and slots whose copies are on several."""
    data = numbers(512, 4096)
    array = stored(tmp_path, data, chunk, codec)
    for _ in range(2):
        assert_restored(array, data, SHARDINGS[sharding], PinnedEngine(ring))


@pytest.mark.parametrize("cold", [False, True])
@pytest.mark.parametrize("gap", [0, 13, BLOCK - 1, BLOCK])
def test_reads_of_any_length(tmp_path, ring, gap, cold):
    """Around a block, a read, and a slot of two; the last one ends with the file."""
    ends = [n + d for n in (BLOCK, READ_BYTES, SLOT_BYTES) for d in (-1, 0, 1)]
    arrays, want, blob = [], {}, b"x" * gap
    file = str(tmp_path / "data.bin")
    for i, nbytes in enumerate([1, 3 * SLOT_BYTES + 1, *ends]):
        data = np.random.default_rng(i).integers(0, 256, nbytes, np.uint8)
        layout = Layout((nbytes,), data.dtype, (nbytes,), (nbytes,), "raw", False, "", ".")
        arrays.append(StoredArray(f"w{i}", layout, {f"w{i}/0": Extent(file, len(blob), nbytes)}))
        want[f"w{i}"] = data
        blob += data.tobytes() + (b"x" * gap if i < len(ends) + 1 else b"")
    with open(file, "wb") as f:
        f.write(blob)
        f.flush()
        os.fsync(f.fileno())
        if cold:
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    memory = Memory([(array, ONE) for array in arrays])
    memory.read(PinnedEngine(ring))
    memory.assert_holds(**want)


@settings(deadline=None, max_examples=40)
@given(
    shape=st.lists(st.integers(1, 3).map(lambda n: 4 * n), min_size=1, max_size=4),
    cut=st.lists(st.sampled_from([1, 2, 4]), min_size=4, max_size=4),
    axes=st.sampled_from([(), ("a",), (None, "a"), ("a", "b"), (None, "b", "a"), (("a", "b"),)]),
    dtype=st.sampled_from([np.uint8, np.int16, np.complex128]),
    codecs=st.lists(st.sampled_from(["raw", "zstd", "inline"]), min_size=1, max_size=3),
)
def test_several_arrays_of_any_kind(tmp_path_factory, shape, cut, axes, dtype, codecs):
    """Together in one restore: of files, compressed, and held by the metadata."""
    chunk = tuple(n // c for n, c in zip(shape, cut, strict=False))
    axes = axes[: len(shape)]
    if any(a == ("a", "b") and n % 8 for a, n in zip(axes, shape, strict=False)):
        axes = ()
    arrays, want = [], {}
    for i, codec in enumerate(codecs):
        data = numbers(*shape, dtype=dtype) + np.array(i, dtype)
        folder = tmp_path_factory.mktemp("any")
        array = stored(folder, data, chunk, "zstd" if codec == "zstd" else "raw")
        values = dict(array._values)
        if codec == "inline":
            values = {key: oracle.content(source) for key, source in values.items()}
        values = {f"w{i}{key[1:]}": source for key, source in values.items()}
        arrays.append(StoredArray(f"w{i}", array.layout, values))
        want[f"w{i}"] = data
    memory = Memory([(array, sharded(*axes)) for array in arrays])
    memory.read(PinnedEngine())
    memory.assert_holds(**want)


def test_nothing_to_read():
    engine = PinnedEngine()
    engine.read(lambda: [], [])
    engine.read(lambda: [], [Buffer(0, 0, jax.devices()[0])])
    assert engine.note == ""


def test_arrays_without_elements(tmp_path):
    tree = {"none": np.zeros((0, 4), np.float32), "some": numbers(40, 8)}
    save_file(tree, tmp_path / "m.safetensors")
    got = jaxgds.load(tmp_path / "m.safetensors")
    assert oracle.last_report().path != "host"
    for name, x in tree.items():
        np.testing.assert_array_equal(got[name], x)


# Files


def in_many_files(folder, count: int) -> tuple[StoredArray, np.ndarray]:
    data = numbers(count, 1000)
    whole = stored(folder, data, (1, 1000))
    values = {}
    for i in range(count):
        with open(folder / f"{i}", "wb") as f:
            f.write(oracle.content(whole._values[f"w/{i}.0"]))
        values[f"w/{i}.0"] = Extent(str(folder / f"{i}"), 0, 4000)
    return StoredArray("w", whole.layout, values), data


@pytest.fixture
def few_files():
    """Allows the process so many more files than it has open now."""
    import resource

    limits = resource.getrlimit(resource.RLIMIT_NOFILE)

    def allow(count: int) -> None:
        most = max(map(int, os.listdir("/proc/self/fd"))) + count
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))

    yield allow
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("sharding", ["one", "all rows"])
def test_a_file_for_each_chunk(tmp_path, ring, few_files, sharding):
    """More of them than the process may have open."""
    array, data = in_many_files(tmp_path, 304)
    few_files(60)
    assert_restored(array, data, SHARDINGS[sharding], PinnedEngine(ring))


@pytest.mark.parametrize("sharding", ["one", "all rows"])
def test_no_descriptor_for_a_request(tmp_path, ring, few_files, sharding):
    """The file can be opened, but that is all: its reads are plain ones, and the report says so.

    Requests that read the same range before do not pass for ones that have read it now.
    """
    before = numbers(*LARGE)
    array = stored(tmp_path, before, (1, LARGE[1]))
    assert_restored(array, before, SHARDINGS[sharding], PinnedEngine(ring))
    data = before + 1
    array = stored(tmp_path, data, (1, LARGE[1]))
    few_files(8)
    others = []
    with pytest.raises(OSError, match="Too many open files"):
        while True:
            others.append(os.open(os.devnull, os.O_RDONLY))
    os.close(others.pop())
    engine = PinnedEngine(ring)
    try:
        assert_restored(array, data, SHARDINGS[sharding], engine)
    finally:
        for fd in others:
            os.close(fd)
    assert "waited for one by one: [Errno 24]" in engine.note


def shorter(file) -> None:
    os.truncate(file, file.stat().st_size // 2)


def a_directory(file) -> None:
    file.unlink()
    file.mkdir()


def a_link_to_itself(file) -> None:
    file.unlink()
    file.symlink_to(file)


CHANGES = {
    shorter: "bytes are missing",
    os.unlink: "cannot be read: .*No such file",
    a_directory: "cannot be read: .*Is a directory",
    a_link_to_itself: "cannot be read: .*symbolic links",
}


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("sharding", ["one", "columns"])
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_file_that_changes(tmp_path, ring, change, sharding, codec):
    """After the plan was made; what other files hold is of no use then."""
    data = numbers(2000, 2000)
    array = stored(tmp_path, data, (500, 2000), codec)
    file = tmp_path / "data.bin"
    content = file.read_bytes()
    memory = Memory([(array, SHARDINGS[sharding])])
    change(file)
    with pytest.raises(CheckpointError, match=rf"data\.bin.*'w'.*({CHANGES[change]})"):
        memory.read(PinnedEngine(ring))
    file.rmdir() if file.is_dir() else file.unlink(missing_ok=True)
    file.write_bytes(content)
    assert_restored(array, data, SHARDINGS[sharding], PinnedEngine(ring))


FAULTS = {
    "none": "",
    "short": "",
    "EINTR": "",
    "EIO": "Input/output error",
    "end": "bytes are missing",
    "EACCES": "Permission denied",
}


@pytest.mark.parametrize(
    ("codec", "sharding", "shape"),
    [("raw", "one", (2, 50_000)), ("zstd", "one", (2, 50_000)), ("raw", "all rows", LARGE)],
)
@pytest.mark.parametrize("kind", FAULTS)
def test_a_faulty_disk(tmp_path, ring, kind, codec, sharding, shape):
    data = numbers(*shape)
    array = stored(tmp_path, data, (1, shape[1]), codec)
    fault(kind, "data.bin")
    memory = Memory([(array, SHARDINGS[sharding])])
    if FAULTS[kind]:
        with pytest.raises(CheckpointError, match=rf"data\.bin.*'w'.*{FAULTS[kind]}"):
            memory.read(PinnedEngine(ring))
    else:
        memory.read(PinnedEngine(ring))
        memory.assert_holds(w=data)
    assert shim.faults() or kind == "none"


# Failures of everything else


class Stop(Exception):
    pass


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("warm", [False, True])
def test_a_plan_that_fails(tmp_path, ring, warm, codec):
    data = numbers(*SMALL)
    array = stored(tmp_path, data, SMALL, codec)
    if warm:
        assert_restored(array, data, engine=PinnedEngine(ring))

    def plan():
        raise Stop

    with pytest.raises(Stop):
        PinnedEngine(ring).read(plan, Memory([(array, ONE)]).buffers)
    assert_restored(array, data, engine=PinnedEngine(ring))


@pytest.mark.parametrize("number", [0, 2])  # threads that pin wait for the first one, too
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_memory_that_cannot_be_allocated(tmp_path, ring, codec, number):
    data = numbers(512, 4096)
    array = stored(tmp_path, data, (64, 512), codec)
    memory = Memory([(array, sharded(None, "a"))])

    def fail() -> int:
        raise Stop

    memory.buffers[number]._pointer = fail
    with pytest.raises(Stop):
        memory.read(PinnedEngine(ring))
    assert_restored(array, data, engine=PinnedEngine(ring))


def test_memory_that_is_allocated_late(tmp_path, ring, monkeypatch):
    """To wait for it is not to wait for a file."""
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", "0.2")
    data = numbers(2000, 2000)
    memory = Memory([(stored(tmp_path, data, (100, 2000)), ONE)])
    (buffer,) = memory.buffers
    pointer = buffer.pointer

    def late() -> int:
        time.sleep(1)
        return pointer

    buffer._pointer = late
    memory.read(PinnedEngine(ring))
    memory.assert_holds(w=data)


ALWAYS = 1 << 30
CALLS = [
    ("cuStreamCreate", 1),
    ("cuEventCreate", ALWAYS),
    ("cuEventQuery", 1),
    *(("cuEventRecord", times) for times in (1, ALWAYS)),
    *(("cuMemcpyHtoDAsync_v2", times) for times in (1, ALWAYS)),
    *(("cuMemcpy3DAsync_v2", times) for times in (1, ALWAYS)),
]


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("after", [0, 3])
@pytest.mark.parametrize("call, times", CALLS)
def test_a_call_of_the_driver_that_fails(tmp_path, ring, call, times, after, codec):
    """Nothing is copied any more when that is reported, and the next restore is as any other."""
    data = numbers(600, 4096)
    sharding = sharded(None, "a") if "3D" in call else sharded("a")
    array = stored(tmp_path, data, (60, 4096), codec)
    memory = Memory([(array, sharding)])
    stand_in.fail(call, after, times)
    with pytest.raises(CudaError, match=f"{call}: .*out of memory"):
        memory.read(PinnedEngine(ring))
    stand_in.fail("")
    assert stand_in.held()["queued"] == 0
    assert_restored(array, data, sharding, PinnedEngine(ring))


@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("chunks", [1, 20])
@pytest.mark.parametrize("sharding", ["one", "rows"])
@pytest.mark.parametrize("pinned", [(0,), (5,), (0, 2, 4), (1, 3, 5)])
def test_lanes_that_cannot_be_pinned(tmp_path, codec, chunks, sharding, pinned):
    """The others do their work, whoever's it was to be."""
    data = numbers(400, 1000)
    array = stored(tmp_path, data, (400 // chunks, 1000), codec)
    ring = Ring(6, 2)
    gpus = sorted({d.local_hardware_id for d in SHARDINGS[sharding].addressable_devices})
    try:
        for number, (lane, _) in enumerate(ring.lanes(gpus)):
            if number not in pinned:
                lane._count = 1 << 40  # slots
        engine = PinnedEngine(ring)
        assert_restored(array, data, SHARDINGS[sharding], engine)
        assert re.match(f"{len(pinned)} of . pinned buffers: no more memory to pin", engine.note)
    finally:
        ring.close()


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_no_memory_to_pin(tmp_path, ring, codec):
    data = numbers(*SMALL)
    array = stored(tmp_path, data, SMALL, codec)
    stand_in.fail("cuMemHostRegister_v2")
    with pytest.raises(MemoryError, match="no host memory can be pinned: .*out of memory"):
        Memory([(array, ONE)]).read(PinnedEngine(ring))
    stand_in.fail("")
    assert_restored(array, data, engine=PinnedEngine(ring))


def test_the_stages_are_marked_in_a_profile(tmp_path, ring):
    shape = (2000, 3000)  # of many reads: some are waited for, however busy the machine is
    array = stored(tmp_path, numbers(*shape), shape)
    with jax.profiler.trace(tmp_path / "profile", create_perfetto_trace=True):
        Memory([(array, ONE)]).read(PinnedEngine(ring))
    (file,) = tmp_path.rglob("perfetto_trace.json.gz")
    text = gzip.decompress(file.read_bytes()).decode()
    assert "jaxgds read" in text and "jaxgds copy" in text


# Reads that never end


@pytest.fixture
def pipe(tmp_path):
    """A file of which reads wait, in the C library's threads too, until it is closed."""
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR)
    ended = threading.Event()

    def close() -> None:
        if not ended.is_set():
            ended.set()
            os.close(end)

    yield str(tmp_path / "pipe"), close
    close()


def hanging(file: str, chunks: int) -> Memory:
    size = MAX_STAGED
    layout = Layout((chunks, size), np.dtype(np.uint8), (1, size), (1, size), "raw", False, "", ".")
    values = {f"w/{i}.0": Extent(file, i * size, size) for i in range(chunks)}
    return Memory([(StoredArray("w", layout, values), ONE)])


def test_many_reads_that_never_end(tmp_path, ring, pipe, monkeypatch):
    """More than the C library has threads for: other restores go on, also then."""
    file, close = pipe
    data = numbers(*SMALL)
    array = stored(tmp_path, data, SMALL)
    ring._threads = 4
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", "0.2")
    for _ in range(5):
        with pytest.raises(TimeoutError, match=r"pipe: array 'w'.*READ_TIMEOUT"):
            hanging(file, 8).read(PinnedEngine(ring))
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", "5")
    assert_restored(array, data, engine=PinnedEngine(ring))
    close()


def interrupt(after: float, ready: threading.Event) -> threading.Thread:
    def run() -> None:
        ready.wait()
        time.sleep(after)
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_control_c(tmp_path, ring, codec):
    """At moments of all sorts: the next restore works."""
    data = numbers(3000, 2000)
    array = stored(tmp_path, data, (300, 2000), codec)
    for number in range(12):
        ready = threading.Event()
        thread = interrupt(0.001 * number**2, ready)
        try:
            with pytest.raises(KeyboardInterrupt):
                ready.set()
                while True:
                    Memory([(array, sharded("a"))]).read(PinnedEngine(ring))
        finally:
            thread.join()
        assert_restored(array, data, sharded("a"), PinnedEngine(ring))


def test_control_c_while_reads_hang(tmp_path, ring, pipe, monkeypatch):
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", "0")
    file, close = pipe
    data = numbers(*SMALL)
    array = stored(tmp_path, data, SMALL)
    ready = threading.Event()
    thread = interrupt(0.3, ready)
    with pytest.raises(KeyboardInterrupt):
        ready.set()
        hanging(file, 4).read(PinnedEngine(ring))
    thread.join()
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", "5")
    assert_restored(array, data, engine=PinnedEngine(ring))
    close()


# Many restores


def test_several_threads_at_once(tmp_path, ring):
    """Each with arrays and devices of its own, some of them damaged."""
    outcomes: dict[int, list[str]] = {}
    arrays = []
    for i in range(4):
        (tmp_path / f"{i}").mkdir()
        data = numbers(800, 1000) + i
        array = stored(tmp_path / f"{i}", data, (100, 1000), "zstd" if i == 2 else "raw")
        arrays.append((array, data))
    os.truncate(tmp_path / "1" / "data.bin", 5000)

    def work(number: int) -> None:
        outcomes[number] = []
        for i in range(12):
            array, data = arrays[(i + number) % 4]
            sharding = list(SHARDINGS.values())[(i * number) % len(SHARDINGS)]
            try:
                assert_restored(array, data, sharding, PinnedEngine(ring))
                outcomes[number].append("good")
            except CheckpointError:
                outcomes[number].append("bad")

    threads = [threading.Thread(target=work, args=(n,)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found in outcomes.items():
        assert found == ["bad" if (i + number) % 4 == 1 else "good" for i in range(12)]


def test_nothing_is_left_after_many_restores(tmp_path, ring):
    """Nor does a ring that is kept grow."""
    data = numbers(800, 1000)
    arrays = []
    for codec in ("raw", "zstd"):
        (tmp_path / codec).mkdir()
        arrays.append(stored(tmp_path / codec, data, (100, 1000), codec))

    def all_kinds() -> dict[str, int]:
        for array in arrays:
            for sharding in SHARDINGS.values():
                assert_restored(array, data, sharding, PinnedEngine(ring))
        gc.collect()
        return {**stand_in.held(), "files": len(os.listdir("/proc/self/fd"))}

    first, *_, last = (all_kinds() for _ in range(11))
    # One for each slot and GPU, made when they first meet.
    assert first.pop("events") <= last.pop("events") <= last["pinned"] * 2 * len(jax.devices())
    assert last == first


# The driver itself


def test_the_driver_copies_late():
    """So that a slot which is used again too early is seen by its bytes, and one given back too."""
    cuda.use(0)
    memory, stream, event = Pinned(BLOCK), cuda.stream(), cuda.event()
    memory.lock(0)
    got = np.zeros(3, np.uint8)

    def queue() -> None:
        memory.view[:3] = b"old"
        cuda.submit("cuMemcpyHtoDAsync_v2", got.ctypes.data, memory.pointer, 3, stream)
        cuda.submit("cuEventRecord", event, stream)
        memory.view[:3] = b"new"

    queue()
    cuda.wait(event)
    assert got.tobytes() == b"new" and stand_in.held()["queued"] == 0
    queue()
    assert stand_in.held()["queued"] == 2 and stand_in.violation() == ""
    memory.close()
    assert stand_in.violation() == "cuMemHostUnregister: a copy from or to it is not done"
    cuda.call("cuEventDestroy_v2", event)
    cuda.call("cuStreamDestroy_v2", stream)
