"""Which CPUs are near which GPU, on hosts with several NUMA nodes."""

import ctypes
import functools
import os
from collections import defaultdict
from collections.abc import Sequence
from ctypes import c_char, c_int

from jaxgds.engines import cuda


def near(ordinal: int) -> None:
    """Keeps the calling thread on the NUMA node of GPU `ordinal`, where there are several.

    The C library's threads for reads inherit that, but serve the copiers of all GPUs.
    """
    cpus = near_cpus(ordinal)
    if cpus:
        os.sched_setaffinity(0, cpus)


def by_node(ordinals: Sequence[int]) -> list[list[int]]:
    """The GPUs that are near the same CPUs; all of them where there is one node, or none known."""
    groups: dict[frozenset[int], list[int]] = defaultdict(list)
    for ordinal in ordinals:
        groups[frozenset(near_cpus(ordinal) or ())].append(ordinal)
    return list(groups.values())


def numa_node(ordinal: int) -> int | None:
    """The NUMA node of GPU `ordinal`; None where it is not known."""
    device, text = c_int(), (c_char * 32)()
    try:
        cuda.call("cuDeviceGet", ctypes.byref(device), ordinal)
        cuda.call("cuDeviceGetPCIBusId", text, 32, device)
        with open(f"/sys/bus/pci/devices/{text.value.decode().lower()}/numa_node") as f:
            node = int(f.read())
    except (OSError, ValueError):
        return None
    return node if node >= 0 else None


@functools.cache
def near_cpus(ordinal: int) -> set[int] | None:
    """The CPUs on the NUMA node of GPU `ordinal`; None where there is one node, or none known."""
    try:
        if len([n for n in os.listdir("/sys/devices/system/node") if n[4:].isdigit()]) < 2:
            return None
        with open(f"/sys/devices/system/node/node{numa_node(ordinal)}/cpulist") as f:
            cpus = parse_cpus(f.read())
    except (OSError, ValueError):
        return None
    return (cpus & os.sched_getaffinity(0)) or None


def parse_cpus(text: str) -> set[int]:
    """The CPUs of a kernel list such as "0-3,8,10-11"."""
    cpus: set[int] = set()
    for part in text.strip().split(","):
        first, _, last = part.partition("-")
        if first:
            cpus |= set(range(int(first), int(last or first) + 1))
    return cpus
