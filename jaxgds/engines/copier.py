"""The reads of one GPU or several, all on one Python thread: files -> pinned slots -> the devices.

The thread only begins reads and copies and looks whether they are done, so that it rarely
waits for the interpreter lock, whatever else the process does.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass

from jaxgds.engines import aio
from jaxgds.engines.aio import Descriptor, Request
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.parts import Part, Parts
from jaxgds.engines.posix import BLOCK, DirectFile, Way
from jaxgds.engines.ring import AHEAD, READ_BYTES, READS, Copies, Slot, wait_for
from jaxgds.progress import traced
from jaxgds.workers import waits, waits_no_more


_NAP = 50e-6  # seconds between two looks at what is under way
_LONG_NAP = 1e-3  # where nothing is under way
_LONGEST_NAP = 0.1  # where a read does not end that nobody waits for


@dataclass(slots=True, eq=False)
class _Piece:
    """Of a part, what one request reads.

    Attributes:
      end: the offset that it reads up to.
      pointer: from where on its blocks lie.
      way: how to read it; None if it is read.
      descriptor: that reads it.
      began: when it was begun, of time.monotonic.
    """

    part: Part
    slot: Slot
    request: Request
    file: DirectFile
    end: int
    pointer: int = 0
    way: Way | None = None
    descriptor: Descriptor | None = None
    began: float = 0.0


def _pieces(part: Part, file: DirectFile, slot: Slot) -> Iterator[_Piece]:
    """What to read of a part, in two halves if it is long."""
    offset, end = part.offset, part.offset + part.nbytes
    first, second = slot.requests
    if first.at_once(file, offset, part.nbytes, slot.pointer):
        yield _Piece(part, slot, first, file, end)
        return
    middle = -(-(offset + part.nbytes // 2) // BLOCK) * BLOCK if part.nbytes > READ_BYTES else end
    yield _Piece(part, slot, first, file, middle, slot.pointer, file.way(offset, middle - offset))
    if middle < end:
        part.left = 2
        pointer = slot.pointer + middle - offset // BLOCK * BLOCK
        yield _Piece(part, slot, second, file, end, pointer, file.way(middle, end - middle))


class Copier:
    """Carries out reads with the slots it is given.

    Args:
      copies: what the parts queue with.
      more: gives slots that are for this thread from now on; None if there will be no others.
      gpus: how many it copies to; there are READS under way for each.

    Attributes:
      slow: why a read could not be begun, and was waited for instead; None if there was none.
    """

    def __init__(
        self,
        files: OpenFiles[DirectFile],
        copies: Copies,
        more: Callable[[], Sequence[Slot] | None],
        gpus: int,
    ):
        self._files, self._copies, self._gpus = files, copies, gpus
        self._more, self._free = more, deque[Slot]()
        self._next: deque[_Piece] = deque()  # of the newest part, to be read
        self._reading: list[_Piece] = []
        self._copying: deque[Slot] = deque()  # on each GPU's stream the first ends first
        self._descriptors = [Descriptor() for _ in range(READS * gpus)]
        self.slow: OSError | None = None

    def run(self, parts: Parts, stop: threading.Event) -> None:
        """Returns, or raises, when nothing is under way."""
        try:
            unread, slots = True, self._more()
            while (unread or self._reading or self._copying) and not stop.is_set():
                if slots is not None:
                    self._free.extend(slots)
                    slots = self._more()
                unread = unread and self._begin(parts)
                if not (self._end_reads() or self._end_copies()):
                    if slots is None and not self._busy:
                        break  # nothing could be pinned
                    self._nap(_NAP if self._busy else _LONG_NAP)
        finally:
            try:
                parts.close()
            finally:
                self._drain()

    @property
    def _busy(self) -> bool:
        return bool(self._free or self._next or self._reading or self._copying)

    def _begin(self, parts: Parts) -> bool:
        """Begins as many reads as there may be at once; whether there are others, perhaps."""
        requests: list[Request] = []
        unread = self._prepare(parts, requests)
        if requests:
            try:
                aio.begin(requests)
            except OSError as e:
                self.slow = e  # as in _prepare
        return unread

    def _prepare(self, parts: Parts, requests: list[Request]) -> bool:
        """Adds to `requests` what may begin now; whether there are others, perhaps."""
        while True:
            if not self._next:
                if not self._free:
                    return True
                try:
                    found = next(parts)
                except StopIteration:
                    return False
                if found is None:
                    return True
                self._next.extend(_pieces(*found, self._free.popleft()))
            piece = self._next[0]
            if piece.way is not None:
                fd, *_ = piece.way
                piece.descriptor = descriptor = self._descriptor(piece.file, fd)
                if descriptor is None:
                    return True
                try:
                    descriptor.follow(piece.file, fd)
                except OSError as e:
                    piece.request.fail()
                    self.slow = e  # it is waited for when the part is found to be short
                else:
                    piece.request.prepare(descriptor, piece.way, piece.pointer)
                    requests.append(piece.request)
                descriptor.under_way += 1
            piece.began = time.monotonic()  # not before: others may keep it waiting
            self._reading.append(self._next.popleft())

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
        ended = [piece for piece in self._reading if piece.request.done]
        if not ended:
            return False
        for piece in ended:
            self._reading.remove(piece)
            if piece.descriptor is not None:
                piece.descriptor.under_way -= 1
            part = piece.part
            part.left -= 1
            part.short = part.short or not piece.request.filled(piece.end)
            if not part.left:
                self._end_read(piece.slot, part)
        return True

    def _end_read(self, slot: Slot, part: Part) -> None:
        waits_no_more()  # what follows may wait for memory, not for a file
        offset, nbytes = part.offset, part.nbytes
        if part.short:
            # Whatever was wrong: this way does without, or says what it was.
            with self._files.open(part.file, part.read.array) as file:
                file.read(offset, nbytes, slot.view, part.read.array)
        self._copying.append(slot)
        part.queue(part.done, nbytes, slot, offset % BLOCK)

    def _end_copies(self) -> bool:
        """Frees the slots whose copies are done; whether there was any."""
        done, waiting = [], 0
        for slot in self._copying:
            if slot.copied():
                done.append(slot)
                continue
            waiting += 1
            if waiting == self._gpus:
                break
        for slot in done:
            self._copying.remove(slot)
        self._free += done
        return bool(done)

    def _nap(self, seconds: float) -> None:
        if self._reading:
            oldest = self._reading[0]
            waits(oldest.began, oldest.part.file, oldest.part.read.array)
        with traced("read") if self._reading else nullcontext():
            time.sleep(seconds)

    def _drain(self) -> None:
        nap = _NAP
        while self._reading:  # perhaps for ever
            self._reading = [piece for piece in self._reading if not piece.request.done]
            self._nap(nap)
            nap = min(2 * nap, _LONGEST_NAP)
        waits_no_more()
        aio.settle()
        with ExitStack() as closed:
            for descriptor in self._descriptors:
                closed.callback(descriptor.close)
            wait_for(self._copying)
