"""Codes <-> bytes.

Invariants. Codes of b bits are stored as *planes* of uint8, packed along the last axis, whose
length n is a multiple of 8:
- 2, 4 and 8 bits: one plane of b-bit fields; 3 bits: a plane of 2-bit fields (the magnitude's
  index), then a plane of 1-bit fields (the sign). So n codes take exactly n * b / 8 bytes.
- Code i of a plane with f-bit fields lies in byte i * f // 8, at bit i * f % 8 (little end first).
"""

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, UInt8

from pallas_kernels.format import check_bits


def plane_bits(bits: int) -> tuple[int, ...]:
    """Bits per code in each plane."""
    check_bits(bits)
    return (2, 1) if bits == 3 else (bits,)


def pack(codes: UInt8[Array, "*batch n"], bits: int) -> tuple[UInt8[Array, "*batch _"], ...]:
    """Planes of the codes, each [*batch, n * plane_bits / 8]; ValueError unless 8 divides n."""
    fields = plane_bits(bits)
    if codes.shape[-1] % 8:
        raise ValueError(f"{codes.shape=}: the last axis must be a multiple of 8 to be packed")
    low = codes & np.uint8(3) if bits == 3 else codes
    return tuple(
        _pack_plane(plane, width)
        for plane, width in zip((low, codes >> np.uint8(2)), fields, strict=False)
    )


def unpack(planes: tuple[UInt8[Array, "*batch _"], ...], bits: int) -> UInt8[Array, "*batch n"]:
    """Codes of the planes: the inverse of `pack`."""
    low, *high = (
        _unpack_plane(plane, width) for plane, width in zip(planes, plane_bits(bits), strict=True)
    )
    return low | high[0] << np.uint8(2) if high else low


def _pack_plane(codes: Array, width: int) -> Array:
    fields = codes.reshape(*codes.shape[:-1], -1, 8 // width)
    packed = fields[..., 0]
    for i in range(1, 8 // width):
        packed |= fields[..., i] << np.uint8(i * width)
    return packed


def _unpack_plane(plane: Array, width: int) -> Array:
    if width == 8:
        return plane
    shifts = np.arange(0, 8, width, dtype=np.uint8)
    wide = jnp.broadcast_to(plane[..., None], (*plane.shape, len(shifts)))
    fields = wide >> jnp.broadcast_to(shifts, wide.shape) & np.uint8(2**width - 1)
    return fields.reshape(*plane.shape[:-1], -1)
