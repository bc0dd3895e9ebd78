from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk


# window 32, 4 sinks, pages of 16: pages complete at 52, 68, ...; blocks of pages end at 256 + 36.
LENGTHS = (0, 1, 3, 4, 5, 36, 51, 52, 53, 67, 68, 100, 291, 292, 293, 340)
SMALL = pk.KVFormat(window=32, sinks=4, page_size=16)


def normal(*shape, seed=0):
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def filled(fmt, heads, d, lengths=LENGTHS, mean=0.0, room=0):
    """A cache with ragged sequences of bf16 tokens."""
    n = max(lengths)
    k, v = (jnp.asarray(normal(len(lengths), n, heads, d, seed=i), jnp.bfloat16) for i in (1, 2))
    cache = pk.KVCache.create(fmt, len(lengths), n + room, heads, d)
    return cache.append(k + mean, v, jnp.asarray(lengths))


def exact_attention(q, k, v, lengths, scale=None, soft_cap=None, sliding_window=None):
    """float64 attention: q [batch, q_heads, d], k, v [batch, tokens, kv_heads, d]."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    grouped = q.reshape(q.shape[0], k.shape[2], -1, q.shape[-1])
    scores = np.einsum("bkgd,btkd->bkgt", grouped, k, optimize=True)
    scores *= q.shape[-1] ** -0.5 if scale is None else scale
    if soft_cap is not None:
        scores = soft_cap * np.tanh(scores / soft_cap)
    ends = np.asarray(lengths)[:, None]
    starts = 0 if sliding_window is None else ends - sliding_window
    tokens = np.arange(k.shape[1])
    valid = ((tokens < ends) & (tokens >= starts))[:, None, None]
    scores = np.where(valid, scores, -1e300)
    weights = np.where(valid, np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    weights /= np.maximum(weights.sum(axis=-1, keepdims=True), 1e-300)
    return np.einsum("bkgt,btkd->bkgd", weights, v, optimize=True).reshape(q.shape)


@pytest.mark.parametrize(
    ("d", "group", "key_bits", "value_bits", "heads"),
    [
        (64, 1, 4, 4, 2),
        (64, 3, 3, 3, 3),
        (128, 4, 2, 8, 2),
        (128, 8, 4, 3, 1),
        (256, 16, 8, 2, 1),
        (256, 3, 4, 4, 1),
    ],
)
def test_decode_agrees_with_float64(d, group, key_bits, value_bits, heads):
    cache = filled(replace(SMALL, key_bits=key_bits, value_bits=value_bits), heads, d)
    q = normal(len(LENGTHS), heads * group, d, seed=3)
    out = pk.decode_attention(jnp.asarray(q), cache)
    expected = exact_attention(q, *cache.dequantize(), LENGTHS)
    assert (np.asarray(out[0]) == 0).all()
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    "fmt",
    [
        pk.KVFormat(window=0, sinks=0, page_size=16),
        pk.KVFormat(window=7, sinks=1, page_size=128, seed=3),
        pk.KVFormat(window=500, key_offset=False),
    ],
)
def test_decode_agrees_for_each_shape_of_the_cache(fmt):
    cache = filled(fmt, 2, 64)
    q = normal(len(LENGTHS), 4, 64, seed=3)
    out = pk.decode_attention(jnp.asarray(q), cache, scale=0.3, implementation="xla")
    expected = exact_attention(q, *cache.dequantize(), LENGTHS, scale=0.3)
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-5)


# A window of 1 is the token alone, one of 60 ends in the pages of some and cuts off the sinks.
OPTIONS = [(0.5, None), (None, 1), (None, 60), (2.0, 270)]


@pytest.mark.parametrize(("soft_cap", "sliding_window"), OPTIONS)
def test_decode_with_soft_cap_and_sliding_window(soft_cap, sliding_window):
    cache = filled(SMALL, 2, 64, mean=0.5)
    q = normal(len(LENGTHS), 4, 64, seed=3)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    out = pk.decode_attention(jnp.asarray(q), cache, implementation="xla", **options)
    expected = exact_attention(q, *cache.dequantize(), LENGTHS, **options)
    np.testing.assert_allclose(out, expected, rtol=2e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("group", "chunk", "options"),
    [(1, 40, {}), (3, 1, {}), (3, 17, {})]
    + [(2, 17, {"soft_cap": cap, "sliding_window": window}) for cap, window in OPTIONS],
)
def test_prefill_agrees_with_float64(group, chunk, options):
    heads, d = 2, 64
    cache = filled(SMALL, heads, d)
    shape = (len(LENGTHS), chunk, heads, d)
    q = normal(len(LENGTHS), chunk, heads * group, d, seed=3)
    k, v = (jnp.asarray(normal(*shape, seed=i), jnp.bfloat16) for i in (4, 5))
    out = pk.prefill_attention(jnp.asarray(q), k, v, cache, **options)
    old_k, old_v = (np.asarray(x, np.float64) for x in cache.dequantize())
    for b, n in enumerate(LENGTHS):
        for i in {0, chunk // 2, chunk - 1}:
            own = slice(0, i + 1)
            seen_k, seen_v = (
                np.concatenate([old[b, :n], np.asarray(new[b, own], np.float64)])[None]
                for old, new in ((old_k, k), (old_v, v))
            )
            expected = exact_attention(q[b : b + 1, i], seen_k, seen_v, [n + i + 1], **options)[0]
            np.testing.assert_allclose(out[b, i], expected, rtol=2e-3, atol=1e-5)


def test_prefill_ignores_padding_whatever_it_holds():
    counts = (0, 1, 17, 40)
    cache = filled(SMALL, 2, 64, lengths=(5, 0, 100, 60))
    q, k, v = (jnp.asarray(normal(4, 40, h, 64, seed=h)) for h in (4, 2, 2))
    padding = (np.arange(40) >= np.array(counts)[:, None])[..., None, None]
    dirty_q, dirty_k, dirty_v = (jnp.where(padding, jnp.nan, x) for x in (q, k, v))
    lengths = jnp.asarray(counts)
    out = pk.prefill_attention(dirty_q, dirty_k, dirty_v, cache, lengths=lengths)
    expected = pk.prefill_attention(q, k, v, cache)
    np.testing.assert_allclose(out, np.where(padding, 0, expected), rtol=1e-5, atol=1e-6)


def test_the_offset_returns_to_the_logits():
    # A mean of 20 per channel moves every score by 20 * sum(q): forgetting it for the packed
    # tokens would leave the softmax to the others.
    fmt = replace(SMALL, key_bits=8, value_bits=8)
    cache = filled(fmt, 2, 64, lengths=(300, 150), mean=20.0)
    q = normal(2, 4, 64, seed=3)
    out = pk.decode_attention(jnp.asarray(q), cache, scale=0.01)
    k, v = (normal(2, 300, 2, 64, seed=i) for i in (1, 2))
    exact = exact_attention(q, k + 20, v, (300, 150), scale=0.01)
    np.testing.assert_allclose(out, exact, atol=0.01)


def test_append_and_decode_in_a_scan_with_donation_equal_eager_calls():
    steps = 40
    q, k, v = (jnp.asarray(normal(steps, 2, 1, h, 64, seed=h), jnp.bfloat16) for h in (6, 2, 2))

    def step(cache, new):
        q, k, v = new
        cache = cache.append(k, v)
        return cache, pk.decode_attention(q[:, 0], cache)

    cache = donated = filled(SMALL, 2, 64, lengths=(40, 47), room=steps)
    eager = []
    for i in range(steps):
        cache, out = step(cache, (q[i], k[i], v[i]))
        eager.append(out)
    run = jax.jit(lambda cache, new: jax.lax.scan(step, cache, new), donate_argnums=0)
    scanned_cache, scanned = run(donated, (q, k, v))
    assert donated.recent_k.is_deleted()
    assert scanned.dtype == jnp.bfloat16
    jax.tree.map(np.testing.assert_array_equal, scanned_cache, cache)
    scanned, eager = scanned.astype(jnp.float32), jnp.stack(eager).astype(jnp.float32)
    np.testing.assert_allclose(scanned, eager, rtol=2**-7, atol=1e-4)


@pytest.mark.parametrize("new", [1, 5])
def test_attend_equals_append_and_attention(new):
    q, k, v = (jnp.asarray(normal(2, new, h, 64, seed=h), jnp.bfloat16) for h in (4, 2, 2))
    cache = filled(SMALL, 2, 64, lengths=(100, 60), room=new)
    lengths = jnp.array([new, new - 1])
    options = {"soft_cap": 20.0, "sliding_window": 70}
    longer = cache.append(k, v, lengths)
    if new == 1:
        expected = pk.decode_attention(q[:, 0], longer, 0.3, **options)[:, None]
    else:
        expected = pk.prefill_attention(q, k, v, cache, 0.3, lengths, **options)
    attend = partial(pk.attend, **options)
    for run in (attend, jax.jit(attend, static_argnums=4)):
        out, after = run(q, k, v, cache, 0.3, lengths)
        np.testing.assert_allclose(out, expected, rtol=2**-7, atol=1e-3)
        jax.tree.map(np.testing.assert_array_equal, after, longer)


def test_works_in_64_bits_with_strict_promotion():
    def outputs():
        cache = filled(SMALL, 2, 64, lengths=(100, 60))
        q, k, v = (jnp.asarray(normal(2, 3, h, 64, seed=h)) for h in (4, 2, 2))
        prefilled = pk.prefill_attention(q, k, v, cache, lengths=jnp.array([3, 1]))
        return prefilled, pk.decode_attention(q[:, 0], cache)

    strict = jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise")
    with jax.enable_x64(True), strict[0], strict[1]:
        got = outputs()
    for x, expected in zip(got, outputs(), strict=True):
        assert x.dtype == jnp.float32
        np.testing.assert_allclose(x, expected, rtol=1e-5, atol=1e-6)


def temporary_bytes(function, *arguments) -> int:
    analysis = function.lower(*arguments).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def test_memory_of_decode_does_not_grow_with_the_cache():
    def temporary(max_len):
        cache = jax.eval_shape(lambda: pk.KVCache.create(pk.KVFormat(), 1, max_len, 1, 64))
        q = jax.ShapeDtypeStruct((1, 4, 64), jnp.bfloat16)
        return temporary_bytes(jax.jit(pk.decode_attention), q, cache)

    assert temporary(1 << 17) < 1.1 * temporary(1 << 12)


@pytest.mark.parametrize("new", [1, 16])
def test_attend_appends_in_place_to_a_donated_cache(new):
    def temporary(max_len):
        cache = jax.eval_shape(lambda: pk.KVCache.create(pk.KVFormat(), 1, max_len, 1, 64))
        q, k = (jax.ShapeDtypeStruct((1, new, heads, 64), jnp.bfloat16) for heads in (4, 1))
        return temporary_bytes(jax.jit(pk.attend, donate_argnums=3), q, k, k, cache)

    assert temporary(1 << 17) < 1.1 * temporary(1 << 12)


def zeros(*shape):
    return jnp.zeros(shape)


def keys(*shape) -> tuple[jax.Array, jax.Array]:
    return zeros(*shape), zeros(*shape)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: pk.decode_attention(zeros(2, 5, 64), c), "kv_heads=2"),
        (lambda c: pk.decode_attention(zeros(2, 4, 128), c), "head_dim=64"),
        (lambda c: pk.decode_attention(zeros(1, 4, 64), c), "batch=2"),
        (lambda c: pk.decode_attention(zeros(2, 1, 4, 64), c), "q .batch, q_heads, head_dim"),
        (lambda c: pk.decode_attention(zeros(2, 4, 64).astype(jnp.int32), c), "int32"),
        (
            lambda c: pk.prefill_attention(zeros(2, 3, 4, 64), *keys(2, 5, 2, 64), c),
            "number of new tokens",
        ),
        (lambda c: pk.attend(zeros(2, 1, 4, 64), *keys(2, 5, 2, 64), c), "number of new tokens"),
        (
            lambda c: pk.prefill_attention(zeros(2, 3, 4, 64), *keys(2, 3, 1, 64), c),
            "kv_heads=2",
        ),
        (
            lambda c: pk.decode_attention(zeros(2, 4, 64), c, None, "cuda"),  # pyright: ignore
            "implementation='cuda' is not",
        ),
        (lambda c: pk.decode_attention(zeros(2, 4, 64), c, soft_cap=0.0), "soft_cap=0.0"),
        (
            lambda c: pk.prefill_attention(
                zeros(2, 3, 4, 64), *keys(2, 3, 2, 64), c, sliding_window=0
            ),
            "sliding_window=0",
        ),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(pk.KVCache.create(pk.KVFormat(), 2, 16, 2, 64))
