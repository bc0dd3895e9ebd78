"""CPU devices: threads that `preadv` or decompress straight into the destinations."""

import ctypes
import io
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from jaxgds.engines.files import OpenFiles
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, Source
from jaxgds.plan import MAX_READ, Read
from jaxgds.progress import Arrived, ignore, traced
from jaxgds.scatter import Piece, Segment
from jaxgds.workers import check_stop, reading, run_threads


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


MAX_THREADS = 16
# Compressed bytes are fetched in steps of this size while they are decoded.
FETCH = 1 << 20
STEP = 4 << 20  # bytes that are read or decoded without a look at whether to stop


class HostEngine:
    """Reads into host memory; one thread per core, each with a small staging buffer."""

    path, note, max_read = "host", "", MAX_READ

    def __init__(self, threads: int | None = None):
        self._threads = threads or min(MAX_THREADS, len(os.sched_getaffinity(0)))

    def read(
        self,
        plan: Callable[[], Sequence[Read]],
        buffers: Sequence["Buffer"],
        arrived: Arrived = ignore,
    ) -> None:
        with plain_files() as files:
            tasks = [lambda r=read: _read(r, files, buffers, arrived) for read in plan()]
            run_all(tasks, self._threads)


def run_all(tasks: Sequence[Callable[[], None]], threads: int) -> None:
    """Runs `tasks` on threads; on the first failure drops the rest, joins, and raises it."""
    todo = iter(tasks)

    def work(stop: threading.Event) -> None:
        for task in todo:
            if stop.is_set():
                return
            task()

    run_threads([work] * min(threads, len(tasks)))


def plain_files() -> OpenFiles[io.FileIO]:
    return OpenFiles(lambda path, array: io.FileIO(path))


def _read(
    read: Read, files: OpenFiles[io.FileIO], buffers: Sequence["Buffer"], arrived: Arrived
) -> None:
    with opened(read, files) as decoded:
        for segment in read.segments:
            whole = direct(segment)
            if whole is not None:
                pointer = buffers[whole.destination].pointer + whole.dst_offset
                with traced("read"):
                    fill(decoded, _memory(pointer, segment.nbytes), read)
            else:
                staging = np.empty(segment.nbytes, np.uint8)
                with traced("read"):
                    fill(decoded, memoryview(staging), read)
                with traced("scatter"):
                    for piece in segment.pieces:
                        scatter(staging, piece, buffers[piece.destination].pointer)
            arrived(segment.nbytes)


@contextmanager
def opened(read: Read, files: OpenFiles[io.FileIO]) -> Iterator[Callable[[memoryview], int]]:
    """A function that fills a memoryview with the next decoded bytes of `read`.

    Errors of the file or the codec become CheckpointError, naming both file and array.
    """
    source = read.source
    where = "inline value" if isinstance(source, bytes) else source.file
    try:
        with _stream(read, files) as raw:
            if read.codec == "raw":
                yield raw.readinto
                return
            decompressor = zstandard.ZstdDecompressor()
            # Of `raw` the reader only calls read(n).
            with decompressor.stream_reader(raw, read_size=FETCH) as reader:  # type: ignore
                yield reader.readinto
                if reader.read(1):
                    raise CheckpointError(
                        f"{where}: array {read.array!r}: a chunk decodes to more bytes than it has"
                    )
    except OSError as e:
        raise CheckpointError(f"{where}: array {read.array!r}: cannot be read: {e}") from e
    except zstandard.ZstdError as e:
        raise CheckpointError(f"{where}: array {read.array!r}: damaged zstd data: {e}") from e


@contextmanager
def _stream(read: Read, files: OpenFiles[io.FileIO]) -> Iterator["io.BytesIO | _Range"]:
    source = read.source
    if isinstance(source, bytes):
        yield io.BytesIO(source)
        return
    with files.open(source.file, read.array) as file:
        yield _Range(file, source, read.array)


class _Range:
    """The bytes of one extent as a minimal raw stream; `preadv`, so threads share the file."""

    def __init__(self, file: io.FileIO, source: Extent, array: str):
        self._what = source.file, array
        self._fd = file.fileno()
        self._at = source.offset
        self._stop = source.offset + source.nbytes

    def readinto(self, view: memoryview) -> int:
        with reading(*self._what):
            n = os.preadv(self._fd, [view[: self._stop - self._at]], self._at)
        self._at += n
        return n

    def read(self, size: int) -> bytes:
        with reading(*self._what):
            data = os.pread(self._fd, min(size, self._stop - self._at), self._at)
        self._at += len(data)
        return data


def fill(readinto: Callable[[memoryview], int], view: memoryview, read: Read) -> None:
    """Fills `view` with the next bytes of `read`; CheckpointError if there are too few."""
    done = 0
    while done < len(view):
        check_stop()
        n = readinto(view[done : done + STEP])
        if not n:
            raise truncated(read.source, read.array, len(view) - done)
        done += n


def truncated(source: Source, array: str, missing: int) -> CheckpointError:
    where = (
        "inline value"
        if isinstance(source, bytes)
        else f"{source.file} [{source.offset}, {source.offset + source.nbytes})"
    )
    return CheckpointError(
        f"{where}: array {array!r}: {missing} bytes are missing; "
        "the file is truncated, restore another checkpoint or copy this one again"
    )


def direct(segment: Segment) -> Piece | None:
    """The piece that takes the whole segment as it is, if there is just that one."""
    if len(segment.pieces) == 1:
        piece = segment.pieces[0]
        if piece.contiguous and piece.nbytes == segment.nbytes:
            return piece
    return None


def scatter(staging: np.ndarray, piece: Piece, pointer: int) -> None:
    """Copies one piece out of a staged segment into the buffer at `pointer`."""
    src = np.lib.stride_tricks.as_strided(
        staging[piece.src_offset :], piece.shape, piece.src_strides, writeable=False
    )
    last = sum((n - 1) * s for n, s in zip(piece.shape, piece.dst_strides, strict=True))
    target = np.frombuffer(_memory(pointer + piece.dst_offset, last + 1), np.uint8)
    dst = np.lib.stride_tricks.as_strided(target, piece.shape, piece.dst_strides)
    np.copyto(dst, src)


def _memory(pointer: int, nbytes: int) -> memoryview:
    return memoryview((ctypes.c_char * nbytes).from_address(pointer)).cast("B")
