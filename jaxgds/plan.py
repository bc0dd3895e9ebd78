"""Index + shardings -> the reads one host makes. Pure: no files, no devices touched.

Each chunk that some addressable shard needs is read once per host; what is
needed by several shards is scattered from that one read. Replicas of a shard
are one destination: they are filled from it afterwards, not from storage.
"""

import dataclasses
import functools
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import NamedTuple

import jax
from jax.sharding import Sharding

from jaxgds.index import Extent, Source, StoredArray, indices
from jaxgds.scatter import Box, Destination, Need, Scatter, Segment, placed, strides_of
from jaxgds.zarr import Codec, Layout


# Small enough that many threads share one large array, large enough that a
# system call's cost vanishes.
MAX_READ = 16 << 20


class Read(NamedTuple):
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


def summary(plan: Plan) -> str:
    """What is read and where it goes, in one line."""
    files = {r.source.file for r in plan.reads if isinstance(r.source, Extent)}
    codecs = sorted({r.codec for r in plan.reads})
    devices = {d for destination in plan.destinations for d in destination.devices}
    return (
        f"{len(plan.reads)} reads ({', '.join(codecs)}) of {plan.source_nbytes:,} bytes from "
        f"{len(files)} files, into {len(plan.destinations)} shards on {len(devices)} devices"
    )


def all_shards(arrays: Sequence[tuple[StoredArray, Sharding]]) -> tuple[Destination, ...]:
    """What to allocate for `arrays`: the distinct shards of each, in order."""
    shards = functools.cache(_shards)
    return tuple(
        Destination(array.name, box, devices)
        for array, sharding in arrays
        for box, devices in shards(array.layout.shape, sharding)
    )


def _shards(shape: tuple[int, ...], sharding: Sharding) -> list[tuple[Box, tuple[jax.Device, ...]]]:
    """The distinct shards that `sharding` puts on this host's devices."""
    devices: dict[Box, list[jax.Device]] = defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        box = tuple(s.indices(n)[:2] for s, n in zip(index, shape, strict=True))
        devices[box].append(device)
    return [(box, tuple(on)) for box, on in devices.items()]


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
    cut = functools.cache(functools.partial(_cut, max_read))
    kinds: dict[tuple[Layout, tuple[Box, ...]], list[_Chunk]] = {}
    reads: list[Read] = []
    for array, _ in arrays:
        mine = numbers[array.name]
        layout, boxes = kind = array.layout, tuple(destinations[n].box for n in mine)
        if kind in kinds:
            sources = [_source(array, chunk.at) for chunk in kinds[kind]]
        else:
            wanted, sources = _wanted(array, boxes)
            kinds[kind] = list(_chunks(layout, boxes, wanted, cut))
        reads += _reads(array, mine, kinds[kind], sources)
    reads.sort(key=_file_order)
    return Plan(destinations, tuple(reads))


class _Chunk(NamedTuple):
    """What is read of one chunk; the same for all arrays of one layout and equal shards.

    Attributes:
      parts: of a `Scatter` for the shards that need the chunk.
      to: of each of these, its number among the array's, and where the chunk begins in it.
    """

    at: tuple[int, ...]
    parts: list[tuple[int, Segment]]
    to: list[tuple[int, int]]


def _wanted(
    array: StoredArray, boxes: Sequence[Box]
) -> tuple[dict[tuple[int, ...], list[int]], list[Source]]:
    """The chunks that shards need, with the numbers of these shards, and where each chunk lies."""
    wanted: dict[tuple[int, ...], list[int]] = {}
    sources: list[Source] = []
    for number, box in enumerate(boxes):
        spans = [
            range(start // c, -(-stop // c))
            for (start, stop), c in zip(box, array.layout.chunk, strict=True)
        ]
        for index in indices(spans):
            if index not in wanted:  # at once: a grid may name more chunks than memory has room for
                sources.append(_source(array, index))
                wanted[index] = []
            wanted[index].append(number)
    return wanted, sources


def _source(array: StoredArray, index: tuple[int, ...]) -> Source:
    source = array.chunk(index)
    array.check_chunk(source)
    return source


def _chunks(
    layout: Layout,
    boxes: Sequence[Box],
    wanted: Mapping[tuple[int, ...], Sequence[int]],
    cut: Callable[..., list[tuple[int, Segment]]],
) -> Iterator[_Chunk]:
    itemsize = layout.dtype.itemsize
    shapes = [tuple(hi - lo for lo, hi in box) for box in boxes]
    strides = [strides_of(shape, itemsize) for shape in shapes]
    for index, numbers in wanted.items():
        needs, to = [], []
        for n in numbers:
            # As the chunk sees it, whose first element is at 0.
            box = [
                (lo - i * c, hi - i * c)
                for (lo, hi), i, c in zip(boxes[n], index, layout.chunk, strict=True)
            ]
            part = tuple(
                (max(0, lo), min(c, hi)) for (lo, hi), c in zip(box, layout.chunk, strict=True)
            )
            needs.append((part, shapes[n]))
            to.append((n, -sum(lo * s for (lo, _), s in zip(box, strides[n], strict=True))))
        yield _Chunk(index, cut(layout.codec, layout.chunk, itemsize, tuple(needs)), to)


def _cut(
    limit: int, codec: Codec, chunk: tuple[int, ...], itemsize: int, needs: tuple[Need, ...]
) -> list[tuple[int, Segment]]:
    return Scatter(chunk, itemsize, needs).parts(codec, limit)


def _reads(
    array: StoredArray, numbers: Sequence[int], chunks: Sequence[_Chunk], sources: Sequence[Source]
) -> Iterator[Read]:
    codec = array.layout.codec
    for chunk, source in zip(chunks, sources, strict=True):
        to = [(numbers[n], shift) for n, shift in chunk.to]
        parts = [(at, placed(segment, to)) for at, segment in chunk.parts]
        if codec == "raw":
            for at, segment in parts:
                yield Read(array.name, _part(source, at, segment.nbytes), "raw", (segment,))
        else:
            yield Read(array.name, source, codec, tuple(s for _, s in parts))


def _part(source: Source, at: int, nbytes: int) -> Source:
    if isinstance(source, bytes):
        return source[at : at + nbytes]
    return Extent(source.file, source.offset + at, nbytes)


def _file_order(read: Read) -> tuple:
    return () if isinstance(read.source, bytes) else read.source
