"""TurboQuant's other variants (arXiv:2504.19874), in plain jax.numpy: neither is for KVCache.

quantize_prod: inner-product search. quantize_split: more bits for channels that hold outliers.
Both take vectors whose length is any multiple of 8. Lengths that `rotation` has a Hadamard for
are rotated by it, others by a seeded orthogonal matrix.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, BFloat16, Float, Int32, UInt8

from pallas_kernels import codebook, codec, packing
from pallas_kernels.format import HEAD_DIMS, ScaleMode, check_seed
from pallas_kernels.rotation import rotate, unrotate


PROD_BITS = (1, 2, 3, 4)
SPLIT_BITS = (2, 3)
_TINY = np.finfo(np.float32).tiny


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Codes:
    """TurboQuant_mse of vectors of any multiple of 8: x ~ scale * unrotate(levels).

    planes: packed codes (see `packing`); none at 0 bits, a plane of signs at 1. scale: |x| by
    sqrt(length), 0 for zero vectors, NaN for vectors with an infinity or a NaN.
    """

    planes: tuple[UInt8[Array, "*batch _"], ...]
    scale: BFloat16[Array, "*batch"]
    bits: int = field(metadata={"static": True})
    length: int = field(metadata={"static": True})
    seed: int = field(metadata={"static": True})

    def dequantize(self) -> Float[Array, "*batch length"]:
        """The vectors that the codes stand for, float32."""
        return _unrotate(self.rotated(), self.seed)

    def rotated(self) -> Float[Array, "*batch length"]:
        """The same before they are rotated back."""
        return _levels(self.planes, self.bits, self.length) * _column(self.scale)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedProd:
    """TurboQuant_prod (algorithm 2): x ~ unrotate(codes + residual_scale * Q^T signs).

    codes: at one bit less than asked for. With r the rotated residual of the *stored* codes and Q
    a seeded orthogonal matrix: signs are those of Q r, one bit each, and residual_scale is |r|
    times the constant that makes `inner` unbiased over seeds. It is float32, since rounding it
    would be a bias.
    """

    codes: Codes
    signs: UInt8[Array, "*batch _"]
    residual_scale: Float[Array, "*batch"]

    def inner(self, q: Float[Array, "*queries length"]) -> Float[Array, "..."]:
        """Estimates of <q, x> for every query and vector: float32 [*queries, *batch].

        The mean over seeds is exact; the variance is |q|^2 |x|^2 distortion(bits - 1) 0.57 / length
        (0.57 = pi/2 - 1, for long vectors).
        Raises ValueError unless q has the vectors' length.
        """
        if q.shape[-1:] != (self.codes.length,):
            raise ValueError(f"{q.shape=} does not end in the vectors' {self.codes.length=}")
        return _inner(self, q)

    def dequantize(self) -> Float[Array, "*batch length"]:
        """The vectors whose inner products `inner` gives, float32: noisier than mse codes."""
        return _dequantize_prod(self)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class QuantizedSplit:
    """Two instances of TurboQuant_mse: channels order[:outliers.length], and the others."""

    outliers: Codes
    others: Codes
    order: Int32[Array, " head_dim"]

    @property
    def bits_per_number(self) -> float:
        """Bits stored for each coordinate: codes and the two 16-bit scales."""
        parts = (self.outliers, self.others)
        return sum(x.bits * x.length + 16 for x in parts) / self.order.size

    def dequantize(self) -> Float[Array, "*batch head_dim"]:
        """The vectors that the codes stand for, float32."""
        return _dequantize_split(self)


@overload
def quantize(
    x: Float[Array, "*batch head_dim"],
    bits: int = 4,
    seed: int = 0,
    scale_mode: ScaleMode = "norm_preserving",
    *,
    variant: Literal["mse"] = "mse",
) -> codec.Quantized: ...
@overload
def quantize(
    x: Float[Array, "*batch head_dim"],
    bits: int = 4,
    seed: int = 0,
    *,
    variant: Literal["prod"],
) -> QuantizedProd: ...
def quantize(
    x,
    bits=4,
    seed=0,
    scale_mode=None,
    *,
    variant="mse",
):
    """Quantises each vector to `bits` bits per coordinate and one bf16 scale.

    x: bf16, f16 or f32, head_dim 64, 128 or 256; any magnitude that float32 holds.
    scale_mode: "norm_preserving" (the default) keeps |x|, "norm" is the paper's (shrinks), "eden"
    makes <x, x^> = |x|^2 (EDEN, Vargaftik et al., 2022).
    variant: "mse" gives a Quantized; "prod" is `quantize_prod`, for inner-product search.
    Raises ValueError for another dtype, head_dim, bits, seed, scale_mode or variant.
    """
    if variant == "mse":
        return codec.quantize(
            x, bits, seed, "norm_preserving" if scale_mode is None else scale_mode
        )
    if variant != "prod":
        raise ValueError(f'{variant=} is not "mse" or "prod"')
    if scale_mode is not None:
        raise ValueError(f'{scale_mode=} does not go with variant="prod", which is unbiased')
    return quantize_prod(x, bits, seed)


def quantize_prod(x: Float[Array, "*batch length"], bits: int = 4, seed: int = 0) -> QuantizedProd:
    """Codes whose inner products with any query are unbiased (TurboQuant_prod, algorithm 2).

    x: bf16, f16 or f32, any length that 8 divides; bits: 1 to 4, one of them for the sign of the
    residual (QJL). Here its matrix is orthogonal rather than Gaussian, which has 2.75 times less
    variance.
    For inner-product search, where a common shrinkage would not average out. Not for attention:
    softmax turns variance into error and hardly sees a shrinkage, and at equal bits the variance
    here is 1.5 (2 bits) to 2 times (4 bits) that of `quantize(..., scale_mode="eden")`, whose
    products with x itself are exact.
    Raises ValueError for another dtype, length, bits or seed.
    """
    if bits not in PROD_BITS:
        raise ValueError(f"{bits=} is not one of {PROD_BITS}")
    _check(x, seed)
    return _quantize_prod(x, bits, seed)


def outlier_channels(calibration: Float[Array, "*batch head_dim"], count: int) -> tuple[int, ...]:
    """The `count` channels of largest mean magnitude over a calibration batch, ascending."""
    size = np.abs(np.asarray(calibration, np.float64)).reshape(-1, calibration.shape[-1])
    if not 0 <= count <= size.shape[1]:
        raise ValueError(f"{count=} is not in [0, {size.shape[1]}], the number of channels")
    largest = np.argsort(-size.mean(axis=0), kind="stable")[:count]
    return tuple(sorted(largest.tolist()))


def quantize_split(
    x: Float[Array, "*batch head_dim"], bits: int, outliers: Sequence[int], seed: int = 0
) -> QuantizedSplit:
    """Channels `outliers` at bits + 1 and the others at bits: the paper's 2.5 and 3.5 bits.

    x: bf16, f16 or f32; bits: 2 or 3; outliers: distinct channels, chosen once for all vectors
    (see `outlier_channels`). 8 divides the number of them and of the others. The paper's 32 of
    128 channels are, at bits=2, 2.25 bits of codes, and 2.5 with the two scales; 64 of 128 are
    2.5 and 2.75.
    Raises ValueError for arguments that do not fit.
    """
    if bits not in SPLIT_BITS:
        raise ValueError(f"{bits=} is not one of {SPLIT_BITS}")
    _check(x, seed)
    inside = np.zeros(x.shape[-1], bool)
    wrong = [c for c in outliers if not 0 <= c < len(inside)]
    if wrong or len(set(outliers)) != len(outliers):
        raise ValueError(f"{outliers=} are not distinct channels in [0, {len(inside)})")
    if len(outliers) % 8 or not 0 < len(outliers) < len(inside):
        raise ValueError(f"{len(outliers)=} is no multiple of 8 between 0 and {len(inside)}")
    inside[list(outliers)] = True
    order = np.concatenate([np.flatnonzero(inside), np.flatnonzero(~inside)]).astype(np.int32)
    return _quantize_split(x, jnp.asarray(order), len(outliers), bits, seed)


def _check(x: Array, seed: int) -> None:
    check_seed(seed)
    if x.dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        raise ValueError(f"{x.dtype=} is not bfloat16, float16 or float32; cast x first")
    if x.ndim == 0 or x.shape[-1] == 0 or x.shape[-1] % 8:
        raise ValueError(f"{x.shape=}: the last axis is no multiple of 8; pad with zeros")


@partial(jax.jit, static_argnums=(1, 2))
def _quantize_prod(x: Array, bits: int, seed: int) -> QuantizedProd:
    codes, y = _encode(x, bits - 1, seed)
    # Of the stored scale: the residual then carries its rounding too.
    residual = y - codes.rotated()
    largest = jnp.max(jnp.abs(residual), axis=-1)
    unit = residual / _column(jnp.where(largest < _TINY, 1.0, largest))
    norm = jnp.sqrt(jnp.sum(unit * unit, axis=-1)) * largest
    signs = _pack_signs(_dot(unit, _sketch(codes)))
    return QuantizedProd(codes, signs, norm / (math.sqrt(codes.length) * _mean_size(codes.length)))


@jax.jit
def _inner(code: QuantizedProd, q: Array) -> Array:
    q = _rotate(q.astype(jnp.float32), code.codes.seed)
    exact = jnp.tensordot(q, code.codes.rotated(), (-1, -1), precision="highest")
    sketch = _dot(q, _sketch(code.codes))
    signs = _unpack_signs(code.signs)
    return exact + jnp.tensordot(sketch, signs, (-1, -1), precision="highest") * code.residual_scale


@jax.jit
def _dequantize_prod(code: QuantizedProd) -> Array:
    residual = _dot(_unpack_signs(code.signs), _sketch(code.codes).T)
    y = code.codes.rotated() + residual * _column(code.residual_scale)
    return _unrotate(y, code.codes.seed)


@partial(jax.jit, static_argnums=(2, 3, 4))
def _quantize_split(x: Array, order: Array, count: int, bits: int, seed: int) -> QuantizedSplit:
    x = jnp.take(x, order, axis=-1)
    outliers, _ = _encode(x[..., :count], bits + 1, seed)
    others, _ = _encode(x[..., count:], bits, seed)
    return QuantizedSplit(outliers, others, order)


@jax.jit
def _dequantize_split(code: QuantizedSplit) -> Array:
    x = jnp.concatenate([code.outliers.dequantize(), code.others.dequantize()], axis=-1)
    return jnp.take(x, jnp.argsort(code.order), axis=-1)


def _encode(x: Array, bits: int, seed: int) -> tuple[Codes, Float[Array, "*batch length"]]:
    """The codes of vectors, and the rotated vectors."""
    length = x.shape[-1]
    x = x.astype(jnp.float32)
    # Divided by the largest magnitude first: squares then neither overflow nor vanish.
    largest = jnp.max(jnp.abs(x), axis=-1)
    zero = largest < _TINY
    y = _rotate(x / _column(jnp.where(zero, 1.0, largest)), seed)
    rms = jnp.sqrt(jnp.mean(y * y, axis=-1))
    usable = jnp.isfinite(rms) & ~zero
    unit = jnp.where(_column(usable), y / _column(jnp.where(usable, rms, 1.0)), 1.0)
    scale = jnp.where(zero, 0.0, largest * rms)
    scale = jnp.where(jnp.isfinite(scale), scale, jnp.nan).astype(jnp.bfloat16)
    return Codes(_codes(unit, bits), scale, bits, length, seed), y * _column(largest)


def _codes(unit: Array, bits: int) -> tuple[Array, ...]:
    """Planes of the levels nearest to coordinates of unit variance."""
    if bits == 0:
        return ()
    if bits == 1:
        return (_pack_signs(unit),)
    return packing.pack(codebook.encode(unit * np.float32(codebook.divisor(bits)), bits), bits)


def _levels(planes: tuple[Array, ...], bits: int, length: int) -> Array:
    """The levels that they stand for."""
    if bits == 0:
        return jnp.zeros(length, jnp.float32)
    if bits == 1:
        return _unpack_signs(planes[0]) * np.float32(math.sqrt(2 / math.pi))
    return codec.levels(planes, bits) * np.float32(1 / codebook.divisor(bits))


def _pack_signs(x: Array) -> Array:
    return jnp.packbits(x < 0, axis=-1, bitorder="little")


def _unpack_signs(packed: Array) -> Array:
    return 1 - 2 * jnp.unpackbits(packed, axis=-1, bitorder="little").astype(jnp.float32)


def _rotate(x: Array, seed: int) -> Array:
    n = x.shape[-1]
    return rotate(x, seed) if n in HEAD_DIMS else _dot(x, orthogonal(n, seed))


def _unrotate(y: Array, seed: int) -> Array:
    n = y.shape[-1]
    return unrotate(y, seed) if n in HEAD_DIMS else _dot(y, orthogonal(n, seed).T)


def _sketch(codes: Codes) -> np.ndarray:
    return orthogonal(codes.length, codes.seed, stream=2)


@cache
def orthogonal(n: int, seed: int, stream: int = 1) -> np.ndarray:
    """An orthogonal matrix, float32 [n, n], uniform (Haar) over seeds and streams.

    From the QR decomposition of normal numbers; R's diagonal is made positive, without which Q
    would not be uniform. The normal numbers are made here, by Box and Muller's method from
    Philox's raw stream: NumPy may change its own.
    """
    raw = np.random.Philox(key=seed + (stream << 64)).random_raw(n * n)
    u, v = (
        (raw >> np.uint64(32)).astype(np.float64),
        (raw & np.uint64(2**32 - 1)).astype(np.float64),
    )
    normal = np.sqrt(-2 * np.log((u + 0.5) / 2**32)) * np.cos(2 * np.pi * v / 2**32)
    q, r = np.linalg.qr(normal.reshape(n, n))
    return (q * np.where(np.diagonal(r) < 0, -1.0, 1.0)).astype(np.float32)


def _mean_size(n: int) -> float:
    """sqrt(n) * E|u| of a coordinate u of a random unit vector; sqrt(2 / pi) for large n."""
    return math.sqrt(n / math.pi) * math.exp(math.lgamma(n / 2) - math.lgamma((n + 1) / 2))


def _dot(x: Array, matrix: np.ndarray) -> Array:
    return jnp.matmul(x, jnp.asarray(matrix), precision="highest")


def _column(x: Array) -> Array:
    return x[..., None].astype(jnp.float32)
