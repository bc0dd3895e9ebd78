"""Pinned memory that one process keeps for all its restores, in lanes of a few slots each.

Who fills a slot queues its copies to the device, goes on with another slot, and uses this one
again only when its copies are done.
"""

import os
import threading
from collections.abc import Callable, Iterable

from jaxgds.engines import cuda
from jaxgds.engines.aio import Request
from jaxgds.engines.pinned_memory import Pinned
from jaxgds.scatter import MAX_STAGED


# Lanes: decoding takes every core that there is.
THREADS_PER_GPU = 32
# Reads of a GPU at once: 10, 12, 14 and 16 gave 43..47, 45..49, 46..49 and 47..50 GB/s (10 GB in
# memory, a host with 16 cores, an H100 that takes 50 from pinned memory).
READS = 14
AHEAD = 1  # how many others each of their threads finds when it has carried one out
# What is read at once. Of large reads Python has less to do, small ones stay in the cores' caches
# until they are copied on: 2, 3, 4 MiB gave 44.5, 46.6, 46.7 GB/s (16 GB in memory, an H200), and
# 1, 2, 4 MiB 31..36, 40..42, 34..36 (5 GB, an H100, whose host has smaller caches). Onto two GPUs
# 3 and 4 MiB gave 58 and 50.
READ_BYTES = 3 << 20
# What is copied at once, of two reads: a copy costs the GPU 2.6 us whatever its size.
SLOT_BYTES = 2 * READ_BYTES
assert SLOT_BYTES >= MAX_STAGED
SLOTS = 2  # of a lane
# Lanes that the raw reads of a GPU use: 8, 10, 12 gave 49.1, 48.2, 46.9 GB/s (10 GB in memory, an
# H200). What is copied on from few slots is in the cores' caches still.
COPIERS_PER_GPU = 8
PINNERS = 4  # threads
# A slot has room for a read that is widened to whole blocks at both ends.
_SPACING = SLOT_BYTES + 2 * 4096
MAX_PINNED = 512 << 20


class Slot:
    """A page-aligned piece of pinned memory, and the copies out of it that are under way."""

    __slots__ = ("events", "pending", "pointer", "requests", "view")

    def __init__(self, pointer: int, view: memoryview):
        self.pointer, self.view = pointer, view
        self.requests = Request(), Request()  # reads into it
        self.events: dict[int, int] = {}  # GPU -> event
        self.pending: list[int] = []  # events that are not waited for

    def copied(self) -> bool:
        """Whether its copies are done."""
        while self.pending:
            if not cuda.done(self.pending[-1]):
                return False
            self.pending.pop()
        return True

    def wait(self) -> None:
        """Returns when its copies are done."""
        while self.pending:
            cuda.wait(self.pending.pop())


def wait_for(slots: Iterable[Slot]) -> None:
    """Returns, or raises, when the copies out of all of `slots` are done, or not to be seen."""
    errors: list[cuda.CudaError] = []
    for slot in slots:
        try:
            slot.wait()
        except cuda.CudaError as e:
            errors.append(e)
    if errors:
        raise errors[0]


class Copies:
    """What one thread copies out of slots; it makes GPU `ordinal` current."""

    def __init__(self, streams: "Streams", ordinal: int):
        self._streams, self._current = streams, -1
        self.stream(ordinal)

    def stream(self, ordinal: int) -> int:
        """The stream of GPU `ordinal`, which becomes current."""
        if self._current != ordinal:
            cuda.use(ordinal)
            self._current = ordinal
        return self._streams.at(ordinal)

    def copy(self, slot: Slot, at: int, dst: int, nbytes: int, ordinal: int) -> None:
        """Queues a copy from `slot`."""
        stream = self.stream(ordinal)
        cuda.submit("cuMemcpyHtoDAsync_v2", dst, slot.pointer + at, nbytes, stream)
        self.queued(slot, ordinal)

    def queued(self, slot: Slot, ordinal: int) -> None:
        """Has `slot` wait for what is queued so far on the stream of GPU `ordinal`."""
        stream = self.stream(ordinal)
        try:
            event = slot.events.get(ordinal)
            if event is None:
                event = slot.events[ordinal] = cuda.event()
            cuda.submit("cuEventRecord", event, stream)
        except cuda.CudaError:
            cuda.call("cuStreamSynchronize", stream)
            raise
        slot.pending.append(event)


class Lane:
    """The slots that a decoding thread uses, or hands on to the copier of its GPU."""

    def __init__(self, slots: int):
        self.slots: list[Slot] = []
        self._count = slots
        self._memory: Pinned | None = None
        self._next = 0
        self._opening = threading.Lock()
        self._free_events: Callable[[], object] = lambda: None

    def reserve(self) -> Pinned:
        """Maps memory for the slots, before threads pin that of others."""
        if self._memory is None:
            self._memory = Pinned(self._count * _SPACING)
        return self._memory

    def open(self, ordinal: int) -> None:
        """Pins the slots when it is first used, by GPU `ordinal`."""
        with self._opening:
            if self.slots:
                return
            cuda.use(ordinal)
            memory = self.reserve()
            memory.lock(ordinal)
            slots = [
                Slot(memory.pointer + at, memory.view[at : at + _SPACING])
                for at in range(0, self._count * _SPACING, _SPACING)
            ]
            self._free_events = cuda.when_dropped(
                self, _destroy, "cuEventDestroy_v2", [slot.events for slot in slots]
            )
            self.slots = slots

    def slot(self) -> Slot:
        """The slot that was used longest ago, free again."""
        slot = self.slots[self._next]
        self._next = (self._next + 1) % self._count
        slot.wait()
        return slot

    def drain(self) -> None:
        """Returns when nothing is copied out of its slots."""
        wait_for(self.slots)

    def close(self) -> None:
        """Drains, and gives everything back."""
        self.drain()
        self.slots = []
        self._free_events()
        if self._memory is not None:
            self._memory.close()
            self._memory = None


class Streams:
    """A stream on each GPU, made when it is first asked for, for several lanes.

    There is one way to the device, which one stream fills as well as many, and each
    stream takes milliseconds to make.

    Attributes:
      close: destroys them.
    """

    def __init__(self) -> None:
        self._made: dict[int, int] = {}
        self._lock = threading.Lock()
        self.close = cuda.when_dropped(self, _destroy, "cuStreamDestroy_v2", [self._made])

    def at(self, ordinal: int) -> int:
        """The stream on GPU `ordinal`, which must be current."""
        stream = self._made.get(ordinal)
        if stream is None:
            with self._lock:
                stream = self._made.get(ordinal) or cuda.stream()
                self._made[ordinal] = stream
        return stream


def _destroy(name: str, made: list[dict[int, int]]) -> None:
    """Has the driver's function `name` free events or streams: GPU -> one on it."""
    for of_gpus in made:
        for ordinal, one in of_gpus.items():
            with cuda.current(ordinal):
                cuda.call(name, one)


class Ring:
    """All lanes of a process, used by one restore at a time.

    Args:
      threads: lanes per GPU; all lanes together stay below the number of cores and MAX_PINNED.
    """

    def __init__(self, threads: int = THREADS_PER_GPU, slots: int = SLOTS):
        self.busy = threading.Lock()
        self._threads, self._slots = threads, slots
        self.streams = Streams()
        self._lanes: list[Lane] = []

    def lanes(self, ordinals: list[int]) -> list[tuple[Lane, int]]:
        """Lanes for a restore onto these GPUs, each with the GPU it works for first."""
        count = lane_count(len(ordinals), self._threads, self._slots * _SPACING)
        while len(self._lanes) < count:
            self._lanes.append(Lane(self._slots))
        return [(lane, ordinals[i % len(ordinals)]) for i, lane in enumerate(self._lanes[:count])]

    def abandon(self) -> None:
        """Gives up all lanes: a thread that hangs may still write into one."""
        self._lanes.clear()
        self.streams = Streams()

    def close(self) -> None:
        for lane in self._lanes:
            lane.close()
        self._lanes.clear()
        self.streams.close()


def lane_count(gpus: int, threads: int, lane_bytes: int, cores: int | None = None) -> int:
    """As many lanes as there are cores and pinned memory for, and at least one per GPU."""
    cores = cores or len(os.sched_getaffinity(0))
    return max(gpus, min(gpus * threads, cores, MAX_PINNED // lane_bytes))
