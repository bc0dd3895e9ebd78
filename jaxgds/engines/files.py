"""Files opened once each, used by many threads at once, closed together."""

import threading
from collections.abc import Callable
from typing import Protocol


class _Closable(Protocol):
    def close(self) -> None: ...


class OpenFiles[File: _Closable]:
    """A context manager; `open(path, array)` opens `path` with the given function, once.

    Args:
      how: opens a file; `array`, whose bytes are wanted, is for the text of its errors.
    """

    def __init__(self, how: Callable[[str, str], File]):
        self._how = how
        self._files: dict[str, File] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> "OpenFiles[File]":
        return self

    def __exit__(self, *_: object) -> None:
        for file in self._files.values():
            file.close()
        self._files.clear()

    def open(self, path: str, array: str) -> File:
        with self._lock:
            if path not in self._files:
                self._files[path] = self._how(path, array)
            return self._files[path]
