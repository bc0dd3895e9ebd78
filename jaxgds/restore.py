"""index -> plan -> allocate -> read -> arrays: the way every restore takes."""

import dataclasses
import functools
import logging
import math
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxgds import arrays
from jaxgds.allocation import Allocation, own_settings
from jaxgds.engines import Buffer, Engine, HostEngine, engine_for
from jaxgds.index import StoredArray
from jaxgds.plan import Destination, Plan, Read, all_shards, make_plan, summary
from jaxgds.progress import shown, traced
from jaxgds.report import TransferReport, is_strict, total
from jaxgds.workers import watched


_log = logging.getLogger("jaxgds")


@dataclasses.dataclass(frozen=True)
class Wanted:
    """An array of a checkpoint, the sharding it is to have, and its dtype (None: as stored)."""

    array: StoredArray
    sharding: Sharding
    dtype: Any = None


def unsupported(wanted: Wanted) -> str | None:
    """Why `restore` cannot restore this array; None if it can."""
    dtype, shape = wanted.array.layout.dtype, wanted.array.layout.shape
    sharding = wanted.sharding
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return f"{dtype} needs jax_enable_x64"
    if 0 in shape:
        return "an array without elements has no bytes to read"
    devices = sharding.addressable_devices
    if not devices:
        return "no device of its sharding belongs to this process"
    default = next(iter(devices)).default_memory().kind
    if sharding.memory_kind not in (None, default):
        return f"memory kind {sharding.memory_kind!r} is not device memory"
    try:
        engine_for(set(devices))
    except NotImplementedError as e:
        return str(e)
    return None


def restore(
    wanted: Sequence[Wanted], engine: Engine | None = None, strict: bool | None = None
) -> tuple[list[jax.Array], TransferReport]:
    """Restores arrays onto their shardings, each needed byte read once.

    Args:
      wanted: arrays of one checkpoint, none twice, none of them `unsupported`.
      engine: None picks by the devices' platform.
      strict: an engine that fails is not replaced by another; None asks JAXGDS_STRICT.

    Returns:
      One array per entry of `wanted`, and the report (without index time).

    Raises:
      CheckpointError: a file is missing, truncated or damaged. Nothing is returned then.
      MemoryError: a device has too little free memory. Nothing was read then.
      TimeoutError: a file system does not answer.
      ValueError: a sharding does not fit its array's shape.
    """
    platforms = [_platform(w.sharding) for w in wanted]
    if engine is None and len(set(platforms)) > 1:
        return _by_platform(wanted, platforms, strict)
    start = time.perf_counter()
    pairs = [(w.array, w.sharding) for w in wanted]
    destinations = all_shards(pairs)
    dtypes = {w.array.name: arrays.stored_dtype(w.array.layout.dtype) for w in wanted}
    _check_room(destinations, dtypes)
    allocation = Allocation(destinations, [dtypes[d.array] for d in destinations])
    buffers = allocation.buffers
    bytes_read, planned = 0, start

    def plan() -> list[Read]:
        nonlocal bytes_read, planned
        with traced("plan"):
            made = watched(lambda: make_plan(pairs, used.max_read, destinations))
            reads = in_order(made.reads, allocation.order)
        bytes_read, planned = made.source_nbytes, time.perf_counter()
        _log_plan(made)
        return reads

    try:
        allocation.start()
        used = engine or engine_for({b.device for b in buffers}, strict=is_strict(strict))
        with shown(sum(b.nbytes for b in buffers)) as arrived:
            used.read(plan, buffers, arrived)
    except BaseException:
        allocation.drop()
        raise
    filled = allocation.arrays()
    read = time.perf_counter()
    shards: dict[str, list] = {w.array.name: [] for w in wanted}
    for destination, array in zip(destinations, filled, strict=True):
        shards[destination.array].append((destination, array))
    restored = undisturbed(lambda: _assemble(wanted, shards))
    report = TransferReport(
        path=used.path,
        bytes_read=bytes_read,
        bytes_restored=sum(b.nbytes for b in buffers),
        seconds=time.perf_counter() - start,
        plan_seconds=planned - start,
        read_seconds=read - planned,
        arrays=len(restored),
        note=used.note,
    )
    return restored, report


def undisturbed[T](work: Callable[[], T]) -> T:
    """What `work` returns, without the caller's mesh, transfer guards or trace.

    These hold for his thread, so that `work` has one of its own. It runs programs on single
    devices, which need not be of his mesh.
    """
    x64 = bool(jax.config.jax_enable_x64)

    def run() -> T:
        with own_settings(x64):
            return work()

    return watched(run)


def _assemble(
    wanted: Sequence[Wanted], shards: Mapping[str, list[tuple[Destination, jax.Array]]]
) -> list[jax.Array]:
    return jax.block_until_ready(
        [arrays.assemble(w.array.layout, w.sharding, shards[w.array.name], w.dtype) for w in wanted]
    )


def _log_plan(plan: Plan) -> None:
    if _log.isEnabledFor(logging.DEBUG):
        _log.debug("plan: %s", summary(plan))


def _check_room(destinations: Sequence[Destination], dtypes: Mapping[str, np.dtype]) -> None:
    """Raises MemoryError if a device that counts its memory has too little for its shards."""
    needed: dict[jax.Device, int] = defaultdict(int)
    for destination in destinations:
        nbytes = math.prod(destination.shape) * dtypes[destination.array].itemsize
        for device in destination.devices:
            needed[device] += nbytes
    short = []
    for device, nbytes in needed.items():
        stats = device.memory_stats() or {}
        if limit := stats.get("bytes_limit"):
            free = limit - stats["bytes_in_use"]
            if nbytes > free:
                short.append(f"{device} has {free:,} bytes free of {limit:,}, needed {nbytes:,}")
    if short:
        raise MemoryError(
            f"too little device memory for the restore: {'; '.join(short)}. Delete arrays that "
            "are no longer needed, restore onto more devices, or let XLA use more of the memory "
            "(XLA_PYTHON_CLIENT_MEM_FRACTION)"
        )


def _platform(sharding: Sharding) -> str:
    return next(iter(sharding.addressable_devices)).platform


def _by_platform(
    wanted: Sequence[Wanted], platforms: Sequence[str], strict: bool | None
) -> tuple[list[jax.Array], TransferReport]:
    """Restores onto CPUs and GPUs one after the other: each has its engine."""
    made: dict[int, jax.Array] = {}
    reports = []
    for platform in sorted(set(platforms)):
        some = [i for i, p in enumerate(platforms) if p == platform]
        arrays, done = restore([wanted[i] for i in some], strict=strict)
        made.update(zip(some, arrays, strict=True))
        reports.append(done)
    return [made[i] for i in range(len(wanted))], functools.reduce(total, reports)


def restore_to_host(
    stored: Sequence[StoredArray],
) -> tuple[list[np.ndarray], TransferReport]:
    """Restores whole arrays as numpy arrays, each with its stored dtype.

    Raises:
      CheckpointError: a file is missing, truncated or damaged. Nothing is returned then.
    """
    start = time.perf_counter()
    made = [np.empty(a.layout.shape, a.layout.dtype) for a in stored]
    whole = [tuple((0, n) for n in a.shape) for a in made]
    destinations = tuple(Destination(a.name, box, ()) for a, box in zip(stored, whole, strict=True))
    pairs: list[Any] = [(a, None) for a in stored]  # no shardings: the destinations are given
    with traced("plan"):
        plan = watched(lambda: make_plan(pairs, destinations=destinations))
    _log_plan(plan)
    planned = time.perf_counter()
    engine = HostEngine()
    buffers = [Buffer(lambda a=a: a.ctypes.data, a.nbytes, None) for a in made]
    with shown(sum(b.nbytes for b in buffers)) as arrived:
        engine.read(lambda: plan.reads, buffers, arrived)
    end = time.perf_counter()
    report = TransferReport(
        path=engine.path,
        bytes_read=plan.source_nbytes,
        bytes_restored=sum(a.nbytes for a in made),
        seconds=end - start,
        plan_seconds=planned - start,
        read_seconds=end - planned,
        arrays=len(made),
    )
    return made, report


def in_order(reads: Sequence[Read], order: Sequence[int]) -> list[Read]:
    """Reads whose memory is allocated first come first; else they keep their order."""

    def first(read: Read) -> int:
        return min((order[p.destination] for s in read.segments for p in s.pieces), default=0)

    return sorted(reads, key=first)
