"""Codebooks: symmetric levels whose magnitudes float8_e4m3fn holds exactly.

A code is a sign (its top bit) and the index of a magnitude. At 8 bits that is the e4m3 byte.
Levels are for a coordinate times `divisor(bits)`, where coordinates have unit variance: at 2, 3
and 4 bits they lie within 0.8 % of Lloyd-Max (arXiv:2504.19874, section 3.1) for Gaussian ones.
A divisor per head_dim would lower the distortion by at most 0.45 % (4 bits, head_dim 64).
"""

import math
from functools import cache

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, UInt8

from pallas_kernels.format import check_bits, check_head_dim


_MAGNITUDES = {
    2: (2.25, 7.5),
    3: (1.5, 4.5, 8.0, 13.0),
    4: (0.5625, 1.625, 2.75, 4.0, 5.5, 7.0, 9.0, 12.0),
}
# 8 bits: sqrt(256) * 21.25 = 340 stays below e4m3's 448. Of the divisors with the least distortion
# this one also suits constant vectors, whose few rotated values else fall between two levels.
_DIVISORS = {2: 4.965, 3: 6.02, 4: 4.345, 8: 21.25}


@cache
def magnitudes(bits: int) -> np.ndarray:
    """Magnitudes in ascending order, float64 [2**(bits - 1)]; 8 bits: [127], e4m3's finite ones."""
    check_bits(bits)
    if bits == 8:
        return np.arange(127, dtype=np.uint8).view(jnp.float8_e4m3fn).astype(np.float64)
    return np.array(_MAGNITUDES[bits])


def divisor(bits: int) -> float:
    """Level of a coordinate at one standard deviation."""
    check_bits(bits)
    return _DIVISORS[bits]


def encode(u: Float[Array, "*batch"], bits: int) -> UInt8[Array, "*batch"]:
    """Codes of the levels nearest to `u` (float32, in units of the levels)."""
    if bits == 8:
        return jax.lax.bitcast_convert_type(u.astype(jnp.float8_e4m3fn), jnp.uint8)
    levels = magnitudes(bits)
    size = jnp.abs(u)
    code = jnp.where(u < 0, jnp.uint8(len(levels)), jnp.uint8(0))
    for middle in (levels[1:] + levels[:-1]) / 2:
        code += (size > np.float32(middle)).astype(jnp.uint8)
    return code


def decode(codes: UInt8[Array, "*batch"], bits: int) -> Float[Array, "*batch"]:
    """Levels of the codes, float32 (exact in e4m3 and bf16)."""
    if bits == 8:
        return jax.lax.bitcast_convert_type(codes, jnp.float8_e4m3fn).astype(jnp.float32)
    levels = magnitudes(bits)
    table = jnp.asarray(np.concatenate([levels, -levels]), jnp.float32)
    return table.at[codes].get(mode="promise_in_bounds")


@cache
def distortion(bits: int, head_dim: int) -> float:
    """Expected squared error of a random unit vector whose scale is its exact norm ("norm").

    head_dim * E[(x - c(x))^2] over the density of one coordinate, proportional to
    (1 - x^2)^((head_dim - 3) / 2), by Gauss-Legendre quadrature in float64.
    """
    check_head_dim(head_dim)
    levels = magnitudes(bits) / (divisor(bits) * math.sqrt(head_dim))
    edges = np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [1.0]]).clip(max=1.0)
    nodes, weights = np.polynomial.legendre.leggauss(64)
    # Eighths of a cell keep the last one accurate, which spans the density's whole tail.
    cuts = np.linspace(edges[:-1], edges[1:], 9)
    half = (cuts[1:] - cuts[:-1])[..., None] / 2
    x = cuts[:-1, :, None] + half * (nodes + 1)
    log_norm = math.lgamma(head_dim / 2) - math.lgamma((head_dim - 1) / 2)
    density = math.exp(log_norm) / math.sqrt(math.pi) * (1 - x * x) ** ((head_dim - 3) / 2)
    return float(2 * head_dim * np.sum(half * weights * density * (x - levels[:, None]) ** 2))
