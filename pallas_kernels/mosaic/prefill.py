"""prefill_attention: what the kernel reads, in the rotated space of the packed codes, and back.

A rotation keeps dot products, so the tokens that are not packed can be rotated too, and one
softmax goes over all of them. The packed keys lack the key offset; so the others give it up as
well: that moves all scores of a query by the same. Everything is float16 in units that keep it in
range: of the largest key and the largest value of each head, and of each query.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int32

from pallas_kernels import codebook
from pallas_kernels.cache import KVCache
from pallas_kernels.codec import levels as unpack_levels
from pallas_kernels.mosaic import levels, prefill_blackwell, prefill_hopper
from pallas_kernels.mosaic.attention import Architecture
from pallas_kernels.mosaic.prefill_blackwell import Queries
from pallas_kernels.mosaic.prefill_hopper import Keys
from pallas_kernels.mosaic.tiles import rotation_matrix


_LOG2_E = math.log2(math.e)
_LARGEST = 1024.0  # in float16: with as many bits above as products need, and many below


# Compiled as a whole, called from traced code or not.
@partial(
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
    valid = (jnp.arange(new, dtype=jnp.int32)[None] < count[:, None])[..., None, None]
    if lengths is not None:
        q, k, v = (jnp.where(valid, x, 0) for x in (q, k, v))
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
    # Blackwell's leaves the rotations to XLA.
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
    """Keys, and what one of k and of v stands for: float32 [batch, kv_heads]."""
    fmt = cache.fmt
    batch, new, heads, d = k.shape
    tile = prefill_hopper.tile_tokens(d)
    length = jnp.minimum(cache.lengths, cache.max_len)
    packed = fmt.packed(length)
    base = packed // tile * tile
    # Packed tokens that do not fill a tile are decoded here.
    pages = max(0, tile // fmt.page_size - 1)
    rest = pages * fmt.page_size
    ids = base[:, None] // fmt.page_size + jnp.arange(pages, dtype=jnp.int32)[None]
    ids = jnp.minimum(ids, cache.page_table.shape[1] - 1)
    ids = jnp.take_along_axis(cache.page_table, ids, axis=1)

    def decoded(planes, bits, scale, transposed):
        """Rotated, [batch, kv_heads, dense, head_dim] with the tokens in their places."""
        if rest == 0:
            return jnp.zeros((batch, heads, 1, d), jnp.float32)
        x = unpack_levels(tuple(plane[ids] for plane in planes), bits)
        x = x.swapaxes(-1, -2) if transposed else x
        x = x * scale[ids][..., None].astype(jnp.float32)
        x = x.swapaxes(1, 2).reshape(batch, heads, rest, d)
        after = index.shape[1] - fmt.sinks - rest
        x = jnp.pad(x, ((0, 0), (0, 0), (fmt.sinks, after), (0, 0)))
        return jnp.where(is_decoded[:, None, :, None], x, 0.0)

    index = _dense_index(fmt, length, count, new, rest, tile)
    is_decoded = (index >= fmt.sinks) & (index < fmt.sinks + rest)

    def gathered(sink, ring, fresh):
        """bf16 [batch, dense, kv_heads, head_dim], not rotated."""
        nothing = jnp.zeros((batch, rest, heads, d), jnp.bfloat16)
        x = [sink.swapaxes(1, 2), nothing, ring.swapaxes(1, 2), fresh.astype(jnp.bfloat16)]
        x = jnp.concatenate(x, axis=1)
        x = jnp.take_along_axis(x, jnp.maximum(index, 0)[..., None, None], axis=1)
        return jnp.where((index >= 0)[..., None, None], x, 0)

    def unit(dense, decoded, scale, bits):
        """Of float16: a rotated coordinate is at most the root of head_dim times the largest."""
        of_dense = jnp.max(_magnitude(dense.astype(jnp.float32)), axis=(1, 3)) * math.sqrt(d)
        of_decoded = jnp.max(_magnitude(decoded), axis=(2, 3))
        of_packed = jnp.max(_magnitude(scale), axis=2) * float(codebook.magnitudes(bits)[-1])
        largest = jnp.maximum(of_dense, jnp.maximum(of_decoded, of_packed))
        return _nonzero(largest) / _LARGEST

    k_scale, v_scale = (_scales(x, cache, base, tile) for x in (cache.k_scale, cache.v_scale))
    by_head = (..., None, None)

    key_order = levels.slots(fmt.key_bits, d)
    left = decoded(cache.k_planes, fmt.key_bits, cache.k_scale, False)[..., key_order]
    x = gathered(cache.sink_k, cache.recent_k, k)
    offset = cache.key_offset if fmt.key_offset else jnp.zeros_like(cache.key_offset)
    # The offset is subtracted after the rotation, which is exact for bf16.
    k_unit = unit(x, left, k_scale, fmt.key_bits)
    k_unit += jnp.max(jnp.abs(offset), axis=-1) * (math.sqrt(d) / _LARGEST)
    dense_k = _rotated(x, _key_rotation(cache), "blhd,de->bhle")
    dense_k -= _rotated(offset, _key_rotation(cache))[:, :, None]
    dense_k = jnp.where(is_decoded[:, None, :, None], left, dense_k)

    left = decoded(cache.v_planes, fmt.value_bits, cache.v_scale, True)
    x = gathered(cache.sink_v, cache.recent_v, v)
    v_unit = unit(x, left, v_scale, fmt.value_bits)
    dense_v = _rotated(x, rotation_matrix(d, fmt.seed), "blhd,de->bhel")
    dense_v = jnp.where(is_decoded[:, None, None, :], left.swapaxes(-1, -2), dense_v)
    keys = Keys(
        (dense_k / k_unit[by_head]).astype(jnp.float16),
        (dense_v / v_unit[by_head]).astype(jnp.float16),
        (k_scale / k_unit[..., None]).astype(jnp.float16),
        (v_scale / v_unit[..., None]).astype(jnp.float16),
        base,
        length,
    )
    return keys, k_unit, v_unit


def _dense_index(fmt, length, count, new: int, rest: int, tile: int) -> Int32[Array, "batch dense"]:
    """Where each dense token lies in [sinks, decoded pages, ring, chunk]; -1: it does not exist."""
    packed = fmt.packed(length)[:, None]
    base = packed // tile * tile
    n = fmt.sinks + rest + fmt.ring_slots + new
    j = jnp.arange(n + -n % tile, dtype=jnp.int32)[None]
    length, count = length[:, None], count[:, None]
    position = jnp.where(j < fmt.sinks, j, base + j)
    after_sinks = position - fmt.sinks
    in_ring = fmt.sinks + rest + after_sinks % fmt.ring_slots
    in_chunk = fmt.sinks + rest + fmt.ring_slots + position - length
    old = jnp.where((j < fmt.sinks) | (after_sinks < packed), j, in_ring)
    index = jnp.where(position < length, old, in_chunk)
    return jnp.where(position < length + count, index, -1)


def _scales(pool: Array, cache: KVCache, base: Array, tile: int) -> Float[Array, "batch heads n"]:
    """Scales of each sequence's packed tokens, zero from `base` on, in the order of page_rows."""
    x = pool[cache.page_table].astype(jnp.float32).swapaxes(1, 2)
    x = x.reshape(*x.shape[:2], -1)
    t = jnp.arange(x.shape[2], dtype=jnp.int32)
    x = jnp.where((t[None] < base[:, None])[:, None], x, 0.0)
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -x.shape[2] % tile)))
    order = levels.page_rows(cache.fmt.value_bits)
    return x.reshape(*x.shape[:2], -1, order.size)[..., order].reshape(x.shape)


def _key_rotation(cache: KVCache) -> np.ndarray:
    """The rotation of keys and queries, its columns in the order in which keys are decoded."""
    order = levels.slots(cache.fmt.key_bits, cache.head_dim)
    return rotation_matrix(cache.head_dim, cache.fmt.seed)[:, order]


def _rotated(x: Array, matrix: np.ndarray, axes: str = "...d,de->...e") -> Float[Array, "*shape"]:
    """x @ matrix, float32: exact products, as the matrix is a root of head_dim times +-1."""
    root = math.sqrt(len(matrix))
    ones = jnp.asarray(np.round(matrix * root), x.dtype)
    product = jnp.einsum(axes, x, ones, precision="highest", preferred_element_type=jnp.float32)
    return product * np.float32(1 / root)


def _magnitude(x: Array) -> Array:
    return jnp.where(jnp.isfinite(x), jnp.abs(x), 0.0)


def _nonzero(x: Array) -> Array:
    return jnp.where(x > 0, x, 1.0)
