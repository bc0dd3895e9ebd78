"""The Hopper decode kernel, interpreted and on a GPU, against the plain jax.numpy implementation.

The interpreter runs the kernel but for the machine code that decodes codes in registers.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attend import assert_close, attend_both

import pallas_kernels as pk
from pallas_kernels import mosaic


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def interpret(request):
    return request.param


@pytest.mark.parametrize(
    ("key_bits", "value_bits", "head_dim", "group"),
    [(4, 4, 128, 8), (3, 4, 64, 3), (4, 3, 64, 1), (2, 8, 64, 16), (8, 2, 64, 4), (3, 3, 256, 8)],
)
def test_every_width_and_group(interpret, key_bits, value_bits, head_dim, group):
    fmt = pk.KVFormat(key_bits, value_bits, window=3)
    got, want = attend_both(
        interpret, fmt, [4 + 3 + 2 * 64 + 5], group, head_dim, mosaic.Config(splits=1)
    )
    assert_close(got, want)


def test_ragged_lengths_and_more_splits_than_pages(interpret):
    fmt = pk.KVFormat(window=8)
    lengths = [4 + 8 + 3 * 64, 4 + 8 + 64 + 1, 4 + 8 + 63, 2, 0]
    got, want = attend_both(interpret, fmt, lengths, 2, 64, mosaic.Config(splits=2, stages=1))
    assert not got[-1].any()
    for one, other in zip(got[:-1], want[:-1], strict=True):  # no sequence hides in the others
        assert_close(one, other)


def test_ring_that_has_gone_round(interpret):
    fmt = pk.KVFormat(window=100, sinks=2)  # three tiles of ring
    lengths = [2 + 100 + 64 * (3 * i + 1) + 7 * i for i in range(3)] + [71]
    got, want = attend_both(interpret, fmt, lengths, 8, 64, mosaic.Config(splits=1), jnp.float16)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    ("page_size", "key_bits", "value_bits"),
    [(16, 4, 3), (16, 3, 4), (32, 8, 3), (32, 4, 2), (128, 2, 3), (128, 4, 8)],
)
def test_page_sizes(interpret, page_size, key_bits, value_bits):
    fmt = pk.KVFormat(key_bits, value_bits, window=9, page_size=page_size)
    lengths = [4 + 9 + pages * page_size + 3 for pages in (1, 2, 5)]
    config = mosaic.Config(splits=2, stages=2)
    got, want = attend_both(interpret, fmt, lengths, 4, 64, config)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize(
    ("page_size", "soft_cap", "sliding_window"),
    [(64, 3.0, None), (64, None, 180), (64, None, 5), (16, 2.0, 90), (128, 2.0, 90)],
)
def test_soft_cap_and_sliding_window(interpret, page_size, soft_cap, sliding_window):
    fmt = pk.KVFormat(4, 4, window=20, page_size=page_size)
    options = {"soft_cap": soft_cap, "sliding_window": sliding_window}
    config = mosaic.Config(splits=2)
    got, want = attend_both(interpret, fmt, [300, 200, 40, 2], 3, 64, config, **options)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_pages_in_any_order_heads_and_bfloat16(interpret):
    fmt = pk.KVFormat(window=0, sinks=0, key_offset=False)
    table = jnp.asarray([[2, 0, 3], [5, 4, 1]], jnp.int32)
    got, want = attend_both(
        interpret,
        fmt,
        [192, 192],
        2,
        64,
        mosaic.Config(splits=1, stages=2),
        jnp.bfloat16,
        table,
        kv_heads=2,
    )
    assert_close(got, want, 4e-3)  # bf16 has 2**-8 between two numbers: half of it


def test_pages_of_a_prefix_that_two_sequences_share(interpret):
    """What is theirs alone (sinks, ring, key offset, last page) stays their own."""
    fmt = pk.KVFormat(window=9, page_size=32)
    table = jnp.asarray([[3, 1, 0, 2], [3, 1, 4, 5]], jnp.int32)
    config = mosaic.Config(splits=2, stages=2)
    lengths = [4 + 9 + 4 * 32, 4 + 9 + 3 * 32 + 5]
    got, want = attend_both(interpret, fmt, lengths, 4, 64, config, table=table)
    for one, other in zip(got, want, strict=True):
        assert_close(one, other)


def test_the_number_of_splits_is_no_part_of_the_result(interpret):
    """But for the rounding to float16 of what is multiplied with V."""
    fmt = pk.KVFormat(3, 4, window=8)
    lengths = [4 + 8 + 5 * 64, 4 + 8 + 2 * 64 + 7]
    one, many = (
        attend_both(interpret, fmt, lengths, 2, 64, mosaic.Config(splits=splits))[0]
        for splits in (1, 5)
    )
    for sequence, same in zip(one, many, strict=True):
        assert_close(same, sequence, 5e-4)


def test_overflowed_sequence_gives_nan(interpret):
    fmt = pk.KVFormat(window=0, sinks=0)
    cache = pk.KVCache.create(fmt, 2, 64, 1, 64)
    lengths = jnp.asarray([64, 700], jnp.int32)
    cache = type(cache)(**{**vars(cache), "lengths": lengths})
    q = jnp.ones((2, 1, 64), jnp.float32)
    out = np.asarray(mosaic.decode_attention(q, cache, interpret=interpret))
    assert np.isfinite(out[0]).all() and np.isnan(out[1]).all()


def test_what_the_kernel_cannot_do():
    q = jnp.zeros((1, 17, 64))
    cache = pk.KVCache.create(pk.KVFormat(), 1, 256, 1, 64)
    with pytest.raises(NotImplementedError, match="over 16 query heads"):
        mosaic.decode_attention(q, cache)


def test_the_kernel_is_asked_for_by_name():
    """On the CPU, under jit or not, the reason is the device."""
    cache = pk.KVCache.create(pk.KVFormat(), 1, 256, 1, 64)
    q = jax.device_put(jnp.zeros((1, 2, 64)), jax.local_devices(backend="cpu")[0])
    attend = partial(pk.decode_attention, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match=r"Hopper.*not for cpu"):
        attend(q, cache)
    with jax.default_device("cpu"), pytest.raises(NotImplementedError, match="Hopper"):
        jax.jit(attend)(q, cache)
    kv = jnp.zeros((1, 1, 1, 64))
    with pytest.raises(NotImplementedError, match="Hopper"):
        pk.prefill_attention(q[:, None], kv, kv, cache, implementation="mosaic_gpu")


@pytest.fixture
def hopper():
    if getattr(jax.local_devices()[0], "compute_capability", None) != "9.0":
        pytest.skip("the kernel is for Hopper GPUs")


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_the_kernel_runs_through_the_public_function():
    rng = np.random.default_rng(3)
    cache = pk.KVCache.create(pk.KVFormat(), 2, 1024, 2, 128)
    k, v = (jnp.asarray(rng.standard_normal((2, 700, 2, 128)), jnp.bfloat16) for _ in range(2))
    cache = cache.append(k, v)
    q = jnp.asarray(rng.standard_normal((2, 16, 128)), jnp.float32)
    got = jax.jit(partial(pk.decode_attention, implementation="mosaic_gpu"))(q, cache)
    want = pk.decode_attention(q, cache, implementation="xla")
    assert_close(np.asarray(got, np.float64), np.asarray(want, np.float64))


@pytest.mark.gpu
@pytest.mark.usefixtures("hopper")
def test_the_kernel_is_the_default_where_it_can_run():
    """Eager or under jit, on a Hopper GPU, for a case that it can do; then "xla" is not."""
    cpu, gpu = jax.local_devices(backend="cpu")[0], jax.local_devices()[0]

    def kernels(device, heads):
        cache = pk.KVCache.create(pk.KVFormat(), 1, 256, 1, 64)
        arguments = jax.device_put((jnp.zeros((1, heads, 64)), cache), device)
        assert not np.asarray(pk.decode_attention(*arguments)).any()
        return jax.jit(pk.decode_attention).lower(*arguments).as_text().count("mosaic_gpu")

    assert kernels(gpu, 2) and not kernels(gpu, 17) and not kernels(cpu, 2)
