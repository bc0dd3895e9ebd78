"""Reads by the C library's threads, against plain ones of the same bytes."""

import ctypes
import errno
import mmap
import os
import resource
import threading
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgds.engines import aio
from jaxgds.engines.aio import SMALL, Descriptor, Request
from jaxgds.engines.posix import BLOCK, DirectFile


SIZE = 3 * (1 << 20) + 777  # of the file
ROOM = 1 << 20  # of a read
REQUESTS = 6
LONG = SMALL + 1  # what is not read at once


class Slot:
    """Page-aligned memory with a request that reads into it, on a descriptor of its own."""

    def __init__(self):
        self._memory = mmap.mmap(-1, ROOM + 2 * BLOCK)
        self.pointer = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        self.request, self.descriptor = Request(), Descriptor()

    def begin(self, file: DirectFile, offset: int, nbytes: int) -> None:
        self._memory[:] = b"\xa5" * len(self._memory)
        self.request.fail()
        if not self.request.at_once(file, offset, nbytes, self.pointer):
            way = file.way(offset, nbytes)
            self.descriptor.follow(file, way[0])
            self.request.prepare(self.descriptor, way, self.pointer)
            aio.begin([self.request])

    def found(self, offset: int, nbytes: int) -> bytes | None:
        """What was read, once it is; None if it is not all that was asked for."""
        while not self.request.done:
            time.sleep(1e-4)
        at = offset % BLOCK
        return self._memory[at : at + nbytes] if self.request.filled(offset + nbytes) else None


@pytest.fixture(scope="module")
def slots():
    made = [Slot() for _ in range(REQUESTS)]
    yield made
    for slot in made:
        slot.descriptor.close()


@pytest.fixture(scope="module", params=["cached", "cold"])
def stored(request, tmp_path_factory):
    """(path, content, what to do before each read) of a file."""
    path = tmp_path_factory.mktemp("aio") / "data.bin"
    content = os.urandom(SIZE)
    path.write_bytes(content)

    def before() -> None:
        if request.param == "cold":
            with open(path, "rb") as f:
                os.fsync(f.fileno())
                os.posix_fadvise(f.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)

    return path, content, before


@pytest.fixture
def file(stored):
    made = DirectFile(str(stored[0]))
    yield made
    made.close()


near_blocks = st.builds(
    lambda n, by: max(0, n * BLOCK + by), st.integers(0, SIZE // BLOCK), st.integers(-2, 2)
)
offsets = st.integers(0, SIZE - 1) | near_blocks.filter(lambda n: n < SIZE)
lengths = st.integers(1, ROOM) | near_blocks.filter(lambda n: 0 < n <= ROOM) | st.just(SIZE)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(offsets, lengths), min_size=1, max_size=REQUESTS))
def test_several_reads_at_once(stored, slots, ranges):
    """From one file, by requests that have read before: all bytes, or it is known that it ended."""
    path, content, before = stored
    ranges = [(offset, min(nbytes, ROOM)) for offset, nbytes in ranges]
    before()
    file = DirectFile(str(path))
    for slot, (offset, nbytes) in zip(slots, ranges, strict=False):
        slot.begin(file, offset, nbytes)
    file.close()  # while they are under way
    for slot, (offset, nbytes) in zip(slots, ranges, strict=False):
        whole = offset + nbytes <= SIZE
        want = content[offset : offset + nbytes] if whole else None
        assert slot.found(offset, nbytes) == want, (offset, nbytes)


def test_reads_that_follow_each_other(stored, slots):
    """All of one descriptor; it can only be given to another file when they are done."""
    path, content, before = stored
    descriptor = Descriptor()
    for file in (DirectFile(str(path)), DirectFile(str(path))):
        before()
        fd, *_ = file.way(0, LONG)
        descriptor.follow(file, fd)
        for i, slot in enumerate(slots):
            slot.request.prepare(descriptor, (fd, 0, i * BLOCK, LONG + BLOCK - 1), slot.pointer)
            assert slot.request.done and not slot.request.filled(i * BLOCK + 1)
            descriptor.under_way += 1
        aio.begin([slot.request for slot in slots])
        with pytest.raises(AssertionError):
            descriptor.follow(DirectFile(str(path)), 0)
        file.close()
        for i, slot in enumerate(slots):
            assert slot.found(i * BLOCK, LONG) == content[i * BLOCK :][:LONG]
            descriptor.under_way -= 1
    descriptor.close()


@pytest.mark.parametrize("beyond", [0, 1, BLOCK, 10 * BLOCK])
def test_the_end_of_the_file(stored, file, slots, beyond):
    _, content, before = stored
    before()
    slots[0].begin(file, SIZE - 100, 100 + beyond)
    assert slots[0].found(SIZE - 100, 100 + beyond) == (None if beyond else content[-100:])
    slots[0].begin(file, SIZE + beyond, 1)
    assert slots[0].found(SIZE + beyond, 1) is None


def test_a_request_of_many_files(tmp_path, slots):
    """One after the other, each as it is by then, under numbers that the others had."""
    for i in range(60):
        content = os.urandom(1000 + i)
        (tmp_path / f"{i % 7}").write_bytes(content)
        file = DirectFile(str(tmp_path / f"{i % 7}"))
        try:
            for slot in slots[: 1 + i % REQUESTS]:
                slot.begin(file, i, 1000)
            for slot in slots[: 1 + i % REQUESTS]:
                assert slot.found(i, 1000) == content[i : i + 1000]
        finally:
            file.close()


def test_descriptors(stored, file):
    """One for each request that has read, which no other program inherits, until it is closed."""

    def opened() -> set[int]:
        links = [(int(fd), f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
        return {fd for fd, link in links if os.path.realpath(link) == str(path)}

    path, content, before = stored
    before()
    file.way(0, 1)  # opens what it needs
    others, slot = opened(), Slot()
    for _ in range(2):
        for at in (0, 5000):
            slot.begin(file, at, LONG)
            assert slot.found(at, LONG) == content[at : at + LONG]
            (own,) = opened() - others
            assert not os.get_inheritable(own)
        slot.descriptor.close()
        slot.descriptor.close()
        assert opened() == others


def a_directory(path) -> int:
    return os.open(path, os.O_RDONLY)


def not_for_reading(path) -> int:
    return os.open(path / "data", os.O_WRONLY | os.O_CREAT)


@pytest.mark.parametrize("opened", [a_directory, not_for_reading])
def test_what_cannot_be_read(tmp_path, stored, slots, opened):
    """As if nothing was read: it is for a plain read to say why."""
    (tmp_path / "some").write_bytes(b"x" * 100)
    file = DirectFile(str(tmp_path / "some"))
    os.close(file._fd)
    file._fd, file._flags = opened(tmp_path), 0
    with pytest.raises(OSError):
        os.pread(file._fd, 1, 0)
    slots[0].begin(file, 0, 100)
    assert slots[0].found(0, 100) is None
    file.close()


def test_a_closed_file(stored, slots):
    """Bytes that were read before are not taken for what could not be asked for."""
    path, content, _ = stored
    file, closed = DirectFile(str(path)), DirectFile(str(path))
    slots[0].begin(file, 5000, 100)
    assert slots[0].found(5000, 100) == content[5000:5100]
    file.close()
    number = closed._fd
    closed.close()
    closed._flags, closed._fd = 0, number
    with pytest.raises(OSError) as e:
        slots[0].begin(closed, 0, 100)
    assert e.value.errno == errno.EBADF
    assert slots[0].found(0, 100) is None


def test_no_descriptor_is_left(stored, file):
    """Nor then."""
    _, content, _ = stored
    slot = Slot()
    slot.begin(file, 5000, LONG)
    assert slot.found(5000, LONG) == content[5000 : 5000 + LONG]
    slot.descriptor.close()
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (1, limits[1]))
    try:
        with pytest.raises(OSError) as e:
            slot.begin(file, 0, LONG)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert e.value.errno == errno.EMFILE
    assert slot.found(0, LONG) is None
    slot.begin(file, 0, LONG)
    assert slot.found(0, LONG) == content[:LONG]
    slot.descriptor.close()


def test_reads_that_wait_do_not_hold_up_others(tmp_path, stored, file, slots):
    """Many of them: each takes one of the C library's threads."""
    os.mkfifo(tmp_path / "pipe")
    end = os.open(tmp_path / "pipe", os.O_RDWR)
    pipe = DirectFile(str(tmp_path / "pipe"))
    waiting = [Slot() for _ in range(40)]
    for slot in waiting:
        slot.begin(pipe, 0, 100)
    _, content, before = stored
    for _ in range(3):
        before()
        for i, slot in enumerate(slots):
            slot.begin(file, i * 1000, 1000)
        for i, slot in enumerate(slots):
            assert slot.found(i * 1000, 1000) == content[i * 1000 :][:1000]
    assert not any(slot.request.done for slot in waiting)
    pipe.close()
    os.write(end, b"y" * 100 * len(waiting))
    for slot in waiting:
        assert slot.found(0, 100) == b"y" * 100
        slot.descriptor.close()
    os.close(end)


def test_requests_of_several_threads(stored, slots):
    path, content, _ = stored
    wrong: list[int] = []

    def work(number: int) -> None:
        file = DirectFile(str(path))
        for i in range(40):
            at = (number * 40 + i) * 10_007 % (SIZE - 50_000)
            slots[number].begin(file, at, 50_000)
            if slots[number].found(at, 50_000) != content[at : at + 50_000]:
                wrong.append(at)
        file.close()

    threads = [threading.Thread(target=work, args=(n,)) for n in range(REQUESTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
