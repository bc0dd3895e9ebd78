"""Files opened once each, used by many threads at once, closed when others take their place."""

import fcntl
import os
import resource
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Protocol

from jaxgds.workers import reading


MAX_IDLE = 64
_ROOM = 512  # descriptors


class _Closable(Protocol):
    def close(self) -> None: ...


class OpenFiles[File: _Closable]:
    """A context manager; `open(path, array)` opens `path` with the given function, or has it open.

    Checkpoints with a file for each chunk have more files than a process may have open: of those
    that no thread uses only the newest stay open.

    Args:
      how: opens a file; `array`, whose bytes are wanted, is for the text of its errors.
    """

    def __init__(self, how: Callable[[str, str], File]):
        self._how = how
        self._idle = _idle_at_most()
        self._files: dict[str, File] = {}  # the one used longest ago comes first
        self._users: Counter[str] = Counter()
        self._opening = threading.Lock()
        self._lock = threading.Lock()  # never held while the file system is waited for

    def __enter__(self) -> "OpenFiles[File]":
        return self

    def __exit__(self, *_: object) -> None:
        with self._lock:  # a thread may be left behind
            files, self._files = self._files, {}
        for file in files.values():
            file.close()

    @contextmanager
    def open(self, path: str, array: str) -> Iterator[File]:
        with reading(path, array), self._opening:
            file = self._take(path)
            if file is None:
                file = self._how(path, array)
                self._take(path, file)
        try:
            yield file
        finally:
            for closed in self._give_back(path):
                closed.close()

    def _take(self, path: str, opened: File | None = None) -> File | None:
        with self._lock:
            file = opened or self._files.pop(path, None)
            if file is not None:
                self._files[path] = file
                self._users[path] += 1
            return file

    def _give_back(self, path: str) -> list[File]:
        """Returns the files to close."""
        with self._lock:
            self._users[path] -= 1
            if len(self._files) <= self._idle:
                return []
            idle = [path for path in self._files if not self._users[path]]
            return [self._files.pop(path) for path in idle[: -self._idle or None]]


def make_room(_stop: threading.Event) -> None:
    """Has the kernel make its table of this process's descriptors large enough for a restore.

    Where several threads share the table, whoever opens the 65th, 129th or 257th file waits for all
    cores to have passed through the scheduler: 30 ms on a host with 16 of them.
    """
    with suppress(OSError):  # fewer are allowed
        fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.close(fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, _ROOM - 1))
        finally:
            os.close(fd)


def _idle_at_most() -> int:
    allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return MAX_IDLE if allowed == resource.RLIM_INFINITY else min(MAX_IDLE, allowed // 8)
