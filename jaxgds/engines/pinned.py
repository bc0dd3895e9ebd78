"""GPUs without GPUDirect Storage: files -> pinned ring -> asynchronous copies to the device."""

import functools
import io
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from jaxgds.engines import cuda
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.host import direct, fill, opened, plain_files
from jaxgds.engines.posix import DirectFile, direct_files
from jaxgds.engines.ring import COPIERS_PER_GPU, Lane, Ring, Slot, near
from jaxgds.engines.strided import boxes
from jaxgds.index import Extent
from jaxgds.plan import Read
from jaxgds.progress import Arrived, ignore, traced
from jaxgds.scatter import Piece, Segment
from jaxgds.workers import run_threads


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


class PinnedEngine:
    """Reads onto GPUs; one thread per lane of the process's pinned ring.

    Args:
      ring: None takes the ring that all restores of this process share.

    Raises:
      NotImplementedError: there is no NVIDIA driver here.
    """

    path = "pinned"

    def __init__(self, ring: Ring | None = None):
        cuda.driver()
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
    """One call of `read`."""

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
        self._work: dict[int, Iterator[Read]] = {}
        self._planned = threading.Event()
        self._compressed = False
        self._pinned: list[Lane] = []
        self._unpinned: list[Exception] = []

    def run(self, plan: Callable[[], Sequence[Read]]) -> str:
        """Returns what to note."""

        def share_out() -> None:
            try:
                reads = plan()
                self._compressed = any(read.codec != "raw" for read in reads)
                self._work = by_device(reads, self._ordinals)
            finally:
                self._planned.set()

        # The first restore of a process pins its lanes, which takes longer than to plan.
        gpus = sorted(set(self._ordinals))
        lanes = self._ring.lanes(gpus)
        targets = [
            functools.partial(self._lane, lane, ordinal, i >= COPIERS_PER_GPU * len(gpus))
            for i, (lane, ordinal) in enumerate(lanes)
        ]
        run_threads(targets, meanwhile=share_out, left_behind=self._ring.abandon)
        if not self._unpinned:
            return ""
        if not self._pinned:
            raise MemoryError(f"no host memory can be pinned: {self._unpinned[0]}")
        left, count = len(self._pinned), len(self._pinned) + len(self._unpinned)
        return f"{left} of {count} readers: no more memory to pin: {self._unpinned[0]}"

    def _lane(self, lane: Lane, home: int, decodes_only: bool, stop: threading.Event) -> None:
        if decodes_only:
            self._wait(stop)
            if not self._compressed:
                return
        near(home)
        try:
            lane.open(home)
        except (cuda.CudaError, OSError) as e:
            self._unpinned.append(e)  # the other lanes do its work
            return
        self._pinned.append(lane)
        self._wait(stop)
        try:
            for read in self._todo(home):
                if stop.is_set():
                    break
                self._carry_out(read, lane)
        finally:
            lane.drain()

    def _wait(self, stop: threading.Event) -> None:
        """Returns when the plan is made; it is empty if that failed."""
        while not (self._planned.wait(0.1) or stop.is_set()):
            pass

    def _todo(self, home: int) -> Iterator[Read]:
        """The reads for GPU `home`, then what the other GPUs' lanes have not begun."""
        yield from self._work.get(home, ())
        for ordinal, reads in self._work.items():
            if ordinal != home:
                yield from reads

    def _carry_out(self, read: Read, lane: Lane) -> None:
        source = read.source
        if read.codec != "raw" or isinstance(source, bytes):
            self._decode(read, lane)
            return
        with self._files.open(source.file, read.array) as file:
            self._copy(read, source, file, lane)

    def _copy(self, read: Read, source: Extent, file: DirectFile, lane: Lane) -> None:
        (segment,) = read.segments
        whole = direct(segment)
        if whole is None:
            assert segment.nbytes <= lane.slot_bytes  # see scatter.MAX_STAGED
            slot = lane.slot()
            with traced("read"):
                at = file.read(source.offset, segment.nbytes, slot.view, read.array)
            self._scatter(segment, slot, at, lane)
            return
        ordinal, offset, left = self._ordinals[whole.destination], source.offset, segment.nbytes
        dst = 0
        while left:
            nbytes = min(left, lane.slot_bytes)
            slot = lane.slot()
            with traced("read"):
                at = file.read(offset, nbytes, slot.view, read.array)
            # Asked for as late as possible: it may still be being allocated.
            dst = dst or self._buffers[whole.destination].pointer + whole.dst_offset
            with traced("copy"):
                lane.copy(slot, at, dst, nbytes, ordinal)
            self._arrived(nbytes)
            offset, dst, left = offset + nbytes, dst + nbytes, left - nbytes

    def _decode(self, read: Read, lane: Lane) -> None:
        """The same for what is compressed, or held inline by the metadata."""
        with opened(read, self._plain) as decoded:
            for segment in read.segments:
                whole = direct(segment)
                if whole is None:
                    slot = lane.slot()
                    with traced("read"):
                        fill(decoded, slot.view[: segment.nbytes], read)
                    self._scatter(segment, slot, 0, lane)
                    continue
                ordinal = self._ordinals[whole.destination]
                for done in range(0, segment.nbytes, lane.slot_bytes):
                    nbytes = min(lane.slot_bytes, segment.nbytes - done)
                    slot = lane.slot()
                    with traced("read"):
                        fill(decoded, slot.view[:nbytes], read)
                    dst = self._buffers[whole.destination].pointer + whole.dst_offset
                    with traced("copy"):
                        lane.copy(slot, 0, dst + done, nbytes, ordinal)
                    self._arrived(nbytes)

    def _scatter(self, segment: Segment, slot: Slot, at: int, lane: Lane) -> None:
        """Queues the copies of all pieces of a segment, which lies at `at` in `slot`."""
        per_gpu: dict[int, list[Piece]] = defaultdict(list)
        for piece in segment.pieces:
            per_gpu[self._ordinals[piece.destination]].append(piece)
        for ordinal, pieces in per_gpu.items():
            stream = lane.stream(ordinal)
            try:
                # Rows of 256 bytes cross the bus as fast as one piece, of 64 bytes at 0.8 of that.
                with traced("scatter"):
                    copy_pieces(pieces, slot.pointer + at, self._buffers, stream, on_device=False)
            finally:
                lane.release(slot, ordinal)
        self._arrived(segment.nbytes)


def copy_pieces(
    pieces: Sequence[Piece],
    src: int,
    buffers: Sequence["Buffer"],
    stream: int,
    *,
    on_device: bool,
) -> None:
    """Queues the copies of pieces of a segment that lies at address `src`."""
    for piece in pieces:
        dst = buffers[piece.destination].pointer
        for box in boxes(piece):
            cuda.copy_box(box, src, dst, stream, on_device=on_device)


def ordinal_of(buffer: "Buffer") -> int:
    """The driver's number of the GPU that holds `buffer`."""
    ordinal = buffer.device.local_hardware_id
    assert ordinal is not None
    return ordinal


def by_device(reads: Sequence[Read], ordinals: Sequence[int]) -> dict[int, Iterator[Read]]:
    """The reads of each GPU; what several lanes may draw from at once.

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
