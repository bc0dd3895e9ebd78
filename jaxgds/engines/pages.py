"""Hints to the kernel on how pages of this process's memory will be used."""

import ctypes
import functools


def advise(pointer: int, nbytes: int, advice: int) -> None:
    """Calls madvise on page-aligned memory, without the interpreter lock; a failure is harmless."""
    _libc().madvise(ctypes.c_void_p(pointer), ctypes.c_size_t(nbytes), advice)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)
