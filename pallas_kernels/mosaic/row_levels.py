"""Packed codes in shared memory -> e4m3 levels in registers, a row a thread: tcgen05's A operand.

Tensor memory has a lane for each of A's 128 rows, and a thread writes one lane. So each thread
decodes a whole row, in the order in which that is cheapest (`order`): the order of the contraction
is free if both operands share it. The levels stay the bytes that `prmt` looks up (see `levels`):
tensor cores multiply e4m3.

Neighbouring threads read rows 32 or more bytes apart, which share banks of shared memory unless TMA
swizzles them (`transforms`).
"""

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from pallas_kernels.mosaic import levels
from pallas_kernels.packing import plane_bits


ROWS = 128  # lanes of tensor memory, threads of a warpgroup, tokens of a tile
LAYOUT = plgpu.Layout.TCGEN05_TMEM_NATIVE  # of 32-bit elements: a row a thread
_BYTES = plgpu.Layout.TCGEN05_TMEM_NATIVE(4)
_HALF = ROWS // 2


def order(bits: int, n: int, xp=np):
    """Which code of a row of n (a multiple of 16) each column of its levels holds, int [n]."""
    column = xp.arange(n)
    if bits in (4, 8):
        return column
    # Words of 16 fields of two bits: even codes, then odd ones.
    return column // 16 * 16 + 2 * (column % 8) + column // 8 % 2


def transforms(row_bytes: int, page_bytes: int) -> tuple:
    """How TMA lays out the lines of 128 bytes of a plane's pages in shared memory."""
    if row_bytes < 32 or page_bytes % 1024:
        return ()
    return (
        plgpu.TilingTransform((8, 128)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )


def load_keys(planes, layouts, table, bits: int, d: int, value_bits: int, *, interpret: bool):
    """Levels of a tile's 128 keys, e4m3 [128, d], the tokens in `order(value_bits)`.

    planes: uint8 refs that hold [128, d * plane_bits / 8] contiguously, in `layouts`, their
    transforms; table: the two words of `levels.tables(bits)`.
    """
    if interpret:
        rows = levels._plain_levels([plane[...].reshape(ROWS, -1) for plane in planes], bits)
        rows = rows[order(value_bits, ROWS, jnp)][:, order(bits, d, jnp)]
        return rows.astype(jnp.float8_e4m3fn)

    def words(refs):
        token = _token(value_bits)
        for ref, layout, width in zip(refs, layouts, plane_bits(bits), strict=True):
            size = d * width // 8
            yield _load(ref, arith.muli(token, levels._c(size)), 0, size, bool(layout))

    return _decode(planes, layouts, table, bits, d, words)


def load_values(
    planes, layouts, table, bits: int, d: int, page_size: int, channel: int, *, interpret: bool
):
    """Levels of the values of 128 of the tile's channels, e4m3 [128, 128], tokens in `order`.

    planes: uint8 refs that hold [pages, d, page_size * plane_bits / 8] contiguously, 128 tokens in
    all; channel: the first one. Otherwise as `load_keys`. For d = 64 the result is [128, 64]: the
    channels' first 64 tokens, then their last 64.
    """
    n = min(d, ROWS)
    if interpret:
        shape = (ROWS // page_size, d, -1)
        tokens = levels._plain_levels([plane[...].reshape(shape) for plane in planes], bits)
        tokens = jnp.moveaxis(tokens, 0, 1).reshape(d, ROWS)
        if d == _HALF:
            rows = jnp.concatenate([tokens[:, :_HALF], tokens[:, _HALF:]])
        else:
            rows = tokens[channel : channel + ROWS]
        return rows[:, order(bits, n, jnp)].astype(jnp.float8_e4m3fn)

    def words(refs):
        thread = _thread()
        row, last = thread, None
        if d == _HALF:
            row, last = levels._and(thread, _HALF - 1), arith.shrui(thread, levels._c(6))
        for ref, layout, width in zip(refs, layouts, plane_bits(bits), strict=True):
            size = page_size * width // 8
            offset = arith.muli(row, levels._c(size))
            page_bytes = d * size
            if last is not None:  # the threads that take the last 64 tokens
                half = page_bytes * _HALF // page_size if page_size < ROWS else size // 2
                offset = arith.addi(offset, arith.muli(last, levels._c(half)))
            size = min(size, n * width // 8)
            out = []
            for page in range(max(1, n // page_size)):
                start = page * page_bytes + channel * size
                out += _load(ref, offset, start, size, bool(layout))
            yield _signs_of_pages(out) if size == 2 else out

    return _decode(planes, layouts, table, bits, n, words)


def load_scales(ref, value_bits: int, page_size: int, *, interpret: bool):
    """Scales of a tile's 128 tokens in `order(value_bits)`, float32 [128], one a row.

    ref: bf16 [pages, max(64, page_size)], of which the first page_size are the page's.
    """
    if interpret:
        scales = ref[...].astype(jnp.float32)[:, :page_size].reshape(-1)
        return scales[order(value_bits, ROWS, jnp)]

    def load(ref):
        token = _token(value_bits)
        if page_size < _HALF:
            page = arith.shrui(token, levels._c(page_size.bit_length() - 1))
            place = levels._and(token, page_size - 1)
            token = arith.addi(arith.muli(page, levels._c(_HALF)), place)
        word = levels._load(ref, arith.muli(token, levels._c(2)), levels._i(16), 2)
        word = arith.shli(arith.extui(levels._i(32), word), levels._c(16))
        return arith.bitcast(ir.F32Type.get(), word)

    return _one_a_row(load, ref)


def tokens(value_bits: int, *, interpret: bool):
    """Which token of the tile each row is, `order(value_bits)`, float32 [128]."""
    if interpret:
        return order(value_bits, ROWS, jnp).astype(jnp.float32)
    return _one_a_row(lambda: arith.uitofp(ir.F32Type.get(), _token(value_bits)))


def _one_a_row(function, *refs):
    layout = LAYOUT.reduce(1)

    @levels.inline(
        arg_types=tuple(plgpu.RefType() for _ in refs),
        return_type=levels.array((ROWS,), jnp.float32, layout),
    )
    def one_a_row(_, *refs):
        out = np.empty(layout.to_mgpu().registers_shape((ROWS,)), object)
        one = ir.VectorType.get((1,), ir.F32Type.get())
        out.flat[0] = vector.broadcast(one, function(*refs))
        return mgpu.FragmentedArray(_registers=out, _layout=layout.to_mgpu(), _is_signed=None)

    return one_a_row(*refs)


def _decode(planes, layouts, table, bits: int, n: int, words):
    @levels.inline(
        arg_types=(
            tuple(plgpu.RefType(layout) for layout in layouts),
            (plgpu.Layout.WG_SPLAT(()),) * len(table),
        ),
        return_type=levels.array((ROWS, n), jnp.float8_e4m3fn, _BYTES),
    )
    def decode(_, refs, table):
        table = [x.registers.item() for x in table]
        four = ir.VectorType.get((4,), ir.Float8E4M3FNType.get())
        out = np.empty(_BYTES.to_mgpu().registers_shape((ROWS, n)), object)
        for i, word in enumerate(levels._fours(bits, list(words(refs)), table)):
            out.flat[i] = mgpu.utils.bitcast(word, four)
        return mgpu.FragmentedArray(_registers=out, _layout=_BYTES.to_mgpu(), _is_signed=None)

    return decode(tuple(planes), tuple(table))


def _thread():
    return levels._and(mgpu.utils.thread_idx(), ROWS - 1)


def _token(value_bits: int):
    """order(value_bits)[thread]."""
    thread = _thread()
    if value_bits in (4, 8):
        return thread
    even = arith.shli(levels._and(thread, 7), levels._c(1))
    odd = levels._and(arith.shrui(thread, levels._c(3)), 1)
    return arith.ori(levels._and(thread, ~15), arith.ori(even, odd))


def swizzle(offset: int) -> int:
    """Where TMA's swizzle of 128 bytes puts a byte. Offsets without common bits can be XORed."""
    return offset ^ (offset >> 7 & 7) << 4


def _load(ref, offset, start: int, size: int, swizzled: bool) -> list:
    """`size` bytes from offset + start on, as 32-bit words (2 bytes: one word).

    What of offset is set is not in start, nor in the bytes after it.
    """
    if swizzled:
        line = levels._and(arith.shrui(offset, levels._c(7)), 7)
        offset = arith.xori(offset, arith.shli(line, levels._c(4)))
    out = []
    for at in range(start, start + size, 16):
        width = min(16, size)
        here = arith.xori(offset, levels._c(swizzle(at))) if swizzled else levels._add(offset, at)
        if width == 2:
            return [arith.extui(levels._i(32), levels._load(ref, here, levels._i(16), 2))]
        if width == 4:
            return [levels._load(ref, here, levels._i(32), 4)]
        loaded = levels._load(ref, here, ir.VectorType.get((width // 4,), levels._i(32)), width)
        out += [llvm.extractelement(loaded, levels._c(i)) for i in range(width // 4)]
    return out


def _signs_of_pages(halves: list) -> list:
    """Signs of pages of 16 tokens -> as of runs of 32 codes (see `packing`)."""

    def spread(word):
        high = levels._and(arith.shli(word, levels._c(14)), 0x33330000)
        return arith.ori(levels._and(word, 0x3333), high)

    pairs = zip(halves[::2], halves[1::2], strict=True)
    return [
        arith.ori(spread(first), arith.shli(spread(last), levels._c(2))) for first, last in pairs
    ]
