"""Checkpoint metadata -> which bytes lie where. Reads no array data.

An Orbax item directory (the one with `_METADATA`) keeps its arrays as a zarr
key-value store, either in one OCDBT B-tree or as plain files. `Index.array(name)`
answers, for one array, where each chunk's bytes are: a range of a file, or
the bytes themselves when the B-tree holds them inline.
"""

import dataclasses
import functools
import itertools
import math
import os
import struct
from collections.abc import Iterator, Mapping
from urllib.parse import unquote

import tensorstore as ts

from jaxgds import zarr
from jaxgds.errors import CheckpointError


@dataclasses.dataclass(frozen=True, slots=True)
class Extent:
    """A byte range of a file."""

    file: str
    offset: int
    nbytes: int


Source = Extent | bytes  # bytes: a value held inline by the metadata
_ABSENT = 2**64 - 1  # offset and length, in a shard's index, of a chunk that was not stored


@dataclasses.dataclass(frozen=True, eq=False)
class StoredArray:
    """One array of a checkpoint: its layout, and where each of its chunks lies."""

    name: str
    layout: zarr.Layout
    _values: Mapping[str, Source]
    _shard_indices: dict[tuple[int, ...], list[tuple[int, int]]] = dataclasses.field(
        default_factory=dict
    )

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
        per = layout.per_stored
        outer = tuple(i // p for i, p in zip(index, per, strict=True))
        source = self._value(outer)
        if not layout.sharded:
            return source
        if outer not in self._shard_indices:
            self._shard_indices[outer] = self._read_shard_index(source)
        inner = tuple(i % p for i, p in zip(index, per, strict=True))
        at, length = self._shard_indices[outer][_ravel(inner, per)]
        if at == length == _ABSENT:
            raise CheckpointError(
                f"array {self.name!r}: {_where(source)}: its shard lacks chunk {index}"
            )
        if isinstance(source, bytes):
            return source[at : at + length]
        return Extent(source.file, source.offset + at, length)

    def chunks(self) -> Iterator[tuple[tuple[int, ...], Source]]:
        for index in itertools.product(*map(range, self.grid)):
            yield index, self.chunk(index)

    def _value(self, outer: tuple[int, ...]) -> Source:
        key = value_key(self.name, self.layout.key(outer))
        try:
            return self._values[key]
        except KeyError:
            raise CheckpointError(f"array {self.name!r}: its chunk {key!r} is missing") from None

    def _read_shard_index(self, source: Source) -> list[tuple[int, int]]:
        """(offset, length) of each chunk of one shard, from the index at the shard's end."""
        count = math.prod(self.layout.per_stored)
        size = 16 * count + 4
        raw = _tail(source, size, self.name)
        where = _where(source)
        (checksum,) = struct.unpack("<I", raw[-4:])
        if checksum != crc32c(raw[:-4]):
            raise CheckpointError(f"array {self.name!r}: {where}: a shard index fails its checksum")
        total = len(source) if isinstance(source, bytes) else source.nbytes
        entries = list(struct.iter_unpack("<QQ", raw[:-4]))
        for at, length in entries:
            if not (at == length == _ABSENT) and at + length > total - size:
                raise CheckpointError(f"array {self.name!r}: {where}: a shard index points outside")
        return entries


class Index:
    """The arrays of one Orbax item directory, by parameter name (key path joined by dots).

    An item that is a single array, not a tree, has the name "".
    """

    def __init__(self, path: str, values: Mapping[str, Source]):
        self.path = path
        self._values = values

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
        v2 = self._values.get(value_key(name, ".zarray"))
        v3 = self._values.get(value_key(name, "zarr.json"))
        if v2 is None and v3 is None:
            raise CheckpointError(
                f"{self.path}: no array {name!r} in this checkpoint; it has {_few(self.names())}"
            )
        layout = zarr.parse(v2 and _content(v2, name), v3 and _content(v3, name), name)
        return StoredArray(name, layout, self._values)


def open_index(path: str | os.PathLike[str]) -> Index:
    """Opens an Orbax item directory (the one that holds `_METADATA`).

    Raises:
      CheckpointError: not a directory, or its OCDBT manifest or tree is damaged.
    """
    path = os.fspath(path)
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: not a checkpoint directory")
    if os.path.exists(os.path.join(path, "manifest.ocdbt")):
        return Index(path, _ocdbt_values(path))
    return Index(path, _Files(path))


def _ocdbt_values(path: str) -> dict[str, Source]:
    """Every key of an OCDBT database: walks the B-tree with TensorStore's public dump."""
    root = path.rstrip("/") + "/"
    store = ts.KvStore.open({"driver": "file", "path": root}).result()
    values: dict[str, Source] = {}
    try:
        version = ts.ocdbt.dump(store).result()["versions"][-1]
        location = version["root"].get("location")
        level = [(b"", location)] if location else []
        while level:  # one level of the tree at a time, its nodes read concurrently
            nodes = [(prefix, ts.ocdbt.dump(store, at)) for prefix, at in level]
            level = []
            for prefix, node in ((p, f.result()) for p, f in nodes):
                for entry in node["entries"]:
                    key = prefix + entry["key"]
                    if node["height"] > 0:
                        child = prefix + entry.get("subtree_common_prefix", b"")
                        level.append((child, entry["location"]))
                    elif "inline_value" in entry:
                        values[key.decode()] = bytes(entry["inline_value"])
                    else:  # value:<base>:<relative path>:<offset>:<length>
                        _, base, rel, offset, length = entry["indirect_value"].split(":")
                        file = root + unquote(base) + unquote(rel)
                        values[key.decode()] = Extent(file, int(offset), int(length))
    except (ValueError, KeyError, IndexError) as e:  # TensorStore raises ValueError
        # Callers of Orbax match the first words: they are what TensorStore's own error says.
        why = f'Error opening "ocdbt" driver: the database is damaged: {e}'
        raise CheckpointError(f"{path}: {why}") from e
    return values


class _Files(Mapping[str, Source]):
    """The same view of a checkpoint without OCDBT: every key is a file."""

    def __init__(self, path: str):
        self._path = path

    def __getitem__(self, key: str) -> Source:
        file = os.path.join(self._path, key)
        try:
            return Extent(file, 0, os.stat(file).st_size)
        except (FileNotFoundError, NotADirectoryError):
            raise KeyError(key) from None

    def __iter__(self) -> Iterator[str]:
        for folder, _, files in os.walk(self._path):
            for file in files:
                yield os.path.relpath(os.path.join(folder, file), self._path)

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _content(source: Source, name: str) -> bytes:
    return _tail(source, len(source) if isinstance(source, bytes) else source.nbytes, name)


def _tail(source: Source, nbytes: int, name: str) -> bytes:
    """The last `nbytes` bytes of a value."""
    if isinstance(source, bytes):
        data, where = source[-nbytes:], "inline value"
    else:
        where = source.file
        try:
            with open(source.file, "rb", buffering=0) as f:
                offset = max(source.offset, source.offset + source.nbytes - nbytes)
                data = os.pread(f.fileno(), nbytes, offset)
        except OSError as e:
            raise CheckpointError(f"array {name!r}: cannot read {where}: {e}") from e
    if len(data) != nbytes:
        raise CheckpointError(f"array {name!r}: {where} is truncated")
    return data


def value_key(name: str, rest: str) -> str:
    """Key of `rest`, metadata or a chunk; an array that is the whole item has no folder."""
    return f"{name}/{rest}" if name else rest


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


@functools.cache
def _crc32c_table() -> list[int]:
    table = []
    for byte in range(256):
        for _ in range(8):
            byte = (byte >> 1) ^ (0x82F63B78 if byte & 1 else 0)
        table.append(byte)
    return table


def crc32c(data: bytes) -> int:
    """CRC-32C (Castagnoli) of metadata: slow, about 10 MB/s."""
    table, crc = _crc32c_table(), 0xFFFFFFFF
    for byte in data:
        crc = (crc >> 8) ^ table[(crc ^ byte) & 0xFF]
    return crc ^ 0xFFFFFFFF
