"""The parts of the GPU engines that need no GPU: boxes, file reads, counters, selection."""

import json
import mmap
import os
import re
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxgds.engines import HostEngine, cufile, cufile_config, engine_for, numa
from jaxgds.engines.files import MAX_IDLE, OpenFiles
from jaxgds.engines.gds import MIN_READ, WINDOW, unfit, windows
from jaxgds.engines.gds_proof import nvidia_fs_reads, reads_by_gpu
from jaxgds.engines.parts import in_turns
from jaxgds.engines.posix import BLOCK, direct_files
from jaxgds.engines.ring import MAX_PINNED, lane_count
from jaxgds.engines.strided import boxes
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray
from jaxgds.plan import Read, make_plan
from jaxgds.scatter import Piece, Segment
from jaxgds.zarr import Layout


def copy_box(src: np.ndarray, dst: np.ndarray, box) -> None:
    """What the driver's 3-D copy does, from its own parameters: pitch and height in rows."""
    depth, height, width = box.shape
    assert all(plane % row == 0 for plane, row in (box.src_strides, box.dst_strides))
    for z in range(depth):
        for y in range(height):
            a = box.src + z * box.src_strides[0] + y * box.src_strides[1]
            b = box.dst + z * box.dst_strides[0] + y * box.dst_strides[1]
            dst[b : b + width] = src[a : a + width]


AXES = [("a",), (None, "a"), (None, None, "a"), ("a", "b"), (None, "a", "b"), ("b", None, "a")]


@given(
    shape=st.lists(st.integers(1, 3).map(lambda n: 4 * n), min_size=1, max_size=5),
    cut=st.lists(st.sampled_from([1, 2, 4]), min_size=5, max_size=5),
    axes=st.sampled_from(AXES),
    dtype=st.sampled_from([np.uint8, np.int16, np.complex64]),
)
def test_boxes_rebuild_the_array(shape, cut, axes, dtype):
    shape = tuple(shape)
    chunk = tuple(n // c for n, c in zip(shape, cut, strict=False))
    mesh = Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"))
    layout = Layout(shape, np.dtype(dtype), chunk, chunk, "raw", False, "", ".")
    data = np.random.default_rng(0).integers(0, 255, layout_bytes(layout), np.uint8)
    grid = np.ndindex(*(n // c for n, c in zip(shape, chunk, strict=True)))
    values = {
        f"w/{'.'.join(map(str, index))}": Extent(
            "file", i * layout.chunk_nbytes, layout.chunk_nbytes
        )
        for i, index in enumerate(grid)
    }
    sharding = NamedSharding(mesh, P(*axes[: len(shape)]))
    plan = make_plan([(StoredArray("w", layout, values), sharding)])
    ours = [
        np.zeros(int(np.prod(d.shape)) * layout.dtype.itemsize, np.uint8) for d in plan.destinations
    ]
    for read in plan.reads:
        assert isinstance(read.source, Extent)
        (segment,) = read.segments
        staged = data[read.source.offset :][: read.source.nbytes]
        for piece in segment.pieces:
            for box in boxes(piece):
                copy_box(staged, ours[piece.destination], box)
    whole = assembled(layout, data)
    for destination, got in zip(plan.destinations, ours, strict=True):
        expected = whole[tuple(slice(a, b) for a, b in destination.box)]
        assert got.tobytes() == expected.tobytes()


def layout_bytes(layout: Layout) -> int:
    return int(np.prod(layout.shape)) * layout.dtype.itemsize


def assembled(layout: Layout, data: np.ndarray) -> np.ndarray:
    """The array whose chunks lie one after the other in `data`."""
    whole = np.zeros(layout.shape, layout.dtype)
    grid = np.ndindex(*(n // c for n, c in zip(layout.shape, layout.chunk, strict=True)))
    for i, index in enumerate(grid):
        part = data[i * layout.chunk_nbytes : (i + 1) * layout.chunk_nbytes].view(layout.dtype)
        where = tuple(slice(k * c, (k + 1) * c) for k, c in zip(index, layout.chunk, strict=True))
        whole[where] = part.reshape(layout.chunk)
    return whole


@pytest.fixture(scope="module")
def slot():
    """Page-aligned memory, as a ring's slot is."""
    memory = mmap.mmap(-1, 1 << 20)
    view = memoryview(memory)
    yield view
    view.release()
    memory.close()


@pytest.fixture(params=["cached", "cold"])
def file(request, tmp_path):
    """A file on the disk of the tests' folder, in the page cache or dropped from it."""
    data = np.random.default_rng(0).integers(0, 256, 300_000, np.uint8)
    path = tmp_path / "data.bin"
    path.write_bytes(data.tobytes())
    with open(path, "rb") as f:
        os.fsync(f.fileno())
        if request.param == "cold":
            os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return str(path), data


@pytest.mark.parametrize(
    "offset, nbytes",
    [(0, 300_000), (0, 4096), (4096, 8192), (1, 1), (4095, 2), (12_345, 200_001), (299_999, 1)],
)
def test_a_range_of_a_file(file, slot, offset, nbytes):
    path, data = file
    with direct_files() as files:
        for _ in range(2):
            with files.open(path, "w") as f:
                at = f.read(offset, nbytes, slot[: nbytes + 2 * BLOCK], "w")
            assert bytes(slot[at : at + nbytes]) == data[offset : offset + nbytes].tobytes()


@pytest.mark.parametrize("offset, nbytes", [(0, 300_001), (299_999, 2), (290_000, 50_000)])
def test_a_range_beyond_the_end(file, slot, offset, nbytes):
    path, data = file
    missing = offset + nbytes - len(data)
    with direct_files() as files, files.open(path, "w") as f:
        with pytest.raises(CheckpointError, match=f"'w'.* {missing} bytes"):
            f.read(offset, nbytes, slot, "w")


def test_files_that_cannot_be_read(tmp_path, slot):
    with direct_files() as files:
        with pytest.raises(CheckpointError, match=r"gone\.bin.*'w'"):
            files.open(str(tmp_path / "gone.bin"), "w").__enter__()
        with pytest.raises(CheckpointError, match="directory"), files.open(str(tmp_path), "w") as f:
            f.read(0, 1, slot, "w")


def test_files_are_closed(file, slot):
    before = os.listdir("/proc/self/fd")
    with direct_files() as files:
        with files.open(file[0], "w") as f:
            f.read(5, 100, slot, "w")
        assert len(os.listdir("/proc/self/fd")) > len(before)
    assert os.listdir("/proc/self/fd") == before


class Opened:
    def __init__(self, path: str, array: str):
        self.path, self.closed = path, False

    def close(self) -> None:
        assert not self.closed
        self.closed = True


def test_of_files_in_use_none_is_closed_and_of_others_the_oldest():
    made = []
    with OpenFiles(lambda path, array: made.append(Opened(path, array)) or made[-1]) as files:
        with files.open("used", "w"), files.open("used", "w") as used:
            for _ in range(2):
                for number in range(MAX_IDLE):
                    with files.open(str(number), "w") as f:
                        assert f.path == str(number)
            assert len(made) == MAX_IDLE + 1, "each is opened once while there is room"
            for number in range(3 * MAX_IDLE):
                with files.open(f"more {number}", "w") as f:
                    assert not f.closed
            assert not used.closed and sum(not f.closed for f in made) == MAX_IDLE + 1
    assert all(f.closed for f in made)


@pytest.mark.parametrize(
    "text, cpus",
    [("0-3,8,10-11\n", {0, 1, 2, 3, 8, 10, 11}), ("5", {5}), ("", set()), ("\n", set())],
)
def test_cpu_lists(text, cpus):
    assert numa.parse_cpus(text) == cpus


@pytest.mark.parametrize(
    ("near", "expected"),
    [
        ({0: None, 1: None, 2: None}, [[0, 1, 2]]),
        ({0: {0, 1}, 1: {2, 3}, 2: {0, 1}, 3: {2, 3}}, [[0, 2], [1, 3]]),
        ({0: {0, 1}, 1: None}, [[0], [1]]),
    ],
)
def test_gpus_of_one_node_are_together(monkeypatch, near, expected):
    monkeypatch.setattr(numa, "near_cpus", near.get)
    assert numa.by_node(list(near)) == expected


@given(st.lists(st.lists(st.none() | st.integers(0, 9), max_size=6), max_size=4))
def test_parts_in_turns(several):
    """All of each in its order, one of each at first; None only while none of them has any."""
    asked, closed = [], []

    def parts(number, items):
        try:
            for item in items:
                asked.append((number, item))
                yield item if item is None else (number, item)
        finally:
            closed.append(number)

    found = []
    for part in in_turns([parts(i, items) for i, items in enumerate(several)]):  # type: ignore
        if part is None:
            without = {number for number, item in asked if item is None}
            assert all(item is None for _, item in asked) and without
        asked.clear()
        found.append(part)
    for i, items in enumerate(several):
        mine = [x for number, x in filter(None, found) if number == i]
        assert mine == [x for x in items if x is not None]
    begun = [number for number, _ in filter(None, found[: len(several)])]
    if all(items and None not in items for items in several):
        assert begun == list(range(len(several)))
    assert sorted(closed) == list(range(len(several)))


def test_room_for_files():
    """The kernel's table of descriptors is large before they are opened, and nothing stays open."""
    code = "import os, threading; from jaxgds.engines.files import make_room;"
    code += "before = os.listdir('/proc/self/fd'); make_room(threading.Event());"
    code += "assert os.listdir('/proc/self/fd') == before; print(open('/proc/self/status').read())"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    (size,) = re.findall(r"FDSize:\s*(\d+)", done.stdout)
    assert int(size) >= 512


def test_no_room_for_files():
    """Where fewer are allowed that is no error: it only takes longer later."""
    code = "import resource as r, threading; from jaxgds.engines.files import make_room;"
    code += "r.setrlimit(r.RLIMIT_NOFILE, (64, 64)); make_room(threading.Event())"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "gpus, cores, expected", [(1, 16, 16), (1, 64, 16), (1, 2, 2), (8, 128, 32), (4, 2, 4)]
)
def test_lanes_are_bounded_by_cores_and_pinned_memory(gpus, cores, expected):
    count = lane_count(gpus, threads=16, lane_bytes=16 << 20, cores=cores)
    assert count == expected and count * (16 << 20) <= MAX_PINNED


def test_the_engine_is_chosen_by_platform_and_by_force(monkeypatch):
    cpu = {jax.devices("cpu")[0]}
    monkeypatch.delenv("JAXGDS_ENGINE", raising=False)
    assert isinstance(engine_for(cpu), HostEngine)
    assert isinstance(engine_for(cpu, "host"), HostEngine)
    with pytest.raises(NotImplementedError, match="'pinned' for cpu"):
        engine_for(cpu, "pinned")
    with pytest.raises(ValueError, match="'warp'.*gds, pinned, host"):
        engine_for(cpu, "warp")
    monkeypatch.setenv("JAXGDS_ENGINE", "gds")
    with pytest.raises(NotImplementedError, match="'gds' for cpu"):
        engine_for(cpu)


@given(st.integers(0, 1000), st.integers(1, 1000), st.integers(1, 300))
def test_windows_cover_the_range_and_cross_no_multiple(offset, nbytes, limit):
    parts = list(windows(offset, nbytes, limit))
    assert [at for at, _ in parts] == [offset, *(at + n for at, n in parts)][:-1]
    assert sum(n for _, n in parts) == nbytes
    assert all(n > 0 and at // limit == (at + n - 1) // limit for at, n in parts)


class Reads(cufile.File):
    """Notes what cuFile would be asked for."""

    def __init__(self, nbytes: int):
        self.nbytes = nbytes

    def read(self, offset, nbytes, pointer):
        self.asked = offset, nbytes, pointer


@given(st.integers(0, 1 << 26), st.integers(1, WINDOW), st.integers(0, 3 * BLOCK))
def test_what_is_staged_is_read_in_whole_blocks(offset, nbytes, behind):
    """But for the end of the file; whatever a window may be, it has room in the staging buffer."""
    staging = object.__new__(cufile.Staging)
    staging.pointer, staging.nbytes = 1 << 40, WINDOW + 2 * BLOCK
    file = Reads(offset + nbytes + behind)
    at = file.stage(offset, nbytes, staging)
    start, length, pointer = file.asked
    assert start % BLOCK == 0 and pointer == staging.pointer and length <= staging.nbytes
    assert (start + length) % BLOCK == 0 or start + length == file.nbytes
    assert start <= offset < start + BLOCK and at - pointer == offset - start
    assert offset + nbytes <= start + length < offset + nbytes + BLOCK


@pytest.mark.parametrize(
    "codec, nbytes, destinations, expected",
    [
        ("raw", MIN_READ, (0,), None),
        ("raw", MIN_READ, (0, 2), None),
        ("raw", MIN_READ - 1, (0,), "small"),
        ("raw", MIN_READ, (0, 1), "several GPUs"),
        ("zstd", MIN_READ, (0,), "zstd"),
    ],
)
def test_reads_for_cufile(codec, nbytes, destinations, expected):
    pieces = tuple(Piece(d, (1,), 0, (1,), 0, (1,)) for d in destinations)
    read = Read("w", Extent("file", 7, nbytes), codec, (Segment(nbytes, pieces),))
    why = unfit(read, ordinals=[0, 1, 0])
    assert why is None if expected is None else why is not None and expected in why


NVIDIA_FS_STATS = """GDS Version: 1.7.0.149
NVFS statistics(ver: 4.0)
IO stats: Enabled, peer IO stats: Enabled

Active Shadow-Buffer (MiB): 0
Reads\t\t\t\t: n=12 ok=11 err=1 readMiB=8 io_state_err=0
Reads\t\t\t\t: Bandwidth(MiB/s)=0 Avg-Latency(usec)=0
Sparse Reads\t\t\t: n=0 io=0 holes=0 pages=0
Writes\t\t\t\t: n=5 ok=5 err=0 writeMiB=1 io_state_err=0 pg-cache=0
"""


@pytest.mark.parametrize("text, count", [(NVIDIA_FS_STATS, 11), ("", 0), ("Reads : off", 0)])
def test_the_counter_of_nvidia_fs(text, count):
    assert nvidia_fs_reads(text) == count


@pytest.mark.parametrize("before", [0, 1000, 1208])
def test_the_counters_of_cufile_are_found_by_uuid(before):
    """Whatever an older or newer cuFile puts in front of them."""
    uuids = [bytes(range(16)), bytes(range(16, 32))]
    gpus = [
        uuid + struct.pack("<30Q", 1, 2, 3, 4, 100, *ways, *range(22))
        for uuid, ways in zip(uuids, [(7, 20, 300), (1, 2, 3)], strict=True)
    ]
    stats = b"\xff" * before + b"".join(gpus)
    assert reads_by_gpu(stats, uuids) == {"p2p": 8, "nvfs": 22, "posix": 303}
    assert reads_by_gpu(stats, uuids[1:]) == {"p2p": 1, "nvfs": 2, "posix": 3}
    assert reads_by_gpu(stats, [b"g" * 16]) == {"p2p": 0, "nvfs": 0, "posix": 0}


CONFIGS = sorted((Path(__file__).parents[2] / "configs" / "cufile").glob("*.json"))


@pytest.mark.parametrize("file", CONFIGS, ids=lambda f: f.name)
def test_shipped_cufile_configurations(file):
    """Whole blocks, as cuFile demands, and every value has its reason in the README beside it."""
    config = json.loads(file.read_text())
    reasons = file.with_name("README.md").read_text()

    def values(part, keys=()):
        for key, value in part.items():
            if isinstance(value, dict):
                yield from values(value, (*keys, key))
            else:
                yield ".".join((*keys, key)), value

    for name, value in values(config):
        assert f"`{name}`" in reasons, name
        if name.endswith("_size_kb"):
            assert value % 64 == 0, name
    properties = config["properties"]
    settings = cufile_config.parse(file.read_text(), str(file))
    staged = settings.threads * (WINDOW + 2 * BLOCK) >> 10  # of one restore on one GPU, in KiB
    assert properties["max_device_pinned_mem_size_kb"] > (
        properties["max_device_cache_size_kb"] + staged
    )


def test_configurations_are_shipped():
    assert [f.name for f in CONFIGS] == ["lustre.json", "nvme.json"]
