"""GPUs without GPUDirect Storage: files -> pinned ring -> asynchronous copies to the device."""

import functools
import io
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxgds.engines import aio, cuda
from jaxgds.engines.copier import Copier, scatter
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.host import direct, fill, opened, plain_files
from jaxgds.engines.posix import DirectFile, direct_files
from jaxgds.engines.ring import COPIERS_PER_GPU, Copies, Lane, Ring, Slot, near
from jaxgds.index import Extent
from jaxgds.plan import Read
from jaxgds.progress import Arrived, ignore, traced
from jaxgds.workers import Target, run_threads


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


class PinnedEngine:
    """Reads onto GPUs through the process's pinned ring.

    Args:
      ring: None takes the ring that all restores of this process share.

    Raises:
      NotImplementedError: there is no NVIDIA driver here.
    """

    path = "pinned"

    def __init__(self, ring: Ring | None = None):
        cuda.driver()
        aio.limit_threads(COPIERS_PER_GPU * cuda.count())
        self.note = ""
        self._ring = ring or _process_ring()

    def read(
        self,
        plan: Callable[[], Sequence[Read]],
        buffers: Sequence["Buffer"],
        arrived: Arrived = ignore,
    ) -> None:
        with self._ring.busy, plain_files() as plain, direct_files() as files:
            self.note = _Restore(self._ring, buffers, plain, files, arrived).run(plan)


@functools.cache
def _process_ring() -> Ring:
    return Ring()


class _Restore:
    """One call of `read`.

    Each lane's thread pins the lane, decodes what is compressed, and leaves its slots to the
    copier of its GPU.
    """

    def __init__(
        self,
        ring: Ring,
        buffers: Sequence["Buffer"],
        plain: OpenFiles[io.FileIO],
        files: OpenFiles[DirectFile],
        arrived: Arrived,
    ):
        self._ring, self._buffers, self._arrived = ring, buffers, arrived
        self._plain, self._files = plain, files
        self._ordinals = [ordinal_of(buffer) for buffer in buffers]
        self._raw: dict[int, Iterator[Read]] = {}
        self._decoded: dict[int, Iterator[Read]] = {}
        self._planned = threading.Event()
        self._lanes: list[
            tuple[Lane, int]
        ] = []  # alive for as long as a thread may write into them
        self._unpinned: list[Exception] = []
        self._slots: dict[int, deque[Slot]] = defaultdict(deque)  # of each GPU, for its copier
        self._coming: dict[int, set[Lane]] = defaultdict(set)  # whose slots it will get

    def run(self, plan: Callable[[], Sequence[Read]]) -> str:
        """Returns what to note."""
        gpus = sorted(set(self._ordinals))
        lanes = self._lanes = self._ring.lanes(gpus)
        for lane, ordinal in lanes[: COPIERS_PER_GPU * len(gpus)]:
            self._coming[ordinal].add(lane)
        # The first restore of a process pins its lanes, which takes longer than to plan.
        pinning = [(lane, home) for lane, home in lanes if self._feeds(lane, home, pinned=False)]

        def share_out() -> list[Target]:
            try:
                reads = plan()
                raw = [r for r in reads if is_raw(r)]
                decoded = [r for r in reads if not is_raw(r)]
                self._raw = by_device(raw, self._ordinals)
                self._decoded = by_device(decoded, self._ordinals)
            finally:
                self._planned.set()
            rest = [one for one in lanes if one not in pinning]
            if all(read.codec == "raw" for read in decoded):
                rest = [one for one in rest if self._feeds(*one, pinned=True)]
            for lane, home in rest[len(decoded) :]:
                self._hand_over(lane, home)
            return [functools.partial(self._lane, *one) for one in rest[: len(decoded)]]

        targets = [functools.partial(self._lane, *one) for one in pinning]
        targets += [functools.partial(self._copy, gpu) for gpu in gpus]
        run_threads(targets, meanwhile=share_out, left_behind=self._ring.abandon)
        if not self._unpinned:
            return ""
        left = sum(bool(lane.slots) for lane, _ in lanes)
        if not left:
            raise MemoryError(f"no host memory can be pinned: {self._unpinned[0]}")
        count = left + len(self._unpinned)
        return f"{left} of {count} readers: no more memory to pin: {self._unpinned[0]}"

    def _feeds(self, lane: Lane, home: int, *, pinned: bool) -> bool:
        """Whether a lane's slots are for the copier in the end, and the lane is pinned or not."""
        return lane in self._coming[home] and bool(lane.slots) == pinned

    def _hand_over(self, lane: Lane, home: int) -> None:
        """Leaves a lane's slots to the copier."""
        if lane in self._coming[home]:
            self._slots[home].extend(lane.slots)
            self._coming[home].discard(lane)

    def _lane(self, lane: Lane, home: int, stop: threading.Event) -> None:
        near(home)
        try:
            copies = Copies(self._ring.streams, home)
            try:
                lane.open(home)
            except (cuda.CudaError, OSError) as e:
                self._unpinned.append(e)  # the other lanes do its work
                return
            self._wait(stop)
            for read in _todo(self._decoded, home):
                if stop.is_set():
                    break
                self._decode(read, lane, copies)
        finally:
            lane.drain()
            self._hand_over(lane, home)

    def _wait(self, stop: threading.Event) -> None:
        """Returns when the plan is made; it is empty if that failed."""
        while not (self._planned.wait(0.1) or stop.is_set()):
            pass

    def _copy(self, home: int, stop: threading.Event) -> None:
        """Carries out all raw reads for GPU `home`."""
        near(home)
        copies = Copies(self._ring.streams, home)
        self._wait(stop)
        copier = Copier(
            copies,
            self._files,
            self._buffers,
            self._ordinals,
            self._slots[home],
            lambda: bool(self._coming[home]),
            self._arrived,
        )
        copier.run(_todo(self._raw, home), stop)

    def _decode(self, read: Read, lane: Lane, copies: Copies) -> None:
        """What is compressed, or held inline by the metadata."""
        with opened(read, self._plain) as decoded:
            for segment in read.segments:
                whole = direct(segment)
                if whole is None:
                    slot = lane.slot()
                    with traced("read"):
                        fill(decoded, slot.view[: segment.nbytes], read)
                    scatter(segment, slot, 0, copies, self._buffers, self._ordinals)
                    self._arrived(segment.nbytes)
                    continue
                ordinal = self._ordinals[whole.destination]
                for done in range(0, segment.nbytes, lane.slot_bytes):
                    nbytes = min(lane.slot_bytes, segment.nbytes - done)
                    slot = lane.slot()
                    with traced("read"):
                        fill(decoded, slot.view[:nbytes], read)
                    dst = self._buffers[whole.destination].pointer + whole.dst_offset
                    with traced("copy"):
                        copies.copy(slot, 0, dst + done, nbytes, ordinal)
                    self._arrived(nbytes)


def _todo(work: dict[int, Iterator[Read]], home: int) -> Iterator[Read]:
    """The reads for GPU `home`, then what the other GPUs' threads have not begun."""
    yield from work.get(home, ())
    for ordinal, reads in work.items():
        if ordinal != home:
            yield from reads


def ordinal_of(buffer: "Buffer") -> int:
    """The driver's number of the GPU that holds `buffer`."""
    ordinal = buffer.device.local_hardware_id
    assert ordinal is not None
    return ordinal


def is_raw(read: Read) -> bool:
    """Whether a read takes bytes of a file as they are."""
    return read.codec == "raw" and isinstance(read.source, Extent)


def by_device(reads: Sequence[Read], ordinals: Sequence[int]) -> dict[int, Iterator[Read]]:
    """The reads of each GPU; what several threads may draw from at once.

    Compressed reads come first, the largest before the others: one frame is one
    thread's work, and a large one that is begun last would be waited for alone.

    Args:
      ordinals: of each destination, the GPU.
    """
    work: dict[int, list[Read]] = defaultdict(list)
    for read in reads:
        first = next((p for s in read.segments for p in s.pieces), None)
        if first is not None:
            work[ordinals[first.destination]].append(read)
    for group in work.values():
        group.sort(key=lambda r: -r.source_nbytes if r.codec != "raw" else 0)
    return {ordinal: iter(group) for ordinal, group in work.items()}
