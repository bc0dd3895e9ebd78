"""What the prefill kernels for Hopper and Blackwell share: what a thread block attends to, and how.

That is tiles of 64 or 128 tokens, first the packed ones, then dense ones. Producers
(`prefill_tiles`) bring them to shared memory, where consumers read them.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float16, Int32

from pallas_kernels.cache import KVCache
from pallas_kernels.format import KVFormat
from pallas_kernels.mosaic.prefill_tiles import Side, both_sides
from pallas_kernels.mosaic.tiles import lines, smem
from pallas_kernels.packing import plane_bits


_SHARED_MEMORY = 226 * 1024


def tile_tokens(head_dim: int) -> int:
    """Tokens that are attended to at once."""
    return 64 if head_dim == 256 else 128


@dataclass(frozen=True)
class Keys:
    """What is attended to: the cache's packed tokens up to a multiple of a tile, then dense ones.

    Dense token j is the sequence's token j if j < sinks, else token base + j, where base is how
    many packed tokens come before. k_scale, v_scale: of the packed tokens, in the order in which
    `levels.page_rows` and `levels.slots` leave a part of a tile.
    """

    k: Float16[Array, "batch kv_heads dense head_dim"]
    v: Float16[Array, "batch kv_heads head_dim dense"]
    k_scale: Float16[Array, "batch kv_heads packed"]
    v_scale: Float16[Array, "batch kv_heads packed"]
    base: Int32[Array, " batch"]
    lengths: Int32[Array, " batch"]


@dataclass(frozen=True)
class Options:
    """What is known when a kernel is compiled. soft_cap: to the base 2."""

    fmt: KVFormat
    group: int
    soft_cap: float | None
    sliding_window: int | None
    interpret: bool


class Sources(NamedTuple):
    """What producers read in global memory, as arrays and then as refs."""

    k: Any
    v: Any
    k_scale: Any
    v_scale: Any
    planes: tuple  # of keys and then of values, in lines of 128 bytes


class Tiles(NamedTuple):
    """What producers fill in shared memory: `Side.tiles`, codes and scales, of both sides."""

    tiles: tuple
    codes: tuple
    scales: tuple


class Barriers(NamedTuple):
    """Those of `Side`, of both sides."""

    codes_ready: tuple
    ready: tuple
    read: tuple


def sources(keys: Keys, cache: KVCache) -> Sources:
    planes = lines((*cache.k_planes, *cache.v_planes))
    return Sources(keys.k, keys.v, keys.k_scale, keys.v_scale, planes)


def scratch(cache: KVCache, rows: int, consumers: int) -> tuple[Tiles, Barriers]:
    """As many stages as fit into shared memory beside a block's `rows` queries."""
    fmt, d = cache.fmt, cache.head_dim
    tile = tile_tokens(d)
    pages = max(1, tile // fmt.page_size)
    parts = max(1, fmt.page_size // tile)  # tiles that a page is cut into
    counts = [len(plane_bits(bits)) for bits in (fmt.key_bits, fmt.value_bits)]
    heights = [math.prod(x.shape[2:]) // 128 * pages for x in (*cache.k_planes, *cache.v_planes)]
    heights = [n // parts if i < counts[0] else n for i, n in enumerate(heights)]
    stages, code_stages = _stages(d, rows, tile, 128 * sum(heights) + 4 * tile)
    return (
        Tiles(
            (smem((stages, tile, d), jnp.float16), smem((stages, d, tile), jnp.float16)),
            tuple(plgpu.SMEM((code_stages, n, 128), jnp.uint8) for n in heights),
            tuple(plgpu.SMEM((code_stages, tile), jnp.float16) for _ in range(2)),
        ),
        Barriers(
            tuple(
                plgpu.Barrier(num_arrivals=pages * n + 1, num_barriers=code_stages) for n in counts
            ),
            tuple(plgpu.Barrier(num_barriers=stages) for _ in range(2)),
            tuple(plgpu.Barrier(num_arrivals=consumers, num_barriers=stages) for _ in range(2)),
        ),
    )


def _stages(d: int, rows: int, tile: int, code_bytes: int) -> tuple[int, int]:
    """Tiles, and tiles of codes, that fit into shared memory."""
    for stages, code_stages in ((2, 2), (2, 1), (1, 1)):
        if 2 * rows * d + 4 * stages * tile * d + code_stages * code_bytes <= _SHARED_MEMORY:
            return stages, code_stages
    raise NotImplementedError(f'a tile of {code_bytes} bytes of codes does not fit; use "xla"')


def sides(
    fmt: KVFormat, words, given: Sources, to: Tiles, barriers: Barriers, at, used: int = 0
) -> tuple[Side, Side]:
    """Keys and values of one sequence and KV head, which `at` are; words: `levels.load_tables`."""
    return both_sides(
        fmt,
        words,
        [plane.at[:, at[1]] for plane in given.planes],
        to.codes,
        (given.k_scale.at[at], given.v_scale.at[at]),
        (given.k.at[at], given.v.at[at]),
        to.scales,
        barriers.codes_ready,
        to.tiles,
        barriers.ready,
        barriers.read,
        used=used,
    )
