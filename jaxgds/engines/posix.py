"""Ranges of files into page-aligned memory: from the page cache, or else around it."""

import ctypes
import errno
import functools
import os
import random
import threading
from collections.abc import Callable

from jaxgds.engines.files import OpenFiles
from jaxgds.engines.host import truncated
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent
from jaxgds.workers import reading


# What O_DIRECT demands of offset, length and memory on every file system in use.
BLOCK = 4096
STRETCH = 16 << 20  # of a file: one page of it that is cached tells of the rest


type Way = tuple[int, int, int, int]  # descriptor, at, offset, bytes: see DirectFile.way


def direct_files() -> "OpenFiles[DirectFile]":
    """Files to read from; CheckpointError, which names the array too, if one cannot be opened."""

    def how(path: str, array: str) -> DirectFile:
        try:
            return DirectFile(path)
        except OSError as e:
            raise unreadable(path, array, e) from e

    return OpenFiles(how)


class DirectFile:
    """One file.

    What the page cache holds is copied from there. What it lacks is read with O_DIRECT, which
    is faster and leaves the cache to others, but for a page here and there. Where the file system
    cannot tell (RWF_NOWAIT) or has no O_DIRECT, reads are plain ones.
    """

    def __init__(self, path: str):
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        # Fail where the page cache lacks the data; 0 where the file system cannot tell.
        self._flags = os.RWF_NOWAIT
        self._cached = -1  # the stretch where a page was found last
        self._lock = threading.Lock()

    def close(self) -> None:
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)

    def way(self, offset: int, nbytes: int) -> Way:
        """How one system call may read a range: (descriptor, at, offset, bytes).

        It fills a view as `read` does, from `at` on.
        """
        if not self.cached(offset, nbytes):
            if self._open_direct():
                assert self._direct is not None
                start = offset // BLOCK * BLOCK
                return self._direct, 0, start, -(-(offset + nbytes) // BLOCK) * BLOCK - start
            self._flags = 0
        return self._fd, offset % BLOCK, offset, nbytes

    def cached(self, offset: int, nbytes: int) -> bool:
        """Whether the page cache has one page of a range; True where the file system cannot tell.

        Any page, for to ask for one has the kernel fetch it: the next restore is not to find
        exactly those that this one asked for. What follows a page is taken to be there, too.
        """
        if not self._flags or offset // STRETCH == self._cached:
            return True
        byte = ctypes.c_char()
        try:
            at = offset + random.randrange(nbytes)
            found = _read_now(self._fd, ctypes.addressof(byte), 1, at) is not None
        except OSError:
            self._flags = 0
            return True
        self._cached = offset // STRETCH if found else -1
        return found

    def read_now(self, offset: int, nbytes: int, pointer: int) -> bool:
        """Copies a range to where `read` would, if that takes no waiting; whether it did."""
        if not self._flags:
            return False
        try:
            return _read_now(self._fd, pointer + offset % BLOCK, nbytes, offset) == nbytes
        except OSError:
            return False  # who reads it the other way finds out why

    def read(self, offset: int, nbytes: int, view: memoryview, array: str) -> int:
        """Reads a range of the file somewhere into `view`, and returns at which offset.

        Args:
          view: page-aligned and at least 2 BLOCK longer than `nbytes`.
          array: for the error's text.

        Raises:
          CheckpointError: the file cannot be read, or ends before the range does.
        """
        # The data lies in memory as it lies in its pages: copying is a third slower otherwise.
        at = offset % BLOCK
        with reading(self._path, array):
            try:
                have = self._read_cached(offset, nbytes, view[at : at + nbytes])
                if have is None:
                    have = self._read_direct(offset, nbytes, view)
            except OSError as e:
                raise unreadable(self._path, array, e) from e
        if have < nbytes:
            raise truncated(Extent(self._path, offset, nbytes), array, nbytes - have)
        return at

    def _read_cached(self, offset: int, nbytes: int, view: memoryview) -> int | None:
        """How many bytes were read into `view`; None if O_DIRECT is to be used."""
        done = 0
        while done < nbytes:
            flags = self._flags
            try:
                n = os.preadv(self._fd, (view[done:],), offset + done, flags)
            except BlockingIOError:  # not in the page cache
                if self._open_direct():
                    return None
                self._flags = 0
                continue
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL) or not flags:
                    raise
                self._flags = 0
                continue
            if not n:
                break
            done += n
        return done

    def _open_direct(self) -> bool:
        with self._lock:
            if self._direct is None:
                try:
                    self._direct = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError:
                    return False
            return True

    def _read_direct(self, offset: int, nbytes: int, view: memoryview) -> int:
        """Reads whole blocks from the start of `view`; how many of the wanted bytes there are."""
        assert self._direct is not None
        start = offset // BLOCK * BLOCK
        want = -(-(offset + nbytes) // BLOCK) * BLOCK - start
        done = 0
        while start + done < offset + nbytes:
            try:
                n = os.preadv(self._direct, (view[done:want],), start + done)
            except OSError as e:
                if e.errno != errno.EINVAL:
                    raise
                self._flags = 0  # the file system takes O_DIRECT in open only
                at = offset - start
                return self._read_cached(offset, nbytes, view[at : at + nbytes]) or 0
            done += n
            if n % BLOCK or not n:  # the end of the file
                break
        return max(0, min(done - (offset - start), nbytes))


class _Vector(ctypes.Structure):
    """struct iovec of sys/uio.h."""

    _fields_ = [("base", ctypes.c_void_p), ("length", ctypes.c_size_t)]


@functools.cache
def _preadv2() -> Callable[..., int]:
    # Keeps the interpreter lock, which others would take: RWF_NOWAIT waits for no disk or server.
    function = ctypes.PyDLL(None, use_errno=True).preadv2
    function.argtypes = [
        ctypes.c_int,
        ctypes.POINTER(_Vector),
        ctypes.c_int,
        ctypes.c_int64,
        ctypes.c_int,
    ]
    function.restype = ctypes.c_ssize_t
    return function


def _read_now(fd: int, pointer: int, nbytes: int, offset: int) -> int | None:
    """How many bytes were read; None if they would have to be waited for.

    Raises:
      OSError: the file system cannot tell, or the bytes cannot be read.
    """
    vector = _Vector(pointer, nbytes)
    count = _preadv2()(fd, ctypes.byref(vector), 1, offset, os.RWF_NOWAIT)
    if count >= 0:
        return count
    if ctypes.get_errno() == errno.EAGAIN:
        return None
    raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def unreadable(path: str, array: str, reason: OSError) -> CheckpointError:
    return CheckpointError(f"{path}: array {array!r}: cannot be read: {reason}")
