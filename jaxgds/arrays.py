"""The `jax.Array`s that are made of the buffers that were filled."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Sharding

from jaxgds.scatter import Destination
from jaxgds.zarr import Layout


_BITS = {"int2": 2, "uint2": 2, "int4": 4, "uint4": 4, "float4_e2m1fn": 4}


def stored_dtype(dtype: np.dtype) -> np.dtype:
    """The dtype of the buffer that stored bytes go to.

    Values below a byte take a byte each in a checkpoint, but are packed in device memory: they
    arrive as uint8.
    """
    return np.dtype(np.uint8) if dtype.name in _BITS else dtype


def assemble(
    layout: Layout,
    sharding: Sharding,
    filled: Sequence[tuple[Destination, jax.Array]],
    dtype: Any = None,
) -> jax.Array:
    """The global array of filled shards; replicas are copied from the first device's shard.

    Args:
      dtype: to cast to, shard by shard; None keeps the stored one.
    """
    shards = []
    for destination, first in filled:
        first = _as_dtype(first, layout.dtype, dtype)
        shards.append(first)
        shards += [jax.device_put(first, device) for device in destination.devices[1:]]
    if len(shards) == 1 and shards[0].sharding == sharding:
        return shards[0]
    return jax.make_array_from_single_device_arrays(layout.shape, sharding, shards)


def _as_dtype(shard: jax.Array, stored: np.dtype, dtype: Any) -> jax.Array:
    if shard.dtype != stored:
        shard = _narrow(shard, stored)
    return shard if dtype in (None, shard.dtype) else shard.astype(dtype)


@functools.partial(jax.jit, static_argnames="dtype")
def _narrow(x: jax.Array, dtype: np.dtype) -> jax.Array:
    """One value per byte, in its low bits -> the packed type."""
    return jax.lax.bitcast_convert_type(x.astype(f"uint{_BITS[dtype.name]}"), dtype)
