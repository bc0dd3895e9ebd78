"""Writes a prepared checkpoint: chunks piece by piece, then all at once under its name."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash

from jaxgds import prepared, sources
from jaxgds.index import Extent, Source
from jaxgds.prepared import Array
from jaxgds.scatter import Box


@dataclass
class _Chunk:
    """A chunk that is being written: how far, its hash, and its bytes if they go to the B-tree."""

    at: int = 0
    hash: Any = field(default_factory=xxhash.xxh3_128)
    inline: bytearray = field(default_factory=bytearray)


class Writer:
    """Writes arrays box by box into the files where their chunks have their places."""

    def __init__(self, folder: str, places: Mapping[str, Extent]):
        self._folder, self._places = folder, places
        self._open: dict[str, tuple[str, int]] = {}  # rank -> its file that is open
        self._chunks: dict[str, _Chunk] = {}  # those that are begun and not complete
        self._values: dict[str, Source] = {}
        self._closer = ThreadPoolExecutor(1)  # storage may be slower than the next file's making
        self._closing: list[Future[None]] = []
        self.checksums: dict[str, str] = {}

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *exc: object) -> None:
        self._closer.shutdown()
        for _, fd in self._open.values():
            os.close(fd)

    def put(self, array: Array, box: Box, data: np.ndarray) -> None:
        """Appends a box to the chunks it touches; boxes of an array come in C order."""
        for index in sources.chunks_in(box, array.chunk):
            corner = [i * c for i, c in zip(index, array.chunk, strict=True)]
            common = tuple(
                slice(max(start, at) - start, min(stop, at + c) - start)
                for (start, stop), at, c in zip(box, corner, array.chunk, strict=True)
            )
            self._append(array, index, np.ascontiguousarray(data[common]))

    def _append(self, array: Array, index: tuple[int, ...], data: np.ndarray) -> None:
        key = array.key(index)
        chunk = self._chunks.setdefault(key, _Chunk())
        raw = data.reshape(-1).view(np.uint8).data
        chunk.hash.update(raw)
        place = self._places.get(key)
        if place is None:
            chunk.inline += raw
        else:
            self._write(place.file, place.offset + chunk.at, raw)
        chunk.at += data.nbytes
        if chunk.at == array.chunk_nbytes:
            if place is not None:
                end = place.offset + chunk.at
                self._write(place.file, end, bytes(prepared.padded(end) - end))
            self._values[key] = place or bytes(chunk.inline)
            self.checksums[key] = chunk.hash.hexdigest()
            del self._chunks[key]

    def _write(self, file: str, offset: int, data: Any) -> None:
        rank = file.partition("-")[0]
        name, fd = self._open.get(rank, ("", -1))
        if name != file:
            self._close(rank)
            path = os.path.join(self._folder, file)
            os.makedirs(os.path.dirname(path), exist_ok=True)
            fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666)
            self._open[rank] = file, fd
        view = memoryview(data)
        while view:
            n = os.pwrite(fd, view, offset)
            view, offset = view[n:], offset + n

    def _close(self, rank: str) -> None:
        if rank in self._open:
            _, fd = self._open.pop(rank)
            self._closing.append(self._closer.submit(_sync_and_close, fd))

    def finish(self) -> dict[str, Source]:
        """Completes the files; returns what the B-tree says of each chunk."""
        assert not self._chunks, f"incomplete: {list(self._chunks)[:8]}"
        for rank in list(self._open):
            self._close(rank)
        for closing in self._closing:
            closing.result()
        return self._values


def _sync_and_close(fd: int) -> None:
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def check_space(folder: str, nbytes: int) -> None:
    """Raises OSError if the file system of `folder` has less free space."""
    free = shutil.disk_usage(folder).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC,
            f"{nbytes / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free",
            folder,
        )


@contextmanager
def temporary(destination: str) -> Iterator[str]:
    """A directory beside `destination`, which takes its name if all goes well.

    What a killed run has left there is removed first. A lock tells it from one that still runs.
    """
    parent, name = os.path.split(destination)
    folder = os.path.join(parent, f".{name}.partial")
    os.makedirs(folder, exist_ok=True)
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as e:
            raise FileExistsError(errno.EEXIST, "another process is writing it", folder) from e
        for entry in os.scandir(folder):
            shutil.rmtree(entry.path) if entry.is_dir() else os.unlink(entry.path)
        try:
            yield folder
            for inside, _, _ in os.walk(folder):
                _sync_folder(inside)
            os.rename(folder, destination)
            _sync_folder(parent)
        except BaseException:
            shutil.rmtree(folder, ignore_errors=True)
            raise
    finally:
        os.close(lock)


def write_file(path: str, content: bytes) -> None:
    """Writes a small file through to storage, with the directories it is in."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as f:
        f.write(content)
        f.flush()
        os.fsync(f.fileno())


def _sync_folder(path: str) -> None:
    _sync_and_close(os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC))
