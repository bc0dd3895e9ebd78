"""GPUs without GPUDirect Storage: files -> pinned ring -> asynchronous copies to the device."""

import functools
import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from jaxgds.engines import cuda
from jaxgds.engines.host import Files, direct, fill, opened
from jaxgds.engines.posix import DirectFiles
from jaxgds.engines.ring import Lane, Ring, Slot, near
from jaxgds.engines.strided import boxes
from jaxgds.index import Extent
from jaxgds.plan import Piece, Read, Segment


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


# Rows at least this long cross the bus at nearly full speed one by one; shorter ones are
# copied densely and spread out on the device.
LONG_ROW = 64


class PinnedEngine:
    """Reads onto GPUs; one thread per lane of the process's pinned ring.

    Args:
      ordinals: the GPUs; pinning for them starts now, in the background.
      ring: None takes the ring that all restores of this process share.
    """

    path = "pinned"

    def __init__(self, ordinals: Sequence[int], ring: Ring | None = None):
        cuda.driver()
        if ring is None:
            ring = _shared_ring(tuple(sorted(set(ordinals))))
        self._ring = ring

    def read(self, reads: Sequence[Read], buffers: Sequence["Buffer"]) -> None:
        if not reads:
            return
        with self._ring.busy, Files() as files, DirectFiles() as direct_files:
            _Restore(self._ring, reads, buffers, files, direct_files).run()


@functools.cache
def _process_ring() -> Ring:
    return Ring()


@functools.cache
def _shared_ring(ordinals: tuple[int, ...]) -> Ring:
    ring = _process_ring()
    ring.warm(list(ordinals))
    return ring


class _Restore:
    """The threads of one call of `read`."""

    def __init__(
        self,
        ring: Ring,
        reads: Sequence[Read],
        buffers: Sequence["Buffer"],
        files: Files,
        direct_files: DirectFiles,
    ):
        self._ring, self._buffers = ring, buffers
        self._files, self._direct_files = files, direct_files
        self._work = by_device(reads, buffers)
        self._failed: list[BaseException] = []
        self._stop = False

    def run(self) -> None:
        threads = [
            threading.Thread(target=self._lane, args=(lane, ordinal), name="jaxgds")
            for lane, ordinal in self._ring.lanes(sorted(self._work))
        ]
        try:
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
        except BaseException:  # Ctrl-C: leave no thread behind that writes into the buffers
            self._stop = True
            for thread in threads:
                if thread.ident is not None:
                    thread.join()
            raise
        if self._failed:
            raise self._failed[0]

    def _lane(self, lane: Lane, home: int) -> None:
        try:
            near(home)
            lane.open(home)
            try:
                for read in self._todo(home):
                    if self._stop:
                        break
                    self._carry_out(read, lane)
            finally:
                lane.drain()
        except BaseException as e:
            self._failed.append(e)
            self._stop = True

    def _todo(self, home: int) -> Iterator[Read]:
        """The reads for GPU `home`, then what the other GPUs' lanes have not begun."""
        yield from self._work[home]
        for ordinal, reads in self._work.items():
            if ordinal != home:
                yield from reads

    def _carry_out(self, read: Read, lane: Lane) -> None:
        source = read.source
        if read.codec == "raw" and isinstance(source, Extent):
            (segment,) = read.segments
            at = 0
            for part, nbytes in _parts(segment, self._ring.slot_bytes):
                slot = lane.slot()
                extent = Extent(source.file, source.offset + at, nbytes)
                start = self._direct_files.read(extent, slot.view, read.array)
                self._copy(part, nbytes, slot, start, lane)
                at += nbytes
            return
        with opened(read, self._files) as decoded:
            for segment in read.segments:
                for part, nbytes in _parts(segment, self._ring.slot_bytes):
                    slot = lane.slot()
                    fill(decoded, slot.view[:nbytes], read)
                    self._copy(part, nbytes, slot, 0, lane)

    def _copy(
        self, pieces: Sequence[Piece], nbytes: int, slot: Slot, start: int, lane: Lane
    ) -> None:
        """Queues the copies of `nbytes` bytes at `start` of `slot`."""
        src = slot.pointer + start
        per_gpu: dict[int, list[Piece]] = defaultdict(list)
        for piece in pieces:
            per_gpu[ordinal_of(self._buffers[piece.destination])].append(piece)
        try:
            for ordinal, group in per_gpu.items():
                stream = lane.stream(ordinal)
                short = any(not p.contiguous and p.shape[-1] < LONG_ROW for p in group)
                if short and len(per_gpu) == 1:
                    scratch = lane.scratch(ordinal, nbytes)
                    cuda.call("cuMemcpyHtoDAsync_v2", scratch, src, nbytes, stream)
                    self._scatter(group, scratch, stream, from_host=False)
                else:
                    self._scatter(group, src, stream, from_host=True)
        finally:
            for ordinal in per_gpu:
                lane.release(slot, ordinal)

    def _scatter(self, pieces: Sequence[Piece], src: int, stream: int, *, from_host: bool) -> None:
        for piece in pieces:
            dst = self._buffers[piece.destination].pointer
            if piece.contiguous:
                name = "cuMemcpyHtoDAsync_v2" if from_host else "cuMemcpyDtoDAsync_v2"
                at = dst + piece.dst_offset
                cuda.call(name, at, src + piece.src_offset, piece.nbytes, stream)
                continue
            for box in boxes(piece):
                cuda.copy_box(
                    src + box.src,
                    dst + box.dst,
                    box.shape,
                    box.src_strides,
                    box.dst_strides,
                    stream,
                    from_host=from_host,
                )


def _parts(segment: Segment, limit: int) -> Iterator[tuple[Sequence[Piece], int]]:
    """Cuts a segment that one piece takes as it is; others fit into a slot as they are."""
    whole = direct(segment)
    if whole is None or segment.nbytes <= limit:
        yield segment.pieces, segment.nbytes
        return
    for at in range(0, segment.nbytes, limit):
        nbytes = min(limit, segment.nbytes - at)
        yield (Piece(whole.destination, (nbytes,), 0, (1,), whole.dst_offset + at, (1,)),), nbytes


def ordinal_of(buffer: "Buffer") -> int:
    """The driver's number of the GPU that holds `buffer`."""
    ordinal = buffer.device.local_hardware_id
    assert ordinal is not None
    return ordinal


def by_device(reads: Sequence[Read], buffers: Sequence["Buffer"]) -> dict[int, Iterator[Read]]:
    """The reads of each GPU; what several lanes may draw from at once.

    Compressed reads come first, the largest before the others: one frame is one
    thread's work, and a large one that is begun last would be waited for alone.
    """
    work: dict[int, list[Read]] = defaultdict(list)
    for read in reads:
        first = next((p for s in read.segments for p in s.pieces), None)
        if first is not None:
            work[ordinal_of(buffers[first.destination])].append(read)
    for group in work.values():
        group.sort(key=lambda r: -r.source_nbytes if r.codec != "raw" else 0)
    return {ordinal: iter(group) for ordinal, group in work.items()}
