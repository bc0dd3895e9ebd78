"""Codes <-> bytes.

Invariants. Codes of b bits are stored as *planes* of uint8, packed along the last axis, whose
length n is a multiple of 8:
- 2, 4 and 8 bits: one plane of b-bit fields; 3 bits: a plane of 2-bit fields (the magnitude's
  index), then a plane of 1-bit fields (the sign). So n codes take exactly n * b / 8 bytes.
- Field i of a plane with f-bit fields lies in byte i * f // 8, at bit i * f % 8 (little end first).
- Field i belongs to code i, but for signs at 3 and 4 bits. Decoders look magnitudes up four codes
  a time; the signs lie where they can then be masked in, without a shuffle:
  - 4 bits: the magnitude's index is the low three bits of the code's field. Of each 8 codes, the
    signs of the first four are the top bits of the four bytes, those of the others bit 3 of them.
    That is, the top bit of field i is the sign of code (4, 0, 5, 1, 6, 2, 7, 3)[i].
  - 3 bits: in a run of 32 codes, bit 4j + 2h + b is the sign of code 16h + 2j + b (h, b < 2): it
    lies over the 2-bit field, if of the fields in a 32-bit word every second one is looked at.
    Where 32 does not divide n, runs have 16 or else 8 codes, the half of a run taking 16's place.
"""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8, UInt32

from pallas_kernels.format import check_bits


# The sign of code (h * bytes + k) * len(LOW) + i of a run lies in its byte k, bit HIGH[h] + LOW[i].
_HIGH = {3: (0, 2), 4: (7, 3)}
_LOW = {3: (0, 1, 4, 5), 4: (0,)}


def plane_bits(bits: int) -> tuple[int, ...]:
    """Bits per code in each plane."""
    check_bits(bits)
    return (2, 1) if bits == 3 else (bits,)


def pack(codes: UInt8[Array, "*batch n"], bits: int) -> tuple[UInt8[Array, "*batch _"], ...]:
    """Planes of the codes, each [*batch, n * plane_bits / 8]; ValueError unless 8 divides n."""
    width = plane_bits(bits)[0]
    if codes.shape[-1] % 8:
        raise ValueError(f"{codes.shape=}: the last axis must be a multiple of 8 to be packed")
    if bits in (2, 8):
        return (_pack_fields(codes, width),)
    sizes = _pack_fields(codes & np.uint8(2 ** (bits - 1) - 1), width)
    signs = _pack_signs(codes >> np.uint8(bits - 1), bits)
    return (sizes, signs) if bits == 3 else (sizes | signs,)


def unpack(planes: tuple[UInt8[Array, "*batch _"], ...], bits: int) -> UInt8[Array, "*batch n"]:
    """Codes of the planes: the inverse of `pack`. Four codes at a time, as GPU kernels do it."""
    check_bits(bits)
    plane = planes[0]
    if bits == 8:
        return plane
    if bits == 4:
        word, half = _words(plane, 4, 2)
        x = word >> 16 * half & _u(0xFFFF)
        x = (x | x << _u(8)) & _u(0x00FF00FF)
        x = (x | x << _u(4)) & _u(0x07070707)
        x |= word >> 4 - 4 * half & _u(0x08080808)
    else:
        size = math.gcd(plane.shape[-1], 4)
        word, byte = _words(plane, size, size)
        x = word >> 8 * byte
        x = (x & _u(0x0F)) | (x & _u(0xF0)) << _u(12)
        x = (x | x << _u(6)) & _u(0x03030303)
    if bits == 3:
        size = math.gcd(planes[1].shape[-1], 4)
        word, four = _words(planes[1], size, 2 * size)
        sign = word >> 8 * (four % size) + 2 * (four // size)
        sign = (sign & _u(0x03)) | (sign & _u(0x30)) << _u(12)
        sign = (sign | sign << _u(7)) & _u(0x01010101)
        x |= sign.reshape(x.shape) << _u(2)
    return jax.lax.bitcast_convert_type(x, jnp.uint8).reshape(*plane.shape[:-1], -1)


def _words(
    plane: UInt8[Array, "*batch n"], size: int, copies: int
) -> tuple[UInt32[Array, "*batch words copies"], UInt32[Array, "*batch words copies"]]:
    """Each `size` bytes as an integer, `copies` times, and which copy each is."""
    word = plane
    if size > 1:
        word = plane.reshape(*plane.shape[:-1], -1, size)
        word = jax.lax.bitcast_convert_type(word, f"uint{8 * size}")
    word = word.astype(jnp.uint32)[..., None]
    word = jnp.broadcast_to(word, (*word.shape[:-1], copies))
    return word, jax.lax.broadcasted_iota(jnp.uint32, word.shape, word.ndim - 1)


def _u(value: int) -> np.uint32:
    return np.uint32(value)


def _pack_fields(codes: Array, width: int) -> Array:
    fields = codes.reshape(*codes.shape[:-1], -1, 8 // width)
    packed = fields[..., 0]
    for i in range(1, 8 // width):
        packed |= fields[..., i] << np.uint8(i * width)
    return packed


def _pack_signs(signs: Array, bits: int) -> Array:
    """Bytes with the signs in their places, zero elsewhere."""
    high, low = _HIGH[bits], _LOW[bits]
    size = math.gcd(signs.shape[-1] // (2 * len(low)), 4)
    runs = signs.reshape(*signs.shape[:-1], -1, 2, size, len(low))
    places = [(h, i, high[h] + low[i]) for h in range(2) for i in range(len(low))]
    placed = [runs[..., h, :, i] << np.uint8(bit) for h, i, bit in places]
    return functools.reduce(jnp.bitwise_or, placed).reshape(*signs.shape[:-1], -1)
