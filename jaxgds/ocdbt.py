"""Writes an OCDBT database, the key-value store that Orbax keeps arrays in, over given data files.

TensorStore's own writer packs values as they come, at any offset, into files with random names,
and stamps the time of the commit. Here the caller says where each value lies (so values can be
aligned, and files be cut per rank), and the same values give the same bytes. Values are written by
the caller; this module encodes the B-tree over them, and the manifest that points at its root.
The format: https://google.github.io/tensorstore/kvstore/ocdbt/#storage-format
"""

import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import xxhash

from jaxgds.index import Extent, Source, crc32c


MAX_INLINE = 1024  # bytes of a value that is kept in the tree itself; what Orbax sets
_MANIFEST_MAGIC = 0x0CDB3A2A
_NODE_MAGIC = 0x0CDB20DE
_MAX_NODE_BYTES = 100_000_000  # a bound for writers that add to the database; what Orbax sets
_VERSION_ARITY_LOG2 = 4  # TensorStore's default; with one version no version tree is built


@dataclass(frozen=True)
class _Node:
    """A node that lies in the node file, and what its parent says of the subtree below it."""

    first_key: bytes
    height: int
    at: Extent
    keys: int
    tree_bytes: int
    indirect_bytes: int


def encode(
    values: Mapping[str, Source], node_file: str, node_bytes: int = 1 << 20
) -> tuple[bytes, bytes]:
    """The B-tree over `values`, and the manifest.

    Args:
      values: key -> the value itself, or where it lies; files are relative to the database's
        directory.
      node_file: where the caller will write the nodes, relative to the database's directory.
      node_bytes: size from which a node is split (it may exceed this by one entry).

    Returns:
      The content of `node_file`, and the content of `manifest.ocdbt`.

    Raises:
      ValueError: no values, or a key that is too long for the format.
    """
    if not values:
        raise ValueError("an OCDBT database needs at least one value")
    nodes = bytearray()

    def put(first_key: bytes, encoded: bytes, height: int, counts: Sequence[int]) -> _Node:
        at = Extent(node_file, len(nodes), len(encoded))
        nodes.extend(encoded)
        keys, tree_bytes, indirect_bytes = counts
        return _Node(first_key, height, at, keys, tree_bytes + len(encoded), indirect_bytes)

    entries = sorted((key.encode(), value) for key, value in values.items())
    if len(longest := max((key for key, _ in entries), key=len)) > 0xFFFF:
        raise ValueError(f"the key {longest[:64]!r}... exceeds 65535 bytes")
    level = [
        put(part[0][0], _leaf(part), 0, (len(part), 0, sum(map(_indirect, part))))
        for part in _parts(entries, lambda e: len(e[0]) + _inline(e) + 16, node_bytes)
    ]
    while len(level) > 1:
        level = [
            put(
                part[0].first_key,
                _interior(part),
                part[0].height + 1,
                [
                    sum(getattr(c, n) for c in part)
                    for n in ("keys", "tree_bytes", "indirect_bytes")
                ],
            )
            for part in _parts(level, lambda n: len(n.first_key) + 32, node_bytes)
        ]
    return bytes(nodes), _manifest(level[0], xxhash.xxh3_128_digest(bytes(nodes)))


def _parts[T](entries: Sequence[T], size: Callable[[T], int], most: int) -> Iterable[Sequence[T]]:
    """`entries` cut into parts of about `most` bytes, of at least two entries but for the last."""
    start = total = 0
    for i, entry in enumerate(entries):
        if total >= most and i - start >= 2:
            yield entries[start:i]
            start, total = i, 0
        total += size(entry)
    yield entries[start:]


def _inline(entry: tuple[bytes, Source]) -> int:
    return len(entry[1]) if isinstance(entry[1], bytes) else 0


def _indirect(entry: tuple[bytes, Source]) -> int:
    return entry[1].nbytes if isinstance(entry[1], Extent) else 0


def _leaf(entries: Sequence[tuple[bytes, Source]]) -> bytes:
    """A node of keys and values."""
    extents = [value for _, value in entries if isinstance(value, Extent)]
    files, table = _data_files(e.file for e in extents)
    prefixes, suffixes = _front_coded([key for key, _ in entries])
    body = [
        b"\0",  # height
        table,
        _varint(len(entries)),
        *map(_varint, prefixes[1:]),
        *(_varint(len(s)) for s in suffixes),
        *suffixes,
        *(_varint(v.nbytes if isinstance(v, Extent) else len(v)) for _, v in entries),
        bytes(isinstance(v, Extent) for _, v in entries),
        *(_varint(files[e.file]) for e in extents),
        *(_varint(e.offset) for e in extents),
        *(v for _, v in entries if isinstance(v, bytes)),
    ]
    return _framed(_NODE_MAGIC, b"".join(body))


def _interior(children: Sequence[_Node]) -> bytes:
    """A node of nodes. No prefix is taken from the children's keys: front coding is enough."""
    files, table = _data_files(c.at.file for c in children)
    prefixes, suffixes = _front_coded([c.first_key for c in children])
    body = [
        bytes([children[0].height + 1]),
        table,
        _varint(len(children)),
        *map(_varint, prefixes[1:]),
        *(_varint(len(s)) for s in suffixes),
        b"\0" * len(children),  # length of the prefix common to each subtree
        *suffixes,
        *_references(children, files),
    ]
    return _framed(_NODE_MAGIC, b"".join(body))


def _manifest(root: _Node, uuid: bytes) -> bytes:
    files, table = _data_files([root.at.file])
    body = [
        uuid,
        b"\0",  # kind: single file
        _varint(MAX_INLINE),
        _varint(_MAX_NODE_BYTES),
        bytes([_VERSION_ARITY_LOG2]),
        b"\0",  # nodes are not compressed
        table,
        b"\1",  # one version
        b"\1",  # its generation
        bytes([root.height]),
        *_references([root], files),
        struct.pack("<Q", 0),  # time of the commit: none, so that equal inputs give equal bytes
        b"\0",  # no version tree nodes
    ]
    return _framed(_MANIFEST_MAGIC, b"".join(body))


def _references(nodes: Sequence[_Node], files: Mapping[str, int]) -> list[bytes]:
    """The columns that say where nodes lie and what is below them."""
    columns = (
        [files[n.at.file] for n in nodes],
        [n.at.offset for n in nodes],
        [n.at.nbytes for n in nodes],
        [n.keys for n in nodes],
        [n.tree_bytes for n in nodes],
        [n.indirect_bytes for n in nodes],
    )
    return [_varint(number) for column in columns for number in column]


def _data_files(paths: Iterable[str]) -> tuple[dict[str, int], bytes]:
    """Numbers for the files that a node refers to, and the encoded table of them."""
    files = sorted({path.encode() for path in paths})
    prefixes, suffixes = _front_coded(files)
    table = [
        _varint(len(files)),
        *map(_varint, prefixes[1:]),
        *(_varint(len(s)) for s in suffixes),
        b"\0" * len(files),  # length of the base path: all are relative to the database
        *suffixes,
    ]
    return {file.decode(): i for i, file in enumerate(files)}, b"".join(table)


def _front_coded(strings: Sequence[bytes]) -> tuple[list[int], list[bytes]]:
    """Of each string, the length of the prefix that it shares with the one before, and the rest."""
    before = b""
    prefixes, suffixes = [], []
    for s in strings:
        prefix = len(os.path.commonprefix([before, s]))
        prefixes.append(prefix)
        suffixes.append(s[prefix:])
        before = s
    return prefixes, suffixes


def _framed(magic: int, body: bytes) -> bytes:
    """Header (magic, length, version 0, no compression), body, and their CRC-32C."""
    encoded = struct.pack(">I", magic) + struct.pack("<Q", len(body) + 18) + b"\0\0" + body
    return encoded + struct.pack("<I", crc32c(encoded))


def _varint(number: int) -> bytes:
    """Unsigned LEB128."""
    encoded = bytearray()
    while number >= 0x80:
        encoded.append(number & 0x7F | 0x80)
        number >>= 7
    encoded.append(number)
    return bytes(encoded)
