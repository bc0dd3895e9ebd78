"""Rotation of the tokens of a tile, whose quarters lie in the registers of threads.

The Hadamard transform is a product over some bits of the channel's number (the lowest, the two that
select the thread, the one below them, and `MORE`), which a tensor core does as a 16 x 16 matrix of
signs, a few times added up, and butterflies over the others, which lie in a thread.
"""

import itertools
import math

import numpy as np

from pallas_kernels import rotation
from pallas_kernels.mosaic.encode_threads import Threads, over_columns


MORE = 1  # bits of the channel's number that the tensor core takes, besides four


def tables(head_dim: int, seed: int) -> np.ndarray:
    """uint32: the signs of pairs of channels, as the sign bits of two bfloat16 [head_dim / 2], and
    each lane's parts of the 16 x 16 signs [128].
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
    return np.concatenate([pairs, *parts])


def key_offset(threads: Threads, warpgroup, is_first, writes, first_page, ref, shared) -> None:
    """Leaves minus the key offset in `shared`, rotated over the bits that the tensor core takes.

    For all warpgroups of a block, this being the number of one. is_first: the offset is the mean
    over the sequence's first page, whose tokens that are not new are in first_page (bf16 [batch,
    kv_heads, slots, head_dim]); otherwise it is in ref (float32 [batch, kv_heads, head_dim]).
    writes: whether this block stores it there. shared: float32 [warpgroups, max(256, 2 * head_dim)]
    in shared memory, a row each; the offset is in its second head_dim numbers.
    """
    ops, sizes, d = threads.ops, threads.sizes, threads.d
    page_size = sizes.fmt.page_size
    thread = (warpgroup << 7) + threads.thread
    pair = thread % (d // 2)  # channels 2 * pair and the next
    parts = 256 * threads.warpgroups // d  # that take a part of the page's tokens each
    part = thread // (d // 2)
    row_bytes = max(256, 2 * d) * 4
    here = ops.address(ref, threads.cache_row(ops.word(0), 1), d * 4, pair * 8)

    def mean():
        count = page_size // parts
        total = [ops.real(0.0), ops.real(0.0)]
        # All on their way from memory at a time.
        loaded = [
            threads.load_token(part * count + i, pair * 2, 1, first_page)[0] for i in range(count)
        ]
        for x in loaded:
            halves = ops.from_bits(x << 16), ops.from_bits(x & 0xFFFF0000)
            total = [a + b for a, b in zip(total, halves, strict=True)]
        return total

    with ops.when(is_first):
        ops.store(ops.address(shared, thread, 8), mean())
    ops.barrier_of_block()

    def add():
        total = [ops.real(0.0), ops.real(0.0)]
        for i in range(parts):
            x = ops.load(ops.address(shared, pair + i * (d // 2), 8), 2)
            total = [a + ops.from_bits(b) for a, b in zip(total, x, strict=True)]
        return [x * (1 / page_size) for x in total]

    offset = ops.either(is_first, add, lambda: [ops.from_bits(x) for x in ops.load(here, 2)])
    ops.barrier_of_block()
    with ops.when(writes & ops.less(thread, d // 2)):
        ops.store(here, offset)
    sign = ops.load(ops.address(threads.arrays.tables, pair, 4), 1)[0]
    low = ops.from_bits(ops.bits(offset[0]) ^ ((sign & 0x8000) << 16) ^ 0x80000000)
    high = ops.from_bits(ops.bits(offset[1]) ^ (sign & 0x80000000) ^ 0x80000000)
    x = [low + high, low - high]
    more = [2 << i for i in range(MORE)]
    for i, bit in enumerate((*more, d // 8, d // 4, d // 2)):
        half = (i % 2) * d * 4
        ops.store(ops.address(shared, warpgroup, row_bytes, pair * 8 + half), x)
        ops.barrier()
        other = (pair ^ (bit // 2)) * 8 + half
        other = ops.load(ops.address(shared, warpgroup, row_bytes, other), 2)
        upper = ~ops.less(pair & (bit // 2), 1)
        x = [
            ops.select(upper, ops.from_bits(b) - a, a + ops.from_bits(b))
            for a, b in zip(x, other, strict=True)
        ]
    ops.barrier()
    ops.store(ops.address(shared, warpgroup, row_bytes, pair * 8 + d * 4), x)
    ops.barrier()


def rotated_rows(threads: Threads, warpgroup=None, offset=None) -> list[tuple]:
    """Both rows: position, whether it is packed, its quarter of rotation(token) * sqrt(head_dim),
    the squared norm of that, and what makes of it the norm of the token.
    """
    ops, d, place, n = threads.ops, threads.d, threads.place, threads.quarter
    first = threads.column * n
    positions = [place.start + row for row in threads.rows]
    active = [ops.less(x, place.end) for x in positions]

    def minus(at):
        """What two channels of a rotated row start with, before the butterflies."""
        if offset is None:
            return []
        mine = ops.address(offset, warpgroup, max(256, 2 * d) * 4, (threads.column + 4) * d)
        return [ops.from_bits(x) for x in ops.load(ops.further(mine, 4 * at), 2)]

    def rotated(again):
        # A second time, which is rare, all is loaded again and not kept in registers for it.
        ops.forget()
        flips = ops.load(ops.address(threads.arrays.tables, first // 2, 4), n // 2)
        tokens = []
        for position, is_active in zip(positions, active, strict=True):
            # A row that is not packed is that of a token which is there.
            position = ops.select(is_active, position, place.start)
            words = threads.load_token(position, first, n // 2)
            tokens.append([x ^ flip for x, flip in zip(words, flips, strict=True)])
        is_first = ops.less(again, 1)
        one, factor = ops.real(1.0), ops.real(1 / math.sqrt(d))
        both = ops.either(
            is_first,
            lambda: [*tokens[0], *tokens[1], one, one, factor, factor],
            lambda: _tamed(threads, tokens, minus),
        )
        tokens, downs, factors = (both[: n // 2], both[n // 2 : n]), both[n : n + 2], both[n + 2 :]
        rows = _rotate(threads, tokens, downs, minus)
        norms = [over_columns(ops, _dot(ops, x)) for x in rows]
        fine = [ops.between(x, 2.0**-80, 2.0**100) for x in norms]
        for i in range(2):
            # Nothing is left of a key that is the offset.
            factors[i] = ops.select(fine[i], factors[i], ops.real(0.0))
            norms[i] = ops.select(fine[i], norms[i], one)
        return [*rows[0], *rows[1], *norms, *factors], is_first & ~(fine[0] & fine[1])

    out = ops.until(rotated, 2 * n + 4)
    return [
        (positions[i], active[i], out[i * n : i * n + n], out[2 * n + i], out[2 * n + 2 + i])
        for i in range(2)
    ]


def _tamed(threads: Threads, tokens, minus) -> list:
    """Both tokens of any magnitude divided by a power of two, the inverses of these, and what makes
    of the rotated token's norm the token's: 0 or NaN for zeros and for what is no number.
    """
    ops, d = threads.ops, threads.d
    scaled, downs, factors = [], [], []
    for token in tokens:
        largest = ops.word(0)
        for x in token:
            largest = ops.larger(largest, ops.larger(x & 0x7FFF, (x >> 16) & 0x7FFF))
        for at in range(0, threads.quarter, 2):
            for x in minus(at):
                largest = ops.larger(largest, (ops.bits(x) & 0x7FFFFFFF) >> 16)
        for distance in (1, 2):
            largest = ops.larger(largest, ops.exchange(largest, distance))
        exponent = largest >> 7
        finite, present = ops.less(exponent, 255), ~ops.less(exponent, 1)
        usable = finite & present
        # The power and its inverse must be normal numbers.
        exponent = ops.select(ops.less(exponent, 7), ops.word(7), exponent)
        exponent = ops.select(ops.less(exponent, 247), exponent, ops.word(247))
        down = ops.from_bits((ops.word(254) - exponent) << 23)
        zero = ops.word(0)
        halves = [(ops.from_bits(x << 16), ops.from_bits(x & 0xFFFF0000)) for x in token]
        words = [ops.bfloats(low * down, high * down) for low, high in halves]
        # What is rotated to ones stands in for what is not usable.
        one = ops.select(ops.less(threads.column, 1), ops.word(0x3F80), zero)
        scaled += [ops.select(usable, x, zero if i else one) for i, x in enumerate(words)]
        downs.append(ops.select(usable, down, ops.real(0.0)))
        factor = ops.from_bits(exponent << 23) * (1 / math.sqrt(d))
        nothing = ops.select(finite, ops.real(0.0), ops.real(math.nan))
        factors.append(ops.select(usable, factor, nothing))
    return [*scaled, *downs, *factors]


def _rotate(threads: Threads, tokens, downs, minus) -> list[list]:
    """Two rows' quarters of rotation(token) * sqrt(head_dim), each plus minus, rotated, * down."""
    ops, n = threads.ops, threads.quarter
    table = threads.d // 2
    parts = [
        ops.load(ops.address(threads.arrays.tables, threads.lane + (table + 32 * i), 4), 1)[0]
        for i in range(4)
    ]
    minus_parts = [x ^ 0x80008000 for x in parts]
    count, size = n // 4, 2**MORE  # products, of 16 channels each, and how many are added
    out: list[list] = [[None] * n, [None] * n]
    for right, i in itertools.product(range(2), range(count)):
        at, first = right * (n // 2) + 2 * i, i // size * size
        c = [x * down for down in downs for x in minus(at)] or [ops.real(0.0)] * 4
        for j in range(first, first + size):
            a = [tokens[0][j], tokens[1][j], tokens[0][j + count], tokens[1][j + count]]
            b = minus_parts if ((i & j) % size).bit_count() % 2 else parts
            c = ops.multiply_add(a, b[2 * right : 2 * right + 2], c)
        out[0][at : at + 2], out[1][at : at + 2] = c[:2], c[2:]
    half = 2 * size
    while half < n // 2:
        for x in out:
            for start in range(0, n, 2 * half):
                for j in range(start, start + half):
                    x[j], x[j + half] = x[j] + x[j + half], x[j] - x[j + half]
        half *= 2
    return out


def _dot(ops, x):
    # Two sums, so that they do not wait for each other.
    sums = [x[0] * x[0], x[1] * x[1]]
    for i, value in enumerate(x[2:]):
        sums[i % 2] = ops.fma(value, value, sums[i % 2])
    return sums[0] + sums[1]
