"""Rotated tokens -> codes and scales, and codes -> bytes, in the registers of threads."""

import math

import numpy as np

from pallas_kernels import codebook
from pallas_kernels.mosaic.encode_threads import Threads, over_columns


STEEP = 1024.0  # one over the distance of float16s between 1 and 2
_UNIT = {2: 4, 3: 2, 4: 16}  # by which a codebook's magnitudes are multiplied to be bytes


def table(bits: int) -> np.ndarray:
    """uint32 [8], for `round_table`: three ramps and the float16 1024, twice each; magnitudes."""
    words = np.zeros(8, np.uint32)
    if bits == 8:
        return words
    ramps = [_ramp(middle) for middle in _middles(bits)][:3]
    words[: len(ramps)] = np.array(ramps) * 0x10001
    words[3] = 0x64006400
    levels = codebook.magnitudes(bits) * _UNIT[bits]
    words[4:6] = np.resize(levels.astype(np.uint8), 8).view(np.uint32)
    return words


def _middles(bits: int) -> np.ndarray:
    """Between the levels' magnitudes."""
    levels = codebook.magnitudes(bits)
    return (levels[1:] + levels[:-1]) / 2


def _ramp(middle: float) -> int:
    """Bits of the float16 t with which x + t is >= 1 from STEEP * middle on, and <= 0 before.

    That is for float16s x: a middle (at least 1) and the one before it are far enough apart.
    """
    distance = 2.0 ** (math.ceil(math.log2(middle)) - 1)  # times STEEP, to the one before
    t = np.float16(distance - STEEP * middle)
    assert float(t) == distance - STEEP * middle
    return int(t.view(np.uint16))


def rounded(threads: Threads, is_key: bool, y, norm, factor):
    """Words of four codes (bytes), and the scale."""
    ops, d, fmt = threads.ops, threads.d, threads.sizes.fmt
    scale_mode, bits = fmt.scale_mode, fmt.key_bits if is_key else fmt.value_bits
    sigma = math.sqrt(d) * codebook.divisor(bits)
    # Those that are compared as float16 are as large as these can be, where they lie closest.
    steep = 1.0 if bits == 8 else STEEP
    inverse = ops.rsqrt(norm)
    inverse_sigma = inverse * (sigma * steep)
    u = [x * inverse_sigma for x in y]
    eden = scale_mode == "eden"
    if bits == 8:
        words, total, unit = _round_e4m3(ops, u, eden)
    else:
        at = d // 2 + 128 + (0 if is_key else 8)
        table = ops.load(ops.address(threads.arrays.tables, ops.word(at), 4), 6)
        words, total, unit = round_table(ops, u, bits, eden, table)
    length = norm * inverse
    if scale_mode == "norm":
        scale = length * (1 / sigma)
    elif eden:
        scale = length * ops.reciprocal(over_columns(ops, total)) * (sigma * unit * steep)
    else:
        scale = length * ops.rsqrt(over_columns(ops, total)) * unit
    return words, scale * factor


def round_table(ops, u, bits: int, eden: bool, table):
    """Codes of u / STEEP by comparison with the middles between levels, two at a time in float16.

    Rounding towards zero keeps a value on its side of a middle, which float16 holds exactly; one
    on a middle goes up. Returns words of four codes, and the sum of squares of the magnitudes (for
    `eden`: of products with |u|) in multiples of 1 / unit, and the unit.
    """
    words, total = [], ops.real(0.0) if eden else ops.word(0)
    for i in range(0, len(u), 8):
        halves = [ops.halves_toward_zero(*u[j : j + 2]) for j in range(i, i + 8, 2)]
        counts = [_count(ops, x & 0x7FFF7FFF, bits, table) for x in halves]
        codes = [ops.permute(*counts[j : j + 2], 0x6420) for j in (0, 2)]
        signs = [ops.permute(*halves[j : j + 2], 0x7531) for j in (0, 2)]
        mask = 0x01010101 << (bits - 1)
        words += [x | ((y >> (8 - bits)) & mask) for x, y in zip(codes, signs, strict=True)]
        index = ops.permute(*[x | (x >> 4) for x in codes], 0x6420)
        for k, chosen in enumerate((index, index >> 16)):
            levels = ops.permute(*table[4:], chosen)
            if not eden:
                total = ops.dot_bytes(levels, levels, total)
                continue
            for j in range(4):
                size = ops.from_bits(ops.bits(u[i + 4 * k + j]) & 0x7FFFFFFF)
                total = ops.fma(size, ops.to_float((levels >> (8 * j)) & 0xFF), total)
    return words, (total if eden else ops.to_float(total)), float(_UNIT[bits])


def _count(ops, x, bits: int, table):
    """For each of two float16, STEEP * |u|: how many middles |u| has reached, in the low byte.

    Of seven middles the fourth says which three of the others are left to ask.
    """
    middles = _middles(bits)
    ramps, count = table[: len(middles)], table[3]
    if bits == 4:
        upper = ops.halves_at_least(x, STEEP * middles[3])
        count = (upper & 0x00040004) ^ count
        ramps = [
            (upper & ((_ramp(middles[i]) ^ _ramp(middles[i + 4])) * 0x10001)) ^ table[i]
            for i in range(3)
        ]
    for ramp in ramps:
        count = ops.add_halves(count, ops.add_halves_saturated(x, ramp))
    return count


def _round_e4m3(ops, u, eden: bool):
    """The same by conversion; the unit is 1."""
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


def pack(ops, bits: int, words, column) -> list[list]:
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


def turn(ops, rows) -> list:
    """Four rows of four bytes -> four columns."""
    a, b, c, e = rows
    low = ops.permute(a, b, 0x5140), ops.permute(c, e, 0x5140)
    high = ops.permute(a, b, 0x7362), ops.permute(c, e, 0x7362)
    return [ops.permute(*x, y) for x in (low, high) for y in (0x5410, 0x7632)]
