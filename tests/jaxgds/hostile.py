"""Makes hostile checkpoints out of honest ones."""

import json
import os
import pathlib
import struct
from collections.abc import Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import zstandard

from jaxgds import ocdbt
from jaxgds.btree import MANIFEST_MAGIC, NODE_MAGIC
from jaxgds.index import Extent, Source, crc32c, open_index


def honest(path: pathlib.Path, *, ocdbt: bool = True, zarr3: bool = False, zstd: bool = True):
    """A checkpoint of one array "w", which does not fit into the tree itself."""
    values = np.arange(4000, dtype=np.float32)
    oracle.save(path, {"w": jnp.asarray(values)}, (ocdbt, zarr3, zstd))
    return values


def values_of(path: pathlib.Path) -> dict[str, Source]:
    """What the tree of a checkpoint says, files relative to its directory."""
    found = open_index(path)._values

    def relative(value: Source) -> Source:
        if isinstance(value, bytes):
            return value
        return Extent(os.path.relpath(value.file, path), value.offset, value.nbytes)

    return {key: relative(found[key]) for key in found}


def write_values(path: pathlib.Path, values: Mapping[str, Source]) -> None:
    """Gives a checkpoint a new tree over the files it has."""
    nodes, manifest = ocdbt.encode(values, "d/tree")
    (path / "d" / "tree").write_bytes(nodes)
    (path / "manifest.ocdbt").write_bytes(manifest)


def change(path: pathlib.Path, changes: Mapping[str, Any]) -> None:
    """Changes values: bytes, an Extent, or a function of the JSON that is there."""
    tree = (path / "manifest.ocdbt").exists()
    values = values_of(path) if tree else {}
    for key, new in changes.items():
        if callable(new):
            old = values[key] if tree else (path / key).read_bytes()
            assert isinstance(old, bytes)
            meta = json.loads(old)
            new = json.dumps(new(meta) or meta).encode()
        if tree:
            values[key] = new
        else:
            (path / key).write_bytes(new)
    if tree:
        write_values(path, values)


# Trees that the encoder would not make

Entry = tuple[bytes, Source]


def framed(magic: int, body: bytes, *, compress: bool = False) -> bytes:
    if compress:
        body = zstandard.ZstdCompressor(level=1).compress(body)
    return compressed_frame(magic, body, int(compress))


def compressed_frame(magic: int, body: bytes, compression: int = 1) -> bytes:
    head = struct.pack(">I", magic) + struct.pack("<Q", len(body) + 18)
    encoded = head + bytes([0, compression]) + body
    return encoded + struct.pack("<I", crc32c(encoded))


def leaf(entries: Sequence[Entry]) -> bytes:
    return ocdbt._leaf(entries)


def inner(height: int, children: Sequence[tuple[bytes, Extent]]) -> bytes:
    nodes = [ocdbt._Node(key, height - 1, at, 1, 1, 1) for key, at in children]
    return ocdbt._interior(nodes)


def manifest(root: Extent, height: int) -> bytes:
    return ocdbt._manifest(ocdbt._Node(b"", height, root, 1, 1, 1), bytes(16))


def write_tree(path: pathlib.Path, nodes: Sequence[bytes], height: int) -> None:
    """Writes nodes one after the other into d/tree; the last is the root."""
    path.mkdir(exist_ok=True)
    (path / "d").mkdir(exist_ok=True)
    (path / "d" / "tree").write_bytes(b"".join(nodes))
    at = sum(map(len, nodes[:-1]))
    root = Extent("d/tree", at, len(nodes[-1]))
    (path / "manifest.ocdbt").write_bytes(manifest(root, height))


def zeros(nbytes: int) -> bytes:
    """A zstd frame of zeros that does not say how many: four bytes for each 128 KiB."""
    blocks = -(-nbytes // (128 << 10))
    header = struct.pack("<I", zstandard.MAGIC_NUMBER) + b"\x00\x58"  # no size, a window of 2 MiB
    block = struct.pack("<I", (128 << 10) << 3 | 1 << 1)[:3] + b"\0"
    last = struct.pack("<I", (128 << 10) << 3 | 1 << 1 | 1)[:3] + b"\0"
    return header + block * (blocks - 1) + last


__all__ = ["MANIFEST_MAGIC", "NODE_MAGIC"]
