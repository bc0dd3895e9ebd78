"""prefill_attention: what the kernel reads, in the rotated space of the packed codes, and back.

A rotation keeps dot products, so the tokens that are not packed can be rotated too, and one
softmax goes over all of them. The packed keys lack the key offset; so the others give it up as
well: that moves all scores of a query by the same. Everything is float16 in units that keep it in
range: of the largest key and the largest value of each head, and of each query.

The new tokens pass through memory twice: gathered into their places, while their largest is looked
for, then rotated by a matrix product that leaves them as the kernel reads them. What is written
here in an odd way keeps XLA to that.
"""

import functools
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Float16, Int32

from pallas_kernels import codebook
from pallas_kernels.cache import KVCache
from pallas_kernels.codec import levels as unpack_levels
from pallas_kernels.format import KVFormat
from pallas_kernels.mosaic import levels, prefill_blackwell, prefill_hopper
from pallas_kernels.mosaic.attention import Architecture
from pallas_kernels.mosaic.prefill_blackwell import Queries
from pallas_kernels.mosaic.prefill_block import Keys, tile_tokens
from pallas_kernels.mosaic.tiles import rotation_matrix


_LOG2_E = math.log2(math.e)
_LARGEST = 1024.0  # in float16: with as many bits above as products need, and many below


# Compiled as a whole, called from traced code or not.
@functools.partial(
    jax.jit, static_argnames=("scale", "interpret", "soft_cap", "sliding_window", "architecture")
)
def prefill_attention(
    q: Float[Array, "batch new q_heads head_dim"],
    k: Float[Array, "batch new kv_heads head_dim"],
    v: Float[Array, "batch new kv_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    lengths: Int32[Array, " batch"] | None = None,
    interpret: bool = False,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    architecture: Architecture = "hopper",
) -> Float[Array, "batch new q_heads head_dim"]:
    """Attention of a chunk of new tokens over the cache and itself, on a GPU.

    As `pallas_kernels.prefill_attention`; lengths: in [0, new]; interpret: run on the CPU, for
    tests; architecture: of the GPU.
    """
    batch, new, q_heads, d = q.shape
    heads = k.shape[2]
    count = jnp.full(batch, new, jnp.int32) if lengths is None else lengths
    factor = _LOG2_E * (d**-0.5 if scale is None else scale)
    keys, k_unit, v_unit = _keys(k, v, cache, count)
    cap = None if soft_cap is None else _LOG2_E * soft_cap
    if architecture == "hopper":
        q = jnp.pad(q, ((0, 0), (0, -new % 64), (0, 0), (0, 0)))
        units = k_unit, v_unit
        out = prefill_hopper.attention(
            q, keys, units, cache, count, factor, cap, sliding_window, interpret
        )
        return out[:, :new]
    # Blackwell's leaves to XLA the rotations, and what is not to be seen of tokens past `lengths`.
    valid = (jnp.arange(new, dtype=jnp.int32)[None] < count[:, None])[..., None, None]
    if lengths is not None:
        q = jnp.where(valid, q, 0)
    queries = _queries(q, cache, factor, k_unit, soft_cap is not None)
    out = prefill_blackwell.attention(
        queries, keys, cache, q_heads // heads, cap, sliding_window, interpret
    )
    out = out[:, :, : new * (q_heads // heads)]
    out = _rotated(out, rotation_matrix(d, cache.fmt.seed).T) * v_unit[..., None, None]
    out = out.reshape(batch, heads, new, -1, d).swapaxes(1, 2).reshape(q.shape)
    if lengths is not None:
        out = jnp.where(valid, out, 0)
    overflowed = (cache.lengths > cache.max_len)[:, None, None, None]
    return jnp.where(overflowed, jnp.nan, out).astype(q.dtype)


def _queries(
    q: Array,
    cache: KVCache,
    factor: float,
    k_unit: Float[Array, "batch kv_heads"],
    capped: bool,
) -> Queries:
    fmt = cache.fmt
    batch, new, q_heads, d = q.shape
    heads = cache.recent_k.shape[1]
    group = q_heads // heads
    rows = q.reshape(batch, new, heads, group, d).swapaxes(1, 2).reshape(batch, heads, -1, d)
    rows = jnp.pad(
        rows, ((0, 0), (0, 0), (0, -rows.shape[2] % prefill_blackwell.block_rows(d)), (0, 0))
    )
    x = _rotated(rows, _key_rotation(cache))
    unit = _nonzero(jnp.max(_magnitude(x), axis=-1))
    bias = None
    if capped and fmt.key_offset:
        bias = factor * jnp.einsum(
            "bkrd,bkd->bkr", rows.astype(jnp.float32), cache.key_offset, precision="highest"
        )
    place = np.arange(rows.shape[2]) // group
    return Queries(
        (x / unit[..., None]).astype(jnp.float16),
        unit * (factor * k_unit[..., None]),
        bias,
        jnp.asarray(place, jnp.float32),
    )


def _keys(k: Array, v: Array, cache: KVCache, count: Int32[Array, " batch"]):
    """Keys, and what one of k and of v stands for: float32 [batch, kv_heads].

    That is a power of two over the root of head_dim. What rotates into such units is +-1 times a
    power of two, which bf16 holds: the products with bf16 tokens are exact.
    """
    fmt = cache.fmt
    d = k.shape[-1]
    tile, root = tile_tokens(d), math.sqrt(d)
    length = jnp.minimum(cache.lengths, cache.max_len)
    packed = fmt.packed(length)
    base = packed // tile * tile
    # Packed tokens that do not fill a tile are decoded here.
    rest = max(0, tile // fmt.page_size - 1) * fmt.page_size
    n = fmt.sinks + rest + fmt.ring_slots + k.shape[1]
    place = _dense_places(fmt, length, count, n + -n % tile, tile)
    dense_k = _gathered(cache.sink_k, cache.recent_k, k, place)
    dense_v = _gathered(cache.sink_v, cache.recent_v, v, place)
    k_scale, v_scale = (_scales(x, cache, packed) for x in (cache.k_scale, cache.v_scale))
    largest = _largest((dense_k, dense_v), (k_scale, v_scale), cache)
    power = _power_of_two(largest * (root / _LARGEST))
    k_unit, v_unit = power / root

    x = _in_units(dense_k, _key_rotation(cache), power[0], "nld,nde->nle")
    if fmt.key_offset:
        # It is subtracted after the rotation, which is exact for bf16.
        ones = np.round(_key_rotation(cache) * root)
        offset = (cache.key_offset / power[0][..., None])[..., None] * ones
        # The barrier: what the matrix product is to subtract must be there before it.
        x -= jax.lax.optimization_barrier(jnp.sum(offset, axis=-2)).reshape(-1, 1, d)
    dense_k = x.astype(jnp.float16).reshape(dense_k.shape)
    x = _in_units(dense_v, rotation_matrix(d, fmt.seed), power[1], "nld,nde->nel")
    dense_v = x.astype(jnp.float16).reshape(dense_v.swapaxes(-1, -2).shape)
    if rest:
        left_k, left_v = _decoded(cache, base, rest, k_unit, v_unit)
        here = slice(fmt.sinks, fmt.sinks + rest)
        exists = (base[:, None] + jnp.arange(rest, dtype=jnp.int32) < packed[:, None])[:, None]
        left_k = jnp.where(exists[..., None], left_k, dense_k[:, :, here])
        left_v = jnp.where(exists[..., None, :], left_v, dense_v[..., here])
        # The barrier: what is written in place must be read before, or all is copied.
        left_k, left_v = jax.lax.optimization_barrier((left_k, left_v))
        dense_k = dense_k.at[:, :, here].set(left_k)
        dense_v = dense_v.at[..., here].set(left_v)
    k_scale, v_scale = (
        _in_tiles(x, unit, base, fmt, tile) for x, unit in ((k_scale, k_unit), (v_scale, v_unit))
    )
    return Keys(dense_k, dense_v, k_scale, v_scale, base, length), k_unit, v_unit


def _dense_places(
    fmt: KVFormat, length: Array, count: Array, dense: int, tile: int
) -> Int32[Array, "batch dense"]:
    """Where each dense token lies in [sinks, ring, chunk]; -1: in none of them."""
    length, count = length[:, None], count[:, None]
    packed = fmt.packed(length)
    base = packed // tile * tile
    j = jnp.arange(dense, dtype=jnp.int32)[None]
    position = jnp.where(j < fmt.sinks, j, base + j)
    after_sinks = position - fmt.sinks
    in_ring = jnp.where(after_sinks < packed, -1, fmt.sinks + after_sinks % fmt.ring_slots)
    old = jnp.where(j < fmt.sinks, j, in_ring)
    new = jnp.where(position < length + count, position - length + fmt.sinks + fmt.ring_slots, -1)
    # The barrier: this is to be found out once a token, not for each of its coordinates.
    return jax.lax.optimization_barrier(jnp.where(position < length, old, new))


def _gathered(
    sink: Array, ring: Array, new: Array, place: Int32[Array, "batch dense"]
) -> BFloat16[Array, "batch kv_heads dense head_dim"]:
    """The dense tokens, not rotated, and zeros where there is none.

    Reads a token of each source and drops all but one: to branch to the right one would leave one
    coordinate a load.
    """
    x, start = jnp.zeros((), jnp.bfloat16), 0
    place = place[:, None, :, None]
    for source in (sink, ring, new.astype(jnp.bfloat16).swapaxes(1, 2)):
        if size := source.shape[2]:
            slot = jnp.clip(place - start, 0, size - 1)
            token = jnp.take_along_axis(source, slot, axis=2, mode="promise_in_bounds")
            x = jnp.where(place >= start, token, x)
        start += size
    return x


def _decoded(
    cache: KVCache, base: Array, rest: int, k_unit: Array, v_unit: Array
) -> tuple[Array, Array]:
    """The `rest` packed tokens from `base` on as Keys.k and Keys.v hold them."""
    fmt = cache.fmt
    page = base[:, None] // fmt.page_size + jnp.arange(rest // fmt.page_size, dtype=jnp.int32)
    page = jnp.minimum(page, cache.page_table.shape[1] - 1)
    ids = jnp.take_along_axis(cache.page_table, page, axis=1)

    def decoded(planes, bits, scale, unit, axis):
        x = unpack_levels(tuple(plane[ids] for plane in planes), bits)
        scale = scale[ids].astype(jnp.float32) / unit[:, None, :, None]
        return (x * jnp.expand_dims(scale, axis)).astype(jnp.float16)

    k = decoded(cache.k_planes, fmt.key_bits, cache.k_scale, k_unit, -1)
    k = k[..., levels.slots(fmt.key_bits, cache.head_dim)].swapaxes(1, 2)
    v = decoded(cache.v_planes, fmt.value_bits, cache.v_scale, v_unit, -2)
    v = jnp.moveaxis(v, 1, 3)
    return k.reshape(*k.shape[:2], rest, -1), v.reshape(*v.shape[:3], rest)


def _scales(
    pool: Array, cache: KVCache, packed: Array
) -> BFloat16[Array, "batch kv_heads pages page_size"]:
    """Of each sequence's packed tokens; zero for others."""
    x = pool[cache.page_table].swapaxes(1, 2)
    t = jnp.arange(x.shape[2] * x.shape[3], dtype=jnp.int32).reshape(x.shape[2:])
    return jnp.where((t < packed[:, None, None])[:, None], x, 0)


def _in_tiles(
    scale: Array, unit: Array, base: Array, fmt: KVFormat, tile: int
) -> Float16[Array, "batch kv_heads packed"]:
    """Scales in units, zero from `base` on, in the order of page_rows."""
    x = scale.reshape(*scale.shape[:2], -1).astype(jnp.float32) / unit[..., None]
    t = jnp.arange(x.shape[2], dtype=jnp.int32)
    x = jnp.where((t < base[:, None])[:, None], x, 0.0).astype(jnp.float16)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % tile)))
    order = levels.page_rows(fmt.value_bits)
    return x.reshape(*x.shape[:2], -1, order.size)[..., order].reshape(x.shape)


def _largest(
    dense: tuple[Array, Array], scales: tuple[Array, Array], cache: KVCache
) -> Float[Array, "2 batch kv_heads"]:
    """What no rotated coordinate of a key without its offset, or of a value, exceeds.

    A coordinate is at most the root of head_dim times the largest before the rotation.
    """
    fmt, root = cache.fmt, math.sqrt(cache.head_dim)
    of_dense = _maxima([x.reshape(*x.shape[:2], -1, 32 * x.shape[3]) for x in dense])
    of_pages = _maxima(scales)
    level_k, level_v = (float(codebook.magnitudes(x)[-1]) for x in (fmt.key_bits, fmt.value_bits))
    # A difference of keys is at most twice the larger one.
    k = [(of_dense[0], 2 * root), (cache.key_offset, 2 * root), (of_pages[0], level_k)]
    v = [(of_dense[1], root), (of_pages[1], level_v)]
    length = max(x.shape[2] for x, _ in k)

    def joined(parts):
        x = [_magnitude(x.astype(jnp.float32)) * times for x, times in parts]
        x = [jnp.pad(x, ((0, 0), (0, 0), (0, length - x.shape[2]))) for x in x]
        return functools.reduce(jnp.maximum, x)

    return jnp.max(jnp.stack([joined(k), joined(v)]), axis=-1)


def _maxima(arrays: Iterable[Array]) -> list[Array]:
    """Along the last axis, of magnitudes, in one reduction: XLA then reads all in one launch."""
    arrays = [_magnitude(x) for x in arrays]
    zeros = [jnp.zeros((), x.dtype) for x in arrays]

    def maximum(x, y):
        return [jnp.maximum(*both) for both in zip(x, y, strict=True)]

    return jax.lax.reduce(arrays, zeros, maximum, (arrays[0].ndim - 1,))


def _power_of_two(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """The least power of two that is no less, of those that float32 can divide by; 1 for zero."""
    bits = jax.lax.bitcast_convert_type(jnp.clip(x, 2.0**-100, 2.0**100), jnp.int32)
    mantissa = np.int32(2**23 - 1)
    power = jax.lax.bitcast_convert_type((bits + mantissa) & ~mantissa, jnp.float32)
    return jnp.where(x > 0, power, 1.0)


def _in_units(
    x: BFloat16[Array, "batch kv_heads dense head_dim"],
    matrix: np.ndarray,
    power: Float[Array, "batch kv_heads"],
    axes: str,
) -> Array:
    """Rotated, in units of power over the root of head_dim; float32, batch and kv_heads joined."""
    ones = jnp.asarray(np.round(matrix * math.sqrt(len(matrix))), jnp.bfloat16)
    ones = ones * (1 / power).astype(jnp.bfloat16)[..., None, None]
    x, ones = (x.reshape(-1, *x.shape[2:]) for x in (x, ones))
    return jnp.einsum(axes, x, ones, preferred_element_type=jnp.float32)


def _key_rotation(cache: KVCache) -> np.ndarray:
    """The rotation of keys and queries, its columns in the order in which keys are decoded."""
    order = levels.slots(cache.fmt.key_bits, cache.head_dim)
    return rotation_matrix(cache.head_dim, cache.fmt.seed)[:, order]


def _rotated(x: Array, matrix: np.ndarray) -> Float[Array, "*shape"]:
    """x @ matrix, float32: exact products, as the matrix is a root of head_dim times +-1."""
    root = math.sqrt(len(matrix))
    ones = jnp.asarray(np.round(matrix * root), x.dtype)
    product = jnp.matmul(x, ones, precision="highest", preferred_element_type=jnp.float32)
    return product * np.float32(1 / root)


def _magnitude(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1.0)
