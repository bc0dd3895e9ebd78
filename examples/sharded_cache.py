"""A packed KV cache whose heads are split over the mesh axis "tp", and attention over it.

XLA cannot split the kernels; `jax.shard_map` gives each device those of its own heads.
"""

from functools import partial
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import pallas_kernels as pk


def make_caches(
    layers: int, mesh: Mesh, fmt: pk.KVFormat, batch: int, max_len: int, heads: int, head_dim: int
) -> list[pk.KVCache]:
    """Empty caches, one a layer; each device makes its KV heads of them.

    Raises ValueError if the heads do not divide by the devices.
    """
    check_heads(heads, mesh)
    create = partial(pk.KVCache.create, fmt, batch, max_len, heads, head_dim)
    place = jax.tree.map(partial(NamedSharding, mesh), specs(jax.eval_shape(create)))
    make = jax.jit(create, out_shardings=place)
    return [make() for _ in range(layers)]


def check_heads(heads: int, mesh: Mesh) -> None:
    if heads % mesh.shape["tp"]:
        raise ValueError(
            f"{heads} KV heads do not divide by the {mesh.shape['tp']} of mesh axis tp"
        )


def specs(cache: pk.KVCache) -> Any:
    """Heads are the second dimension of all large arrays; tables and lengths are everywhere."""
    return jax.tree.map(lambda x: P(None, "tp") if x.ndim >= 3 else P(), cache)


def attend(
    q: Float[Array, "batch new heads d"],
    k: Float[Array, "batch new kv_heads d"],
    v: Float[Array, "batch new kv_heads d"],
    cache: pk.KVCache,
    counts: Int[Array, " batch"],
    mesh: Mesh,
) -> tuple[Float[Array, "batch new heads d"], pk.KVCache]:
    """Causal attention of new tokens, `counts` of them valid, and the longer cache."""

    def of_own_heads(q, k, v, cache, counts):
        return pk.attend(q, k, v, cache, lengths=counts)

    heads, where = P(None, None, "tp"), specs(cache)
    return jax.shard_map(
        of_own_heads,
        mesh=mesh,
        in_specs=(heads, heads, heads, where, P()),
        out_specs=(heads, where),
        check_vma=False,
    )(q, k, v, cache, counts)
