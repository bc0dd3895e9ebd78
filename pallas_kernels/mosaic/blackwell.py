"""What the Blackwell kernels do with tiles: tensor memory, 8-bit operands, small products."""

import functools
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm

from pallas_kernels.mosaic import levels, row_levels, tiles
from pallas_kernels.mosaic.row_levels import LAYOUT


_TILED = (
    plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
    plgpu.SwizzleTransform(64),  # pyright: ignore[reportAbstractUsage]
)
PARTS, STEP = 3, 2.0**5  # see `store_parts`


def smem8(shape):
    """e4m3 shared memory, laid out for tcgen05 64 elements at a time."""
    return plgpu.SMEM(shape, jnp.float8_e4m3fn, transforms=_TILED)


def load_tmem(ref, interpret) -> Any:
    """float32 tensor memory [128, n] -> a row a thread."""
    x = plgpu.async_load_tmem(ref)
    return x if interpret else plgpu.layout_cast(x, LAYOUT)


def matmul(a, b, interpret, acc=None) -> Any:
    """As `tiles.matmul`, of operands in shared memory, through registers (mma.sync).

    For what is small: it is laid out as Hopper's products are.
    """
    if interpret:
        return tiles.matmul(a, b, interpret, acc)
    layouts = (plgpu.Layout.MMA_LHS, plgpu.Layout.MMA_RHS, plgpu.Layout.MMA_ACC)
    left, right, result = (layout(b.dtype) for layout in layouts)
    if acc is None:
        acc = tiles.full((a.shape[0], b.shape[0]), 0.0)
    acc = plgpu.layout_cast(acc, result)
    for k in range(0, a.shape[1], 64):
        here = slice(k, k + 64)
        x = plgpu.load(a.at[:, here], layout=left, optimized=False)
        y = plgpu.load(b.at[:, here].T, layout=right, optimized=False)
        acc = plgpu.mma(acc, x, y)
    return plgpu.layout_cast(acc, plgpu.Layout.WGMMA)


def publish(x, limit: float, interpret, layout: Any = LAYOUT, alone: bool = True):
    """Barrier after which tcgen05 sees what was written; is any x of the warpgroup over the limit?

    Written: to shared and to tensor memory. What was loaded from tensor memory may be overwritten.
    alone: the block has no other warpgroup.
    """
    if interpret:
        plgpu.commit_smem()
        plgpu.commit_tmem()
        plgpu.wait_load_tmem()
        return jnp.any(x > limit).astype(jnp.int32)

    @levels.inline(
        arg_types=(layout,),
        return_type=levels.array((), jnp.int32, plgpu.Layout.WG_SPLAT(())),
    )
    def publish(_, x):
        i32 = ir.IntegerType.get_signless(32)
        values = [
            llvm.extractelement(r, arith.constant(i32, i))
            for r in x.registers.flat
            for i in range(ir.VectorType(r.type).shape[0])
        ]
        largest = functools.reduce(arith.maxnumf, values)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        # Barrier 1 is the first warpgroup's; 0 is the whole block's.
        barrier = levels._c(1)
        if not alone:
            warpgroup = arith.shrui(mgpu.utils.thread_idx(), levels._c(7))
            barrier = arith.addi(warpgroup, barrier)
        any_over = llvm.inline_asm(
            i32,
            [largest, arith.constant(ir.F32Type.get(), limit), barrier],
            "{ .reg .pred p, q; setp.gt.f32 p, $1, $2;"
            " tcgen05.wait::ld.sync.aligned; tcgen05.wait::st.sync.aligned;"
            " tcgen05.fence::before_thread_sync; bar.red.or.pred q, $3, 128, p;"
            " tcgen05.fence::after_thread_sync; selp.u32 $0, 1, 0, q; }",
            "=r,f,f,r",
            has_side_effects=True,
            asm_dialect=0,
        )
        return mgpu.FragmentedArray.splat(any_over, (), is_signed=True)

    return publish(x)


def store_parts(ref, x, layout, interpret) -> None:
    """x [m, n] as the sum of `PARTS` parts: ref [PARTS * n, m], e4m3 in `smem8`, one after another.

    Each part is of what those before leave, times `STEP`: together they have float16's 11 bits.
    |x| <= 2**8; layout: of x, `LAYOUT` or that of Hopper's accumulators.
    """
    m, n = x.shape
    if interpret:
        x = x.astype(jnp.float16)
        for i in range(PARTS):
            part = x.astype(ref.dtype)
            ref[i * n : (i + 1) * n] = part.T
            x = (x - part.astype(jnp.float16)) * STEP
        return

    @levels.inline(arg_types=(plgpu.RefType(_TILED), layout))
    def store(_, ref, x):
        thread = _place_of_thread(layout)
        for pair, (first, column) in zip(x.registers.flat, _places(layout, m, n), strict=True):
            pair = _float16(pair)
            for i in range(PARTS):
                row = swizzle(place(i * n + first, column, m))
                both, pair = _split(pair)
                for j, byte in enumerate((both, arith.shrui(both, _i16(8)))):
                    # The second one's row: what differs is not set in the first one's.
                    here = arith.xori(thread, levels._c(row ^ j * place(1, 0, m)))
                    _store_byte(ref, here, byte)

    store(ref, x)


def sum_parts(load):
    """The sum of the parts that `load` gives for 0 to PARTS - 1."""
    total = load(PARTS - 1)
    for i in reversed(range(PARTS - 1)):
        total = total * (1 / STEP) + load(i)
    return total


def place(n: int, m: int, width: int) -> int:
    """Byte of element [n, m] of `smem8`, `width` elements wide, but for the swizzle."""
    return (n // 8 * (width // 64) + m // 64) * 512 + n % 8 * 64 + m % 64


def swizzle(offset: int) -> int:
    """Where the swizzle of 64 bytes puts a byte. Offsets without common bits can be XORed."""
    return offset ^ (offset >> 7 & 3) << 4


def _places(layout, m: int, n: int) -> list[tuple[int, int]]:
    """[n, m] of the first element of each of a thread's registers, less that of the thread's."""
    if layout is LAYOUT:
        return [(j, 0) for j in range(0, n, 2)]
    return [(j, i + half) for i in range(0, m, 64) for j in range(0, n, 8) for half in (0, 8)]


def _place_of_thread(layout):
    """The swizzled `place` of the thread's first element."""
    thread = row_levels._thread()
    if layout is LAYOUT:  # row `thread`
        high = arith.shli(arith.shrui(thread, levels._c(6)), levels._c(9))
        return arith.ori(high, levels._and(thread, 63))
    # Row 16 * warp + lane // 4, column 2 * (lane % 4).
    warp = arith.shli(arith.shrui(thread, levels._c(5)), levels._c(4))
    row = arith.ori(warp, levels._and(arith.shrui(thread, levels._c(2)), 7))
    pair = levels._and(thread, 3)
    offset = arith.ori(row, arith.shli(pair, levels._c(7)))
    return arith.xori(offset, arith.shli(pair, levels._c(4)))


def _float16(pair):
    """Two float32 -> two float16, the first one low."""
    high, low = (llvm.extractelement(pair, levels._c(i)) for i in (1, 0))
    return _asm(levels._i(32), "cvt.rn.f16x2.f32 $0, $1, $2;", "=r,f,f", high, low)


def _split(pair):
    """Two float16 -> e4m3 of them, 16 bits, and what that leaves, times STEP."""
    i16, i32 = ir.IntegerType.get_signless(16), levels._i(32)
    both = _asm(i16, "cvt.rn.satfinite.e4m3x2.f16x2 $0, $1;", "=h,r", pair)
    rounded = _asm(i32, "cvt.rn.f16x2.e4m3x2 $0, $1;", "=r,h", both)
    left = _asm(i32, "sub.rn.f16x2 $0, $1, $2;", "=r,r,r", pair, rounded)
    steps = levels._c(int(np.full(2, STEP, np.float16).view(np.int32)[0]))
    return both, _asm(i32, "mul.rn.f16x2 $0, $1, $2;", "=r,r,r", left, steps)


def _asm(dtype, code: str, constraints: str, *operands):
    return llvm.inline_asm(dtype, list(operands), code, constraints, asm_dialect=0)


def _store_byte(ref, offset, word) -> None:
    i8 = ir.IntegerType.get_signless(8)
    address = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(ref), [offset], i8)
    llvm.store(arith.trunci(i8, word), address)


def _i16(value: int):
    return arith.constant(ir.IntegerType.get_signless(16), value)
