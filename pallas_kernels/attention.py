"""decode_attention and prefill_attention: validation, and the choice of an implementation."""

import math
from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import xla
from pallas_kernels.cache import KVCache, valid_counts


type Implementation = Literal["xla", "mosaic_gpu"]

# What None means. To be chosen by the device, once the kernels' GPU tests (make test-gpu) pass.
_DEFAULT: Implementation = "xla"


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch q_heads head_dim"]:
    """Attention of each sequence's newest token, already appended, over the whole cache.

    q_heads is a multiple of the cache's kv_heads (grouped queries); scale: of the scores, default
    head_dim**-0.5; implementation: "mosaic_gpu" is the kernel for Hopper GPUs, None the default.
    Returns q's shape and dtype: zeros for an empty sequence, NaN for one that overflowed.
    Raises ValueError for arguments that do not fit, NotImplementedError (with the reason) where
    "mosaic_gpu" cannot run: on this device, with this page_size or so many queries a KV head.
    """
    _check("q [batch, q_heads, head_dim]", q, 3, cache, implementation)
    if (implementation or _DEFAULT) == "mosaic_gpu":
        from pallas_kernels import mosaic  # only where it is used: it takes a second to import

        mosaic.require_hopper(q)
        return mosaic.decode_attention(q, cache, scale)
    rows = _rows(q[:, None], cache, scale)
    return _queries(xla.attend(rows, cache), q[:, None])[:, 0]


def prefill_attention(
    q: Float[Array, "batch new q_heads head_dim"],
    k: Float[Array, "batch new kv_heads head_dim"],
    v: Float[Array, "batch new kv_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    lengths: Int32[Array, " batch"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, "batch new q_heads head_dim"]:
    """Attention of a chunk of new tokens, over the whole cache and causally over the chunk.

    The chunk is appended afterwards (`cache.append(k, v, lengths)`). lengths: how many of its
    tokens are valid, from the front, default all; the others give zeros. k and v are rounded to
    bf16, as the cache stores them. Otherwise as `decode_attention`.
    """
    _check("q [batch, new, q_heads, head_dim]", q, 4, cache, implementation)
    if implementation == "mosaic_gpu":
        raise NotImplementedError(f'{implementation=} has no prefill kernel; use "xla" or None')
    cache.check_new(k, v)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"{q.shape=} and {k.shape=} differ in the number of new tokens")
    batch, new, q_heads, _ = q.shape
    place = jnp.arange(new, dtype=jnp.int32)
    query = jnp.repeat(place, q_heads // k.shape[2])
    mask = jnp.broadcast_to((place[:, None] <= query[None])[None], (batch, new, query.size))
    valid = None
    if lengths is not None:
        count = valid_counts(lengths, k)[:, None]
        # What stands beyond a sequence's end may be anything, even NaN.
        valid = (place[None] < count)[..., None, None]
        k, v = jnp.where(valid, k, 0), jnp.where(valid, v, 0)
    k, v = (x.astype(jnp.bfloat16).swapaxes(1, 2) for x in (k, v))
    out = _queries(xla.attend(_rows(q, cache, scale), cache, (k, v, mask)), q)
    return out if valid is None else jnp.where(valid, out, 0)


def _check(name: str, q: Array, ndim: int, cache: KVCache, implementation: str | None) -> None:
    batch, kv_heads, _, head_dim = cache.recent_k.shape
    if q.ndim != ndim or (q.shape[0], q.shape[-1]) != (batch, head_dim):
        raise ValueError(f"{name} has {q.shape=}, but the cache has {batch=}, {head_dim=}")
    if q.shape[-2] == 0 or q.shape[-2] % kv_heads:
        raise ValueError(f"{name} has {q.shape=}: q_heads is not a multiple of {kv_heads=}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"{q.dtype=} is not a floating-point type")
    if implementation not in (None, "xla", "mosaic_gpu"):
        raise ValueError(f'{implementation=} is not "xla", "mosaic_gpu" or None')


def _rows(q: Array, cache: KVCache, scale: float | None) -> Array:
    """[batch, new, q_heads, head_dim] -> float32 [batch, kv_heads, new * group, head_dim]."""
    batch, new, q_heads, head_dim = q.shape
    kv_heads = cache.recent_k.shape[1]
    rows = q.reshape(batch, new, kv_heads, q_heads // kv_heads, head_dim).swapaxes(1, 2)
    rows = rows.reshape(batch, kv_heads, -1, head_dim).astype(jnp.float32)
    return rows * (1 / math.sqrt(head_dim) if scale is None else scale)


def _queries(out: Array, q: Array) -> Array:
    """The inverse of `_rows`, without the scale, in q's shape and dtype."""
    batch, new, q_heads, head_dim = q.shape
    kv_heads = out.shape[1]
    out = out.reshape(batch, kv_heads, new, q_heads // kv_heads, head_dim).swapaxes(1, 2)
    return out.reshape(q.shape).astype(q.dtype)
