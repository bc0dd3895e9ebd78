"""The append kernel, interpreted and on a GPU, against the plain jax.numpy implementation.

Codes may differ from that where a value is as near to one level as to the next: then, and
everywhere, they are checked against float64.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels import codebook, packing
from pallas_kernels.mosaic import encode, encode_round, lanes_numpy
from pallas_kernels.mosaic.config import EncodeConfig
from pallas_kernels.mosaic.tiles import rotation_matrix


HEADS = 2
EXACT = ("lengths", "recent_k", "recent_v", "sink_k", "sink_v", "page_table")


@pytest.fixture(params=[True, pytest.param(False, marks=pytest.mark.gpu)], ids=["cpu", "gpu"])
def append(request):
    """cache, k, v, lengths -> cache."""
    run = partial(encode.append, config=EncodeConfig(tiles=2, blocks=1), interpret=request.param)
    run = jax.jit(run)
    return lambda cache, k, v, count: run(cache, k, v, jnp.asarray(count, jnp.int32))


def tokens(batch, new, head_dim, dtype="bfloat16", seed=0):
    rng = np.random.default_rng(seed)
    k, v = rng.standard_normal((2, batch, new, HEADS, head_dim))
    k += 2 * np.random.default_rng(1).standard_normal((HEADS, head_dim))  # for the key offset
    v *= np.exp(3 * rng.standard_normal((batch, new, HEADS, 1)))
    v = v.clip(-6e4, 6e4)  # what float16 holds
    return jnp.asarray(k, dtype), jnp.asarray(v, dtype)


def stored(cache):
    """Codes and scales, in the order of tokens: [batch, kv_heads, tokens, head_dim], [..., tokens].

    Of the pages that the longest sequence fills.
    """
    fmt = cache.fmt
    pages = cache.page_table[:, : int(cache.packed_lengths.max()) // fmt.page_size]
    found = {}
    for kind, bits in (("k", fmt.key_bits), ("v", fmt.value_bits)):
        planes = tuple(plane[pages] for plane in getattr(cache, f"{kind}_planes"))
        codes = np.asarray(packing.unpack(planes, bits))
        codes = codes if kind == "k" else codes.swapaxes(-1, -2)
        codes = np.moveaxis(codes, 1, 2).reshape(len(pages), HEADS, -1, cache.head_dim)
        scale = np.asarray(getattr(cache, f"{kind}_scale")[pages], np.float32)
        found[kind] = codes, np.moveaxis(scale, 1, 2).reshape(len(pages), HEADS, -1)
    return found


def assert_equal_but_for_rounding(got, want, differ=1e-3):
    for name in EXACT:
        a, b = (np.asarray(getattr(x, name), np.float32) for x in (got, want))
        np.testing.assert_array_equal(a, b, err_msg=name)
    np.testing.assert_allclose(got.key_offset, want.key_offset, rtol=1e-5, atol=1e-6)
    one, other = stored(got), stored(want)
    packed = np.asarray(want.packed_lengths)
    for kind in "kv":
        for b, n in enumerate(packed):
            codes, scale = (x[b, :, :n] for x in one[kind])
            want_codes, want_scale = (x[b, :, :n] for x in other[kind])
            # One unit in bfloat16's last place.
            np.testing.assert_allclose(scale, want_scale, rtol=2.0**-7, err_msg=kind)
            assert np.mean(codes != want_codes) <= differ if n else True


CASES = [
    # head_dim, key_bits, value_bits, page_size, scale_mode, dtype
    (128, 4, 4, 64, "norm_preserving", "bfloat16"),
    (64, 3, 2, 16, "eden", "float32"),
    (256, 8, 3, 128, "norm", "float16"),
    (64, 2, 8, 32, "eden", "bfloat16"),
    (128, 3, 3, 32, "norm", "float32"),
]


@pytest.mark.parametrize(("d", "key_bits", "value_bits", "size", "mode", "dtype"), CASES)
def test_every_format(append, d, key_bits, value_bits, size, mode, dtype):
    """Pages out of ring and new tokens, in any order, with a waiting page and one that fills up."""
    fmt = pk.KVFormat(
        key_bits, value_bits, window=5, sinks=3, scale_mode=mode, page_size=size, seed=d
    )
    table = jnp.asarray([[3, 1, 0], [5, 2, 4]], jnp.int32) if size > 32 else None
    room = 3 + 5 + 3 * size + (0 if size > 32 else 90)
    k, v = tokens(2, room, d, dtype)
    first, rest = size // 2, room - size // 2 - 1
    cache = pk.KVCache.create(fmt, 2, room, HEADS, d, page_table=table)
    cache = cache.append(k[:, :first], v[:, :first], implementation="xla")
    count = np.array([rest, rest - size - 7])
    k, v = k[:, first:], v[:, first:]
    got = append(cache, k, v, count)
    want = cache.append(k, v, jnp.asarray(count), implementation="xla")
    assert_equal_but_for_rounding(got, want)
    assert (np.asarray(got.packed_lengths) >= size).all()


def test_codes_are_the_nearest_in_float64(append):
    """Whatever the rounding: no level is nearer by more than 1e-4 of the smallest magnitude."""
    fmt = pk.KVFormat(4, 3, window=0, sinks=0, key_offset=False, seed=11)
    k, v = tokens(1, 64, 128, seed=3)
    cache = append(pk.KVCache.create(fmt, 1, 64, HEADS, 128), k, v, [64])
    for kind, x, bits in (("k", k, 4), ("v", v, 3)):
        codes, scale = (a[0] for a in stored(cache)[kind])
        exact = np.asarray(x[0], np.float64).swapaxes(0, 1) @ rotation_matrix(128, 11)
        norm = np.linalg.norm(exact, axis=-1, keepdims=True)
        u = exact / norm * np.sqrt(128) * codebook.divisor(bits)
        levels = codebook.magnitudes(bits)
        levels = np.concatenate([levels, -levels])
        distance = np.abs(u[..., None] - levels)
        chosen = np.take_along_axis(distance, codes[..., None].astype(int), -1)[..., 0]
        assert (chosen <= distance.min(-1) + 1e-4 * levels[0]).all()
        kept = np.linalg.norm(levels[codes], axis=-1) * scale
        np.testing.assert_allclose(kept, norm[..., 0], rtol=2.0**-8 * 1.01)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_rounding_keeps_float32_on_its_side_of_a_middle(bits):
    levels = codebook.magnitudes(bits)
    middles = ((levels[1:] + levels[:-1]) / 2).astype(np.float32)
    near = [np.nextafter(middles, np.float32(x)) for x in (0, np.inf)]
    u = np.concatenate([*near, middles, [0, 1e-30, 13, 63], np.linspace(0, 20, 4000)])
    u = np.resize(np.concatenate([u, -u]).astype(np.float32), (8, 128 * 9))
    table = encode_round.table(bits)
    for columns in np.split(u, 9, axis=1):
        scaled = list(columns * np.float32(encode_round.STEEP))
        words, squares, unit = encode_round.round_table(
            lanes_numpy, scaled, bits, False, [np.full(128, x) for x in table[:6]]
        )
        codes = np.stack(words, -1).view(np.uint8).T
        want = (np.abs(columns)[..., None] >= middles).sum(-1)
        np.testing.assert_array_equal(codes & 2 ** (bits - 1) - 1, want)
        np.testing.assert_array_equal(codes >> (bits - 1), np.signbit(columns))
        np.testing.assert_array_equal(squares / unit**2, np.sum(levels[want] ** 2, axis=0))


def test_content_does_not_depend_on_the_chunks(append):
    """In chunks of any size the same bits, with a ring that goes round and ragged sequences."""
    fmt = pk.KVFormat(4, 4, window=40, sinks=2, page_size=16)
    n, d = 160, 64
    k, v = tokens(2, n, d)
    whole = append(pk.KVCache.create(fmt, 2, n, HEADS, d), k, v, [n, n - 21])
    cache, at = pk.KVCache.create(fmt, 2, n, HEADS, d), np.zeros(2, int)
    for counts in ([1, 1], [50, 0], [50, 50], [1, 50], [50, 38], [8, 0]):
        rows = (at[:, None] + np.arange(50)).clip(max=n - 1)[..., None, None]
        chunk = (jnp.take_along_axis(x, jnp.asarray(rows), axis=1) for x in (k, v))
        cache = append(cache, *chunk, counts)
        at += counts
    assert at.tolist() == whole.lengths.tolist() == [n, n - 21]
    one, other = stored(cache), stored(whole)
    for b, packed in enumerate(np.asarray(whole.packed_lengths)):
        for kind in "kv":
            for x, y in zip(one[kind], other[kind], strict=True):
                np.testing.assert_array_equal(x[b, :, :packed], y[b, :, :packed])
    for name in (*EXACT, "key_offset"):
        np.testing.assert_array_equal(getattr(cache, name), getattr(whole, name))


def test_sequences_share_the_pages_of_a_prefix(append):
    """Both write the same there; what comes after is their own."""
    fmt = pk.KVFormat(window=0, sinks=2, page_size=16)
    k, v = (np.array(x) for x in tokens(2, 2 + 64, 64))
    k[1, : 2 + 32], v[1, : 2 + 32] = k[0, : 2 + 32], v[0, : 2 + 32]
    table = jnp.asarray([[4, 1, 5, 0], [4, 1, 3, 2]], jnp.int32)
    shared, own = (
        append(pk.KVCache.create(fmt, 2, 66, HEADS, 64, page_table=x), k, v, [66, 66])
        for x in (table, None)
    )
    assert shared.k_scale.shape[0] == 6 < own.k_scale.shape[0]
    for kind in "kv":
        for got, want in zip(stored(shared)[kind], stored(own)[kind], strict=True):
            np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("bits", [4, 8])
def test_zeros_extremes_and_what_is_no_number(append, bits):
    fmt = pk.KVFormat(bits, bits, window=0, sinks=0, key_offset=False, page_size=16)
    k, v = (np.asarray(x, np.float32) for x in tokens(1, 16, 64))
    for x in (k, v):
        x[:, 2] = 0
        x[:, 3] *= 1e30
        x[:, 4] *= 1e-30
        x[:, 5] = 1e-39
        x[:, 6] = 3e37
        x[:, 7, 0, 3], x[:, 8, 1, 60] = np.nan, -np.inf
    k, v = (jnp.asarray(x, jnp.bfloat16) for x in (k, v))
    cache = pk.KVCache.create(fmt, 1, 16, HEADS, 64)
    got, want = append(cache, k, v, [16]), cache.append(k, v, implementation="xla")
    scale = np.asarray(got.v_scale[0], np.float32)
    assert (scale[:, [2, 5]] == 0).all() and np.isnan(scale[0, 7]) and np.isnan(scale[1, 8])
    assert_equal_but_for_rounding(got, want)


def test_traced_overflow_spares_the_other_sequences(append):
    fmt = pk.KVFormat(window=0, sinks=0, page_size=16)
    k, v = tokens(2, 80, 64)
    cache = append(pk.KVCache.create(fmt, 2, 32, HEADS, 64), k[:, :32], v[:, :32], [20, 32])
    before, after = cache, append(cache, k, v, [80, 0])
    for name in ("k_planes", "v_planes", "k_scale", "v_scale"):
        pools = zip(
            jax.tree.leaves(getattr(before, name)),
            jax.tree.leaves(getattr(after, name)),
            strict=True,
        )
        for a, b in pools:
            np.testing.assert_array_equal(a[2:], b[2:])  # pages of the second sequence
    assert after.lengths.tolist() == [100, 32]


def test_the_kernel_is_asked_for_by_name():
    cpu = jax.local_devices(backend="cpu")[0]
    k, v = tokens(1, 4, 64)
    with jax.default_device(cpu):
        cache = pk.KVCache.create(pk.KVFormat(), 1, 64, HEADS, 64)
        with pytest.raises(NotImplementedError, match="compute capability 9.0.*not for cpu"):
            cache.append(k, v, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match="implementation='triton'"):
        cache.append(k, v, implementation="triton")  # pyright: ignore[reportArgumentType]


@pytest.mark.gpu
def test_the_kernel_runs_by_default_and_in_place():
    if getattr(jax.local_devices()[0], "compute_capability", None) != "9.0":
        pytest.skip("the default is the kernel on Hopper GPUs alone")
    k, v = tokens(2, 700, 128)
    empty = partial(pk.KVCache.create, pk.KVFormat(), 2, 1024, HEADS, 128)
    step = jax.jit(lambda cache, k, v: cache.append(k, v), donate_argnums=0)
    assert "mosaic_gpu" in (text := str(step.lower(empty(), k, v).compile().as_text()))
    assert " copy(" not in text.partition("\nENTRY ")[2]
    assert_equal_but_for_rounding(step(empty(), k, v), empty().append(k, v, implementation="xla"))
