"""Ranges of files into page-aligned memory: from the page cache, or else around it."""

import errno
import os
import threading

from jaxgds.engines.host import truncated
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent


# What O_DIRECT demands of offset, length and memory on every file system in use.
BLOCK = 4096


class DirectFiles:
    """Files opened once each, and read by many threads at once.

    What the page cache holds is copied from there. What it lacks is read with O_DIRECT, which
    is faster and leaves the cache to others. Where the file system cannot tell
    (RWF_NOWAIT) or has no O_DIRECT, reads are plain ones.
    """

    def __init__(self) -> None:
        self._files: dict[str, _File] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "DirectFiles":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def read(self, extent: Extent, view: memoryview, array: str) -> int:
        """Reads `extent` somewhere into `view`, and returns at which offset.

        Args:
          view: page-aligned and at least 2 BLOCK longer than the extent.
          array: for the error's text.

        Raises:
          CheckpointError: the file cannot be read, or ends before the extent does.
        """
        try:
            with self._lock:
                file = self._files.get(extent.file)
                if file is None:
                    file = self._files[extent.file] = _File(extent.file)
            at, have = file.read(extent.offset, extent.nbytes, view)
        except OSError as e:
            raise CheckpointError(f"{extent.file}: array {array!r}: cannot be read: {e}") from e
        if have < extent.nbytes:
            raise truncated(extent, array, extent.nbytes - have)
        return at


class _File:
    def __init__(self, path: str):
        self._path = path
        self._fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._direct: int | None = None
        self._cache_only = os.RWF_NOWAIT  # 0: the file system does not know this flag
        self._lock = threading.Lock()

    def close(self) -> None:
        os.close(self._fd)
        if self._direct is not None:
            os.close(self._direct)

    def read(self, offset: int, nbytes: int, view: memoryview) -> tuple[int, int]:
        """(where in `view` the data starts, how many bytes of it there are)."""
        done = 0
        while done < nbytes:
            flags = self._cache_only
            try:
                n = os.preadv(self._fd, [view[done:nbytes]], offset + done, flags)
            except BlockingIOError:  # not in the page cache
                if self._open_direct():
                    direct = self._read_direct(offset, nbytes, view)
                    if direct is not None:
                        return direct
                self._cache_only = 0
                continue
            except OSError as e:
                if e.errno not in (errno.EOPNOTSUPP, errno.EINVAL) or not flags:
                    raise
                self._cache_only = 0
                continue
            if not n:
                break
            done += n
        return 0, done

    def _open_direct(self) -> bool:
        with self._lock:
            if self._direct is None:
                try:
                    self._direct = os.open(self._path, os.O_RDONLY | os.O_CLOEXEC | os.O_DIRECT)
                except OSError:
                    return False
            return self._direct is not None

    def _read_direct(self, offset: int, nbytes: int, view: memoryview) -> tuple[int, int] | None:
        """As `read`, by whole blocks; None if the file system refuses."""
        assert self._direct is not None
        start = offset // BLOCK * BLOCK
        want = -(-(offset + nbytes) // BLOCK) * BLOCK - start
        done = 0
        while start + done < offset + nbytes:
            try:
                n = os.preadv(self._direct, [view[done:want]], start + done)
            except OSError as e:
                if e.errno == errno.EINVAL:
                    return None
                raise
            done += n
            if n % BLOCK or not n:  # the end of the file
                break
        return offset - start, max(0, min(done - (offset - start), nbytes))
