"""The Hopper prefill kernel, interpreted and on a GPU, against the plain jax.numpy implementation.

The interpreter runs the kernel but for the machine code that decodes codes in registers.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.mosaic import prefill_attention


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def interpret(request):
    return request.param


def attend_both(
    interpret,
    fmt,
    lengths,
    new,
    group,
    head_dim,
    counts=None,
    dtype=jnp.float32,
    architecture="hopper",
    table=None,
    **options,
):
    """Float64 results of the kernel and of xla, a sequence each."""
    rng = np.random.default_rng(7)
    shape = (len(lengths), max(*lengths, 1) + new, 1, head_dim)
    k = rng.standard_normal(shape) + 2 * rng.standard_normal((1, 1, 1, head_dim))
    v = rng.standard_normal(shape) * np.exp(2 * rng.standard_normal((*shape[:3], 1)))
    k, v = jnp.asarray(k, jnp.bfloat16), jnp.asarray(v, jnp.bfloat16)
    cache = pk.KVCache.create(fmt, shape[0], shape[1], 1, head_dim, page_table=table)
    cache = cache.append(k[:, new:], v[:, new:], jnp.asarray(lengths, jnp.int32))
    k, v = k[:, :new], v[:, :new]
    q = jnp.asarray(2 * rng.standard_normal((shape[0], new, group, head_dim)), dtype)
    counts = None if counts is None else jnp.asarray(counts, jnp.int32)
    got = prefill_attention(
        q, k, v, cache, lengths=counts, interpret=interpret, architecture=architecture, **options
    )
    want = pk.prefill_attention(q, k, v, cache, lengths=counts, implementation="xla", **options)
    assert got.shape == want.shape and got.dtype == want.dtype
    return zip(np.asarray(got, np.float64), np.asarray(want, np.float64), strict=True)


def assert_close(pairs, tolerance=4e-3):  # bf16 has 2**-8 between two numbers: half of it
    for got, want in pairs:
        assert np.linalg.norm(got - want) <= tolerance * np.linalg.norm(want)


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "head_dim", "group", "page_size"),
    [
        (4, 4, 128, 8, 64),
        (3, 8, 64, 1, 16),
        (8, 3, 64, 3, 32),
        (2, 4, 64, 16, 128),
        (4, 2, 256, 2, 128),
        (4, 8, 256, 1, 128),  # one tile at a time in shared memory
    ],
)
def test_widths_groups_and_pages(interpret, key_bits, value_bits, head_dim, group, page_size):
    fmt = pk.KVFormat(key_bits, value_bits, window=3, page_size=page_size)
    length = 4 + 3 + 128 + page_size + 5
    assert_close(attend_both(interpret, fmt, [length], 20, group, head_dim))


def test_ragged_lengths_and_counts(interpret):
    fmt = pk.KVFormat(window=70, sinks=2)
    pairs = list(attend_both(interpret, fmt, [400, 131, 1, 0], 90, 2, 64, [90, 33, 7, 0]))
    assert not pairs[-1][0].any()
    assert_close(pairs)


def test_no_cache_sinks_or_offset_and_bfloat16(interpret):
    fmt = pk.KVFormat(window=0, sinks=0, key_offset=False)
    assert_close(attend_both(interpret, fmt, [0, 256], 130, 2, 64, dtype=jnp.bfloat16), 8e-3)


def test_pages_in_any_order_and_shared(interpret):
    fmt = pk.KVFormat(window=8, sinks=0, page_size=32)
    table = jnp.asarray([[3, 1, 0, 2], [3, 1, 5, 4]], jnp.int32)
    assert_close(attend_both(interpret, fmt, [136, 110], 20, 2, 64, table=table))


@pytest.mark.parametrize(
    ("soft_cap", "sliding_window"), [(3.0, None), (None, 5), (None, 90), (20.0, 200), (None, 330)]
)
def test_soft_cap_and_sliding_window(interpret, soft_cap, sliding_window):
    fmt = pk.KVFormat(window=20)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    assert_close(attend_both(interpret, fmt, [300, 140, 2], 70, 2, 64, **options))


def test_overflowed_sequence_gives_nan(interpret):
    cache = pk.KVCache.create(pk.KVFormat(window=0, sinks=0), 2, 64, 1, 64)
    cache = type(cache)(**{**vars(cache), "lengths": jnp.asarray([60, 700], jnp.int32)})
    q = jnp.ones((2, 4, 1, 64), jnp.float32)
    out = np.asarray(prefill_attention(q, q, q, cache, interpret=interpret))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_norms_from_tiny_to_huge(interpret):
    """Units keep float16 in range: keys and values of one head far larger than another's."""
    rng = np.random.default_rng(5)
    size = np.array([1e-6, 1.0, 1e8], np.float32)[:, None]
    k, v = (jnp.asarray(rng.standard_normal((1, 200, 3, 64)) * size, jnp.bfloat16) for _ in "kv")
    q = jnp.asarray(rng.standard_normal((1, 9, 3, 64)) / size, jnp.float32)
    cache = pk.KVCache.create(pk.KVFormat(window=8), 1, 300, 3, 64).append(k, v)
    got = prefill_attention(q, k[:, :9], v[:, :9], cache, interpret=interpret)
    want = pk.prefill_attention(q, k[:, :9], v[:, :9], cache, implementation="xla")
    by_head = (np.asarray(x, np.float64)[0].swapaxes(0, 1) for x in (got, want))
    assert_close(zip(*by_head, strict=True))


def test_tokens_beyond_the_counts_may_hold_anything(interpret):
    rng = np.random.default_rng(3)
    q, k, v = (jnp.asarray(rng.standard_normal((2, 70, 1, 64)), jnp.bfloat16) for _ in "qkv")
    cache = pk.KVCache.create(pk.KVFormat(window=8), 2, 200, 1, 64).append(k, v)
    counts = jnp.asarray([70, 33], jnp.int32)
    exists = (jnp.arange(70) < counts[:, None])[..., None, None]
    want, got = (
        prefill_attention(
            *(jnp.where(exists, x, filler) for x in (q, k, v)),
            cache,
            lengths=counts,
            interpret=interpret,
        )
        for filler in (0, jnp.nan)
    )
    np.testing.assert_array_equal(np.asarray(got, np.float32), np.asarray(want, np.float32))


@pytest.mark.gpu
def test_the_kernel_is_the_default_on_hopper():
    """Eager or under jit; not on a CPU of the same process."""
    cpu, gpu = jax.local_devices(backend="cpu")[0], jax.local_devices()[0]

    def kernels(device):
        cache = pk.KVCache.create(pk.KVFormat(), 1, 256, 1, 64)
        q, kv = jnp.zeros((1, 5, 20, 64)), jnp.zeros((1, 5, 1, 64))
        arguments = jax.device_put((q, kv, kv, cache), device)
        assert not np.asarray(pk.prefill_attention(*arguments)).any()
        return jax.jit(pk.prefill_attention).lower(*arguments).as_text().count("mosaic_gpu")

    assert kernels(gpu) and not kernels(cpu)
