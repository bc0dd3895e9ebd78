"""XLA-owned destinations, and the `jax.Array`s made of them.

The buffers are written behind XLA's back, which it does not forbid but does not
promise to support: so they are fresh, unaliased and ready before the first
write, nothing reads them until the last write is done, and all of it happens here
and in the engines.
"""

import ctypes
import functools
import mmap
from collections import defaultdict
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import Mesh, NamedSharding, PartitionSpec, Sharding

from jaxgds.engines import Buffer
from jaxgds.plan import Destination


_MADV_HUGEPAGE = 14


def allocate(
    destinations: Sequence[Destination], dtypes: Sequence[np.dtype]
) -> tuple[list[jax.Array], list[Buffer]]:
    """Uninitialised memory for each destination, on the first of its devices.

    Returns:
      One single-device array per destination, and the memory behind it.
    """
    alike: dict[tuple, list[int]] = defaultdict(list)
    for i, (destination, dtype) in enumerate(zip(destinations, dtypes, strict=True)):
        alike[destination.shape, dtype].append(i)
    arrays: list[jax.Array | None] = [None] * len(destinations)
    for (shape, dtype), numbers in alike.items():
        for batch in _rounds(numbers, destinations):
            devices = tuple(destinations[i].devices[0] for i in batch)
            for i, array in zip(batch, _empty(shape, dtype, devices)(), strict=True):
                arrays[i] = array
    done = [a for a in arrays if a is not None]
    jax.block_until_ready(done)
    buffers = [
        Buffer(a.unsafe_buffer_pointer(), a.nbytes, d.devices[0])
        for a, d in zip(done, destinations, strict=True)
    ]
    if len({b.pointer for b in buffers if b.nbytes}) != sum(b.nbytes > 0 for b in buffers):
        raise RuntimeError("XLA returned one buffer for two arrays; please report this")
    for buffer in buffers:
        if buffer.device.platform == "cpu":
            _huge_pages(buffer)
    return done, buffers


def assemble(
    shape: tuple[int, ...],
    sharding: Sharding,
    filled: Sequence[tuple[Destination, jax.Array]],
) -> jax.Array:
    """The global array of filled shards; replicas are copied from the first device's shard."""
    shards = []
    for destination, first in filled:
        shards.append(first)
        shards += [jax.device_put(first, device) for device in destination.devices[1:]]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _rounds(numbers: list[int], destinations: Sequence[Destination]) -> list[list[int]]:
    """Batches in which no device occurs twice: one SPMD call allocates a batch."""
    per_device: dict[jax.Device, list[int]] = defaultdict(list)
    for i in numbers:
        per_device[destinations[i].devices[0]].append(i)
    rounds: list[list[int]] = []
    for queue in per_device.values():
        for k, i in enumerate(queue):
            if k == len(rounds):
                rounds.append([])
            rounds[k].append(i)
    return rounds


@functools.lru_cache(maxsize=4096)
def _empty(shape: tuple[int, ...], dtype: np.dtype, devices: tuple[jax.Device, ...]):
    """A function that returns one uninitialised array of `shape` on each of `devices`.

    One program for all devices: compiling is what allocation costs. On CPU `lax.empty`
    is a fill with zeros, so there the output of a callback that does nothing is used.
    """
    if not shape:  # a mesh needs an axis to shard; scalars are not worth a program
        return lambda: [jax.device_put(np.zeros((), dtype), d, may_alias=False) for d in devices]
    mesh = Mesh(np.array(devices), ("device",))
    spec = PartitionSpec("device")
    if devices[0].platform == "cpu":
        fill = buffer_callback(
            lambda ctx, out: None, jax.ShapeDtypeStruct(shape, dtype), has_side_effect=True
        )
        call = jax.jit(jax.shard_map(fill, mesh=mesh, in_specs=(), out_specs=spec, check_vma=False))
    else:
        stacked = (shape[0] * len(devices), *shape[1:])
        call = jax.jit(
            lambda: jax.lax.empty(stacked, jnp.dtype(dtype)),
            out_shardings=NamedSharding(mesh, spec),
        )

    def arrays() -> list[jax.Array]:
        shards = {s.device: s.data for s in call().addressable_shards}
        return [shards[d] for d in devices]

    return arrays


def _huge_pages(buffer: Buffer) -> None:
    """Asks for huge pages, which make the first touch of a large buffer several times cheaper."""
    page = mmap.PAGESIZE
    start = -(-buffer.pointer // page) * page
    nbytes = (buffer.pointer + buffer.nbytes) // page * page - start
    if nbytes >= 2 << 20:  # a hint: its failure changes nothing
        libc = ctypes.CDLL(None)
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(nbytes), _MADV_HUGEPAGE)
