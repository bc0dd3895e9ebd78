"""cuFile through kvikio: open files, and registered memory on the device."""

# kvikio is optional.
# pyright: reportMissingImports=false

import os
from typing import Any

from jaxgds.engines import cuda
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.host import truncated
from jaxgds.engines.posix import BLOCK, unreadable
from jaxgds.index import Extent
from jaxgds.workers import reading


class CuFileError(RuntimeError):
    """cuFile cannot do what it was asked for; names the file and the array."""


class Staging:
    """Device memory that is registered with cuFile, and the stream of the copies out of it."""

    def __init__(self, nbytes: int):
        import kvikio

        self.stream = cuda.stream()
        self.nbytes = nbytes + 2 * BLOCK
        self._allocated = cuda.allocate(self.nbytes + BLOCK)
        self.pointer = -(-self._allocated // BLOCK) * BLOCK
        try:
            kvikio.memory_register(Memory(self.pointer, self.nbytes))
        except RuntimeError as e:
            cuda.free(self._allocated)
            raise CuFileError(f"GPU memory cannot be registered with cuFile: {e}") from e

    def close(self) -> None:
        import kvikio

        cuda.call("cuStreamSynchronize", self.stream)
        kvikio.memory_deregister(Memory(self.pointer, self.nbytes))  # must precede the release
        cuda.free(self._allocated)
        cuda.call("cuStreamDestroy_v2", self.stream)


class Memory:
    """Device memory as kvikio takes it."""

    def __init__(self, pointer: int, nbytes: int):
        self.__cuda_array_interface__ = {
            "shape": (nbytes,),
            "typestr": "|u1",
            "data": (pointer, False),
            "version": 3,
        }


class File:
    """A file that is open for cuFile."""

    def __init__(self, path: str, array: str):
        import kvikio

        self._path, self._array = path, array
        self.nbytes = os.stat(path).st_size
        self._file: Any = kvikio.CuFile(path, "r")

    def close(self) -> None:
        self._file.close()

    def stage(self, offset: int, nbytes: int, staging: Staging) -> int:
        """Reads the blocks that hold a range; returns the address of its first byte."""
        start = offset // BLOCK * BLOCK
        stop = min(-(-(offset + nbytes) // BLOCK) * BLOCK, self.nbytes)
        self.read(start, stop - start, staging.pointer)
        return staging.pointer + offset - start

    def read(self, offset: int, nbytes: int, pointer: int) -> None:
        try:
            with reading(self._path, self._array):
                n = self._file.raw_read(Memory(pointer, nbytes), nbytes, offset, 0)
        except (RuntimeError, OSError) as e:
            raise CuFileError(
                f"{self._path}: array {self._array!r}: cuFile cannot read "
                f"[{offset}, {offset + nbytes}): {e}; JAXGDS_ENGINE=pinned reads without cuFile"
            ) from e
        if n < nbytes:
            raise truncated(Extent(self._path, offset, nbytes), self._array, nbytes - n)


def files() -> OpenFiles[File]:
    def how(path: str, array: str) -> File:
        try:
            return File(path, array)
        except OSError as e:
            raise unreadable(path, array, e) from e
        except RuntimeError as e:
            raise CuFileError(f"{path}: array {array!r}: cannot be opened for cuFile: {e}") from e

    return OpenFiles(how)
