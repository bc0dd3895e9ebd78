"""A plan's strided copies as the boxes that one call of the CUDA driver copies. Pure."""

import itertools
from collections.abc import Iterator
from typing import NamedTuple

from jaxgds.scatter import Piece


class Box(NamedTuple):
    """`shape` is (depth, height, width) in bytes; strides are of planes and of rows."""

    src: int
    dst: int
    shape: tuple[int, int, int]
    src_strides: tuple[int, int]
    dst_strides: tuple[int, int]


def boxes(piece: Piece) -> Iterator[Box]:
    """Cuts a piece into boxes of at most three axes, offsets as in the piece.

    Planes must be a whole number of rows apart; pieces of C-ordered arrays are.
    """
    rank = len(piece.shape)
    inner = min(rank, 3)
    if inner == 3 and any(s[-3] % s[-2] for s in (piece.src_strides, piece.dst_strides)):
        inner = 2
    outer = rank - inner
    ones = (1,) * (3 - inner)
    shape = ones + piece.shape[outer:]
    src_strides = _planes_and_rows(piece.src_strides[outer:-1], piece.shape[outer:])
    dst_strides = _planes_and_rows(piece.dst_strides[outer:-1], piece.shape[outer:])
    for index in itertools.product(*map(range, piece.shape[:outer])):
        src = sum(i * s for i, s in zip(index, piece.src_strides, strict=False))
        dst = sum(i * s for i, s in zip(index, piece.dst_strides, strict=False))
        yield Box(
            piece.src_offset + src,
            piece.dst_offset + dst,
            (shape[0], shape[1], shape[2]),
            src_strides,
            dst_strides,
        )


def _planes_and_rows(strides: tuple[int, ...], shape: tuple[int, ...]) -> tuple[int, int]:
    """(plane stride, row stride), where axes that are missing get those of a dense copy."""
    row = strides[-1] if strides else shape[-1]
    if len(strides) == 2:
        return strides[0], row
    return row * (shape[-2] if len(shape) > 1 else 1), row
