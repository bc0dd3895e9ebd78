"""What one slot of pinned memory takes of a read, and where it goes from there."""

from collections import defaultdict, deque
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from jaxgds.engines import cuda
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.host import direct
from jaxgds.engines.posix import DirectFile
from jaxgds.engines.ring import SLOT_BYTES, Copies, Slot
from jaxgds.engines.strided import boxes
from jaxgds.index import Extent
from jaxgds.plan import Read
from jaxgds.progress import Arrived, traced
from jaxgds.scatter import Piece, Segment


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


@dataclass(slots=True)
class Part:
    """A part of a read: `nbytes` of a file, from `offset` on.

    Attributes:
      done: how many bytes of the read come before it.
      queue: called with `done`, `nbytes`, and a slot and from where on the bytes lie in it: queues
        their copies.
      left: how many requests for it are not done.
      short: whether one of them has given too little.
    """

    read: Read
    file: str
    offset: int
    nbytes: int
    done: int
    queue: Callable[[int, int, Slot, int], None]
    left: int = 1
    short: bool = False


# The file is open until the next part is asked for. None: there is none now, but there will be.
type Parts = Generator[tuple[Part, DirectFile] | None]


def cut(
    read: Read,
    source: Extent,
    at_once: int,
    files: OpenFiles[DirectFile],
    queue: Callable[[int, int, Slot, int], None],
) -> Parts:
    """Parts of a range of a file."""
    path, begin, size = source
    with files.open(path, read.array) as file:
        for done in range(0, size, at_once):
            nbytes = min(at_once, size - done)
            yield Part(read, path, begin + done, nbytes, done, queue), file


def raw_parts(
    reads: Iterable[Read],
    copies: Copies,
    files: OpenFiles[DirectFile],
    buffers: Sequence["Buffer"],
    ordinals: Sequence[int],
    arrived: Arrived,
) -> Parts:
    """Parts of raw reads, which go straight to their destinations."""

    def whole(piece: Piece, done: int, nbytes: int, slot: Slot, at: int) -> None:
        # Asked for as late as possible: it may still be being allocated.
        dst = buffers[piece.destination].pointer + piece.dst_offset
        with traced("copy"):
            copies.copy(slot, at, dst + done, nbytes, ordinals[piece.destination])
        arrived(nbytes)

    def scattered(segment: Segment, done: int, nbytes: int, slot: Slot, at: int) -> None:
        scatter(segment, slot, at, copies, buffers, ordinals)
        arrived(nbytes)

    for read in reads:
        source, (segment,) = read.source, read.segments
        assert isinstance(source, Extent)
        piece = direct(segment)
        queue = partial(scattered, segment) if piece is None else partial(whole, piece)
        yield from cut(read, source, SLOT_BYTES, files, queue)


def in_turns(several: Sequence[Parts]) -> Parts:
    """One part of each after the other; None while none of them has one."""
    waiting, without = deque(several), 0
    try:
        while waiting:
            try:
                found = next(waiting[0])
            except StopIteration:
                waiting.popleft()
                continue
            waiting.rotate(-1)
            without = without + 1 if found is None else 0
            if found is not None or without >= len(waiting):
                yield found
                without = 0
    finally:
        for parts in several:
            parts.close()


def merged(first: Parts, second: Parts) -> Parts:
    """All parts of both; those of `second` while `first` has none."""
    try:
        for part in first:
            yield next(second, None) if part is None else part
        yield from second
    finally:
        first.close()
        second.close()


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
            copies.queued(slot, ordinal)


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
