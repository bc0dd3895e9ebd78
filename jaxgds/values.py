"""The key-value store of an Orbax checkpoint: key -> where the value's bytes are.

Either the B-tree of an OCDBT database, or plain files. Nothing here is believed before it is
checked: a reference lies inside of the checkpoint and of its file, and memory stays in proportion
to the files that are read.
"""

import bisect
import dataclasses
import os
import stat
from collections.abc import Iterator, Mapping
from typing import NamedTuple

from jaxgds import btree
from jaxgds.errors import CheckpointError
from jaxgds.workers import reading, watched


class Extent(NamedTuple):
    """A byte range of a file."""

    file: str
    offset: int
    nbytes: int


Source = Extent | bytes  # bytes: a value held inline by the metadata
MAX_NODE = 256 << 20  # bytes of a B-tree node or of an array's metadata
# A tree may expand to MAX_SLACK bytes, and to MAX_RATIO times what was read of it.
MAX_SLACK, MAX_RATIO = 256 << 20, 100


class ValueLostError(CheckpointError):
    """A value is not where it should be. Whoever knows the array's name adds it."""


def open_values(path: str) -> "Database | Files":
    """The values of the checkpoint in the directory `path`.

    Raises:
      CheckpointError: its OCDBT manifest or tree is damaged.
      TimeoutError: the file system does not answer.
    """
    if os.path.exists(os.path.join(path, "manifest.ocdbt")):
        return Database(watched(lambda: _read_tree(path)))
    return Files(path)


def _read_tree(path: str) -> dict[str, Source]:
    """Every key of an OCDBT database, from the nodes of its B-tree.

    A tree that visits a node twice or is not as high as it says, one that expands to far more
    than its files hold, and a reference that leads out of the directory are damage, too.
    """
    values: dict[str, Source] = {}
    try:
        manifest = read_metadata(os.path.join(path, "manifest.ocdbt"))
        room = _Room()
        root = btree.decode_manifest(manifest, room.for_more(len(manifest)))
        level = [] if root is None else [(b"", btree.Child(b"", b"", root[1]))]
        height = 0 if root is None else root[0]
        seen: set[btree.Reference] = set()
        files: dict[bytes, str] = {}
        last: bytes | None = None
        while level:  # one level of the tree at a time
            below: list[tuple[bytes, btree.Child]] = []
            for prefix, child in level:
                place = child.node
                if place in seen:
                    raise btree.DamagedError(f"the node {place} is in the tree twice")
                seen.add(place)
                encoded = read_metadata(_inside(path, place.path), place.offset, place.length)
                node, used = btree.decode_node(encoded, place.base, room.for_more(len(encoded)))
                room.used += used
                if node.height != height:
                    raise btree.DamagedError(f"a node of height {node.height}, not {height}")
                keys = [c.key for c in node.children] or [key for key, _ in node.values]
                if keys[0] < child.key[len(child.prefix) :]:
                    raise btree.DamagedError("a node has a key that its parent says it has not")
                within = prefix + child.prefix
                below += [(within, c) for c in node.children]
                for key, value in node.values:
                    key = within + key
                    if last is not None and key <= last:
                        raise btree.DamagedError("keys out of order")
                    last = key
                    if isinstance(value, btree.Reference):
                        if value.path not in files:
                            files[value.path] = _inside(path, value.path)
                        value = Extent(files[value.path], value.offset, value.length)
                    values[key.decode()] = value
            level, height = below, height - 1
    except (ValueError, OSError) as e:
        # Callers of Orbax match the first words: they are what TensorStore's own error says.
        why = f'Error opening "ocdbt" driver: the database is damaged: {e}'
        raise CheckpointError(f"{path}: {why}") from e
    return values


@dataclasses.dataclass
class _Room:
    """What a tree may expand to: honest ones reach a tenth of it.

    Attributes:
      read: bytes of its files.
      used: bytes that these have been expanded to.
    """

    read: int = 0
    used: int = 0

    def for_more(self, nbytes: int) -> int:
        """What is left, when `nbytes` more have been read."""
        self.read += nbytes
        return MAX_SLACK + MAX_RATIO * self.read - self.used


def _inside(folder: str, path: bytes) -> str:
    """The file that a database calls `path`."""
    if b"\0" in path or not {b"", b".", b".."}.isdisjoint(path.split(b"/")):
        raise btree.DamagedError(f"{path!r} is no file of the checkpoint")
    return os.path.join(folder, os.fsdecode(path))


def read_metadata(file: str, offset: int = 0, nbytes: int | None = None) -> bytes:
    """A range of a file; None: all of it.

    Raises:
      OSError: it cannot be read.
      DamagedError: the file ends before, that is too much for metadata, or it is no regular file.
    """
    with reading(file):
        fd = os.open(file, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a pipe would block
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode):
            raise btree.DamagedError(f"{file} is not a regular file")
        size = found.st_size
        nbytes = size if nbytes is None else nbytes
        if offset + nbytes > size:
            raise btree.DamagedError(
                f"{file} is truncated: it has {size} bytes, not {offset + nbytes}"
            )
        if nbytes > MAX_NODE:
            raise btree.DamagedError(f"{file}: {nbytes} bytes are too many for metadata")
        data = bytearray()
        while len(data) < nbytes:
            with reading(file):
                part = os.pread(fd, nbytes - len(data), offset + len(data))
            if not part:
                raise btree.DamagedError(f"{file} became shorter while it was read")
            data += part
        return bytes(data)
    finally:
        os.close(fd)


def read_whole(file: str) -> bytes | None:
    """All of a small file; None if it is not there.

    Raises:
      CheckpointError: it cannot be read, is no regular file (to open a pipe would wait), or large.
      TimeoutError: the file system does not answer.
    """
    try:
        return watched(lambda: read_metadata(file))
    except FileNotFoundError:
        return None
    except TimeoutError:
        raise
    except btree.DamagedError as e:
        raise CheckpointError(str(e)) from e
    except (OSError, ValueError) as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from e


class Database(Mapping[str, Source]):
    """The values of an OCDBT database. A range of a file lies within that file."""

    def __init__(self, values: dict[str, Source]):
        self._values = values
        self._sorted: list[str] | None = None
        self._file_sizes: dict[str, int] = {}

    def __getitem__(self, key: str) -> Source:
        source = self._values[key]
        if isinstance(source, Extent):
            size = self._file_sizes.get(source.file)
            if size is None:
                size = self._file_sizes[source.file] = _size(source.file)
            if source.offset + source.nbytes > size:
                raise ValueLostError(
                    f"{source.file}: [{source.offset}, {source.offset + source.nbytes}) is not in "
                    f"the {size} bytes of the file; it is truncated, restore another checkpoint "
                    "or copy this one again"
                )
        return source

    def __contains__(self, key: object) -> bool:
        return key in self._values

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def sizes(self, prefix: str) -> Iterator[int]:
        """Bytes of each value whose key begins with `prefix`."""
        if self._sorted is None:
            self._sorted = sorted(self._values)
        for i in range(bisect.bisect_left(self._sorted, prefix), len(self._sorted)):
            if not self._sorted[i].startswith(prefix):
                return
            try:
                source = self[self._sorted[i]]
            except ValueLostError as e:
                # Another host may have the file, on a disk of its own.
                if not isinstance(e.__cause__, FileNotFoundError):
                    raise
                source = self._values[self._sorted[i]]
            yield len(source) if isinstance(source, bytes) else source.nbytes


def _size(file: str) -> int:
    try:
        found = os.stat(file)
    except OSError as e:
        raise ValueLostError(f"cannot read {file}: {e}") from e
    if not stat.S_ISREG(found.st_mode):
        raise ValueLostError(f"{file} is not a regular file")
    return found.st_size


class Files(Mapping[str, Source]):
    """The same view of a checkpoint without OCDBT: every key is a file."""

    def __init__(self, path: str):
        self._path = path

    def __getitem__(self, key: str) -> Source:
        file = os.path.join(self._path, key)
        try:
            return Extent(file, 0, _size(file))
        except ValueLostError as e:
            if isinstance(e.__cause__, FileNotFoundError | NotADirectoryError):
                raise KeyError(key) from None
            raise

    def sizes(self, prefix: str) -> Iterator[int]:
        """Bytes of each value whose key begins with `prefix`, which ends with a slash."""
        for folder, _, files in os.walk(os.path.join(self._path, prefix)):
            for file in files:
                yield _size(os.path.join(folder, file))

    def __iter__(self) -> Iterator[str]:
        for folder, _, files in os.walk(self._path):
            for file in files:
                yield os.path.relpath(os.path.join(folder, file), self._path)

    def __len__(self) -> int:
        return sum(1 for _ in self)
