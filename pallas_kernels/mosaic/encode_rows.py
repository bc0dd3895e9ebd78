"""What a block of 128 threads does to encode 64 tokens of one KV head: keys, or values.

A warp has 16 tokens, and of each token a thread has a quarter of the channels: consecutive ones, so
that it packs a key's codes without asking another thread. The Hadamard transform is a product over
four bits of the channel's number (the lowest, the two that select the thread, and the one below
them), which a tensor core does as a 16 x 16 matrix of signs, and butterflies over the others, which
lie in a thread. Values turn through shared memory, as one byte a code, to be packed along tokens.

The program is written once, over `ops`: `lanes` emits machine code, `lanes_numpy` computes.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pallas_kernels import codebook, rotation
from pallas_kernels.format import KVFormat
from pallas_kernels.packing import plane_bits


TILE = 64  # tokens of a block
PAD = 16  # bytes after each row of codes in shared memory, against bank conflicts


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

    tables: Any  # see `tables`
    page_table: Any
    new: Any
    recent: Any
    sink: Any  # None without sinks
    planes: Sequence[Any]
    scale: Any


def tables(head_dim: int, seed: int) -> np.ndarray:
    """int32 [head_dim / 2 + 128]: the rotation's signs, and each lane's part of the 16 x 16 signs.

    Signs: of pairs of channels, as the sign bits of two bfloat16.
    """
    flip = (rotation.signs(head_dim, seed) < 0).astype(np.uint32) << 15
    pairs = flip[::2] | flip[1::2] << 16
    lane = np.arange(32)
    k, n = 2 * (lane % 4), lane // 4
    parts = []
    for right in (0, 8):
        for below in (0, 8):
            # bfloat16's 1 is 0x3F80
            signs = [np.bitwise_count((k + below + i) & (n + right)) % 2 for i in (0, 1)]
            low, high = (0x3F80 | sign.astype(np.uint32) << 15 for sign in signs)
            parts.append(low | high << 16)
    return np.concatenate([pairs, *parts]).view(np.int32)


class Threads:
    """The threads' parts of a tile."""

    def __init__(self, ops, sizes: Sizes, place: Place, arrays: Arrays):
        self.ops, self.sizes, self.place, self.arrays = ops, sizes, place, arrays
        self.d = sizes.head_dim
        self.quarter = sizes.head_dim // 4  # channels of a thread
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


def key_offset(threads: Threads, is_first, writes, first_page, offset_ref, shared) -> None:
    """Leaves minus the key offset in `shared` (float32 [2, head_dim], the second half), rotated
    over the bits of the channel's number that the tensor core takes.

    is_first: the offset is the mean over the sequence's first page, whose tokens that are not new
    are in first_page (bf16 [batch, kv_heads, slots, head_dim]); otherwise it is in offset_ref
    (float32 [batch, kv_heads, head_dim]). writes: whether this block stores it there.
    """
    ops, sizes, d = threads.ops, threads.sizes, threads.d
    pair = threads.thread % (d // 2)  # channels 2 * pair and the next; threads may do the same
    here = ops.address(offset_ref, threads.cache_row(ops.word(0), 1), d * 4, pair * 8)
    page_size = sizes.fmt.page_size

    def mean():
        def add(i, state):
            loaded = [threads.load_token(i * 8 + j, pair * 2, 1, first_page)[0] for j in range(8)]
            for x in loaded:
                halves = ops.from_bits(x << 16), ops.from_bits(x & 0xFFFF0000)
                state = [a + b for a, b in zip(state, halves, strict=True)]
            return state

        total = ops.loop(page_size // 8, add, [ops.real(0.0), ops.real(0.0)])
        return [x * (1 / page_size) for x in total]

    offset = ops.either(is_first, mean, lambda: [ops.from_bits(x) for x in ops.load(here, 2)])
    with ops.when(writes & ops.less(threads.thread, d // 2)):
        ops.store(here, offset)
    sign = ops.load(ops.address(threads.arrays.tables, pair, 4), 1)[0]
    low = ops.from_bits(ops.bits(offset[0]) ^ ((sign & 0x8000) << 16) ^ 0x80000000)
    high = ops.from_bits(ops.bits(offset[1]) ^ (sign & 0x80000000) ^ 0x80000000)
    x = [low + high, low - high]
    for i, bit in enumerate((d // 8, d // 4, d // 2)):
        half = (i % 2) * d * 4
        mine = ops.address(shared, pair, 8, half)
        ops.store(mine, x)
        ops.barrier()
        other = ops.load(ops.address(shared, pair ^ (bit // 2), 8, half), 2)
        upper = ~ops.less(pair & (bit // 2), 1)
        x = [
            ops.select(upper, ops.from_bits(b) - a, a + ops.from_bits(b))
            for a, b in zip(x, other, strict=True)
        ]
    ops.store(ops.address(shared, pair, 8, d * 4), x)
    ops.barrier()


def keys(threads: Threads, offset) -> None:
    """Encodes a tile of keys; offset: what `key_offset` has left, or None."""
    ops, fmt, arrays, d = threads.ops, threads.sizes.fmt, threads.arrays, threads.d
    bits = fmt.key_bits
    for position, active, words, scale in _encode(threads, bits, offset):
        planes = _pack(ops, bits, words, threads.column)
        with ops.when(active):
            page, place = threads.page(position)
            row = page * fmt.page_size + place
            _store_scale(threads, row, scale)
            for ref, width, plane in zip(arrays.planes, plane_bits(bits), planes, strict=True):
                row_bytes = d * width // 8
                here = ops.address(ref, row, row_bytes, threads.column * (row_bytes // 4))
                if row_bytes >= 16:
                    ops.store(here, plane)
                else:  # of 16 channels' signs two threads have made a word
                    with ops.when(ops.less(threads.column & 1, 1)):
                        ops.store(here, plane)


def values(threads: Threads, codes) -> None:
    """Encodes a tile of values; codes: uint8 [TILE, head_dim + PAD] in shared memory."""
    ops, fmt, arrays, d = threads.ops, threads.sizes.fmt, threads.arrays, threads.d
    bits, size = fmt.value_bits, fmt.page_size
    encoded = _encode(threads, bits, None)
    ops.barrier()  # the codes of the tile before have been read
    for row, (position, active, words, scale) in zip(threads.rows, encoded, strict=True):
        ops.store(ops.address(codes, row, d + PAD, threads.column * threads.quarter), words)
        with ops.when(active):
            page, place = threads.page(position)
            _store_scale(threads, page * size + place, scale)
    ops.barrier()
    run = min(size, 32)  # tokens that a thread packs, of four channels
    items = d // 4 * (TILE // run)
    for first in range(0, items, 128):
        item = threads.thread + first
        channels, token = (item % (d // 4)) * 4, item // (d // 4) * run
        position = threads.place.start + token
        active = ops.less(item, items) & ops.less(position, threads.place.end)
        with ops.when(active):
            page, place = threads.page(position)
            rows = [
                ops.load(ops.address(codes, token + i, d + PAD, channels), 1)[0] for i in range(run)
            ]
            turned = [_turn(ops, rows[i : i + 4]) for i in range(0, run, 4)]
            for i in range(4):
                row = page * d + (channels + i)
                planes = _pack(ops, bits, [x[i] for x in turned], None)
                for ref, width, plane in zip(arrays.planes, plane_bits(bits), planes, strict=True):
                    here = ops.address(ref, row, size * width // 8, place // 8 * width)
                    if run * width // 8 == 2:
                        ops.store_half(here, plane[0])
                    else:
                        ops.store(here, plane)


def recent(threads: Threads, tile) -> None:
    """Writes new tokens to the sinks and to the ring.

    Of the ring, a tile writes the slots that it alone has read; tile: its number, a word.
    """
    ops, sizes, place, d = threads.ops, threads.sizes, threads.place, threads.d
    slots, sinks = sizes.fmt.ring_slots, sizes.fmt.sinks

    def copy(condition, position, ref, row):
        with ops.when(condition & ~ops.less(position, place.length)):
            first = threads.column * threads.quarter
            words = threads.load_new(position, first, threads.quarter // 2)
            ops.store(ops.address(ref, row, d * 2, first * 2), words)

    for row in threads.rows:
        position = place.start + row
        last = place.total - 1
        mine = ops.less(tile * TILE + row, slots) & ops.less(position, place.total)
        # The newest token of this slot.
        newest = position + (last - position) // slots * slots
        copy(mine, newest, threads.arrays.recent, threads.cache_row(position % slots, slots))
        for start in range(0, sinks, TILE):
            slot = row + start
            position = slot - sinks
            mine = ops.less(slot, sinks) & ops.less(tile, 1) & ops.less(position, place.total)
            copy(mine, position, threads.arrays.sink, threads.cache_row(slot, sinks))


def _store_scale(threads: Threads, row, scale) -> None:
    ops = threads.ops
    with ops.when(ops.less(threads.column, 1)):
        here = ops.address(threads.arrays.scale, row, 2)
        ops.store_half(here, ops.bfloats(scale, scale))


def _encode(threads: Threads, bits: int, offset) -> list[tuple]:
    """For both rows: position, whether it is packed, words of four codes (bytes), scale."""
    ops, d, place, n = threads.ops, threads.d, threads.place, threads.quarter
    first = threads.column * n
    positions = [place.start + row for row in threads.rows]
    active = [ops.less(x, place.end) for x in positions]

    def inputs():
        flips = ops.load(ops.address(threads.arrays.tables, first // 2, 4), n // 2)
        tokens = []
        for position, is_active in zip(positions, active, strict=True):
            # A row that is not packed is that of a token which is there.
            position = ops.select(is_active, position, place.start)
            words = threads.load_token(position, first, n // 2)
            tokens.append([x ^ flip for x, flip in zip(words, flips, strict=True)])
        if offset is None:
            return tokens, [ops.real(0.0)] * n
        minus = ops.load(ops.address(offset, threads.column, d, d * 4), n)
        return tokens, [ops.from_bits(x) for x in minus]

    def again():
        # Rare. What was loaded is not kept for it in registers.
        ops.forget()
        return _rotate_any(threads, *inputs())

    tokens, minus = inputs()
    rotated = _rotate(threads, tokens, [minus, minus])
    norms = [_over_columns(ops, _dot(ops, y)) for y in rotated]
    fine = ops.between(norms[0], 2.0**-80, 2.0**100) & ops.between(norms[1], 2.0**-80, 2.0**100)
    factor = ops.real(1 / math.sqrt(d))
    out = ops.either(
        ops.any_in_warp(~fine),
        again,
        lambda: [*rotated[0], *rotated[1], *norms, factor, factor],
    )
    results = []
    for i in range(2):
        y, norm, factor = out[i * n : i * n + n], out[2 * n + i], out[2 * n + 2 + i]
        words, scale = _round(ops, y, norm, bits, d, threads.sizes.fmt.scale_mode)
        results.append((positions[i], active[i], words, scale * factor))
    return results


def _rotate(threads: Threads, tokens, minus) -> list[list]:
    """Two rows' quarters of rotation(token) * sqrt(head_dim) + minus."""
    ops, n = threads.ops, threads.quarter
    table = threads.d // 2
    parts = [
        ops.load(ops.address(threads.arrays.tables, threads.lane + (table + 32 * i), 4), 1)[0]
        for i in range(4)
    ]
    count = n // 4  # products, of 16 channels each
    out: list[list] = [[None] * n, [None] * n]
    for i in range(count):
        a = [tokens[0][i], tokens[1][i], tokens[0][i + count], tokens[1][i + count]]
        for right in range(2):
            at = right * (n // 2) + 2 * i
            start = [x[j] for x in minus for j in (at, at + 1)]
            c = ops.multiply_add(a, parts[2 * right : 2 * right + 2], start)
            out[0][at : at + 2], out[1][at : at + 2] = c[:2], c[2:]
    half = 2
    while half < n // 2:
        for x in out:
            for start in range(0, n, 2 * half):
                for j in range(start, start + half):
                    x[j], x[j + half] = x[j] + x[j + half], x[j] - x[j + half]
        half *= 2
    return out


def _rotate_any(threads: Threads, tokens, minus) -> list:
    """The same for tokens of any magnitude, with zeros, infinities and NaNs.

    Returns both rows, their squared norms, and the factors of their scales.
    """
    ops, d = threads.ops, threads.d
    scaled, less, finite, present, ups = [], [], [], [], []
    for token in tokens:
        largest = ops.word(0)
        for x in token:
            largest = ops.larger(largest, ops.larger(x & 0x7FFF, (x >> 16) & 0x7FFF))
        for x in minus:
            largest = ops.larger(largest, (ops.bits(x) & 0x7FFFFFFF) >> 16)
        for distance in (1, 2):
            largest = ops.larger(largest, ops.exchange(largest, distance))
        exponent = largest >> 7
        finite.append(ops.less(exponent, 255))
        present.append(~ops.less(exponent, 1))
        # Divided by 2 ** exponent, or nearly: this and its inverse must be normal numbers.
        exponent = ops.select(ops.less(exponent, 7), ops.word(7), exponent)
        exponent = ops.select(ops.less(exponent, 247), exponent, ops.word(247))
        ups.append(ops.from_bits(exponent << 23))
        down = ops.from_bits((ops.word(254) - exponent) << 23)
        halves = [(ops.from_bits(x << 16), ops.from_bits(x & 0xFFFF0000)) for x in token]
        scaled.append([ops.bfloats(low * down, high * down) for low, high in halves])
        less.append([x * down for x in minus])
    rows, norms, factors = [], [], []
    for i, y in enumerate(_rotate(threads, scaled, less)):
        norm = _over_columns(ops, _dot(ops, y))
        usable = finite[i] & present[i] & ops.between(norm, 0.0, 2.0**120)
        rows += [ops.select(usable, x, ops.real(1.0)) for x in y]
        norms.append(ops.select(usable, norm, ops.real(float(d))))
        nothing = ops.select(finite[i], ops.real(0.0), ops.real(math.nan))
        factors.append(ops.select(usable, ups[i] * (1 / math.sqrt(d)), nothing))
    return [*rows, *norms, *factors]


def _round(ops, y, norm, bits: int, d: int, scale_mode: str):
    """Words of four codes (bytes), and the scale for coordinates sqrt(head_dim) times too large."""
    sigma = math.sqrt(d) * codebook.divisor(bits)
    inverse = ops.rsqrt(norm)
    inverse_sigma = inverse * sigma
    u = [x * inverse_sigma for x in y]
    eden = scale_mode == "eden"
    words, total, unit = (_round_e4m3 if bits == 8 else _round_table)(ops, u, bits, eden)
    length = norm * inverse  # the norm
    if scale_mode == "norm":
        return words, length * (1 / sigma)
    total = _over_columns(ops, total)
    if eden:
        return words, length * ops.reciprocal(total) * (sigma * unit)
    return words, length * ops.rsqrt(total) * unit


def _round_table(ops, u, bits: int, eden: bool):
    """Codes by comparison with the middles between levels, two at a time in float16.

    Rounding towards zero keeps a value on its side of a middle, which float16 holds exactly; one
    on a middle goes up. Each half of a word becomes the code and, in its low byte, the magnitude
    times `unit`. Returns the words of four codes, and the sum of squares of the magnitudes (for
    `eden`: of products with |u|) in multiples of 1 / unit.
    """
    sizes = codebook.magnitudes(bits)
    unit = {2: 4, 3: 2, 4: 16}[bits]
    entries = [i << 8 | int(size * unit) for i, size in enumerate(sizes)]
    middles = (sizes[1:] + sizes[:-1]) / 2
    pairs = []
    for low, high in zip(u[::2], u[1::2], strict=True):
        h = ops.halves_toward_zero(low, high)
        size = h & 0x7FFF7FFF
        x = ((h >> (8 - bits)) & (0x00010001 << (7 + bits))) ^ (entries[0] * 0x10001)
        for middle, before, entry in zip(middles, entries[:-1], entries[1:], strict=True):
            x = x ^ (ops.halves_at_least(size, middle) & ((before ^ entry) * 0x10001))
        pairs.append(x)
    words, total = [], ops.real(0.0) if eden else ops.word(0)
    for i, (a, b) in enumerate(zip(pairs[::2], pairs[1::2], strict=True)):
        words.append(ops.permute(a, b, 0x7531))
        levels = ops.permute(a, b, 0x6420)
        if not eden:
            total = ops.dot_bytes(levels, levels, total)
            continue
        for j in range(4):
            size = ops.from_bits(ops.bits(u[4 * i + j]) & 0x7FFFFFFF)
            total = ops.fma(size, ops.to_float((levels >> (8 * j)) & 0xFF), total)
    return words, (total if eden else ops.to_float(total)), float(unit)


def _round_e4m3(ops, u, bits: int, eden: bool):
    """The same by conversion; the unit is 1."""
    del bits
    words, total = [], ops.real(0.0)
    for i in range(0, len(u), 4):
        pairs = [ops.e4m3s(*u[j : j + 2]) for j in (i, i + 2)]
        words.append(ops.permute(*pairs, 0x5410))
        for j, pair in zip((i, i + 2), pairs, strict=True):
            halves = ops.halves_of_e4m3s(pair)
            for k, half in enumerate((halves, halves >> 16)):
                level = ops.float_of_half(half)
                total = ops.fma(u[j + k] if eden else level, level, total)
    return words, total, 1.0


def _pack(ops, bits: int, words, column) -> list[list]:
    """Planes (see `packing`) of words of four codes: words, the last one maybe in part.

    column: the thread's number among the four of a row, if the row goes on in other threads; None
    if the words end where a page does, or at a multiple of 32 codes.
    """
    if bits == 8:
        return [words]
    if bits == 4:
        packed = []
        for x, y in zip(words[::2], words[1::2], strict=True):
            sizes = []
            for z in (x & 0x07070707, y & 0x07070707):
                sizes.append(z | z >> 4)
            signs = (x & 0x08080808) << 4 | y & 0x08080808
            packed.append(ops.permute(*sizes, 0x6420) | signs)
        return [packed]
    # Four fields of two bits, one in each byte, meet in the top byte of a product.
    fields = _top_bytes(ops, [(x & 0x03030303) * 0x01041040 for x in words])
    if bits == 2:
        return [fields]
    signs = [((x >> 2) & 0x01010101) * 0x01021020 for x in words]
    if column is not None and len(words) == 4:  # half a run of 32 codes
        half = _top_bytes(ops, signs)[0] << ((column & 1) << 1)
        return [fields, [half | ops.exchange(half, 1)]]
    half = min(4, len(words) // 2)
    merged = []
    for i in range(0, len(words), 2 * half):
        merged += [signs[j] | signs[j + half] << 2 for j in range(i, i + half)]
    return [fields, _top_bytes(ops, merged)]


def _top_bytes(ops, words) -> list:
    """The top bytes of each four words in one (of the last, fewer)."""
    out = []
    for i in range(0, len(words), 4):
        some = words[i : i + 4]
        pairs = [
            ops.permute(*some[j : j + 2], 0x73) if j + 1 < len(some) else some[j] >> 24
            for j in range(0, len(some), 2)
        ]
        out.append(ops.permute(*pairs, 0x5410) if len(pairs) == 2 else pairs[0])
    return out


def _turn(ops, rows) -> list:
    """Four rows of four bytes -> four columns."""
    a, b, c, e = rows
    low = ops.permute(a, b, 0x5140), ops.permute(c, e, 0x5140)
    high = ops.permute(a, b, 0x7362), ops.permute(c, e, 0x7362)
    return [ops.permute(*x, y) for x in (low, high) for y in (0x5410, 0x7632)]


def _dot(ops, x):
    # Two sums, so that they do not wait for each other.
    sums = [x[0] * x[0], x[1] * x[1]]
    for i, value in enumerate(x[2:]):
        sums[i % 2] = ops.fma(value, value, sums[i % 2])
    return sums[0] + sums[1]


def _over_columns(ops, x):
    """The sum over the four threads of a row."""
    for distance in (1, 2):
        x = x + ops.exchange(x, distance)
    return x
