"""The decode kernels and the plain jax.numpy implementation on the same cache."""

import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from pallas_kernels import mosaic


def attend_both(
    interpret,
    fmt,
    lengths,
    group,
    head_dim,
    config,
    dtype=jnp.float32,
    table=None,
    kv_heads=1,
    architecture="hopper",
    **options,
):
    """The kernel's output and that of the plain implementation, float64."""
    rng = np.random.default_rng(7)
    batch, longest = len(lengths), max(lengths)
    k = rng.standard_normal((batch, longest, kv_heads, head_dim))
    k += 2 * rng.standard_normal((1, 1, kv_heads, head_dim))  # a mean for the key offset to take
    v = rng.standard_normal(k.shape) * np.exp(2 * rng.standard_normal((*k.shape[:3], 1)))
    cache = pk.KVCache.create(fmt, batch, longest, kv_heads, head_dim, page_table=table)
    k, v = jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16)
    cache = cache.append(k, v, jnp.asarray(lengths, jnp.int32))
    q = jnp.asarray(2 * rng.standard_normal((batch, kv_heads * group, head_dim)), dtype)
    got = mosaic.decode_attention(
        q, cache, config=config, interpret=interpret, architecture=architecture, **options
    )
    want = pk.decode_attention(q, cache, implementation="xla", **options)
    assert got.shape == want.shape and got.dtype == want.dtype
    return np.asarray(got, np.float64), np.asarray(want, np.float64)


def assert_close(got, want, tolerance=2e-3):
    assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)
