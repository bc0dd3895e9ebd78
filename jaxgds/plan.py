"""Index + shardings -> the reads one host makes. Pure: no files, no devices touched.

Each chunk that some addressable shard needs is read once per host; what is
needed by several shards is scattered from that one read. Replicas of a shard
are one destination: they are filled from it afterwards, not from storage.
"""

import dataclasses
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Sharding

from jaxgds.index import Extent, Source, StoredArray, indices
from jaxgds.scatter import Box, Destination, Scatter, Segment, moved, strides_of
from jaxgds.zarr import Codec


# Small enough that many threads share one large array, large enough that a
# system call's cost vanishes.
MAX_READ = 16 << 20


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
    sources: dict[tuple[int, ...], Source] = {}
    for number in numbers:
        spans = [
            range(start // c, -(-stop // c))
            for (start, stop), c in zip(destinations[number].box, layout.chunk, strict=True)
        ]
        for index in indices(spans):
            if (
                index not in sources
            ):  # at once: a grid may name more chunks than memory has room for
                sources[index] = array.chunk(index)
            wanted[index].append(number)
    strides = {n: strides_of(destinations[n].shape, layout.dtype.itemsize) for n in numbers}
    alike: dict[tuple[int, ...], tuple[tuple[int, ...], list[tuple[int, Segment]]]] = {}
    for index, needed_by in wanted.items():
        source = sources[index]
        array.check_chunk(source)
        origin = tuple(i * c for i, c in zip(index, layout.chunk, strict=True))
        chunk = Scatter(layout.chunk, origin, layout.dtype.itemsize, destinations, needed_by)
        # Chunks that lie wholly inside the same destinations differ by a shift only, and
        # to shift is far cheaper than to intersect boxes again.
        if all(chunk.inside) and (key := tuple(needed_by)) in alike:
            first, parts = alike[key]
            shift = [a - b for a, b in zip(origin, first, strict=True)]
            parts = [(at, moved(segment, shift, strides)) for at, segment in parts]
        else:
            parts = list(chunk.parts(layout.codec, max_read))
            if all(chunk.inside):
                alike[tuple(needed_by)] = origin, parts
        if layout.codec == "raw":
            for at, segment in parts:
                yield Read(array.name, _part(source, at, segment.nbytes), "raw", (segment,))
        else:
            yield Read(array.name, source, layout.codec, tuple(s for _, s in parts))


def _part(source: Source, at: int, nbytes: int) -> Source:
    if isinstance(source, bytes):
        return source[at : at + nbytes]
    return Extent(source.file, source.offset + at, nbytes)


def _file_order(read: Read) -> tuple[str, int]:
    source = read.source
    return ("", 0) if isinstance(source, bytes) else (source.file, source.offset)
