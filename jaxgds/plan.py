"""Index + shardings -> the reads one host makes. Pure: no files, no devices touched.

Each chunk that some addressable shard needs is read once per host; what is
needed by several shards is scattered from that one read. Replicas of a shard
are one destination: they are filled from it afterwards, not from storage.
"""

import dataclasses
import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence

import jax
from jax.sharding import Sharding

from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, Source, StoredArray
from jaxgds.zarr import Codec


# Small enough that many threads share one large array, large enough that a
# system call's cost vanishes.
MAX_READ = 8 << 20
# Segments that are scattered are staged whole, so they must fit into a slot of a staging ring.
MAX_STAGED = 4 << 20
# Runs at least this long are worth a read of their own; shorter ones are read
# together, with the gaps between them, and scattered.
MIN_RUN = 64 << 10

Box = tuple[tuple[int, int], ...]  # (start, stop) along each axis


@dataclasses.dataclass(frozen=True, slots=True)
class Destination:
    """One distinct shard of one array on this host.

    Attributes:
      array: name.
      box: which part of the global array.
      devices: all addressable devices that hold it; the first receives the reads.
    """

    array: str
    box: Box
    devices: tuple[jax.Device, ...]

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(stop - start for start, stop in self.box)


@dataclasses.dataclass(frozen=True, slots=True)
class Piece:
    """A strided copy out of a segment: `shape` runs over bytes, last axis contiguous.

    Byte i of the copy goes from `src_offset` + i . `src_strides` of the segment
    to `dst_offset` + i . `dst_strides` of destination number `destination`.
    """

    destination: int
    shape: tuple[int, ...]
    src_offset: int
    src_strides: tuple[int, ...]
    dst_offset: int
    dst_strides: tuple[int, ...]

    @property
    def contiguous(self) -> bool:
        return len(self.shape) == 1

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape)


@dataclasses.dataclass(frozen=True, slots=True)
class Segment:
    """The next `nbytes` decoded bytes of a read, and where they go."""

    nbytes: int
    pieces: tuple[Piece, ...]


@dataclasses.dataclass(frozen=True, slots=True)
class Read:
    """One range of a file (or inline bytes), decoded front to back into segments.

    A raw read has one segment of exactly `source`'s bytes; a zstd read is one
    whole frame whose decoded bytes are its segments, in order.
    """

    array: str
    source: Source
    codec: Codec
    segments: tuple[Segment, ...]

    @property
    def source_nbytes(self) -> int:
        return len(self.source) if isinstance(self.source, bytes) else self.source.nbytes


@dataclasses.dataclass(frozen=True, slots=True)
class Plan:
    """What to allocate and what to read, reads in file order."""

    destinations: tuple[Destination, ...]
    reads: tuple[Read, ...]

    @property
    def source_nbytes(self) -> int:
        return sum(read.source_nbytes for read in self.reads)


def make_plan(arrays: Sequence[tuple[StoredArray, Sharding]], max_read: int = MAX_READ) -> Plan:
    """Plans the reads that fill every addressable shard of `arrays`.

    Args:
      arrays: each array of the checkpoint with the sharding it is to have.
      max_read: bytes per raw read, and per decoded segment.

    Raises:
      CheckpointError: a chunk is missing or has an impossible size.
    """
    destinations: list[Destination] = []
    reads: list[Read] = []
    for array, sharding in arrays:
        first = len(destinations)
        destinations += shards(array.name, array.layout.shape, sharding)
        reads += _array_reads(array, destinations, first, max_read)
    reads.sort(key=_file_order)
    return Plan(tuple(destinations), tuple(reads))


def shards(name: str, shape: tuple[int, ...], sharding: Sharding) -> list[Destination]:
    """The distinct shards that `sharding` puts on this host's devices."""
    devices: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices[box].append(device)
    return [Destination(name, box, tuple(on)) for box, on in devices.items()]


def _array_reads(
    array: StoredArray, destinations: Sequence[Destination], first: int, max_read: int
) -> Iterator[Read]:
    layout = array.layout
    itemsize = layout.dtype.itemsize
    wanted: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in range(first, len(destinations)):
        spans = [
            range(start // c, -(-stop // c))
            for (start, stop), c in zip(destinations[number].box, layout.chunk, strict=True)
        ]
        for index in itertools.product(*spans):
            wanted[index].append(number)
    for index, numbers in wanted.items():
        source = array.chunk(index)
        origin = tuple(i * c for i, c in zip(index, layout.chunk, strict=True))
        pieces = _Scatter(layout.chunk, origin, itemsize, destinations, numbers)
        if layout.codec == "raw":
            _check_size(array.name, source, layout.chunk_nbytes)
            for at, segment in pieces.ranges(max_read):
                yield Read(array.name, _part(source, at, segment.nbytes), "raw", (segment,))
        else:
            yield Read(array.name, source, layout.codec, tuple(pieces.segments(max_read)))


@dataclasses.dataclass(frozen=True, slots=True)
class _Scatter:
    """One decoded chunk, and the destinations that need parts of it."""

    chunk: tuple[int, ...]
    origin: tuple[int, ...]
    itemsize: int
    destinations: Sequence[Destination]
    numbers: Sequence[int]

    def segments(self, limit: int) -> Iterator[Segment]:
        """The whole chunk, front to back (a compressed frame cannot be entered midway)."""
        whole = self._whole()
        if whole is not None:
            yield Segment(whole.nbytes, (whole,))
            return
        for _, segment in self._walk(limit, lambda n, pieces: [(0, Segment(n, tuple(pieces)))]):
            yield segment

    def ranges(self, limit: int) -> Iterator[tuple[int, Segment]]:
        """Only the bytes that are needed: (offset in the chunk, segment) of each read."""
        whole = self._whole()
        if whole is not None:
            step = max(1, limit // self.itemsize) * self.itemsize
            for at in range(0, whole.nbytes, step):
                n, to = min(step, whole.nbytes - at), whole.dst_offset + at
                yield at, Segment(n, (Piece(whole.destination, (n,), 0, (1,), to, (1,)),))
            return
        yield from self._walk(limit, _needed)

    def _walk(
        self,
        limit: int,
        cut: Callable[[int, list[Piece]], list[tuple[int, Segment]]],
    ) -> Iterator[tuple[int, Segment]]:
        """Slab by slab, what `cut` makes of the slab's size and pieces, at its place in the chunk.

        Slabs of one shape that lie wholly inside every destination differ by a shift only:
        it is most of them, and far cheaper than to intersect boxes again.
        """
        limit = max(1, min(limit, MAX_STAGED) // self.itemsize)
        src = _strides(self.chunk, self.itemsize)
        dst = {n: _strides(self.destinations[n].shape, self.itemsize) for n in self.numbers}
        inside = [
            all(
                lo <= o and o + c <= hi
                for lo, hi in (self.destinations[n].box[axis] for n in self.numbers)
            )
            for axis, (o, c) in enumerate(zip(self.origin, self.chunk, strict=True))
        ]
        first: dict[tuple[int, ...], tuple[Box, list[tuple[int, Segment]]]] = {}
        for slab in slabs(self.chunk, limit):
            shape = tuple(b - a for a, b in slab)
            offset = sum(a * s for (a, _), s in zip(slab, src, strict=True))
            if shape in first:
                other, parts = first[shape]
                shift = [a - b for (a, _), (b, _) in zip(slab, other, strict=True)]
                for at, segment in parts:
                    pieces = tuple(_moved(p, shift, dst[p.destination]) for p in segment.pieces)
                    yield offset + at, Segment(segment.nbytes, pieces)
                continue
            nbytes = math.prod(shape) * self.itemsize
            parts = cut(nbytes, _relative(self._pieces(slab), offset))
            whole = [axis for axis, n in enumerate(shape) if n == self.chunk[axis]]
            if all(inside[axis] or axis in whole for axis in range(len(shape))):
                first[shape] = slab, parts
            for at, segment in parts:
                yield offset + at, segment

    def _whole(self) -> Piece | None:
        """The piece that takes the whole chunk as it is, if there is just that one."""
        pieces = self._pieces(tuple((0, n) for n in self.chunk))
        nbytes = math.prod(self.chunk) * self.itemsize
        if len(pieces) == 1 and pieces[0].contiguous and pieces[0].nbytes == nbytes:
            return pieces[0]
        return None

    def _pieces(self, slab: Box) -> list[Piece]:
        """What each destination needs of `slab`; source offsets count from the chunk's start."""
        pieces = []
        for number in self.numbers:
            box = self.destinations[number].box
            part = [
                (max(a, lo - o), min(b, hi - o))
                for (a, b), (lo, hi), o in zip(slab, box, self.origin, strict=True)
            ]
            if any(a >= b for a, b in part):
                continue
            starts = [lo - o for (lo, _), o in zip(box, self.origin, strict=True)]
            shape = self.destinations[number].shape
            pieces.append(_piece(number, part, self.chunk, starts, shape, self.itemsize))
        return pieces


def _needed(nbytes: int, pieces: list[Piece]) -> list[tuple[int, Segment]]:
    """The runs of a slab that are worth reading: (offset in the slab, segment)."""
    parts = []
    for group in _overlapping([p for piece in pieces for p in _long_runs(piece)]):
        start = min(p.src_offset for p in group)
        stop = max(_src_stop(p) for p in group)
        parts.append((start, Segment(stop - start, tuple(_relative(group, start)))))
    return parts


def _relative(pieces: Sequence[Piece], start: int) -> list[Piece]:
    return [dataclasses.replace(p, src_offset=p.src_offset - start) for p in pieces]


def _moved(piece: Piece, shift: Sequence[int], strides: Sequence[int]) -> Piece:
    """The same copy out of a slab that lies `shift` elements further along each axis."""
    by = sum(n * s for n, s in zip(shift, strides, strict=True))
    return Piece(
        piece.destination,
        piece.shape,
        piece.src_offset,
        piece.src_strides,
        piece.dst_offset + by,
        piece.dst_strides,
    )


def _piece(
    number: int,
    part: Sequence[tuple[int, int]],
    src_shape: Sequence[int],
    dst_origin: Sequence[int],
    dst_shape: Sequence[int],
    itemsize: int,
) -> Piece:
    """The copy of box `part` from an array of `src_shape` into one of `dst_shape`.

    Axes that are contiguous on both sides are merged, so that the common case is one run.
    """
    src, dst = _strides(src_shape, itemsize), _strides(dst_shape, itemsize)
    shape, src_strides, dst_strides = [itemsize], [1], [1]
    for (a, b), s, d in reversed(list(zip(part, src, dst, strict=True))):
        n, run = b - a, shape[0] * src_strides[0]
        if n == 1:
            continue
        if s == run and d == shape[0] * dst_strides[0]:
            shape[0] *= n
        else:
            shape.insert(0, n)
            src_strides.insert(0, s)
            dst_strides.insert(0, d)
    return Piece(
        destination=number,
        shape=tuple(shape),
        src_offset=sum(a * s for (a, _), s in zip(part, src, strict=True)),
        src_strides=tuple(src_strides),
        dst_offset=sum((a - o) * d for (a, _), o, d in zip(part, dst_origin, dst, strict=True)),
        dst_strides=tuple(dst_strides),
    )


def slabs(shape: tuple[int, ...], limit: int) -> Iterator[Box]:
    """Cuts an array into boxes that are contiguous in C order, of at most `limit` elements."""
    axis, inner = len(shape), 1
    while axis > 0 and inner * shape[axis - 1] <= limit:
        axis -= 1
        inner *= shape[axis]
    if axis == 0:
        yield tuple((0, n) for n in shape)
        return
    axis -= 1  # the axis that is cut; those before it are walked one by one
    step = max(1, limit // inner)
    rest = tuple((0, n) for n in shape[axis + 1 :])
    for outer in itertools.product(*map(range, shape[:axis])):
        for start in range(0, shape[axis], step):
            cut = (start, min(start + step, shape[axis]))
            yield (*((i, i + 1) for i in outer), cut, *rest)


def _long_runs(piece: Piece) -> Iterator[Piece]:
    """Splits a strided piece into its runs where these are long enough to be read alone."""
    if piece.contiguous or piece.shape[-1] < MIN_RUN:
        yield piece
        return
    for index in itertools.product(*map(range, piece.shape[:-1])):
        yield Piece(
            piece.destination,
            piece.shape[-1:],
            piece.src_offset + sum(i * s for i, s in zip(index, piece.src_strides, strict=False)),
            (1,),
            piece.dst_offset + sum(i * s for i, s in zip(index, piece.dst_strides, strict=False)),
            (1,),
        )


def _overlapping(pieces: list[Piece]) -> Iterator[list[Piece]]:
    """Groups pieces whose byte spans overlap: these are read together, others alone."""
    group: list[Piece] = []
    stop = 0
    for piece in sorted(pieces, key=lambda p: p.src_offset):
        if group and piece.src_offset >= stop:
            yield group
            group = []
        group.append(piece)
        stop = max(stop, _src_stop(piece))
    if group:
        yield group


def _src_stop(piece: Piece) -> int:
    """One past the last source byte."""
    return (
        piece.src_offset
        + sum((n - 1) * s for n, s in zip(piece.shape, piece.src_strides, strict=True))
        + 1
    )


def _strides(shape: Sequence[int], itemsize: int) -> list[int]:
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides


def _part(source: Source, at: int, nbytes: int) -> Source:
    if isinstance(source, bytes):
        return source[at : at + nbytes]
    return Extent(source.file, source.offset + at, nbytes)


def _check_size(name: str, source: Source, nbytes: int) -> None:
    have = len(source) if isinstance(source, bytes) else source.nbytes
    if have != nbytes:
        where = "inline value" if isinstance(source, bytes) else source.file
        raise CheckpointError(
            f"array {name!r}: {where}: a chunk of {nbytes} bytes is stored in {have} bytes; "
            "the file is truncated or the metadata is damaged"
        )


def _file_order(read: Read) -> tuple[str, int]:
    source = read.source
    return ("", 0) if isinstance(source, bytes) else (source.file, source.offset)
