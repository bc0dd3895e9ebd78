"""quantize: vectors -> rotated, scaled codes (TurboQuant_mse, arXiv:2504.19874, algorithm 1)."""

import math
from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, UInt8

from pallas_kernels import codebook, packing
from pallas_kernels.format import (
    ScaleMode,
    check_bits,
    check_head_dim,
    check_scale_mode,
    check_seed,
)
from pallas_kernels.rotation import rotate, unrotate


_TINY = np.finfo(np.float32).tiny


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Quantized:
    """Quantised vectors: x ~ scale * unrotate(levels of the codes).

    codes: planes of packed codes (see `packing`), scale: one per vector. Zero vectors have scale
    0, vectors with an infinity or a NaN have scale NaN.
    """

    codes: tuple[UInt8[Array, "*batch _"], ...]
    scale: BFloat16[Array, "*batch"]
    bits: int = field(metadata={"static": True})
    head_dim: int = field(metadata={"static": True})
    seed: int = field(metadata={"static": True})

    def dequantize(self, dtype=jnp.float32) -> Float[Array, "*batch head_dim"]:
        """The vectors that the codes stand for."""
        return _dequantize(self).astype(dtype)


def quantize(
    x: Float[Array, "*batch head_dim"],
    bits: int = 4,
    seed: int = 0,
    scale_mode: ScaleMode = "norm_preserving",
) -> Quantized:
    """Quantises each vector to `bits` bits per coordinate and one bf16 scale.

    x: bf16, f16 or f32, head_dim 64, 128 or 256; any magnitude that float32 holds.
    scale_mode: "norm_preserving" keeps |x|, "norm" is the paper's (shrinks), "eden" makes
    <x, x^> = |x|^2 (EDEN, Vargaftik et al., 2022).
    Raises ValueError for another dtype, head_dim, bits, seed or scale_mode.
    """
    check_bits(bits)
    check_seed(seed)
    check_scale_mode(scale_mode)
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{x.dtype=} is not bfloat16, float16 or float32; cast x first")
    if x.ndim == 0:
        raise ValueError(f"{x.shape=} has no head_dim axis")
    check_head_dim(x.shape[-1])
    return _quantize(x, bits, seed, scale_mode)


# Compiled as a whole, called from traced code or not: speed, and the same bits either way.
@partial(jax.jit, static_argnums=(1, 2, 3))
def _quantize(x: Array, bits: int, seed: int, scale_mode: ScaleMode) -> Quantized:
    codes, scale = encode(x.astype(jnp.float32), bits, seed, scale_mode)
    return Quantized(packing.pack(codes, bits), scale, bits, x.shape[-1], seed)


@jax.jit
def _dequantize(code: Quantized) -> Array:
    return unrotate(levels(code.codes, code.bits), code.seed) * code.scale[..., None].astype(
        jnp.float32
    )


def encode(
    x: Float[Array, "*batch head_dim"], bits: int, seed: int, scale_mode: ScaleMode
) -> tuple[UInt8[Array, "*batch head_dim"], BFloat16[Array, "*batch"]]:
    """Codes (one a byte) and scales of float32 vectors; see `quantize`, which checks arguments."""
    # Divided by the largest magnitude first: squares then neither overflow nor vanish.
    largest = jnp.max(jnp.abs(x), axis=-1)
    zero = largest < _TINY
    # XLA may multiply by the reciprocal, which must not be subnormal.
    shrunk = jnp.where(largest > 1, 0.25, 1.0)
    y = rotate(x * shrunk[..., None] / jnp.where(zero, 1.0, largest * shrunk)[..., None], seed)
    norm = jnp.sqrt(_dot(y, y))
    finite = jnp.isfinite(norm)
    # Zeros, infinities and NaNs are in the scale alone; their codes are those of a stand-in.
    usable = finite & ~zero
    y = jnp.where(usable[..., None], y, 1.0)
    norm = jnp.where(usable, norm, math.sqrt(x.shape[-1]))
    sigma = math.sqrt(x.shape[-1]) * codebook.divisor(bits)
    codes = codebook.encode(y * (sigma / norm)[..., None], bits)
    if scale_mode == "norm":
        scale = norm / sigma
    else:
        # Without the barrier XLA may take the conversion to float8 and back for the value itself.
        nearest = codebook.decode(jax.lax.optimization_barrier(codes), bits)
        if scale_mode == "eden":
            scale = norm * norm / _dot(y, nearest)
        else:
            scale = norm / jnp.sqrt(_dot(nearest, nearest))
    scale = jnp.where(zero, 0.0, jnp.where(finite, largest * scale, jnp.nan))
    return codes, scale.astype(jnp.bfloat16)


def levels(planes: tuple[UInt8[Array, "*batch _"], ...], bits: int) -> Float[Array, "*batch n"]:
    """Levels of packed codes, float32."""
    return codebook.decode(packing.unpack(planes, bits), bits)


def _dot(a: Array, b: Array) -> Array:
    return jnp.sum(a * b, axis=-1)
