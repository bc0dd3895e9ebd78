import math

import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from scipy import integrate, special

import pallas_kernels as pk
from pallas_kernels import codebook


# Least distortion that any codebook reaches (arXiv:2504.19874, section 3.1, worked out exactly).
LLOYD_MAX = {
    2: {64: 0.11453, 128: 0.11600, 256: 0.11674},
    3: {64: 0.03339, 128: 0.03397, 256: 0.03426},
    4: {64: 0.00913, 128: 0.00931, 256: 0.00941},
}


def all_codes(bits):
    codes = np.arange(2**bits, dtype=np.uint8)
    return codes[codes & 0x7F != 0x7F] if bits == 8 else codes  # e4m3's NaNs are not codes


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_levels_are_exact_in_e4m3_and_bf16(bits):
    levels = np.asarray(codebook.decode(jnp.asarray(all_codes(bits)), bits))
    assert levels.dtype == np.float32
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.bfloat16):
        np.testing.assert_array_equal(levels.astype(dtype).astype(np.float32), levels)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_the_top_bit_is_the_sign(bits):
    codes = all_codes(bits)
    positive = codes[: len(codes) // 2]
    levels = np.asarray(codebook.decode(jnp.asarray(codes), bits))
    plus, minus = np.split(levels, 2)
    np.testing.assert_array_equal(minus, -plus)
    assert (np.diff(plus) > 0).all() and plus[0] >= 0
    np.testing.assert_array_equal(codes[len(codes) // 2 :], positive | 1 << bits - 1)


def test_eight_bits_are_e4m3():
    codes = all_codes(8)
    np.testing.assert_array_equal(
        codebook.decode(jnp.asarray(codes), 8),
        codes.view(ml_dtypes.float8_e4m3fn).astype(np.float32),
    )
    assert 16 * codebook.divisor(8) < float(ml_dtypes.finfo(ml_dtypes.float8_e4m3fn).max)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_encode_takes_the_nearest_level(bits):
    u = np.random.default_rng(bits).normal(0, codebook.divisor(bits), 20_000).astype(np.float32)
    levels = np.asarray(codebook.decode(jnp.asarray(all_codes(bits)), bits))
    nearest = np.abs(u[:, None] - levels).min(axis=1)
    codes = codebook.encode(jnp.asarray(u), bits)
    np.testing.assert_array_equal(np.abs(u - codebook.decode(codes, bits)), nearest)
    np.testing.assert_array_equal(codebook.encode(jnp.asarray(levels), bits), all_codes(bits))


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_distortion_against_adaptive_quadrature(bits, head_dim):
    levels = codebook.magnitudes(bits) / codebook.divisor(bits) / math.sqrt(head_dim)
    half = (head_dim - 1) / 2
    edges = [0, *((levels[1:] + levels[:-1]) / 2), 1]

    def integrand(x, level):
        return (1 - x * x) ** (half - 1) / special.beta(0.5, half) * (x - level) ** 2

    cells = zip(edges, edges[1:], levels, strict=False)
    parts = [integrate.quad(integrand, a, min(b, 1), (c,))[0] for a, b, c in cells if a < 1]
    assert pk.distortion(bits, head_dim) == pytest.approx(2 * head_dim * sum(parts), rel=1e-6)


@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4])
def test_distortion_is_near_the_optimum(bits, head_dim):
    ratio = pk.distortion(bits, head_dim) / LLOYD_MAX[bits][head_dim]
    assert 0.999 < ratio < 1.015
    assert 4.0**-bits < pk.distortion(bits, head_dim) < math.sqrt(3) * math.pi / 2 * 4.0**-bits


def test_unknown_bits_and_head_dim():
    with pytest.raises(ValueError, match="bits=5 is not one of"):
        pk.distortion(5, 64)
    with pytest.raises(ValueError, match="head_dim=80 is not one of"):
        pk.distortion(4, 80)
