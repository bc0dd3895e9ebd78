"""Attention over a KVCache in plain jax.numpy: the path of machines without a kernel, the oracle.

Each part of the cache (sinks, packed pages, ring, the chunk itself) gives a partial softmax; the
parts are merged at the end. Scores are [batch, kv_heads, tokens, rows]: tokens lead, so that
packed K [tokens, head_dim] and V [head_dim, tokens] are both left operands as they lie in memory.
A row is a query: its place in the chunk times the query heads of its KV head.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int32

from pallas_kernels.cache import KVCache
from pallas_kernels.codec import levels
from pallas_kernels.rotation import rotate, unrotate


_LOWEST = -1e30  # below any score, and finite: a part without tokens then needs no special case
_BLOCK_TOKENS = 256  # packed tokens decoded at once: bounds the memory, whatever max_len


class _Softmax(NamedTuple):
    """A partial softmax: largest score, sum of exponentials, and their sum weighted with V."""

    largest: Float[Array, "batch kv_heads rows"]
    total: Float[Array, "batch kv_heads rows"]
    out: Float[Array, "batch kv_heads head_dim rows"]


@partial(jax.jit, static_argnames="soft_cap")
def attend(
    q: Float[Array, "batch kv_heads rows head_dim"],
    cache: KVCache,
    chunk: tuple[Array, Array, Bool[Array, "batch tokens rows"]] | None = None,
    oldest: Int32[Array, "batch rows_or_1"] | None = None,
    soft_cap: float | None = None,
) -> Float[Array, "batch kv_heads rows head_dim"]:
    """softmax(q k^T) v over the cache and, if given, a chunk's own (k, v, mask).

    q: float32, times the softmax's scale; chunk: k, v [batch, kv_heads, tokens, head_dim];
    oldest: position of the first of the cache's tokens that a row attends to, default 0; soft_cap:
    scores s become soft_cap * tanh(s / soft_cap).
    Returns float32: zeros for a row without tokens, NaN for a sequence that overflowed.
    """
    if oldest is None:
        oldest = jnp.zeros((q.shape[0], 1), jnp.int32)
    parts = [_packed(q, cache, oldest, soft_cap), _recent(q, cache, oldest, soft_cap)]
    if cache.fmt.sinks:
        slots = jnp.arange(cache.fmt.sinks, dtype=jnp.int32)
        valid = slots[None] < cache.lengths[:, None]
        valid = valid[..., None] & (slots[None, :, None] >= oldest[:, None])
        parts.append(_dense(q, cache.sink_k, cache.sink_v, valid, soft_cap))
    if chunk:
        parts.append(_dense(q, *chunk, soft_cap))
    merged = parts[0]
    for part in parts[1:]:
        merged = _merge(merged, part)
    total = jnp.where(merged.total == 0, 1.0, merged.total)
    out = (merged.out / total[:, :, None, :]).swapaxes(-1, -2)
    overflowed = cache.lengths > cache.max_len
    return jnp.where(overflowed[:, None, None, None], jnp.nan, out)


def _dense(
    q: Array, k: Array, v: Array, valid: Bool[Array, "batch tokens #rows"], soft_cap: float | None
) -> _Softmax:
    scores = _dot("bktd,bkrd->bktr", k.astype(jnp.float32), q)
    p, largest, total = _exponentials(scores, valid, soft_cap)
    return _Softmax(largest, total, _dot("bktd,bktr->bkdr", v.astype(jnp.float32), p))


def _recent(q: Array, cache: KVCache, oldest: Array, soft_cap: float | None) -> _Softmax:
    slots = cache.fmt.ring_slots
    packed = cache.packed_lengths[:, None]
    slot = jnp.arange(slots, dtype=jnp.int32)[None]
    # The only token that slot can hold: the first one, from the end of the packed on, in it.
    token = packed + (slot - packed) % slots
    position = cache.fmt.sinks + token
    valid = position < cache.lengths[:, None]
    valid = valid[..., None] & (position[..., None] >= oldest[:, None])
    return _dense(q, cache.recent_k, cache.recent_v, valid, soft_cap)


def _packed(q: Array, cache: KVCache, oldest: Array, soft_cap: float | None) -> _Softmax:
    """The packed pages, a block of them at a time, from the oldest token to the last."""
    fmt, size = cache.fmt, cache.fmt.page_size
    batch, kv_heads, rows, head_dim = q.shape
    pages = min(cache.page_table.shape[1], max(1, _BLOCK_TOKENS // size))
    tokens = pages * size
    table = jnp.pad(cache.page_table, ((0, 0), (0, -cache.page_table.shape[1] % pages)))
    packed, oldest = cache.packed_lengths, oldest - fmt.sinks
    q_rotated = rotate(q, fmt.seed)
    q_offset = _dot("bkrd,bkd->bkr", q, cache.key_offset)[:, :, None, :]

    def block(i, state):
        ids = jax.lax.dynamic_slice_in_dim(table, i * pages, pages, axis=1)
        t = i * tokens + jnp.arange(tokens, dtype=jnp.int32)
        valid = (t[None] < packed[:, None])[..., None] & (t[None, :, None] >= oldest[:, None])

        def load(pool):  # [batch, kv_heads, pages, ...]
            return jnp.moveaxis(pool[ids], 2, 1)

        def scales(pool):  # [batch, kv_heads, tokens, 1]
            return load(pool).reshape(batch, kv_heads, tokens, 1).astype(jnp.float32)

        k = levels(tuple(map(load, cache.k_planes)), fmt.key_bits)
        k = k.reshape(batch, kv_heads, tokens, head_dim)
        scores = _dot("bktd,bkrd->bktr", k, q_rotated) * scales(cache.k_scale) + q_offset
        p, largest, total = _exponentials(scores, valid, soft_cap)
        # Masked after the scale: a page that is not this sequence's may hold anything.
        weights = jnp.where(valid[:, None], p * scales(cache.v_scale), 0.0)
        v = levels(tuple(map(load, cache.v_planes)), fmt.value_bits)
        weights = weights.reshape(batch, kv_heads, pages, size, rows)
        out = _dot("bkpdt,bkptr->bkpdr", v, weights).sum(axis=2)
        return _merge(state, _Softmax(largest, total, out))

    nothing = jnp.zeros((batch, kv_heads, rows), jnp.float32)
    empty = _Softmax(
        nothing + _LOWEST, nothing, jnp.zeros((*q.shape[:2], head_dim, rows), jnp.float32)
    )
    blocks = jnp.minimum(-(-jnp.max(packed) // tokens), table.shape[1] // pages)
    first = jnp.maximum(jnp.min(oldest), 0) // tokens
    state = jax.lax.fori_loop(first, blocks, block, empty)
    out = unrotate(state.out.swapaxes(-1, -2), fmt.seed).swapaxes(-1, -2)
    return state._replace(out=out)


def _exponentials(
    scores: Array, valid: Array, soft_cap: float | None
) -> tuple[Array, Array, Array]:
    if soft_cap is not None:
        scores = soft_cap * jnp.tanh(scores / soft_cap)
    valid = valid[:, None]
    largest = jnp.max(jnp.where(valid, scores, _LOWEST), axis=2)
    p = jnp.where(valid, jnp.exp(scores - largest[:, :, None]), 0.0)
    return p, largest, p.sum(axis=2)


def _merge(a: _Softmax, b: _Softmax) -> _Softmax:
    largest = jnp.maximum(a.largest, b.largest)
    of_a, of_b = jnp.exp(a.largest - largest), jnp.exp(b.largest - largest)
    out = a.out * of_a[:, :, None] + b.out * of_b[:, :, None]
    return _Softmax(largest, a.total * of_a + b.total * of_b, out)


def _dot(spec: str, a: Array, b: Array) -> Array:
    return jnp.einsum(spec, a, b, precision=jax.lax.Precision.HIGHEST)
