"""attend, decode_attention and prefill_attention: validation, the choice of an implementation."""

import math
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int32

from pallas_kernels import device, xla
from pallas_kernels.cache import KVCache, valid_counts


type Implementation = Literal["xla", "mosaic_gpu"]


def attend(
    q: Float[Array, "batch new q_heads head_dim"],
    k: Float[Array, "batch new kv_heads head_dim"],
    v: Float[Array, "batch new kv_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    lengths: Int32[Array, " batch"] | None = None,
    implementation: Implementation | None = None,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[Float[Array, "batch new q_heads head_dim"], KVCache]:
    """Attention of new tokens over the cache and themselves, and the cache with them appended.

    What a layer of a model calls. One token a sequence is appended, then attends
    (`decode_attention`); of a chunk (`prefill_attention`) the attention comes first, for XLA too:
    left to itself inside `jax.jit`, it copies the whole cache, to append to the copy meanwhile.
    Donate the cache, and it is updated in place. Arguments and errors are those of the two.
    """
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    _check_chunk(q, k, v, cache)
    if q.shape[1] == 1:
        cache = cache.append(k, v, lengths, implementation)
        return decode_attention(q[:, 0], cache, scale, implementation, **options)[:, None], cache
    out = prefill_attention(q, k, v, cache, scale, lengths, implementation, **options)
    if device.traced(out, cache):
        out, cache = jax.lax.optimization_barrier((out, cache))
    return out, cache.append(k, v, lengths, implementation)


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    implementation: Implementation | None = None,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "batch q_heads head_dim"]:
    """Attention of each sequence's newest token, already appended, over the whole cache.

    q_heads is a multiple of the cache's kv_heads (grouped queries); scale: of the scores, default
    head_dim**-0.5; soft_cap: scores s become soft_cap * tanh(s / soft_cap); sliding_window: only
    the newest that many tokens are attended to, the sinks only where they are among them.
    implementation: "mosaic_gpu" is the kernel for Hopper GPUs (compute capability 9.0), or that for
    Blackwell GPUs (10.x), which is compiled and interpreted in tests but has not yet run on one;
    "xla" runs everywhere; None is the kernel on Hopper wherever it can do the case, else "xla".
    Returns q's shape and dtype: zeros for an empty sequence, NaN for one that overflowed.
    Raises ValueError for arguments that do not fit, NotImplementedError (with the reason) where
    "mosaic_gpu" cannot run: on this device, or with so many queries a KV head.
    """
    _check_queries("q [batch, q_heads, head_dim]", q, 3, cache)
    _check_options(implementation, soft_cap, sliding_window)

    def plain(q, cache):
        oldest = None if sliding_window is None else cache.lengths[:, None] - sliding_window
        rows = _rows(q[:, None], cache, scale)
        return _queries(xla.attend(rows, cache, None, oldest, soft_cap), q[:, None])[:, 0]

    def kernel(q, cache):
        from pallas_kernels import mosaic  # only where it is used: it takes a second to import

        fixed = None if scale is None else float(scale)
        options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
        architecture = mosaic.architecture(q)
        return mosaic.decode_attention(q, cache, fixed, architecture=architecture, **options)

    def able():
        from pallas_kernels import mosaic

        return mosaic.unsupported(q, cache) is None

    return _choose(implementation, plain, kernel, q, cache, able=able)


def prefill_attention(
    q: Float[Array, "batch new q_heads head_dim"],
    k: Float[Array, "batch new kv_heads head_dim"],
    v: Float[Array, "batch new kv_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    lengths: Int32[Array, " batch"] | None = None,
    implementation: Implementation | None = None,
    *,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> Float[Array, "batch new q_heads head_dim"]:
    """Attention of a chunk of new tokens, over the whole cache and causally over the chunk.

    The chunk is appended afterwards (`cache.append(k, v, lengths)`; `attend` does both). lengths:
    how many of its tokens are valid, from the front, default all; the others give zeros. k and v
    are rounded to bf16, as the cache stores them. sliding_window counts the query's own token.
    Otherwise as `decode_attention`, but that the kernel is for any number of query heads.
    """
    _check_chunk(q, k, v, cache)
    _check_options(implementation, soft_cap, sliding_window)
    count = None if lengths is None else valid_counts(lengths, k)

    def plain(q, k, v, cache, count):
        batch, new, q_heads, _ = q.shape
        place = jnp.arange(new, dtype=jnp.int32)
        query = jnp.repeat(place, q_heads // k.shape[2])
        mask, oldest = place[:, None] <= query[None], None
        if sliding_window is not None:
            first = query[None] + 1 - sliding_window
            mask, oldest = mask & (place[:, None] >= first), cache.lengths[:, None] + first
        mask = jnp.broadcast_to(mask[None], (batch, new, query.size))
        valid = None
        if count is not None:
            # What stands beyond a sequence's end may be anything, even NaN.
            valid = (place[None] < count[:, None])[..., None, None]
            k, v = jnp.where(valid, k, 0), jnp.where(valid, v, 0)
        k, v = (x.astype(jnp.bfloat16).swapaxes(1, 2) for x in (k, v))
        rows = _rows(q, cache, scale)
        out = _queries(xla.attend(rows, cache, (k, v, mask), oldest, soft_cap), q)
        return out if valid is None else jnp.where(valid, out, 0)

    def kernel(q, k, v, cache, count):
        from pallas_kernels import mosaic

        return mosaic.prefill_attention(
            q,
            k,
            v,
            cache,
            None if scale is None else float(scale),
            count,
            soft_cap=soft_cap,
            sliding_window=sliding_window,
            architecture=mosaic.architecture(q),
        )

    return _choose(implementation, plain, kernel, q, k, v, cache, count)


def _choose(implementation: str | None, plain, kernel, q: Array, *rest, able=lambda: True) -> Array:
    """The result of `plain` or of the `kernel`, functions of (q, *rest); able: can it do that?"""
    if implementation == "mosaic_gpu":
        return kernel(q, *rest)
    if implementation == "xla" or device.compute_capability(q) != "9.0" or not able():
        return plain(q, *rest)
    if device.traced(q, *rest):
        return jax.lax.platform_dependent(q, *rest, cuda=kernel, default=plain)
    return kernel(q, *rest)


def _check_chunk(q: Array, k: Array, v: Array, cache: KVCache) -> None:
    _check_queries("q [batch, new, q_heads, head_dim]", q, 4, cache)
    cache.check_new(k, v)
    if k.shape[1] != q.shape[1]:
        raise ValueError(f"{q.shape=} and {k.shape=} differ in the number of new tokens")


def _check_queries(name: str, q: Array, ndim: int, cache: KVCache) -> None:
    batch, kv_heads, _, head_dim = cache.recent_k.shape
    if q.ndim != ndim or (q.shape[0], q.shape[-1]) != (batch, head_dim):
        raise ValueError(f"{name} has {q.shape=}, but the cache has {batch=}, {head_dim=}")
    if q.shape[-2] == 0 or q.shape[-2] % kv_heads:
        raise ValueError(f"{name} has {q.shape=}: q_heads is not a multiple of {kv_heads=}")
    if not jnp.issubdtype(q.dtype, jnp.floating):
        raise ValueError(f"{q.dtype=} is not a floating-point type")


def _check_options(
    implementation: str | None, soft_cap: float | None, sliding_window: int | None
) -> None:
    if implementation not in (None, "xla", "mosaic_gpu"):
        raise ValueError(f'{implementation=} is not "xla", "mosaic_gpu" or None')
    if soft_cap is not None and not soft_cap > 0:
        raise ValueError(f"{soft_cap=} is not positive; use None for no cap")
    if sliding_window is not None and sliding_window < 1:
        raise ValueError(f"{sliding_window=} is not positive; use None to attend to every token")


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
