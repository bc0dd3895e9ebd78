"""index -> plan -> allocate -> read -> arrays: the way every restore takes."""

import time
from collections.abc import Sequence

import jax
from jax.sharding import Sharding

from jaxgds import arrays
from jaxgds.engines import Engine, engine_for
from jaxgds.index import StoredArray
from jaxgds.plan import make_plan
from jaxgds.report import TransferReport


def unsupported(array: StoredArray, sharding: Sharding) -> str | None:
    """Why `restore` cannot give this array this sharding; None if it can."""
    dtype, shape = array.layout.dtype, array.layout.shape
    if jax.dtypes.canonicalize_dtype(dtype) != dtype:
        return f"{dtype} needs jax_enable_x64"
    if dtype.name in ("int2", "uint2", "int4", "uint4", "float4_e2m1fn"):
        return f"{dtype} is packed in device memory, but not in the checkpoint"
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
    wanted: Sequence[tuple[StoredArray, Sharding]], engine: Engine | None = None
) -> tuple[list[jax.Array], TransferReport]:
    """Restores arrays onto their shardings, each needed byte read once.

    Args:
      wanted: arrays of one checkpoint, each with its sharding, none of them `unsupported`.
      engine: None picks by the devices' platform.

    Returns:
      One array per entry of `wanted`, and the report (without index time).

    Raises:
      CheckpointError: a file is missing, truncated or damaged. Nothing is returned then.
      ValueError: a sharding does not fit its array's shape.
    """
    start = time.perf_counter()
    plan = make_plan(wanted)
    planned = time.perf_counter()
    dtypes = {array.name: array.layout.dtype for array, _ in wanted}
    filled, buffers = arrays.allocate(
        plan.destinations, [dtypes[d.array] for d in plan.destinations]
    )
    allocated = time.perf_counter()
    if engine is None:
        engine = engine_for({b.device for b in buffers})
    engine.read(plan.reads, buffers)
    read = time.perf_counter()
    shards: dict[str, list] = {array.name: [] for array, _ in wanted}
    for destination, array in zip(plan.destinations, filled, strict=True):
        shards[destination.array].append((destination, array))
    restored = [
        arrays.assemble(array.layout.shape, sharding, shards[array.name])
        for array, sharding in wanted
    ]
    report = TransferReport(
        path=engine.path,
        bytes_read=plan.source_nbytes,
        bytes_restored=sum(b.nbytes for b in buffers),
        seconds=time.perf_counter() - start,
        plan_seconds=planned - start,
        allocate_seconds=allocated - planned,
        read_seconds=read - allocated,
        arrays=len(restored),
    )
    return restored, report
