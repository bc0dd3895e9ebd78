"""Packed codes in shared memory -> levels in registers, laid out as the A operand of a wgmma.

A wgmma contracts 16 slots at a time, and in each row gives four of them to each of four lanes:
slots 2t, 2t+1, 2t+8, 2t+9 to lane t. The order of the contraction is free if both operands share
it, so each lane reads a quarter of the row's bytes, contiguous, and takes four codes a step in
the order in which they decode most cheaply: `prmt` looks four codes up in a table of e4m3 bytes,
`cvt` makes two float16 of two bytes. `slots` says which code lies in which slot; the other
operand is permuted to match, once, outside the loop over the pages.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector
from jaxtyping import Array

from pallas_kernels import codebook, packing
from pallas_kernels.format import KVFormat


inline: Any = plgpu.inline_mgpu  # jax types it as the undecorated function
_SCALAR = plgpu.Layout.WG_SPLAT(())
ROWS = 64  # rows of a wgmma: a warp holds 16 of them, a lane rows g and g + 8 of its warp's


def array(shape: tuple[int, ...], dtype, layout) -> plgpu.ShapeDtypeStruct:
    """The type of an array that inlined code returns."""
    return plgpu.ShapeDtypeStruct(shape, jnp.dtype(dtype), layout)


def _first_codes(bits: int, steps):
    """The first of the four codes that a lane takes in each step (an int or an array)."""
    if bits in (4, 8):  # consecutive codes
        return 4 * steps
    # Words of 16 fields of two bits: even codes (low half, high half), then odd ones.
    return 16 * (steps // 4) + 8 * (steps % 2) + steps // 2 % 2


def _code_step(bits: int) -> int:
    return 1 if bits in (4, 8) else 2


def slots(bits: int, n: int, xp=np):
    """Which code of a row of n (a multiple of 64) each slot of the contraction holds, int [n]."""
    return code_of_slot(bits, n, xp.arange(n))


def code_of_slot(bits: int, n: int, slot):
    """`slots`, of some slots."""
    step, place = slot // 16, slot % 16
    lane, i = place % 8 // 2, place % 2 + 2 * (place // 8)
    return lane * (n // 4) + _first_codes(bits, step) + _code_step(bits) * i


def page_rows(value_bits: int, xp=np):
    """Which token of 64 each row of K's tile holds, so that P's rows are V's slots, int [64]."""
    return slots(value_bits, ROWS, xp)


def tables(bits: int) -> np.ndarray:
    """The codebook's e4m3 bytes as int32 [2], the `table` of `load_levels`.

    The kernel reads them from memory: constants would be moved to a register for each `prmt`.
    """
    if bits == 8:
        return np.arange(2, dtype=np.int32)  # not used; XLA would launch a fill for equal numbers
    levels = codebook.magnitudes(bits)
    both = levels if bits == 4 else np.resize(np.concatenate([levels, -levels]), 8)
    return both.astype(jnp.float8_e4m3fn).view(np.int32)


def both_tables(fmt: KVFormat) -> Array:
    """`tables` of keys, then of values."""
    return jnp.asarray(np.concatenate([tables(fmt.key_bits), tables(fmt.value_bits)]))


def tables_of_lanes(fmt: KVFormat) -> Array:
    """`both_tables` for each lane of a warp, int32 [32, 4]; see `load_tables`."""
    return jnp.tile(both_tables(fmt), (32, 1))


def load_tables(ref, interpret: bool) -> tuple:
    """The four words of `tables_of_lanes`, each in a register of each thread.

    Words that ptxas knows to be the same in all threads it keeps in uniform registers, and moves
    one of them to another register for each `prmt`.
    """
    if interpret:
        return tuple(ref[0, i] for i in range(4))

    @inline(arg_types=(plgpu.RefType(),), return_type=(array((), jnp.int32, _SCALAR),) * 4)
    def load(_, ref):
        lane = _and(mgpu.utils.thread_idx(), 31)
        words = _load(ref, arith.muli(lane, _c(16)), ir.VectorType.get((4,), _i(32)), 16)
        words = [llvm.extractelement(words, _c(i)) for i in range(4)]
        return tuple(mgpu.FragmentedArray.splat(word, (), is_signed=True) for word in words)

    return load(ref)


def load_levels(
    planes,
    table,
    bits: int,
    rows: int,
    n: int,
    *,
    rows_of: int | None = None,
    page_size: int | None = None,
    part: Any = 0,
    only: slice = slice(None),
    columns: slice = slice(None),
    interpret: bool,
):
    """Levels of packed rows in shared memory, float16 [rows, n], columns in slot order.

    planes: uint8 refs of any shape that hold [rows, n * plane_bits / 8] contiguously; if page_size
    is given [pages, rows, page_size * plane_bits / 8], whose pages make up the n = 64 columns, or
    whose only page holds them as its part-th 64 (an int or a scalar). table: the two words of
    `tables(bits)`. rows_of: value_bits whose `page_rows` orders the rows; None keeps the order.
    only, columns: of these rows and columns (multiples of 64 and 16).
    """
    size = page_size or n
    first, end, _ = only.indices(rows)
    left, right, _ = columns.indices(n)
    if interpret:
        pages = max(1, n // size)
        levels = _plain_levels([plane[...].reshape(pages, rows, -1) for plane in planes], bits)
        levels = jnp.moveaxis(levels, 0, 1).reshape(rows, -1)
        levels = levels[:, part * n + slots(bits, n, jnp)[columns]]
        return levels[only] if rows_of is None else levels[page_rows(rows_of, jnp)]

    layout = plgpu.Layout.WGMMA

    @inline(
        arg_types=(tuple(plgpu.RefType() for _ in planes), (_SCALAR,) * len(table), _SCALAR),
        return_type=array((end - first, right - left), jnp.float16, layout),
    )
    def load(_, refs, table, part):
        part = part.registers.item()
        table = [x.registers.item() for x in table]
        quad, lane = _row_of_thread(rows_of)
        shape = end - first, right - left
        out = np.empty(layout.to_mgpu().registers_shape(shape), object)
        tiles, steps = shape[0] // ROWS, slice(left // 16, right // 16)
        flat = out.reshape(tiles, shape[1] // 16, 2, 2)  # tile, step, column half, row half
        for tile in range(tiles):
            for half in range(2):
                row = _add(quad, first + tile * ROWS + half * _half_step(rows_of))
                words = [
                    _load_words(ref, rows, row, lane, n * width // 32, 4 * size // n, part)
                    for ref, width in zip(refs, packing.plane_bits(bits), strict=True)
                ]
                for step, four in enumerate(list(_fours(bits, words, table))[steps]):
                    flat[tile, step, :, half] = _two_halves(four)
        return mgpu.FragmentedArray(_registers=out, _layout=layout.to_mgpu(), _is_signed=None)

    return load(tuple(planes), tuple(table), jnp.int32(part))


def load_scales(ref, value_bits: int, *, page_size: int = ROWS, interpret: bool):
    """Scales of 64 tokens in the order of `page_rows`, float32 [64], one per row.

    ref: bf16 [64]; for pages of fewer tokens [pages, 64], of which the first page_size are theirs.
    """
    size = min(page_size, ROWS)
    if interpret:
        scales = ref[...].astype(jnp.float32).reshape(-1, ROWS)[:, :size].reshape(-1)
        return scales[page_rows(value_bits, jnp)]
    layout = plgpu.Layout.WGMMA.reduce(1)

    @inline(
        arg_types=(plgpu.RefType(),),
        return_type=array((ROWS,), jnp.float32, layout),
    )
    def load(_, ref):
        token, _ = _row_of_thread(value_bits)
        out = np.empty(layout.to_mgpu().registers_shape((ROWS,)), object)
        for half in range(2):
            place = _add(token, half * _half_step(value_bits))
            if size < ROWS:
                page = arith.shrui(place, _c(size.bit_length() - 1))
                place = arith.addi(arith.muli(page, _c(ROWS)), _and(place, size - 1))
            word = arith.extui(_i(32), _load(ref, arith.muli(place, _c(2)), _i(16), 2))
            value = arith.bitcast(ir.F32Type.get(), arith.shli(word, _c(16)))
            one = ir.VectorType.get((1,), ir.F32Type.get())
            out.reshape(2)[half] = vector.broadcast(one, value)
        return mgpu.FragmentedArray(_registers=out, _layout=layout.to_mgpu(), _is_signed=None)

    return load(ref)


def tokens(value_bits: int, *, interpret: bool):
    """`page_rows`, float32 [64], one per row."""
    if interpret:
        return page_rows(value_bits, jnp).astype(jnp.float32)
    layout = plgpu.Layout.WGMMA.reduce(1)

    @inline(arg_types=(), return_type=array((ROWS,), jnp.float32, layout))
    def rows(_):
        token, _ = _row_of_thread(value_bits)
        out = np.empty(layout.to_mgpu().registers_shape((ROWS,)), object)
        for half in range(2):
            place = _add(token, half * _half_step(value_bits))
            value = arith.uitofp(ir.F32Type.get(), place)
            one = ir.VectorType.get((1,), ir.F32Type.get())
            out.reshape(2)[half] = vector.broadcast(one, value)
        return mgpu.FragmentedArray(_registers=out, _layout=layout.to_mgpu(), _is_signed=None)

    return rows()


def _row_of_thread(rows_of: int | None):
    """The thread's first row and its lane t among the four of a row."""
    thread = mgpu.utils.thread_idx()
    warp = arith.andi(arith.shrui(thread, _c(5)), _c(3))
    g = arith.andi(arith.shrui(thread, _c(2)), _c(7))
    lane = arith.andi(thread, _c(3))
    if rows_of is None:
        return arith.addi(arith.muli(warp, _c(16)), g), lane
    # page_rows(rows_of)[16 * warp + g]: a quarter of the tokens for each two of g.
    if rows_of in (4, 8):
        first = arith.muli(warp, _c(4))
    else:
        first = arith.addi(arith.muli(_and(warp, 1), _c(8)), arith.shrui(warp, _c(1)))
    row = arith.addi(arith.muli(arith.shrui(g, _c(1)), _c(ROWS // 4)), first)
    return arith.addi(row, arith.muli(_and(g, 1), _c(_code_step(rows_of)))), lane


def _half_step(rows_of: int | None) -> int:
    return 8 if rows_of is None else 2 * _code_step(rows_of)


def _plain_levels(planes: list, bits: int):
    """Levels of packed rows [rows, n], float16, in plain jnp without array constants."""
    if bits == 8:
        return codebook.decode(planes[0], 8).astype(jnp.float16)
    code = packing.unpack(tuple(planes), bits)
    size = jnp.zeros(code.shape, jnp.float16)
    for i, magnitude in enumerate(codebook.magnitudes(bits)):
        size = jnp.where(code & np.uint8(2 ** (bits - 1) - 1) == i, jnp.float16(magnitude), size)
    return jnp.where(code >> np.uint8(bits - 1) == 1, -size, size)


def _load_words(ref, rows: int, row, lane, quarter: int, quarters: int, part) -> list:
    """A lane's quarter of a row, as 32-bit words.

    quarter: its bytes; quarters: those in a row as it lies in memory, of which part says which
    four if there are more, and which go on `rows` rows later if there are fewer.
    A quarter of 2 bytes are signs, which two lanes' 32 codes share a word for: the second lane's
    lie two bits higher. Alone, its 16 codes have them in halves, the second's two bits higher.
    """
    offset = arith.muli(row, _c(quarters * quarter))
    if quarters < 4:
        page = arith.shrui(lane, _c(quarters // 2))  # of one or two quarters
        offset = arith.addi(offset, arith.muli(page, _c(rows * quarters * quarter)))
        if quarters == 2:
            offset = arith.addi(offset, arith.muli(_and(lane, 1), _c(quarter)))
    else:
        offset = arith.addi(offset, arith.muli(lane, _c(quarter)))
        if quarters > 4:
            offset = arith.addi(offset, arith.muli(part, _c(4 * quarter)))
    if quarter == 2 and quarters == 1:
        word = arith.extui(_i(32), _load(ref, offset, _i(16), 2))
        high = _and(arith.shli(word, _c(14)), 0x33330000)
        return [arith.ori(_and(word, 0x3333), high)]
    if quarter == 2:
        word = _load(ref, _and(offset, ~3), _i(32), 4)
        return [arith.shrui(word, arith.muli(_and(lane, 1), _c(2)))]
    if quarter == 4:
        return [_load(ref, offset, _i(32), 4)]
    words = []
    for start in range(0, quarter, 16):
        size = min(16, quarter - start)
        loaded = _load(ref, _add(offset, start), ir.VectorType.get((size // 4,), _i(32)), size)
        words += [llvm.extractelement(loaded, _c(i)) for i in range(size // 4)]
    return words


def _fours(bits: int, planes: list[list], table: list):
    """32-bit words of four e4m3 bytes, in slot order."""
    words = planes[0]
    if bits == 8:
        yield from words
        return
    low, high = table
    if bits == 4:
        for word in words:
            index = _and(word, 0x77777777)
            shifted = arith.shli(word, _c(4))
            for i, signs in enumerate((word, shifted)):
                size = _prmt(low, high, arith.shrui(index, _c(16)) if i else index)
                yield arith.ori(size, _and(signs, 0x80808080))
        return
    for i, word in enumerate(words):
        for odd in range(2):
            fields = _and(arith.shrui(word, _c(2)) if odd else word, 0x33333333)
            if bits == 3:  # the sign is the third bit of the look-up
                signs, bit = planes[1][i // 2], 2 * (i % 2) + odd
                shift = arith.shli if bit < 2 else arith.shrui
                signs = shift(signs, _c(abs(2 - bit))) if bit != 2 else signs
                fields = arith.ori(fields, _and(signs, 0x44444444))
            for half in range(2):
                yield _prmt(low, high, arith.shrui(fields, _c(16)) if half else fields)


def _two_halves(four) -> list:
    """Four e4m3 bytes -> two float16 pairs."""
    pairs = llvm.inline_asm(
        llvm.StructType.get_literal([_i(32)] * 2),
        [four],
        "{ .reg .b16 lo, hi; mov.b32 {lo, hi}, $2;"
        " cvt.rn.f16x2.e4m3x2 $0, lo; cvt.rn.f16x2.e4m3x2 $1, hi; }",
        "=r,=r,r",
        asm_dialect=0,
    )
    pair = ir.VectorType.get((2,), ir.F16Type.get())
    return [llvm.bitcast(pair, llvm.extractvalue(_i(32), pairs, [i])) for i in range(2)]


def _prmt(a, b, selector):
    return llvm.inline_asm(
        _i(32), [a, b, selector], "prmt.b32 $0, $1, $2, $3;", "=r,r,r,r", asm_dialect=0
    )


def _load(ref, offset, dtype, alignment: int):
    address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], _i(8))
    return llvm.load(dtype, address, alignment=alignment)


def _i(width: int):
    return ir.IntegerType.get_signless(width)


def _c(value: int):
    return arith.constant(
        _i(32), ir.IntegerAttr.get(_i(32), (value & 0xFFFFFFFF) - (value >> 31 & 1) * 2**32)
    )


def _add(value, constant: int):
    return arith.addi(value, _c(constant)) if constant else value


def _and(value, mask: int):
    return arith.andi(value, _c(mask))
