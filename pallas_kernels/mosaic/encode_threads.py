"""Which part of a tile of 64 tokens each thread of a warpgroup has, and how it loads that.

A warp has 16 tokens, and of each token a thread has a quarter of the channels: consecutive ones, so
that it packs a key's codes without asking another thread.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pallas_kernels.format import KVFormat


TILE = 64  # tokens of a warpgroup


@dataclass(frozen=True)
class Sizes:
    """Of the cache and of the new tokens."""

    fmt: KVFormat
    heads: int
    head_dim: int
    new: int
    new_dtype: str  # bfloat16, float16 or float32
    pages_per_seq: int


@dataclass(frozen=True)
class Place:
    """Of a tile: words, the same in all threads. Positions count from the end of the sinks."""

    batch: Any
    head: Any
    start: Any  # position of the tile's first token
    end: Any  # positions from here on are not packed
    length: Any  # position of the first new token; may be negative
    total: Any  # position after the last new token; may be negative


@dataclass(frozen=True)
class Arrays:
    """References to the keys' arrays, or the values'."""

    tables: Any  # of `encode_rows`
    page_table: Any
    new: Any
    recent: Any
    sink: Any  # None without sinks
    planes: Sequence[Any]
    scale: Any


class Threads:
    """What the threads of a warpgroup, one of `warpgroups` in a block, have of a tile."""

    def __init__(self, ops, sizes: Sizes, place: Place, arrays: Arrays, warpgroups: int):
        self.ops, self.sizes, self.place, self.arrays = ops, sizes, place, arrays
        self.d = sizes.head_dim
        self.quarter = sizes.head_dim // 4  # channels of a thread
        self.warpgroups = warpgroups
        thread = ops.thread()
        self.thread, self.lane = thread, thread & 31
        self.column = thread & 3
        row = ((thread >> 5) << 4) + ((thread & 31) >> 2)
        self.rows = [row, row + 8]

    def new_row(self, position):
        """Number of the row of `new` with the token at a position."""
        place, sizes = self.place, self.sizes
        token = place.batch * sizes.new + (position - place.length)
        return token * sizes.heads + place.head

    def cache_row(self, slot, slots: int):
        """Number of the row of a slot of the ring, or of the sinks."""
        return (self.place.batch * self.sizes.heads + self.place.head) * slots + slot

    def page(self, position):
        """Number of the row of the page's KV head in the pools, and the place in the page."""
        ops, sizes, size = self.ops, self.sizes, self.sizes.fmt.page_size
        entry = ops.address(
            self.arrays.page_table, self.place.batch * sizes.pages_per_seq + position // size, 4
        )
        return ops.load(entry, 1)[0] * sizes.heads + self.place.head, position % size

    def load_new(self, position, first, pairs: int) -> list:
        """Pairs of channels of a new token, from channel `first` on, as bfloat16."""
        ops, dtype = self.ops, self.sizes.new_dtype
        size = 4 if dtype == "float32" else 2
        here = ops.address(self.arrays.new, self.new_row(position), self.d * size, first * size)
        words = ops.load(here, pairs * size // 2)
        if dtype == "bfloat16":
            return words
        if dtype == "float32":
            x = [ops.from_bits(x) for x in words]
        else:
            x = [ops.float_of_half(half) for x in words for half in (x, x >> 16)]
        return [ops.bfloats(low, high) for low, high in zip(x[::2], x[1::2], strict=True)]

    def load_token(self, position, first, pairs: int, ring=None) -> list:
        """The same of a token that is new, or else in the ring (or what is given for it)."""
        ops = self.ops
        ring = self.arrays.recent if ring is None else ring
        slots = ops.shape(ring)[2]
        row = self.cache_row(position % slots, slots)
        ring = ops.address(ring, row, self.d * 2, first * 2)
        is_old = ops.less(position, self.place.length)
        if self.sizes.new_dtype == "bfloat16":
            new = ops.address(self.arrays.new, self.new_row(position), self.d * 2, first * 2)
            return ops.load(ops.select(is_old, ring, new), pairs)
        return ops.either(
            is_old, lambda: ops.load(ring, pairs), lambda: self.load_new(position, first, pairs)
        )


def over_columns(ops, x):
    """The sum over the four threads of a row."""
    for distance in (1, 2):
        x = x + ops.exchange(x, distance)
    return x
