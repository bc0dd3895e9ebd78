"""The kernels of zstd.cu: what they are given, what they say, and their launches."""

import ctypes
import functools
import re
from contextlib import suppress
from ctypes import c_uint32, c_uint64
from importlib import resources

import zstandard

from jaxgds.engines import cuda


# In the order of their launches: name, thread blocks for each lane, threads of each.
_KERNELS = (
    ("zstd_walk", 1, 128),
    ("zstd_parse", 64, 4),
    ("zstd_link", 1, 1),
    ("zstd_sequences", 64, 4),
    ("zstd_place", 1, 1),
    ("zstd_literals", 128, 32),
    ("zstd_scatter", 128, 512),
    ("zstd_execute", 1, 128),
)
FIRST, LAST = 1, 2  # of Order.flags: a frame's first piece, its last one


class Order(ctypes.Structure):
    """What zstd.cu's struct Order is: what a lane is to do."""

    _fields_ = [
        ("piece", c_uint64),
        ("nbytes", c_uint64),
        ("out", c_uint64),
        ("capacity", c_uint64),
        ("flags", c_uint64),
    ]


class Status(ctypes.Structure):
    """What zstd.cu's struct Status is: how far a lane has come."""

    _fields_ = [
        ("error", c_uint32),
        ("finished", c_uint32),
        ("produced", c_uint64),
        ("consumed", c_uint64),
        ("content_size", c_uint64),
        ("blocks", c_uint64),
        ("sequences", c_uint64),
        ("has_checksum", c_uint32),
        ("checksum", c_uint32),
        ("window_size", c_uint64),
    ]


def reason(status: Status) -> str:
    """Why a GPU leaves a frame to the CPU."""
    unsupported = {
        64: "a dictionary",
        65: "a skippable frame",
        66: "a window above 2 GiB",
        67: "too many blocks",
        68: "too many matches",
    }
    if status.error:
        return unsupported.get(status.error, f"damage, of kind {status.error} in zstd.cu")
    return "a checksum" if status.has_checksum else "more or less than one frame"


_FOLDER = resources.files("jaxgds.engines")


@functools.cache
def _ptx() -> bytes:
    return _FOLDER.joinpath("zstd.ptx").read_bytes() + b"\0"


@functools.cache
def workspace_nbytes() -> int:
    """Bytes of a lane's state in zstd.cu."""
    found = re.search(rb"workspace_bytes = (\d+)", _ptx())
    assert found
    return int(found[1])


@functools.cache
def kernels(ordinal: int) -> list[int]:
    """The functions of zstd.cu on GPU `ordinal`, which is current.

    Raises:
      CudaError: the driver does not take them.
    """
    names = [name for name, _, _ in _KERNELS]
    code = _FOLDER.joinpath(f"zstd_sm_{cuda.compute_capability(ordinal)[0]}0.cubin.zst")
    # None for newer GPUs, and an older driver may not take it. PTX the driver compiles, which takes
    # half a second the first time on a machine.
    with suppress(FileNotFoundError, cuda.CudaError):
        return cuda.functions(zstandard.decompress(code.read_bytes()), names)
    return cuda.functions(_ptx(), names)


def launch(ordinal: int, lanes: int, stream: int, workspaces: int, orders: int) -> None:
    """Queues the decoding of a piece in each of `lanes` lanes, on GPU `ordinal`, which is current.

    workspaces, orders: device memory with one for each lane.
    """
    for function, (_, blocks, threads) in zip(kernels(ordinal), _KERNELS, strict=True):
        cuda.launch(function, (blocks, lanes), threads, stream, workspaces, orders)
