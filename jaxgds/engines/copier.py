"""The raw reads of one GPU, all on one Python thread: files -> pinned slots -> the device.

The thread only begins reads and copies and looks whether they are done, so that it rarely
waits for the interpreter lock, whatever else the process does.
"""

import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxgds.engines import aio, cuda
from jaxgds.engines.aio import Descriptor, Request
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.host import direct
from jaxgds.engines.posix import BLOCK, DirectFile, Way
from jaxgds.engines.ring import AHEAD, READ_BYTES, READS, SLOT_BYTES, Copies, Slot, wait_for
from jaxgds.engines.strided import boxes
from jaxgds.index import Extent
from jaxgds.plan import Read
from jaxgds.progress import Arrived, traced
from jaxgds.scatter import Piece, Segment
from jaxgds.workers import waits, waits_no_more


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


_NAP = 50e-6  # seconds between two looks at what is under way
_LONG_NAP = 1e-3  # where nothing is under way
_LONGEST_NAP = 0.1  # where a read does not end that nobody waits for


@dataclass(slots=True)
class _Part:
    """A part of a read that one slot takes: `whole`'s bytes from `done` on, or all of a segment."""

    read: Read
    source: Extent
    segment: Segment
    whole: Piece | None
    done: int
    began: float = 0.0
    descriptor: Descriptor | None = None  # that reads it


class Copier:
    """Carries out raw reads with the slots it is given.

    Args:
      copies: of this thread.
      ordinals: of each destination, the GPU.
      more: gives slots that are for this thread from now on; None if there will be no others.

    Attributes:
      slow: why a read could not be begun, and was waited for instead; None if there was none.
    """

    def __init__(
        self,
        copies: Copies,
        files: OpenFiles[DirectFile],
        buffers: Sequence["Buffer"],
        ordinals: Sequence[int],
        more: Callable[[], Sequence[Slot] | None],
        arrived: Arrived,
    ):
        self._copies, self._files, self._arrived = copies, files, arrived
        self._buffers, self._ordinals = buffers, ordinals
        self._more, self._free = more, deque[Slot]()
        self._reading: list[tuple[Slot, _Part]] = []
        self._copying: deque[Slot] = deque()  # one stream: the first ends first
        self._descriptors = [Descriptor() for _ in range(READS)]
        self._next: tuple[_Part, DirectFile, Way] | None = None  # that waits for one of these
        self.slow: OSError | None = None

    def run(self, reads: Iterator[Read], stop: threading.Event) -> None:
        """Returns, or raises, when nothing is under way."""
        parts = self._parts(reads)
        try:
            unread, slots = True, self._more()
            while (unread or self._reading or self._copying) and not stop.is_set():
                if slots is not None:
                    self._free.extend(slots)
                    slots = self._more()
                unread = unread and self._begin(parts)
                if not (self._end_reads() or self._end_copies()):
                    if slots is None and not (self._free or self._reading or self._copying):
                        break  # nothing could be pinned
                    self._nap(_NAP if self._reading or self._copying else _LONG_NAP)
        finally:
            try:
                parts.close()
            finally:
                self._drain()

    def _parts(self, reads: Iterator[Read]) -> Generator[tuple[_Part, DirectFile]]:
        """Cuts reads to parts; the file is open until the next part is asked for."""
        for read in reads:
            source, (segment,) = read.source, read.segments
            assert isinstance(source, Extent)
            with self._files.open(source.file, read.array) as file:
                whole = direct(segment)
                at_once = SLOT_BYTES if whole is None else READ_BYTES
                for done in range(0, segment.nbytes, at_once):
                    nbytes = min(at_once, segment.nbytes - done)
                    part = Extent(source.file, source.offset + done, nbytes)
                    yield _Part(read, part, segment, whole, done), file

    def _begin(self, parts: Iterator[tuple[_Part, DirectFile]]) -> bool:
        """Begins as many reads as there may be at once; whether there are others, perhaps."""
        requests: list[Request] = []
        unread = self._prepare(parts, requests)
        if requests:
            try:
                aio.begin(requests)
            except OSError as e:
                self.slow = e  # as in _prepare
        return unread

    def _prepare(self, parts: Iterator[tuple[_Part, DirectFile]], requests: list[Request]) -> bool:
        """Adds to `requests` what may begin now; whether there are others, perhaps."""
        while self._free:
            slot = self._free[0]
            if self._next is None:
                part, file = next(parts, (None, None))
                if part is None or file is None:
                    return False
                source, part.began = part.source, time.monotonic()
                if slot.request.at_once(file, source.offset, source.nbytes, slot.pointer):
                    self._reading.append((self._free.popleft(), part))
                    continue
                self._next = part, file, file.way(source.offset, source.nbytes)
            part, file, way = self._next
            descriptor = self._descriptor(file, way[0])
            if descriptor is None:
                break
            part.began = time.monotonic()
            try:
                descriptor.follow(file, way[0])
            except OSError as e:
                self.slow = e  # it is waited for when the read is found to have given nothing
            else:
                slot.request.prepare(descriptor, way, slot.pointer)
                part.descriptor, descriptor.under_way = descriptor, descriptor.under_way + 1
                requests.append(slot.request)
            self._next = None
            self._reading.append((self._free.popleft(), part))
        return True

    def _descriptor(self, file: DirectFile, fd: int) -> Descriptor | None:
        """One with nothing to read; or else one that reads the same file, and little more."""
        ahead = None
        for descriptor in self._descriptors:
            if not descriptor.under_way:
                return descriptor
            if descriptor.under_way <= AHEAD and descriptor.file == (file, fd):
                if ahead is None or descriptor.under_way < ahead.under_way:
                    ahead = descriptor
        return ahead

    def _end_reads(self) -> bool:
        """Queues the copies of what is read; whether there was any."""
        under_way = []
        reading, self._reading = self._reading, under_way
        for i, (slot, part) in enumerate(reading):
            if not slot.request.done:
                under_way.append((slot, part))
                continue
            if part.descriptor is not None:
                part.descriptor.under_way -= 1
            try:
                self._end_read(slot, part)
            except BaseException:
                under_way += reading[i + 1 :]
                raise
        return len(under_way) < len(reading)

    def _end_read(self, slot: Slot, part: _Part) -> None:
        waits_no_more()  # what follows may wait for memory, not for a file
        source, at = part.source, part.source.offset % BLOCK
        if not slot.request.filled(source.offset + source.nbytes):
            # Whatever was wrong: this way does without, or says what it was.
            with self._files.open(source.file, part.read.array) as file:
                file.read(source.offset, source.nbytes, slot.view, part.read.array)
        self._copying.append(slot)
        if part.whole is not None:
            # Asked for as late as possible: it may still be being allocated.
            dst = self._buffers[part.whole.destination].pointer + part.whole.dst_offset
            ordinal = self._ordinals[part.whole.destination]
            with traced("copy"):
                self._copies.copy(slot, at, dst + part.done, source.nbytes, ordinal)
        else:
            scatter(part.segment, slot, at, self._copies, self._buffers, self._ordinals)
        self._arrived(source.nbytes)

    def _end_copies(self) -> bool:
        """Frees the slots whose copies are done; whether there was any."""
        before = len(self._copying)
        while self._copying and self._copying[0].copied():
            self._free.append(self._copying.popleft())
        return len(self._copying) < before

    def _nap(self, seconds: float) -> None:
        if self._reading:
            _, oldest = self._reading[0]
            waits(oldest.began, oldest.source.file, oldest.read.array)
        with traced("read") if self._reading else nullcontext():
            time.sleep(seconds)

    def _drain(self) -> None:
        nap = _NAP
        while self._reading:  # perhaps for ever
            self._reading = [(s, p) for s, p in self._reading if not s.request.done]
            self._nap(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        waits_no_more()
        aio.settle()
        with ExitStack() as closed:
            for descriptor in self._descriptors:
                closed.callback(descriptor.close)
            wait_for(self._copying)


def scatter(
    segment: Segment,
    slot: Slot,
    at: int,
    copies: Copies,
    buffers: Sequence["Buffer"],
    ordinals: Sequence[int],
) -> None:
    """Queues the copies of all pieces of a segment, which lies at `at` in `slot`."""
    per_gpu: dict[int, list[Piece]] = defaultdict(list)
    for piece in segment.pieces:
        per_gpu[ordinals[piece.destination]].append(piece)
    for ordinal, pieces in per_gpu.items():
        stream = copies.stream(ordinal)
        try:
            # Rows of 256 bytes cross the bus as fast as one piece, of 64 bytes at 0.8 of that.
            with traced("scatter"):
                copy_pieces(pieces, slot.pointer + at, buffers, stream, on_device=False)
        finally:
            copies.release(slot, ordinal)


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
