from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk


BATCH, HEADS, DIM = 2, 3, 64
TOKENS = 112  # the same shapes in several tests compile once
FORMATS = [
    pk.KVFormat(window=32, page_size=16),
    pk.KVFormat(3, 2, window=0, sinks=0, key_offset=False, seed=7, scale_mode="eden", page_size=32),
]


def keys_and_values(new, batch=BATCH, seed=0):
    k, v = np.random.default_rng(seed).standard_normal((2, batch, new, HEADS, DIM))
    return (k + 3).astype(jnp.bfloat16), v.astype(jnp.bfloat16)


def empty(fmt, max_len, batch=BATCH, **options):
    return pk.KVCache.create(fmt, batch, max_len, HEADS, DIM, **options)


def in_chunks(cache, k, v, size):
    for start in range(0, k.shape[1], size):
        cache = cache.append(k[:, start : start + size], v[:, start : start + size])
    return cache


def assert_same_bits(a, b):
    def compare(path, x, y):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))

    jax.tree_util.tree_map_with_path(compare, a, b)


@pytest.fixture(params=FORMATS, ids=["usual", "all packed"])
def fmt(request):
    return request.param


def test_content_does_not_depend_on_the_chunks(fmt):
    k, v = keys_and_values(TOKENS)
    whole = empty(fmt, TOKENS).append(k, v)
    assert int(whole.packed_lengths[0]) == fmt.packed(TOKENS) >= 64
    for size in (1, 16, 28):
        assert_same_bits(in_chunks(empty(fmt, TOKENS), k, v, size), whole)


def test_scan_with_donation_equals_eager(fmt):
    k, v = keys_and_values(TOKENS)

    @partial(jax.jit, donate_argnums=0)
    def fill(cache, k, v):
        def step(cache, new):
            return cache.append(*(x[:, None] for x in new)), None

        return jax.lax.scan(step, cache, (k.swapaxes(0, 1), v.swapaxes(0, 1)))[0]

    start = empty(fmt, TOKENS).append(k[:, :28], v[:, :28])
    expected = empty(fmt, TOKENS).append(k, v)
    assert_same_bits(fill(start, k[:, 28:], v[:, 28:]), expected)
    assert start.k_planes[0].is_deleted()


def test_ragged_lengths_equal_separate_runs(fmt):
    counts = np.array([[0, 56, 3, 41], [25, 1, 56, 0], [16, 0, 2, 56]])
    cache = empty(fmt, TOKENS, batch=4)
    tokens = [[], [], [], []]
    for i, count in enumerate(counts):
        k, v = keys_and_values(56, batch=4, seed=i)
        padding = np.arange(56)[None] >= count[:, None]
        k[padding], v[padding] = np.nan, np.nan
        cache = cache.append(k, v, lengths=jnp.asarray(count))
        for b, n in enumerate(count):
            tokens[b].append((k[b : b + 1, :n], v[b : b + 1, :n]))
    assert cache.lengths.tolist() == counts.sum(axis=0).tolist()
    got_k, got_v = cache.dequantize()
    for b, parts in enumerate(tokens):
        k, v = (np.concatenate(x, axis=1) for x in zip(*parts, strict=True))
        expected_k, expected_v = in_chunks(empty(fmt, TOKENS, batch=1), k, v, 1).dequantize()
        np.testing.assert_array_equal(got_k[b], expected_k[0])
        np.testing.assert_array_equal(got_v[b], expected_v[0])


def test_each_token_is_where_its_length_says(fmt):
    n, max_len = TOKENS, TOKENS + 8
    k, v = keys_and_values(n)
    cache = empty(fmt, max_len).append(k, v)
    got_k, got_v = map(np.asarray, cache.dequantize())
    assert got_k.shape == got_v.shape == (BATCH, max_len, HEADS, DIM)
    first, end = fmt.sinks, fmt.sinks + fmt.packed(n)
    packed = slice(first, end)

    def codec(x, bits):
        return pk.quantize(x, bits, fmt.seed, fmt.scale_mode).dequantize()

    page = np.asarray(k[:, first : first + fmt.page_size], np.float32)
    offset = page.mean(axis=1, keepdims=True) if fmt.key_offset else np.zeros_like(page[:, :1])
    np.testing.assert_allclose(cache.key_offset, offset[:, 0], atol=1e-5)
    exact_k, exact_v = (np.asarray(x, np.float32) for x in (k, v))
    centred = codec(jnp.asarray(exact_k - offset)[:, packed], fmt.key_bits)
    np.testing.assert_allclose(got_k[:, packed], centred + offset, atol=0.03)
    np.testing.assert_array_equal(got_v[:, packed], codec(v[:, packed], fmt.value_bits))
    for got, exact in ((got_k, exact_k), (got_v, exact_v)):
        np.testing.assert_array_equal(got[:, :first], exact[:, :first])
        np.testing.assert_array_equal(got[:, end:n], exact[:, end:])
        assert (got[:, n:] == 0).all()


def test_the_offset_spares_keys_that_share_a_large_mean():
    k, v = keys_and_values(200)
    k += 30  # and 3, in units of the noise
    errors = {}
    for key_offset in (True, False):
        cache = empty(pk.KVFormat(window=0, sinks=0, key_offset=key_offset), 200).append(k, v)
        got = np.asarray(cache.dequantize()[0][:, :192])
        errors[key_offset] = np.mean((got - np.asarray(k[:, :192], np.float32)) ** 2)
    assert errors[True] < 0.02 < 100 * errors[True] < errors[False]


def test_an_offset_is_set_with_the_first_page_and_then_stays():
    fmt = FORMATS[0]
    k, v = keys_and_values(TOKENS)
    first_page = fmt.sinks + fmt.window + fmt.page_size
    cache = in_chunks(empty(fmt, TOKENS), k[:, : first_page - 1], v[:, : first_page - 1], 1)
    assert (cache.key_offset == 0).all()
    cache = cache.append(k[:, first_page - 1 : first_page], v[:, first_page - 1 : first_page])
    assert (cache.key_offset != 0).all()
    rest = in_chunks(cache, k[:, first_page:], v[:, first_page:], 1)
    np.testing.assert_array_equal(rest.key_offset, cache.key_offset)


def test_sequences_may_share_pages_in_any_order():
    fmt = pk.KVFormat(window=0, sinks=0, page_size=16)
    k, v = keys_and_values(64)
    k[1, :32], v[1, :32] = k[0, :32], v[0, :32]
    table = np.array([[4, 1, 5, 0], [4, 1, 3, 2]])
    shared = empty(fmt, 64, page_table=table, num_pages=7).append(k, v)
    usual = empty(fmt, 64).append(k, v)
    assert shared.k_scale.shape[0] == 7
    assert_same_bits(shared.dequantize(), usual.dequantize())
    q = jnp.ones((BATCH, HEADS, DIM))
    np.testing.assert_array_equal(pk.decode_attention(q, shared), pk.decode_attention(q, usual))


def test_sizes_are_those_of_the_arrays():
    fmt = pk.KVFormat(4, 3)
    cache = empty(fmt, 128 + 4 + 64 * 10)
    assert cache.bytes_per_token == fmt.bytes_per_token(HEADS, DIM) == HEADS * (64 * 7 / 8 + 4)
    pages = BATCH * 10 * 64 * cache.bytes_per_token
    recent = 2 * BATCH * HEADS * (4 + 192) * DIM * 2
    assert cache.nbytes == pages + recent + BATCH * HEADS * DIM * 4 + BATCH * 4 + BATCH * 10 * 4


def test_a_longer_append_than_max_len_is_refused_or_gives_nan():
    fmt = pk.KVFormat(window=0, sinks=0, page_size=16)
    k, v = keys_and_values(33)
    cache = empty(fmt, 32)
    with pytest.raises(ValueError, match="needs 33 tokens, but self.max_len=32"):
        cache.append(k, v)
    overflowed = jax.jit(lambda cache, *new: cache.append(*new))(cache, k, v, jnp.array([33, 32]))
    out = pk.decode_attention(jnp.ones((BATCH, HEADS, DIM)), overflowed)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()
    with pytest.raises(ValueError, match="needs 34 tokens"):
        overflowed.append(k[:, :1], v[:, :1])


def test_traced_overflow_spares_the_other_sequences():
    fmt = pk.KVFormat(window=0, sinks=0, page_size=16)
    k, v = keys_and_values(80)
    cache = empty(fmt, 32).append(k[:, :32], v[:, :32], jnp.array([20, 32]))
    before = [x[1] for x in cache.dequantize()]
    append = jax.jit(lambda cache, *new: cache.append(*new))
    after = [x[1] for x in append(cache, k, v, jnp.array([80, 0])).dequantize()]
    assert_same_bits(after, before)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda c: c.append(jnp.zeros((2, 1, 3, 32)), jnp.zeros((2, 1, 3, 32))), "head_dim=64"),
        (lambda c: c.append(jnp.zeros((2, 3, 64)), jnp.zeros((2, 3, 64))), "is not .batch=2"),
        (lambda c: c.append(jnp.zeros((2, 1, 3, 64)), jnp.zeros((2, 2, 3, 64))), "differs from"),
        (lambda c: c.append(jnp.zeros((2, 0, 3, 64)), jnp.zeros((2, 0, 3, 64))), "no new token"),
        (
            lambda c: c.append(*[jnp.zeros((2, 1, 3, 64), jnp.int8)] * 2),
            "int8 is not a floating-point",
        ),
        (lambda c: c.append(*keys_and_values(4), lengths=jnp.array([5, 1])), "not all in .0, 4."),
        (lambda c: c.append(*keys_and_values(4), lengths=jnp.array([1])), "integer array"),
        (lambda c: empty(pk.KVFormat(), 0), "max_len=0 is not positive"),
        (lambda c: pk.KVCache.create(pk.KVFormat(), 1, 9, 1, 96), "head_dim=96 is not one of"),
        (lambda c: empty(pk.KVFormat(), 9, page_table=np.zeros((1, 1))), "has shape"),
        (
            lambda c: empty(pk.KVFormat(), 9, page_table=np.array([[0], [5]]), num_pages=5),
            "pages 0 to 5 of a pool of 5; pass num_pages=6",
        ),
    ],
)
def test_errors_name_the_value(call, message):
    with pytest.raises(ValueError, match=message):
        call(empty(pk.KVFormat(), 16))
