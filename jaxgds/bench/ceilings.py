"""What the machine itself can do: storage to host memory, and host memory to the device."""

import ctypes
import mmap
import os
import time
from concurrent.futures import ThreadPoolExecutor


BLOCK = 4 << 20
THREADS = 16
FADV_DONTNEED = 4


def read_rate(files: list[str], direct: bool) -> float:
    """Bytes per second of plain parallel reads into one small buffer per thread.

    Args:
      files: read from start to end, by all threads together.
      direct: O_DIRECT instead of the page cache.

    Raises:
      OSError: the file system has no O_DIRECT.
    """
    flags = os.O_RDONLY | (os.O_DIRECT if direct else 0)
    fds = [os.open(file, flags) for file in files]
    try:
        sizes = [os.fstat(fd).st_size for fd in fds]
        work = [
            (fd, at) for fd, size in zip(fds, sizes, strict=True) for at in range(0, size, BLOCK)
        ]

        def run(mine: list[tuple[int, int]]) -> int:
            with mmap.mmap(-1, BLOCK) as buffer:  # page-aligned, as O_DIRECT wants
                view = memoryview(buffer)
                total = sum(os.preadv(fd, [view], at) for fd, at in mine)
                view.release()
                return total

        with ThreadPoolExecutor(THREADS) as pool:
            start = time.perf_counter()
            total = sum(pool.map(run, [work[i::THREADS] for i in range(THREADS)]))
            return total / (time.perf_counter() - start)
    finally:
        for fd in fds:
            os.close(fd)


def pinned_rate(nbytes: int = 1 << 30) -> float | None:
    """Bytes per second from pinned host memory to the first GPU, by JAX; None without a GPU."""
    import jax
    import jax.numpy as jnp

    device = jax.devices()[0]
    if device.platform != "gpu":
        return None
    pinned = jax.sharding.SingleDeviceSharding(device, memory_kind="pinned_host")
    where = jax.sharding.SingleDeviceSharding(device, memory_kind="device")
    host = jax.block_until_ready(jax.device_put(jnp.ones(nbytes, jnp.uint8), pinned))
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        jax.block_until_ready(jax.device_put(host, where))
        best = min(best, time.perf_counter() - start)
    return nbytes / best


def drop_page_cache(files: list[str]) -> float:
    """Asks the kernel to forget `files`; returns the share of their pages still cached.

    Only the page cache of this machine: what a storage server or a hypervisor keeps stays.
    """
    pages = resident = 0
    libc = ctypes.CDLL(None, use_errno=True)
    for file in files:
        fd = os.open(file, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, FADV_DONTNEED)
            size = os.fstat(fd).st_size
            if size == 0:
                continue
            count = -(-size // mmap.PAGESIZE)
            flags = ctypes.create_string_buffer(count)
            with mmap.mmap(fd, size, mmap.MAP_PRIVATE, mmap.PROT_READ | mmap.PROT_WRITE) as m:
                address = ctypes.addressof(ctypes.c_char.from_buffer(m))
                if libc.mincore(ctypes.c_void_p(address), ctypes.c_size_t(size), flags):
                    raise OSError(ctypes.get_errno(), "mincore failed", file)
            pages += count
            resident += sum(f & 1 for f in flags.raw)
        finally:
            os.close(fd)
    return resident / max(pages, 1)
