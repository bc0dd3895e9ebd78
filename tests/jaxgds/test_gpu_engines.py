"""The engines for GPUs on a real one: every byte in its place, and damage reported.

Those that need only the pinned engine also run without one: see test_stand_in.py.
"""

import importlib.util
import json
import os
import pathlib
import re
import shutil
import subprocess
import sys
import threading
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
import stalled_process
import stand_in
import zstandard
from jax.sharding import Mesh, NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P

import jaxgds
import jaxgds.orbax
from jaxgds import restore
from jaxgds.allocation import Allocation
from jaxgds.engines import PinnedEngine, cufile, gds
from jaxgds.engines.ring import Ring
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray
from jaxgds.plan import make_plan
from jaxgds.zarr import Layout


HERE = pathlib.Path(__file__).parent
GPUS = [d for d in jax.devices() if d.platform == "gpu" or stand_in.LIBRARY]
KVIKIO = importlib.util.find_spec("kvikio") is not None and not stand_in.LIBRARY

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no GPU")]

needs_gpu = pytest.mark.skipif(bool(stand_in.LIBRARY), reason="no GPU but a stand-in")
needs_kvikio = pytest.mark.skipif(not KVIKIO, reason="kvikio is not installed")
ENGINES = ["pinned"] + [pytest.param("gds", marks=needs_kvikio)] * (not stand_in.LIBRARY)


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    monkeypatch.setenv("JAXGDS_ENGINE", request.param)
    return request.param


@pytest.fixture
def leaks_nothing(tmp_path_factory):
    """Threads, file descriptors and the GPU's free memory after the test are those before it."""

    def held():
        driver = stand_in.held() if stand_in.LIBRARY else {}
        driver.pop("events", None)  # a slot gets its own when it is first used
        threads = {t.name for t in threading.enumerate()}
        return threads, sorted(os.listdir("/proc/self/fd")), driver

    # What a process keeps on purpose: the shared ring, and cuFile's driver and threads.
    for engine in (PinnedEngine(), *([gds.GdsEngine([0], proof=False)] if KVIKIO else ())):
        restored(stored(tmp_path_factory.mktemp("w"), numbers(512, 512), (256, 512)), one(), engine)
    before = held()
    yield
    assert held() == before


def stored(folder, data: np.ndarray, chunk, codec="raw", gap=13, compressor=None) -> StoredArray:
    """Chunks in one file, none of them aligned, with other bytes in between."""
    layout = Layout(data.shape, data.dtype, chunk, chunk, codec, False, "", ".")  # type: ignore
    file, values, blob = str(folder / "data.bin"), {}, [b"x" * gap]
    at = gap
    for index in np.ndindex(*(n // c for n, c in zip(data.shape, chunk, strict=True))):
        where = tuple(slice(i * c, (i + 1) * c) for i, c in zip(index, chunk, strict=True))
        encoded = data[where].tobytes()
        if codec == "zstd":
            encoded = (compressor or zstandard.ZstdCompressor(level=1)).compress(encoded)
        values[f"w/{'.'.join(map(str, index))}"] = Extent(file, at, len(encoded))
        blob += [encoded, b"x" * gap]
        at += len(encoded) + gap
    with open(file, "wb") as f:
        f.write(b"".join(blob))
    return StoredArray("w", layout, values)


def one() -> SingleDeviceSharding:
    return SingleDeviceSharding(GPUS[0])


def restored(array: StoredArray, sharding, engine) -> list[tuple[tuple, np.ndarray]]:
    """(box, content) of every shard."""
    plan = make_plan([(array, sharding)])
    allocation = Allocation(plan.destinations, [array.layout.dtype] * len(plan.destinations))
    allocation.start()
    try:
        engine.read(lambda: plan.reads, allocation.buffers)
    finally:
        arrays = allocation.arrays()
    boxes = [d.box for d in plan.destinations]
    return [(box, np.asarray(a)) for box, a in zip(boxes, arrays, strict=True)]


def numbers(*shape: int, dtype=np.int32) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 100, shape).astype(dtype)


@pytest.mark.parametrize("threads, slots", [(1, 1), (1, 2), (5, 3)])
@pytest.mark.parametrize("codec", ["raw", "zstd"])
def test_a_ring_of_any_size(tmp_path, leaks_nothing, codec, threads, slots):
    """Chunks longer than a slot, and more slots' worth than there are slots."""
    data = numbers(3000, 3001)
    ring = Ring(threads, slots)
    try:
        for _ in range(3):
            array = stored(tmp_path, data, (1500, 3001), codec)
            ((_, got),) = restored(array, one(), PinnedEngine(ring))
            np.testing.assert_array_equal(got, data)
    finally:
        ring.close()


SCATTERED = {
    "columns": ((512, 4096), (512, 512), np.int16),
    "narrow columns": ((40_000, 64), (40_000, 2), np.int16),
    "single bytes": ((30_000, 8), (30_000, 1), np.int8),
    "blocks": ((2048, 2048), (256, 512), np.float32),
    "three axes": ((64, 48, 96), (16, 24, 32), np.float32),
    "five axes": ((4, 6, 8, 10, 12), (2, 3, 4, 5, 6), np.float64),
    "long rows": ((64, 1 << 17), (64, 1 << 16), np.int32),
}


@pytest.mark.parametrize("case", SCATTERED)
@pytest.mark.parametrize("codec", ["raw", "zstd"])
@pytest.mark.parametrize("name", ENGINES)
def test_scattered_chunks(tmp_path, leaks_nothing, name, codec, case):
    shape, chunk, dtype = SCATTERED[case]
    data = numbers(*shape, dtype=dtype)
    ordinal = GPUS[0].local_hardware_id
    engine = PinnedEngine() if name == "pinned" else gds.GdsEngine([ordinal], proof=False)
    with jax.enable_x64(True):
        ((_, got),) = restored(stored(tmp_path, data, chunk, codec), one(), engine)
    np.testing.assert_array_equal(got, data)


def everything() -> dict[str, Any]:
    rng = np.random.default_rng(0)
    floats = rng.normal(size=(96, 1024)).astype(np.float32)
    dtypes = ["bfloat16", "float16", "float32", "float8_e4m3fn", "float8_e5m2", "complex64"]
    return {
        **{name: floats.astype(jnp.dtype(name)) for name in dtypes},
        "bool": floats > 0,
        "int4": rng.integers(-8, 8, (96, 64)).astype(jnp.int4),
        "uint8": rng.integers(0, 256, (1 << 16,)).astype(np.uint8),
        "scalar": np.float32(2.5),
        "odd": rng.normal(size=(77, 13, 5)).astype(np.float32),
        "large": rng.normal(size=(2048, 4096)).astype(np.float32),
    }


@pytest.fixture(
    scope="module",
    params=[(True, False, False), (True, False, True), (False, True, False)],
    ids=oracle.format_id,
)
def checkpoint(request, tmp_path_factory):
    """Saved from columns on eight CPU devices, so that one GPU must put rows together again."""
    mesh = Mesh(np.array(jax.devices("cpu")), ("x",))

    def place(x):
        columns = x.ndim == 2 and x.shape[1] % mesh.size == 0
        return jax.device_put(x, NamedSharding(mesh, P(None, "x") if columns else P()))

    folder = tmp_path_factory.mktemp("gpu") / "item"
    return oracle.save(folder, jax.tree.map(place, everything()), request.param)


def target(sharding) -> dict[str, jax.ShapeDtypeStruct]:
    return {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding(x))
        for name, x in everything().items()
    }


def stock(path, tree):
    args = ocp.args.PyTreeRestore(
        item=tree, restore_args=ocp.checkpoint_utils.construct_restore_args(tree)
    )
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
        return checkpointer.restore(path, args=args)


def test_onto_one_gpu(checkpoint, engine):
    tree = target(lambda x: one())
    ours = jaxgds.load(checkpoint, tree, strict=True)
    oracle.assert_same(ours, stock(checkpoint, tree))
    assert (
        oracle.last_report().path
        in {"pinned": ["pinned"], "gds": ["gds", "gds-compat", "mixed", "pinned"]}[engine]
    )


@pytest.mark.skipif(len(GPUS) < 2, reason="one GPU")
@pytest.mark.parametrize("axes", [("x",), (None, "x"), ()])
def test_onto_two_gpus(checkpoint, engine, axes):
    mesh = Mesh(np.array(GPUS[:2]), ("x",))

    def sharding(x):
        fits = len(axes) <= x.ndim and all(
            n % 2 == 0 for n, a in zip(x.shape, axes, strict=False) if a
        )
        return NamedSharding(mesh, P(*axes) if fits else P())

    tree = target(sharding)
    oracle.assert_same(jaxgds.load(checkpoint, tree, strict=True), stock(checkpoint, tree))


@needs_kvikio
def test_the_report_does_not_claim_more_than_cufile_counted(tmp_path, monkeypatch):
    """Large enough for cuFile, aligned to nothing."""
    tree = {"w": numbers(1 << 20), "v": numbers(3, 1 << 18)}
    path = oracle.save(tmp_path / "item", jax.tree.map(jnp.asarray, tree), (True, False, False))
    for forced in ("gds", None):
        if forced:
            monkeypatch.setenv("JAXGDS_ENGINE", forced)
        else:
            monkeypatch.delenv("JAXGDS_ENGINE")
        before = gds.counted()
        ours = jaxgds.load(path, strict=True)
        for name, x in tree.items():
            np.testing.assert_array_equal(np.asarray(ours[name]), x)
        report, (direct, posix) = oracle.last_report(), gds.since(before, gds.counted())
        if forced:
            way = "gds-compat" if not direct else "mixed" if posix else "gds"
            assert report.path == way
            assert ("compatibility mode" in report.note) == (way != "gds")
        else:
            assert report.path in (("gds", "mixed") if direct else ("pinned",))


@pytest.mark.parametrize("name", ENGINES)
def test_a_truncated_file(tmp_path, leaks_nothing, name):
    data = numbers(2000, 2000)
    array = stored(tmp_path, data, (500, 2000))
    file = tmp_path / "data.bin"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) * 2 // 3])
    ordinal = GPUS[0].local_hardware_id
    engine = PinnedEngine() if name == "pinned" else gds.GdsEngine([ordinal], proof=False)
    with pytest.raises(CheckpointError, match=r"data\.bin.*'w'.*bytes are missing"):
        restored(array, one(), engine)
    file.write_bytes(whole)
    ((_, got),) = restored(array, one(), engine)
    np.testing.assert_array_equal(got, data)


def test_damaged_zstd(tmp_path, leaks_nothing):
    array = stored(tmp_path, numbers(2000, 2000), (500, 2000), "zstd")
    file = tmp_path / "data.bin"
    content = bytearray(file.read_bytes())
    content[len(content) // 2 :] = bytes(len(content) - len(content) // 2)
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"data\.bin.*'w'"):
        restored(array, one(), PinnedEngine())


def test_a_failed_allocation_stops_the_reads(tmp_path, leaks_nothing):
    """What the readers wait for never comes, and they end."""
    array = stored(tmp_path, numbers(1000, 1000), (500, 1000))
    plan = make_plan([(array, one())])
    allocation = Allocation(plan.destinations, [np.dtype(np.int32)])
    allocation.arrays()

    def fail() -> int:
        raise MemoryError("no memory for this array")

    engine = PinnedEngine()
    allocation.buffers[0]._pointer = fail
    with pytest.raises(MemoryError, match="no memory"):
        engine.read(lambda: plan.reads, allocation.buffers)


@needs_gpu
def test_one_restore_onto_cpu_and_gpu(tmp_path):
    data = numbers(64, 32)
    cpu = SingleDeviceSharding(jax.devices("cpu")[0])
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "c", {"a": data, "b": data + 1})
    target = {
        "a": jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=cpu),
        "b": jax.ShapeDtypeStruct(data.shape, data.dtype, sharding=one()),
    }
    got = jaxgds.load(tmp_path / "c", target, strict=True)
    report = jaxgds.last_report()
    assert report is not None and (report.path, report.arrays) == ("mixed", 2)
    for name, offset in {"a": 0, "b": 1}.items():
        assert got[name].sharding == target[name].sharding
        np.testing.assert_array_equal(got[name], data + offset)


def test_too_little_memory_to_pin(tmp_path, leaks_nothing):
    """Some readers get no memory: the others do the work, and the report says so."""
    data = numbers(3000, 3001)
    ring = Ring(4, 2)
    try:
        for lane, _ in ring.lanes([GPUS[0].local_hardware_id])[1:3]:
            lane._count = 1 << 40  # slots
        engine = PinnedEngine(ring)
        ((_, got),) = restored(stored(tmp_path, data, (1500, 3001)), one(), engine)
        np.testing.assert_array_equal(got, data)
        assert engine.note.startswith("2 of 4 pinned buffers: no more memory to pin")
        for lane, _ in ring.lanes([GPUS[0].local_hardware_id]):
            lane.close()
            lane._count = 1 << 40
        with pytest.raises(MemoryError, match="no host memory can be pinned"):
            restored(stored(tmp_path, data, (1500, 3001)), one(), engine)
    finally:
        ring.close()


@needs_kvikio
@pytest.mark.parametrize("strict", [False, True])
def test_a_failure_of_cufile(tmp_path, leaks_nothing, monkeypatch, strict):
    """kvikio closes the file behind cuFile's back: the next read is refused by cuFile itself."""
    read = cufile.File.read

    def closed(self, offset, nbytes, pointer):
        self._file.close()
        read(self, offset, nbytes, pointer)

    monkeypatch.setattr(cufile.File, "read", closed)
    data = numbers(2000, 2000)
    engine = gds.GdsEngine([GPUS[0].local_hardware_id], proof=False, strict=strict)
    array = stored(tmp_path, data, (500, 2000))
    if strict:
        with pytest.raises(cufile.CuFileError, match=r"data\.bin.*'w'"):
            restored(array, one(), engine)
        return
    ((_, got),) = restored(array, one(), engine)
    np.testing.assert_array_equal(got, data)
    assert engine.path == "pinned" and "cuFile failed" in engine.note


@needs_gpu
def test_too_little_device_memory(tmp_path):
    """Known before anything is allocated or read: the files are not even there."""
    free = (GPUS[0].memory_stats() or {})["bytes_limit"]
    shape = (free // (1 << 20) + 1, 1 << 20)
    layout = Layout(shape, np.dtype(np.uint8), shape, shape, "raw", False, "", ".")
    array = StoredArray("w", layout, {"w/0.0": Extent("nowhere", 0, shape[0] * shape[1])})
    before = (GPUS[0].memory_stats() or {})["bytes_in_use"]
    with pytest.raises(MemoryError, match=f"bytes free of {free:,}, needed {shape[0] << 20:,}"):
        restore.restore([restore.Wanted(array, one())])
    assert (GPUS[0].memory_stats() or {})["bytes_in_use"] == before


# A file system that does not answer, in a process of its own

READERS = 8  # files of the array, each read by a thread of its own


@pytest.fixture(scope="module")
def stalling(tmp_path_factory) -> list[str]:
    """The arguments of stalled_process.py: an array in eight files, twice."""
    folder = tmp_path_factory.mktemp("stalling")
    mesh = Mesh(np.array(jax.devices("cpu")[:READERS]), ("x",))
    rows = jax.device_put(stalled_process.values(), NamedSharding(mesh, P(None, "x")))
    made = [oracle.save(folder / n, {"w": rows}, (False, False, False)) for n in ("no", "yes")]
    return [*made, "/no/w/0."]


@pytest.fixture(scope="module", params=ENGINES)
def stalled(request, stalling, tmp_path_factory) -> dict[str, Any]:
    """What came of the steps of stalled_process.py."""
    return run_stalled(request.param, stalling, tmp_path_factory.mktemp("shim"))


def run_stalled(engine: str, arguments: list[str], folder: pathlib.Path) -> dict[str, Any]:
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the library that makes reads hang")
    library = folder / "faulty.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", library, HERE / "faulty.c", "-ldl"]
    subprocess.run(command, check=True)
    environment = {
        **os.environ,
        "JAXGDS_ENGINE": engine,
        "JAXGDS_READ_TIMEOUT": "0.7" if stand_in.LIBRARY else "2",
        "LD_PRELOAD": str(library),
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
        "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
    }
    command = [sys.executable, HERE / "stalled_process.py", *arguments]
    out, err = folder / "out", folder / "err"  # files keep what a process that hangs has written
    with open(out, "w") as stdout, open(err, "w") as stderr:
        process = subprocess.Popen(command, stdout=stdout, stderr=stderr, env=environment)
        try:
            code = process.wait(150)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
            code = None
    found: dict[str, Any] = {"engine": engine, "code": code, "error": err.read_text()[-4000:]}
    for line in out.read_text().splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    first = found.get("stalls-0")
    if engine == "gds" and first and first["outcome"] == "same" and not first["faults"]:
        pytest.skip("cuFile reads here by calls that the library does not make hang")
    return found


@pytest.mark.parametrize("step", ["stalls-0", "stalls-1", "stalls-2", "stalls-last"])
def test_a_read_that_never_ends(stalled, step):
    """An error that names file and array, and one thread left behind for each file."""
    assert step in stalled, stalled
    found = stalled[step]
    assert found["outcome"] == "TimeoutError", found
    assert re.search(r"/no/w/0\.\d\.0: array 'w'.*READ_TIMEOUT", found["text"]), found
    assert found["faults"] and found["seconds"] < 20, found
    assert 0 < found["left"] <= READERS, found


@pytest.mark.parametrize("cycle", range(stalled_process.CYCLES))
@pytest.mark.parametrize("kind", ["other", "answers"])
def test_restores_after_a_read_that_never_ended(stalled, kind, cycle):
    """While its threads hang, and when they have ended: as the first, with as many readers."""
    step = f"{kind}-{cycle}"
    assert step in stalled, stalled
    found = {name: stalled[step][name] for name in ("outcome", "text", "left")}
    assert found["outcome"] == "same" and found["text"].startswith(stalled["engine"]), found
    assert found["text"] == stalled["first"]["text"] and found["left"] == 0, found


def test_nothing_is_left_of_reads_that_ended_late(stalled):
    """And those that never end do not keep the process from ending."""
    assert "end" in stalled and stalled["code"] == 0, stalled
    first, *_, last = (stalled[f"held-{n}"] for n in range(stalled_process.CYCLES))
    grown = last.pop("device bytes", 0) - first.pop("device bytes", 0)
    assert first == last and grown < 32 << 20, (first, last, grown)
