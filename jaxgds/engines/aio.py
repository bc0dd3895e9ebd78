"""Reads that the C library's own threads carry out (POSIX asynchronous I/O), one `Request` each.

A Python thread must have the interpreter lock again after each read, which with a dozen of them
takes longer than to read a megabyte. The library's threads know no such lock. They
work on one request of a file descriptor at a time, so there is a `Descriptor` for each read at
once; and the thread that has carried out one goes on with the next, if one is there already,
without being woken. They and who begins reads share one lock, for which a thread may sleep tens of
microseconds: so several reads are begun by one call, and to see that one is done takes no lock.
"""

import ctypes
import errno
import functools
import os
import platform
from collections.abc import Sequence
from ctypes import POINTER, Structure, byref, c_char, c_int, c_int64, c_size_t, c_ssize_t, c_void_p

from jaxgds.engines.posix import DirectFile, Way


# Of this process, those that hang in a read among them. The library's own limit is 20, and stays so
# if something else in the process has used it before.
MAX_THREADS = 1024
# What is copied at once if it is in the page cache: a thread takes longer to be woken.
SMALL = 64 << 10
_SIGEV_NONE = _LIO_NOWAIT = 1
# Whether what one processor has written others see in the same order.
_ORDERED = platform.machine() == "x86_64"


class _Notification(Structure):
    """struct sigevent of signal.h."""

    _fields_ = [("value", c_void_p), ("signal", c_int), ("how", c_int), ("rest", c_int * 12)]


class _Block(Structure):
    """struct aiocb of glibc's aio.h on 64 bits; JAX has GPUs on no other C library."""

    _fields_ = [
        *[(name, c_int) for name in ("fd", "opcode", "priority")],
        ("memory", c_void_p),
        ("nbytes", c_size_t),
        ("notification", _Notification),
        ("next", c_void_p),
        *[(name, c_int) for name in ("absolute_priority", "policy", "error")],
        ("returned", c_ssize_t),
        ("offset", c_int64),
        ("reserved", c_char * 32),
    ]


class _Limits(Structure):
    """struct aioinit of glibc's aio.h."""

    _fields_ = [
        (name, c_int)
        for name in ("threads", "requests", "locks", "usedba", "debug", "users", "idle", "reserved")
    ]


@functools.cache
def _libc() -> ctypes.PyDLL:
    # Of a PyDLL, whose functions keep the interpreter lock: they only queue.
    for name in (None, "librt.so.1"):  # where it was before glibc 2.34
        library = ctypes.PyDLL(name, use_errno=True)
        if hasattr(library, "lio_listio64"):
            library.lio_listio64.argtypes = [c_int, c_void_p, c_int, c_void_p]
            library.aio_error64.argtypes = [POINTER(_Block)]
            library.aio_init.argtypes = [POINTER(_Limits)]
            library.aio_init(byref(_Limits(threads=MAX_THREADS, requests=64)))
            return library
    raise NotImplementedError("this C library has no lio_listio64")


class Descriptor:
    """A file descriptor of its own, on which one read after the other is carried out.

    Attributes:
      file: what it stands for: a file and the way into it.
      under_way: how many reads are begun and not ended.
    """

    __slots__ = ("fd", "file", "under_way")

    def __init__(self) -> None:
        self.fd, self.under_way = -1, 0
        self.file: tuple[DirectFile, int] | None = None

    def follow(self, file: DirectFile, fd: int) -> None:
        """Gives it the meaning of `fd`, a way into `file`, which may be closed then."""
        if self.file == (file, fd):
            return
        assert not self.under_way  # a read that is not begun yet would be of the new file
        if self.fd < 0:
            self.fd = os.dup(fd)
        else:
            os.dup2(fd, self.fd, inheritable=False)
        self.file = file, fd

    def close(self) -> None:
        """Lets go of the file."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd, self.file = -1, None


class Request:
    """One read after another into pinned memory."""

    __slots__ = ("_address", "_block", "address")

    def __init__(self) -> None:
        _libc()  # before any file is looked for in vain
        self._block = _Block(fd=-1, notification=_Notification(how=_SIGEV_NONE))
        self._address, self.address = byref(self._block), ctypes.addressof(self._block)

    def at_once(self, file: DirectFile, offset: int, nbytes: int, pointer: int) -> bool:
        """Whether a range of `file` was so short and near that it is read already.

        It lies somewhere after `pointer`; where, `DirectFile.read` says.
        """
        if nbytes > SMALL or not file.read_now(offset, nbytes, pointer):
            return False
        self._block.offset, self._block.returned, self._block.error = offset, nbytes, 0
        return True

    def fail(self) -> None:
        """Makes it one that is done, and has given nothing."""
        self._block.offset, self._block.returned, self._block.error = 0, -1, 0

    def prepare(self, descriptor: Descriptor, way: Way, pointer: int) -> None:
        """Describes a read to somewhere after `pointer`, which `begin` begins.

        way: from `DirectFile.way`; the descriptor follows it.
        """
        block = self._block
        _, at, start, length = way
        block.fd, block.memory, block.nbytes = descriptor.fd, pointer + at, length
        block.offset, block.returned, block.error = start, -1, 0  # as if ended, with nothing read

    @property
    def done(self) -> bool:
        # The function takes the library's lock, and so sees all that its thread has written.
        return self._block.error != errno.EINPROGRESS and (
            _ORDERED or _libc().aio_error64(self._address) != errno.EINPROGRESS
        )

    def filled(self, end: int) -> bool:
        """Whether the read that is done gave all bytes of the file up to `end`."""
        return self._block.offset + self._block.returned >= end


def begin(requests: Sequence[Request]) -> None:
    """Begins reads, each after those of the same descriptor that were begun before.

    Raises:
      OSError: some could not be begun; they are done, and have given nothing.
    """
    blocks = (c_void_p * len(requests))(*[request.address for request in requests])
    if _libc().lio_listio64(_LIO_NOWAIT, blocks, len(blocks), None):
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


def settle() -> None:
    """Returns when the library's threads no longer look at requests that are done."""
    _libc().aio_error64(byref(_Block()))  # has had the lock that they hold until then
