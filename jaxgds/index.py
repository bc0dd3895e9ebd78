"""Checkpoint metadata -> which bytes lie where. Reads no array data.

An Orbax item directory (the one with `_METADATA`) keeps its arrays as a zarr
key-value store, either in one OCDBT B-tree or as plain files. `Index.array(name)`
answers, for one array, where each chunk's bytes are: a range of a file, or
the bytes themselves when the B-tree holds them inline.
"""

import contextlib
import dataclasses
import itertools
import math
import os
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np

from jaxgds import zarr
from jaxgds.crc import crc32c as crc32c
from jaxgds.errors import CheckpointError
from jaxgds.values import MAX_NODE, Files, ValueLostError, open_values, read_metadata
from jaxgds.values import Database as Database
from jaxgds.values import Extent as Extent
from jaxgds.values import Source as Source
from jaxgds.workers import watched


ZSTD_BLOCK = 128 << 10  # what a zstd block, of four bytes at least, can at most expand to
_ABSENT = 2**64 - 1  # offset and length, in a shard's index, of a chunk that was not stored


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
    """One array of a checkpoint: its layout, and where each of its chunks lies."""

    name: str
    layout: zarr.Layout
    _values: Mapping[str, Source]
    _shard_indices: dict[tuple[int, ...], np.ndarray] = dataclasses.field(default_factory=dict)

    @property
    def grid(self) -> tuple[int, ...]:
        """Number of chunks along each axis."""
        return tuple(-(-n // c) for n, c in zip(self.layout.shape, self.layout.chunk, strict=True))

    def chunk(self, index: tuple[int, ...]) -> Source:
        """Where the chunk at `index` of the chunk grid lies (its encoded bytes).

        Raises:
          CheckpointError: the chunk is missing, or a shard's index is damaged.
        """
        layout = self.layout
        if not layout.sharded:
            return self._value(index)
        per = layout.per_stored
        outer = tuple(i // p for i, p in zip(index, per, strict=True))
        source = self._value(outer)
        if outer not in self._shard_indices:
            self._shard_indices[outer] = self._read_shard_index(source)
        inner = tuple(i % p for i, p in zip(index, per, strict=True))
        at, length = self._shard_indices[outer][_ravel(inner, per)].tolist()
        if at == length == _ABSENT:
            raise CheckpointError(
                f"array {self.name!r}: {_where(source)}: its shard lacks chunk {index}"
            )
        if isinstance(source, bytes):
            return source[at : at + length]
        return Extent(source.file, source.offset + at, length)

    def chunks(self) -> Iterator[tuple[tuple[int, ...], Source]]:
        for index in indices([range(n) for n in self.grid]):
            yield index, self.chunk(index)

    def check_stored(self) -> None:
        """Raises CheckpointError if what is stored is too little to be the whole array.

        Costs far less than to look at every chunk, and comes before memory is allocated.
        """
        assert isinstance(self._values, Database | Files)
        sizes = self._values.sizes(value_key(self.name, ""))
        zstd = self.layout.codec == "zstd"
        try:
            most = sum(decoded_at_most(n) if zstd else n for n in sizes)
        except ValueLostError as e:
            raise CheckpointError(f"array {self.name!r}: {e}") from e
        nbytes = math.prod(self.layout.shape) * self.layout.dtype.itemsize
        if nbytes > most:
            for _, source in self.chunks():  # the first that is missing or too small says more
                self.check_chunk(source)
            raise CheckpointError(
                f"array {self.name!r}: shape={self.layout.shape} of {self.layout.dtype} takes "
                f"{nbytes} bytes, but what is stored can be {most} at most; "
                "the metadata is damaged"
            )

    def check_chunk(self, source: Source) -> None:
        """Raises CheckpointError if the bytes of a chunk cannot be those of a whole one."""
        have, nbytes = nbytes_of(source), self.layout.chunk_nbytes
        zstd = self.layout.codec == "zstd"
        if nbytes > decoded_at_most(have) if zstd else nbytes != have:
            raise CheckpointError(
                f"array {self.name!r}: {_where(source)}: a chunk of {nbytes} bytes is stored in "
                f"{have} bytes; the file is truncated or the metadata is damaged"
            )

    def _value(self, outer: tuple[int, ...]) -> Source:
        key = value_key(self.name, self.layout.key(outer))
        try:
            return self._values[key]
        except KeyError:
            raise CheckpointError(f"array {self.name!r}: its chunk {key!r} is missing") from None
        except ValueLostError as e:
            raise CheckpointError(f"array {self.name!r}: {e}") from e

    def _read_shard_index(self, source: Source) -> np.ndarray:
        """(offset, length) of each chunk of one shard, from the index at the shard's end."""
        count = math.prod(self.layout.per_stored)
        size, total = 16 * count + 4, nbytes_of(source)
        where = f"array {self.name!r}: {_where(source)}"
        if size > min(total, MAX_NODE):
            raise CheckpointError(
                f"{where}: {total} bytes are no shard of {count} chunks; "
                "the file is truncated or the metadata is damaged"
            )
        raw = _tail(source, size, self.name)
        (checksum,) = struct.unpack("<I", raw[-4:])
        if checksum != crc32c(raw[:-4]):
            raise CheckpointError(f"{where}: a shard index fails its checksum")
        entries = np.frombuffer(raw[:-4], "<u8").reshape(count, 2)
        at, length = entries.T
        absent = (at == _ABSENT) & (length == _ABSENT)
        room = np.uint64(total - size)
        if (~absent & ((at > room) | (length > room - np.minimum(at, room)))).any():
            raise CheckpointError(f"{where}: a shard index points outside")
        return entries


class Index:
    """The arrays of one Orbax item directory, by parameter name (key path joined by dots).

    An item that is a single array, not a tree, has the name "".
    """

    def __init__(self, path: str, values: Mapping[str, Source]):
        self.path = path
        self._values = values
        self._metadata: dict[str, tuple[bytes | None, bytes | None]] = {}
        self._layouts: dict[tuple[bytes | None, bytes | None], zarr.Layout] = {}

    def fetch(self, names: Iterable[str]) -> None:
        """Reads the metadata of these arrays; what is wrong with it, `array` says.

        Raises:
          TimeoutError: the file system does not answer.
        """

        def work() -> None:
            for name in names:
                with contextlib.suppress(CheckpointError):
                    self._read(name)

        watched(work)

    def __contains__(self, name: str) -> bool:
        return any(value_key(name, file) in self._values for file in (".zarray", "zarr.json"))

    def names(self) -> list[str]:
        """Names of all arrays, sorted."""
        keys = (key.rpartition("/") for key in self._values)
        return sorted({name for name, _, file in keys if file in (".zarray", "zarr.json")})

    def array(self, name: str) -> StoredArray:
        """The array called `name`.

        Raises:
          CheckpointError: there is none, or its metadata is damaged.
          NotImplementedError: its encoding is not read here (codec, order, filter).
        """
        v2, v3 = self._read(name)
        if v2 is None and v3 is None:
            raise CheckpointError(
                f"{self.path}: no array {name!r} in this checkpoint; it has {_few(self.names())}"
            )
        layout = self._layouts.get((v2, v3))
        if layout is None:
            layout = self._layouts[v2, v3] = zarr.parse(v2, v3, name)
        return StoredArray(name, layout, self._values)

    def _read(self, name: str) -> tuple[bytes | None, bytes | None]:
        """`.zarray` and `zarr.json`."""
        if name not in self._metadata:
            v2, v3 = (self._read_file(name, file) for file in (".zarray", "zarr.json"))
            self._metadata[name] = v2, v3
        return self._metadata[name]

    def _read_file(self, name: str, file: str) -> bytes | None:
        try:
            source = self._values[value_key(name, file)]
        except KeyError:
            return None
        except ValueLostError as e:
            raise CheckpointError(f"array {name!r}: {e}") from e
        return _tail(source, nbytes_of(source), name)


def open_index(path: str | os.PathLike[str]) -> Index:
    """Opens an Orbax item directory (the one that holds `_METADATA`).

    Raises:
      CheckpointError: not a directory, or its OCDBT manifest or tree is damaged.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: not a checkpoint directory")
    return Index(path, open_values(path))


def _tail(source: Source, nbytes: int, name: str) -> bytes:
    """The last `nbytes` bytes of a value."""
    if isinstance(source, bytes):
        return source[len(source) - nbytes :]
    try:
        return read_metadata(source.file, source.offset + source.nbytes - nbytes, nbytes)
    except (OSError, ValueError) as e:
        raise CheckpointError(f"array {name!r}: cannot read {source.file}: {e}") from e


def indices(spans: Sequence[range]) -> Iterator[tuple[int, ...]]:
    """`itertools.product` that needs no memory in proportion to the spans."""
    if all(len(span) < 1 << 16 for span in spans):
        yield from itertools.product(*spans)
        return
    for i in spans[0]:
        for rest in indices(spans[1:]):
            yield (i, *rest)


def value_key(name: str, rest: str) -> str:
    """Key of `rest`, metadata or a chunk; an array that is the whole item has no folder."""
    return f"{name}/{rest}" if name else rest


def decoded_at_most(nbytes: int) -> int:
    """What that many bytes of zstd data can at most expand to."""
    return (nbytes // 4 + 1) * ZSTD_BLOCK


def nbytes_of(source: Source) -> int:
    return len(source) if isinstance(source, bytes) else source.nbytes


def _where(source: Source) -> str:
    return "inline value" if isinstance(source, bytes) else source.file


def _ravel(index: tuple[int, ...], shape: tuple[int, ...]) -> int:
    flat = 0
    for i, n in zip(index, shape, strict=True):
        flat = flat * n + i
    return flat


def _few(names: list[str]) -> str:
    more = f" and {len(names) - 8} more" if len(names) > 8 else ""
    return ", ".join(map(repr, names[:8])) + more
