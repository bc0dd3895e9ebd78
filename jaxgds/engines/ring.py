"""Pinned memory that one process keeps for all its restores, in lanes of a few slots each.

Who fills a slot queues its copies to the device, goes on with another slot, and uses this one
again only when its copies are done.
"""

import os
import threading
from collections.abc import Callable, Iterable, Sequence

from jaxgds import scatter
from jaxgds.engines import cuda
from jaxgds.engines.aio import Request
from jaxgds.engines.pinned_memory import Pinned


# Lanes: decoding takes every core that there is.
THREADS_PER_GPU = 32
# Lanes that the raw reads of a GPU use, and how many of these at once: 10, 12, 14 and 16 gave
# 43..47, 45..49, 46..49 and 47..50 GB/s (10 GB in memory, a host with 16 cores, an H100 that takes
# 50 from pinned memory).
COPIERS_PER_GPU = 16
READS = 14
AHEAD = 1  # how many others each of their threads finds when it has carried one out
# What is read at once. Of large reads Python has less to do, small ones stay in the cores' caches
# until they are copied on: 2, 3, 4 MiB gave 44.5, 46.6, 46.7 GB/s (16 GB in memory, an H200), and
# 1, 2, 4 MiB 31..36, 40..42, 34..36 (5 GB, an H100, whose host has smaller caches). Onto two GPUs
# 3 and 4 MiB gave 58 and 50.
READ_BYTES = 3 << 20
# Slots that become free together: to record an event, and to look at it, takes time as a copy does.
RELEASED = 2
PINNERS = 4  # threads
SLOTS = 2
# What is scattered in one piece: from memory, rows of 2 KiB in 2, 4 and 8 MiB gave 44, 48 and 35
# GB/s. Of 8 MiB too little stays in a core's cache until it is copied on.
SLOT_BYTES = scatter.MAX_STAGED
# A slot has room for a read that is widened to whole blocks at both ends.
MARGIN = 2 * 4096
MAX_PINNED = 512 << 20


class Mark:
    """What is queued on a stream up to here, by an event recorded there."""

    __slots__ = ("done", "event")

    def __init__(self, event: int):
        self.event, self.done = event, False

    def passed(self) -> bool:
        """Whether all of it is done."""
        self.done = self.done or cuda.done(self.event)
        return self.done


class Slot:
    """A page-aligned piece of pinned memory, and the copies out of it that are under way."""

    __slots__ = ("events", "pending", "pointer", "request", "view")

    def __init__(self, pointer: int, view: memoryview):
        self.pointer, self.view = pointer, view
        self.request = Request()  # reads into it
        self.events: dict[int, int] = {}  # GPU -> event
        self.pending: list[Mark] = []  # not waited for

    def copied(self) -> bool:
        """Whether its copies are done."""
        while self.pending:
            if not self.pending[-1].passed():
                return False
            self.pending.pop()
        return True

    def wait(self) -> None:
        """Returns when its copies are done."""
        while self.pending:
            mark = self.pending.pop()
            if not mark.done:
                cuda.wait(mark.event)


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
    """What one thread copies out of slots; it makes GPU `ordinal` current.

    An event that is recorded for several slots is not recorded again before all of them are free,
    for it belongs to one of them.
    """

    def __init__(self, streams: "Streams", ordinal: int):
        self._streams, self._current = streams, -1
        self._copied: dict[int, list[Slot]] = {}  # by GPU: not released yet
        self.stream(ordinal)

    def stream(self, ordinal: int) -> int:
        """The stream of GPU `ordinal`, which becomes current."""
        if self._current != ordinal:
            cuda.use(ordinal)
            self._current = ordinal
        return self._streams.at(ordinal)

    def copy(self, slot: Slot, at: int, dst: int, nbytes: int, ordinal: int) -> None:
        """Queues a copy from `slot`, which `release` is to free."""
        stream = self.stream(ordinal)
        cuda.submit("cuMemcpyHtoDAsync_v2", dst, slot.pointer + at, nbytes, stream)
        self.queued(slot, ordinal)

    def queued(self, slot: Slot, ordinal: int) -> None:
        """Has `slot` be freed with what is queued so far on the stream of GPU `ordinal`."""
        slots = self._copied.setdefault(ordinal, [])
        slots.append(slot)
        if len(slots) == RELEASED:
            self.release()

    def release(self) -> None:
        """Frees the slots that were copied from, once that is done: by one event on each GPU."""
        copied, self._copied = self._copied, {}
        errors: list[cuda.CudaError] = []
        for ordinal, slots in copied.items():
            try:
                self._release(slots, ordinal)
            except cuda.CudaError as e:
                errors.append(e)
        if errors:
            raise errors[0]

    def _release(self, slots: Sequence[Slot], ordinal: int) -> None:
        stream = self.stream(ordinal)
        try:
            event = slots[-1].events.get(ordinal)
            if event is None:
                event = slots[-1].events[ordinal] = cuda.event()
            cuda.submit("cuEventRecord", event, stream)
        except cuda.CudaError:
            cuda.call("cuStreamSynchronize", stream)
            raise
        mark = Mark(event)
        for slot in slots:
            slot.pending.append(mark)


class Lane:
    """The slots that a decoding thread uses, or hands on to the copier of its GPU."""

    def __init__(self, slots: int, slot_bytes: int):
        self.slot_bytes = slot_bytes
        self.slots: list[Slot] = []
        self._count = slots
        self._memory: Pinned | None = None
        self._next = 0
        self._opening = threading.Lock()
        self._free_events: Callable[[], object] = lambda: None

    def reserve(self) -> Pinned:
        """Maps memory for the slots, before threads pin that of others."""
        if self._memory is None:
            self._memory = Pinned(self._count * (self.slot_bytes + MARGIN))
        return self._memory

    def open(self, ordinal: int) -> None:
        """Pins the slots when it is first used, by GPU `ordinal`."""
        with self._opening:
            if self.slots:
                return
            cuda.use(ordinal)
            nbytes = self.slot_bytes + MARGIN
            memory = self.reserve()
            memory.lock(ordinal)
            slots = [
                Slot(memory.pointer + at, memory.view[at : at + nbytes])
                for at in range(0, self._count * nbytes, nbytes)
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

    def __init__(
        self,
        threads: int = THREADS_PER_GPU,
        slots: int = SLOTS,
        slot_bytes: int = SLOT_BYTES,
    ):
        assert slot_bytes >= scatter.MAX_STAGED
        self.busy = threading.Lock()
        self.slot_bytes = slot_bytes
        self._threads, self._slots = threads, slots
        self.streams = Streams()
        self._lanes: list[Lane] = []

    def lanes(self, ordinals: list[int]) -> list[tuple[Lane, int]]:
        """Lanes for a restore onto these GPUs, each with the GPU it works for first."""
        count = lane_count(len(ordinals), self._threads, self._slots * (self.slot_bytes + MARGIN))
        while len(self._lanes) < count:
            self._lanes.append(Lane(self._slots, self.slot_bytes))
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
