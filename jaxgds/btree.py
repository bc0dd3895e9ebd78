"""Bytes of an OCDBT manifest or B-tree node -> what they say. Pure.

Every number is checked before anything is made of it: these bytes are input from anywhere.
TensorStore's own decoder is not used for them, as it expands without limit: a node of 150 KB whose
million keys each repeat the one before makes it ask for 64 GB, and abort if it does not get them.
The format: https://google.github.io/tensorstore/kvstore/ocdbt/#storage-format
"""

import dataclasses
import struct
from typing import NamedTuple

import numpy as np
import zstandard

from jaxgds.crc import crc32c


MANIFEST_MAGIC = 0x0CDB3A2A
NODE_MAGIC = 0x0CDB20DE
MAX_ARITY = 1 << 20
MAX_LENGTH = 0xFFFF  # of a key, of a path
MAX_INLINE = 1 << 20
_NO_ROOT = 2**64 - 1  # offset and length of the root of an empty tree


class DamagedError(ValueError):
    """The bytes are not what the format allows."""


class Reference(NamedTuple):
    """A range of a file of the database; `base` is that part of the path below which its own
    references lie."""

    base: bytes
    path: bytes
    offset: int
    length: int


@dataclasses.dataclass(frozen=True, slots=True)
class Child:
    """An entry of an inner node: all keys of the child begin with `prefix`, none is below `key`."""

    key: bytes
    prefix: bytes
    node: Reference


@dataclasses.dataclass(frozen=True, slots=True)
class Node:
    """A node; keys are relative to what the parent says all of them begin with."""

    height: int
    children: list[Child]
    values: list[tuple[bytes, Reference | bytes]]


def decode_manifest(encoded: bytes, limit: int) -> tuple[int, Reference] | None:
    """Height and place of the root of the newest version; None if the tree is empty.

    Args:
      limit: bytes that it may decompress to.

    Raises:
      DamagedError: it is damaged, or of the numbered kind, which Orbax does not write.
    """
    reader = _Reader(_unframed(encoded, MANIFEST_MAGIC, limit))
    reader.take(16)  # the UUID
    if reader.byte() != 0:
        raise DamagedError("a manifest of the numbered kind, which is not read")
    reader.numbers(2, bits=32)  # limits that hold for writers
    arity = reader.byte()
    compression = reader.number(bits=32)
    level = int.from_bytes(reader.take(4), "little", signed=True) if compression == 1 else 0
    if compression > 1 or not -(1 << 17) <= level <= 22:
        raise DamagedError(f"{compression=}, {level=}")
    files = reader.files(b"")
    count = reader.number()
    if not 1 <= arity <= 16 or not 1 <= count <= 1 << arity:
        raise DamagedError(f"{count} versions with {arity=}")
    generations = reader.numbers(count)
    if (generations[1:] <= generations[:-1]).any() or not generations[0]:
        raise DamagedError(f"versions out of order: {generations[:8]}")
    heights = reader.take(count)
    roots = reader.references(count, files, may_lack=True)
    statistics = reader.numbers(3 * count).reshape(3, count).T
    for root, height, numbers in zip(roots, heights, statistics, strict=True):
        if root is None and (height or numbers.any()):
            raise DamagedError("a version that is empty and is not")
    reader.take(8 * count)  # times
    count = reader.number()  # of nodes that list older versions
    if count > 64:
        raise DamagedError(f"{count} version tree nodes")
    reader.numbers(count)
    reader.references(count, files)
    reader.numbers(count)
    reader.take(9 * count)
    reader.end()
    root = roots[-1]
    if root is None:
        return None
    return heights[-1], root


def decode_node(encoded: bytes, base: bytes, limit: int) -> tuple[Node, int]:
    """A node, and how many bytes it takes when it is expanded.

    Args:
      base: of the reference to it.
      limit: bytes that it may expand to.
    """
    body = _unframed(encoded, NODE_MAGIC, limit)
    reader = _Reader(body)
    height = reader.byte()
    files = reader.files(base)
    count = reader.number(bits=32)
    if not 1 <= count <= MAX_ARITY:
        raise DamagedError(f"a node with {count} entries")
    lengths = reader.lengths(count)
    prefixes = reader.numbers(count, bits=32) if height else np.zeros(0, np.uint64)
    expanded = len(body) + int(lengths.sum())
    if expanded > limit:
        raise DamagedError(f"a node expands to {expanded} bytes")
    if height and (prefixes > lengths.sum(axis=1)).any():
        raise DamagedError("the prefix of a subtree is longer than its key")
    keys = reader.strings(lengths)
    if any(a >= b for a, b in zip(keys, keys[1:], strict=False)):
        raise DamagedError("keys out of order")
    if not height:
        values = reader.values(count, files)
        reader.end()
        return Node(0, [], list(zip(keys, values, strict=True))), expanded
    nodes = reader.references(count, files)
    reader.numbers(3 * count)  # statistics
    reader.end()
    children = [
        Child(key, key[:n], node)
        for key, n, node in zip(keys, prefixes.tolist(), nodes, strict=True)
        if node is not None
    ]
    return Node(height, children, []), expanded


def _unframed(encoded: bytes, magic: int, limit: int) -> bytes:
    """The body within header and checksum, decompressed."""
    if len(encoded) < 18:
        raise DamagedError(f"{len(encoded)} bytes are too few")
    found, length = struct.unpack(">I", encoded[:4])[0], struct.unpack("<Q", encoded[4:12])[0]
    if found != magic or length != len(encoded):
        raise DamagedError(f"it begins with {encoded[:12].hex()}, and has {len(encoded)} bytes")
    if crc32c(encoded[:-4]) != struct.unpack("<I", encoded[-4:])[0]:
        raise DamagedError("it fails its checksum")
    if encoded[12] != 0 or encoded[13] > 1:
        raise DamagedError(f"version {encoded[12]}, compression {encoded[13]}")
    body = encoded[14:-4]
    if encoded[13] == 0:
        return body
    try:
        decompressor = zstandard.ZstdDecompressor(max_window_size=1 << 27)
        with decompressor.stream_reader(body, read_across_frames=True) as reader:
            decoded = reader.read(limit + 1)
    except zstandard.ZstdError as e:
        raise DamagedError(f"damaged zstd data: {e}") from e
    if len(decoded) > limit:
        raise DamagedError(f"it decompresses to more than {limit} bytes")
    return decoded


class _Reader:
    """Takes a body apart, front to back."""

    def __init__(self, body: bytes):
        self._body, self._at = body, 0
        self._array = np.frombuffer(body, np.uint8)

    def take(self, count: int) -> bytes:
        if count > len(self._body) - self._at:
            raise DamagedError("it ends early")
        self._at += count
        return self._body[self._at - count : self._at]

    def byte(self) -> int:
        return self.take(1)[0]

    def number(self, bits: int = 64) -> int:
        return int(self.numbers(1, bits)[0])

    def numbers(self, count: int, bits: int = 64) -> np.ndarray:
        """Unsigned LEB128 numbers of at most that many bits."""
        if count > len(self._body) - self._at:
            raise DamagedError("it ends early")
        some = self._array[self._at : self._at + 10 * count]
        stops = np.flatnonzero(some < 0x80)[:count] + 1
        if len(stops) < count:
            raise DamagedError("it ends within a number, or a number exceeds 64 bits")
        starts = np.concatenate(([0], stops[:-1])) if count else stops
        sizes = stops - starts
        values = np.zeros(count, np.uint64)
        places = int(sizes.max(initial=0))
        if places > -(-bits // 7):
            raise DamagedError(f"a number exceeds {bits} bits")
        for place in range(places):
            has = sizes > place
            part = some[(starts + place)[has]].astype(np.uint64) & np.uint64(0x7F)
            if 7 * place + 7 > bits and (part >> np.uint64(bits - 7 * place)).any():
                raise DamagedError(f"a number exceeds {bits} bits")
            values[has] |= part << np.uint64(7 * place)
        self._at += int(stops[-1]) if count else 0
        return values

    def lengths(self, count: int) -> np.ndarray:
        """Of front-coded strings: [count, 2], bytes shared with the one before, and bytes more."""
        prefixes = np.concatenate((np.zeros(1, np.uint64), self.numbers(count - 1, bits=32)))
        suffixes = self.numbers(count, bits=32)
        both = np.stack([prefixes, suffixes], axis=1)
        if (both > MAX_LENGTH).any() or (both.sum(axis=1) > MAX_LENGTH).any():
            raise DamagedError(f"a string of more than {MAX_LENGTH} bytes")
        if (prefixes[1:] > both.sum(axis=1)[:-1]).any():
            raise DamagedError("a string shares more with the one before than that has")
        return both

    def strings(self, lengths: np.ndarray) -> list[bytes]:
        data = self.take(int(lengths[:, 1].sum()))
        strings, at, last = [], 0, b""
        for prefix, suffix in lengths.tolist():
            last = last[:prefix] + data[at : at + suffix]
            at += suffix
            strings.append(last)
        return strings

    def files(self, base: bytes) -> list[tuple[bytes, bytes]]:
        """The table of files: (base, whole path) of each.

        Args:
          base: of the node that has the table.
        """
        count = self.number()
        if not count:
            return []
        if count > MAX_ARITY:
            raise DamagedError(f"{count} files")
        lengths = self.lengths(count)
        bases = self.numbers(count, bits=32)
        if (bases > lengths.sum(axis=1)).any():
            raise DamagedError("the base of a path is longer than the path")
        if ((lengths[1:, 0] > np.minimum(bases[1:], bases[:-1])) & (bases[1:] != bases[:-1])).any():
            raise DamagedError("paths with one beginning have bases of different lengths")
        if int(lengths.sum()) > 64 * MAX_LENGTH + 64 * int(lengths[:, 1].sum()):
            raise DamagedError("paths that repeat each other")
        paths = self.strings(lengths)
        return [(base + p[:n], base + p) for p, n in zip(paths, bases.tolist(), strict=True)]

    def references(
        self, count: int, files: list[tuple[bytes, bytes]], may_lack: bool = False
    ) -> list[Reference | None]:
        numbers = self.numbers(3 * count).reshape(3, count).T.tolist()
        return [_reference(files, file, at, length, may_lack) for file, at, length in numbers]

    def values(self, count: int, files: list[tuple[bytes, bytes]]) -> list[Reference | bytes]:
        lengths = self.numbers(count).tolist()
        kinds = self.take(count)
        if max(kinds) > 1:
            raise DamagedError("a value of an unknown kind")
        outside = sum(kinds)
        places = self.numbers(2 * outside).reshape(2, outside).T.tolist()
        following = iter(places)
        values: list[Reference | bytes] = []
        for length, kind in zip(lengths, kinds, strict=True):
            if kind:
                file, offset = next(following)
                reference = _reference(files, file, offset, length)
                assert reference is not None
                values.append(reference)
            elif length > MAX_INLINE:
                raise DamagedError(f"an inline value of {length} bytes")
            else:
                values.append(self.take(length))
        return values

    def end(self) -> None:
        if self._at != len(self._body):
            raise DamagedError(f"{len(self._body) - self._at} bytes too many")


def _reference(
    files: list[tuple[bytes, bytes]], file: int, offset: int, length: int, may_lack: bool = False
) -> Reference | None:
    if file >= len(files):
        raise DamagedError(f"file {file} of {len(files)}")
    if may_lack and offset == length == _NO_ROOT:
        return None
    if offset + length >= 2**63:
        raise DamagedError(f"[{offset}, +{length}) is no range of a file")
    return Reference(*files[file], offset, length)
