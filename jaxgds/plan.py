"""Index + shardings -> the reads one host makes. Pure: no files, no devices touched.

Each chunk that some addressable shard needs is read once per host; what is
needed by several shards is scattered from that one read. Replicas of a shard
are one destination: they are filled from it afterwards, not from storage.
"""

import dataclasses
import itertools
import math
import operator
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
from jax.sharding import Sharding

from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, Source, StoredArray
from jaxgds.zarr import Codec


# Small enough that many threads share one large array, large enough that a
# system call's cost vanishes.
MAX_READ = 16 << 20
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


def all_shards(arrays: Sequence[tuple[StoredArray, Sharding]]) -> tuple[Destination, ...]:
    """What to allocate for `arrays`: the distinct shards of each, in order."""
    found = [shards(array.name, array.layout.shape, sharding) for array, sharding in arrays]
    return tuple(itertools.chain.from_iterable(found))


def make_plan(
    arrays: Sequence[tuple[StoredArray, Sharding]],
    max_read: int = MAX_READ,
    destinations: tuple[Destination, ...] | None = None,
) -> Plan:
    """Plans the reads that fill every addressable shard of `arrays`.

    Args:
      arrays: each array of the checkpoint with the sharding it is to have.
      max_read: bytes per raw read, and per decoded segment.
      destinations: `all_shards(arrays)`, where that is known already.

    Raises:
      CheckpointError: a chunk is missing or has an impossible size.
    """
    if destinations is None:
        destinations = all_shards(arrays)
    numbers: dict[str, list[int]] = defaultdict(list)
    for number, destination in enumerate(destinations):
        numbers[destination.array].append(number)
    reads: list[Read] = []
    for array, _ in arrays:
        reads += _array_reads(array, destinations, numbers[array.name], max_read)
    reads.sort(key=_file_order)
    return Plan(destinations, tuple(reads))


def shards(name: str, shape: tuple[int, ...], sharding: Sharding) -> list[Destination]:
    """The distinct shards that `sharding` puts on this host's devices."""
    devices: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices[box].append(device)
    return [Destination(name, box, tuple(on)) for box, on in devices.items()]


def _array_reads(
    array: StoredArray, destinations: Sequence[Destination], numbers: Sequence[int], max_read: int
) -> Iterator[Read]:
    layout = array.layout
    wanted: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number in numbers:
        spans = [
            range(start // c, -(-stop // c))
            for (start, stop), c in zip(destinations[number].box, layout.chunk, strict=True)
        ]
        for index in itertools.product(*spans):
            wanted[index].append(number)
    strides = {n: _strides(destinations[n].shape, layout.dtype.itemsize) for n in numbers}
    alike: dict[tuple[int, ...], tuple[tuple[int, ...], list[tuple[int, Segment]]]] = {}
    for index, needed_by in wanted.items():
        source = array.chunk(index)
        origin = tuple(i * c for i, c in zip(index, layout.chunk, strict=True))
        chunk = _Scatter(layout.chunk, origin, layout.dtype.itemsize, destinations, needed_by)
        # Chunks that lie wholly inside the same destinations differ by a shift only, and
        # to shift is far cheaper than to intersect boxes again.
        if all(chunk.inside) and (key := tuple(needed_by)) in alike:
            first, parts = alike[key]
            shift = [a - b for a, b in zip(origin, first, strict=True)]
            parts = [(at, _moved(segment, shift, strides)) for at, segment in parts]
        else:
            parts = list(chunk.parts(layout.codec, max_read))
            if all(chunk.inside):
                alike[tuple(needed_by)] = origin, parts
        if layout.codec == "raw":
            _check_size(array.name, source, layout.chunk_nbytes)
            for at, segment in parts:
                yield Read(array.name, _part(source, at, segment.nbytes), "raw", (segment,))
        else:
            yield Read(array.name, source, layout.codec, tuple(s for _, s in parts))


class _Scatter:
    """One decoded chunk, and the destinations that need parts of it.

    Attributes:
      inside: per axis, whether the chunk lies wholly within each destination.
    """

    def __init__(
        self,
        chunk: tuple[int, ...],
        origin: tuple[int, ...],
        itemsize: int,
        destinations: Sequence[Destination],
        numbers: Sequence[int],
    ):
        self.chunk, self.origin, self.itemsize = chunk, origin, itemsize
        self.destinations, self.numbers = destinations, numbers
        self.inside = [True] * len(chunk)
        for n in numbers:
            for axis, (lo, hi) in enumerate(destinations[n].box):
                if not lo <= origin[axis] <= origin[axis] + chunk[axis] <= hi:
                    self.inside[axis] = False

    def parts(self, codec: Codec, limit: int) -> Iterator[tuple[int, Segment]]:
        """The segments to read, and where in the chunk they start.

        Of a raw chunk those that are needed; of a compressed one, which cannot be entered midway,
        all.
        """
        whole = self._whole()
        if whole is None:
            yield from self._walk(limit, _needed if codec == "raw" else _everything)
            return
        step = max(1, limit // self.itemsize) * self.itemsize if codec == "raw" else whole.nbytes
        for at in range(0, whole.nbytes, step):
            n, to = min(step, whole.nbytes - at), whole.dst_offset + at
            yield at, Segment(n, (Piece(whole.destination, (n,), 0, (1,), to, (1,)),))

    def _walk(
        self,
        limit: int,
        cut: Callable[[int, list[Piece]], list[tuple[int, Segment]]],
    ) -> Iterator[tuple[int, Segment]]:
        """What `cut` makes of each slab (its size, its pieces), at its place in the chunk."""
        limit = max(1, min(limit, MAX_STAGED) // self.itemsize)
        src = _strides(self.chunk, self.itemsize)
        dst = {n: _strides(self.destinations[n].shape, self.itemsize) for n in self.numbers}
        alike: dict[tuple[int, ...], tuple[Box, list[tuple[int, Segment]]]] = {}
        for slab in slabs(self.chunk, limit):
            shape = tuple(b - a for a, b in slab)
            offset = sum(a * s for (a, _), s in zip(slab, src, strict=True))
            if shape in alike:
                first, parts = alike[shape]
                shift = [a - b for (a, _), (b, _) in zip(slab, first, strict=True)]
                parts = [(at, _moved(segment, shift, dst)) for at, segment in parts]
            else:
                nbytes = math.prod(shape) * self.itemsize
                parts = cut(nbytes, _relative(self._pieces(slab), offset))
                cut_axes = [axis for axis, n in enumerate(shape) if n < self.chunk[axis]]
                if all(self.inside[axis] for axis in cut_axes):
                    alike[shape] = slab, parts
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


def _everything(nbytes: int, pieces: list[Piece]) -> list[tuple[int, Segment]]:
    return [(0, Segment(nbytes, tuple(pieces)))]


def _relative(pieces: Sequence[Piece], start: int) -> list[Piece]:
    return [dataclasses.replace(p, src_offset=p.src_offset - start) for p in pieces]


def _moved(segment: Segment, shift: Sequence[int], strides: Mapping[int, list[int]]) -> Segment:
    """The same copies out of bytes that lie `shift` elements further along each axis.

    Args:
      strides: of each destination.
    """
    return Segment(
        segment.nbytes,
        tuple(
            Piece(
                p.destination,
                p.shape,
                p.src_offset,
                p.src_strides,
                p.dst_offset + sum(map(operator.mul, shift, strides[p.destination])),
                p.dst_strides,
            )
            for p in segment.pieces
        ),
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
