"""One decoded chunk -> the strided copies that bring it to its destinations. Pure."""

import itertools
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import jax

from jaxgds.zarr import Codec


# Segments that are scattered are staged whole, so they must fit into a slot of a staging ring.
MAX_STAGED = 4 << 20
# Runs at least this long are worth a read of their own; shorter ones are read
# together, with the gaps between them, and scattered.
MIN_RUN = 64 << 10

Box = tuple[tuple[int, int], ...]  # (start, stop) along each axis
Need = tuple[Box, tuple[int, ...]]  # a box of a chunk, and the shape of the shard it belongs to


class Destination(NamedTuple):
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


class Piece(NamedTuple):
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


class Segment(NamedTuple):
    """The next `nbytes` decoded bytes of a read, and where they go."""

    nbytes: int
    pieces: tuple[Piece, ...]


class Scatter:
    """One decoded chunk, and what several destinations need of it.

    Here these have the numbers of their `needs`, and offsets into one count from where the chunk's
    first element lies, or would lie: so that one Scatter does for all chunks that are needed alike,
    with `placed`.
    """

    def __init__(self, chunk: tuple[int, ...], itemsize: int, needs: Sequence[Need]):
        self.chunk, self.itemsize, self.needs = chunk, itemsize, needs
        self._src = strides_of(chunk, itemsize)
        self._dst = [strides_of(shape, itemsize) for _, shape in needs]

    def parts(self, codec: Codec, limit: int) -> list[tuple[int, Segment]]:
        """The segments to read, and where in the chunk they start.

        Of a raw chunk those that are needed; of a compressed one, which cannot be entered midway,
        all.
        """
        nbytes = math.prod(self.chunk) * self.itemsize
        pieces = self._pieces(tuple((0, n) for n in self.chunk))
        if len(pieces) != 1 or not pieces[0].contiguous or pieces[0].nbytes != nbytes:
            return list(self._walk(limit, _needed if codec == "raw" else _everything))
        step = max(1, limit // self.itemsize) * self.itemsize if codec == "raw" else nbytes
        sizes = [(at, min(step, nbytes - at)) for at in range(0, nbytes, step)]
        return [(at, Segment(n, (Piece(0, (n,), 0, (1,), at, (1,)),))) for at, n in sizes]

    def _walk(
        self,
        limit: int,
        cut: Callable[[int, list[Piece]], list[tuple[int, Segment]]],
    ) -> Iterator[tuple[int, Segment]]:
        """What `cut` makes of each slab (its size, its pieces), at its place in the chunk."""
        limit = max(1, min(limit, MAX_STAGED) // self.itemsize)
        whole = [
            all(box[axis] == (0, n) for box, _ in self.needs) for axis, n in enumerate(self.chunk)
        ]
        alike: dict[tuple[int, ...], tuple[Box, list[tuple[int, Segment]]]] = {}
        for slab in slabs(self.chunk, limit):
            shape = tuple(b - a for a, b in slab)
            offset = sum(a * s for (a, _), s in zip(slab, self._src, strict=True))
            if shape in alike:
                first, parts = alike[shape]
                shift = [a - b for (a, _), (b, _) in zip(slab, first, strict=True)]
                to = [(n, sum(map(operator.mul, shift, dst))) for n, dst in enumerate(self._dst)]
                parts = [(at, placed(segment, to)) for at, segment in parts]
            else:
                nbytes = math.prod(shape) * self.itemsize
                parts = cut(nbytes, _relative(self._pieces(slab), offset))
                if all(whole[axis] for axis, n in enumerate(shape) if n < self.chunk[axis]):
                    alike[shape] = slab, parts
            for at, segment in parts:
                yield offset + at, segment

    def _pieces(self, slab: Box) -> list[Piece]:
        """What each destination needs of `slab`; source offsets count from the chunk's start."""
        pieces = []
        for number, ((box, _), dst) in enumerate(zip(self.needs, self._dst, strict=True)):
            part = [(max(a, lo), min(b, hi)) for (a, b), (lo, hi) in zip(slab, box, strict=True)]
            if all(a < b for a, b in part):
                pieces.append(_piece(number, part, self._src, dst, self.itemsize))
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


def _relative(pieces: list[Piece], start: int) -> list[Piece]:
    return [p._replace(src_offset=p.src_offset - start) for p in pieces] if start else pieces


def placed(segment: Segment, to: Sequence[tuple[int, int]]) -> Segment:
    """The same copies to other places.

    Args:
      to: for each destination number of `segment`, the one to have instead, and by how many bytes
        what is copied there moves.
    """
    pieces = []
    for number, shape, src_offset, src_strides, dst_offset, dst_strides in segment.pieces:
        number, shift = to[number]
        pieces.append(
            Piece(number, shape, src_offset, src_strides, dst_offset + shift, dst_strides)
        )
    return Segment(segment.nbytes, tuple(pieces))


def _piece(
    number: int,
    part: Sequence[tuple[int, int]],
    src: Sequence[int],
    dst: Sequence[int],
    itemsize: int,
) -> Piece:
    """The copy of box `part` between arrays in C order that have those strides.

    Axes that are contiguous on both sides are merged, so that the common case is one run.
    """
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
        dst_offset=sum(a * d for (a, _), d in zip(part, dst, strict=True)),
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


def strides_of(shape: Sequence[int], itemsize: int) -> list[int]:
    """Strides in bytes of an array in C order."""
    strides = [itemsize] * len(shape)
    for axis in range(len(shape) - 2, -1, -1):
        strides[axis] = strides[axis + 1] * shape[axis + 1]
    return strides
