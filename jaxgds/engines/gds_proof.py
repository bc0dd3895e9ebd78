"""Whether bytes went past the CPU's memory: counters of the nvidia-fs driver and of cuFile.

That kvikio does not prefer its own compatibility mode proves nothing: cuFile has one too, and
enters it silently.
"""

# kvikio is optional.
# pyright: reportMissingImports=false

import ctypes
import functools
import importlib.util
import os
import re
import struct
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from jaxgds.engines import cuda, cufile_config


NVIDIA_FS = "/proc/driver/nvidia-fs"


@functools.cache
def missing() -> str | None:
    """What keeps GPUDirect Storage from being tried on this machine; None if nothing does."""
    if importlib.util.find_spec("kvikio") is None:
        return "kvikio is not installed"
    try:
        peer_to_peer = cufile_config.settings().peer_to_peer
    except ValueError as e:
        return str(e)
    if not os.path.exists(f"{NVIDIA_FS}/version") and not peer_to_peer:
        return "the nvidia-fs driver is not loaded, and cuFile is not set to use P2PDMA"
    return None


@functools.cache
def start_counting() -> None:
    """Opens cuFile's driver, and makes it count."""
    import kvikio.cufile_driver

    try:
        kvikio.cufile_driver.initialize()
    except RuntimeError:
        return  # kvikio then reads without cuFile
    set_level = getattr(_cufile(), "cuFileSetStatsLevel", None)
    if set_level is not None:
        set_level.restype = ctypes.c_uint64
        set_level(3)


def _cufile() -> ctypes.CDLL | None:
    """cuFile's library as kvikio has loaded it."""
    try:
        return ctypes.CDLL("libcufile.so.0", mode=os.RTLD_NOLOAD | os.RTLD_NOW)
    except OSError:
        return None


class Counted(NamedTuple):
    """Reads so far: by nvidia-fs for all processes, and by cuFile of this one, by their way."""

    driver: int
    own: Mapping[str, int]


def counted() -> Counted:
    if _cufile() is None:
        return Counted(0, {})  # what the driver counts is then others' alone
    try:
        with open(f"{NVIDIA_FS}/stats") as f:
            driver = nvidia_fs_reads(f.read())
    except OSError:
        driver = 0
    return Counted(driver, cufile_reads())


def since(before: Counted, after: Counted) -> tuple[int, int]:
    """(direct reads, reads through host memory) between the two.

    By cuFile's own counters where it has them; the driver's also count other processes' reads.
    """
    if not after.own:
        return after.driver - before.driver, 0
    ways = {way: n - before.own.get(way, 0) for way, n in after.own.items()}
    return ways["p2p"] + ways["nvfs"], ways["posix"]


def nvidia_fs_reads(text: str) -> int:
    """The count of successful reads in /proc/driver/nvidia-fs/stats."""
    return sum(map(int, re.findall(r"^Reads\s*:.*\bok=(\d+)", text, re.MULTILINE)))


def cufile_reads() -> dict[str, int]:
    """This process's reads on all GPUs by the way they took, as cuFile counts them ("p2p", "nvfs",
    "posix"); empty where its library is not loaded or too old to count (before CUDA 13), or knows
    none of the GPUs."""
    get = getattr(_cufile(), "cuFileGetStatsL3", None)
    room = ctypes.create_string_buffer(64 << 10)
    if get is None:
        return {}
    get.restype = ctypes.c_uint64  # a struct of two ints, of which the first is the status
    if get(room) & 0xFFFFFFFF:
        return {}
    uuids = [cuda.uuid(n) for n in range(cuda.count())]
    return reads_by_gpu(room.raw, uuids) if any(u in room.raw for u in uuids) else {}


def reads_by_gpu(stats: bytes, uuids: Sequence[bytes]) -> dict[str, int]:
    """Sums the counters of all GPUs in a CUfileStatsLevel3 of cufile.h.

    What precedes a GPU's counters grows from version to version: they are found by its UUID. After
    it come bytes, bandwidth, utilisation, duration, then the numbers of all, peer-to-peer,
    nvidia-fs and POSIX reads, eight bytes each.
    """
    found = [at for at in map(stats.find, uuids) if at >= 0]
    ways = [struct.unpack_from("<3Q", stats, at + len(uuids[0]) + 5 * 8) for at in found]
    p2p, nvfs, posix = (sum(column) for column in zip(*ways, strict=True)) if ways else (0, 0, 0)
    return {"p2p": p2p, "nvfs": nvfs, "posix": posix}
