"""A thread's registers in a kernel: what `encode_rows` is written in, here as machine code.

Values are 32 bits wide, unsigned or float32, one for each thread of a warpgroup of 128;
`lanes_numpy` has the same functions over arrays of 128, for machines without a GPU.
"""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import numpy as np
from jax.experimental.mosaic import gpu as mgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, gpu, llvm, scf


_GLOBAL = 1  # LLVM's address space for global memory


class Reg:
    """A register, with the operators that numpy gives arrays of uint32 or float32."""

    def __init__(self, value):
        self.value = value

    @property
    def is_float(self) -> bool:
        return self.value.type == ir.F32Type.get()

    def _with(self, other, integer: Callable, floating: Callable | None = None) -> "Reg":
        if not isinstance(other, Reg):
            other = real(other) if self.is_float else word(other)
        op = floating if self.is_float else integer
        assert op is not None
        return Reg(op(self.value, other.value))

    def __add__(self, other):
        return self._with(other, arith.addi, arith.addf)

    def __sub__(self, other):
        return self._with(other, arith.subi, arith.subf)

    def __mul__(self, other):
        return self._with(other, arith.muli, arith.mulf)

    def __and__(self, other):
        return self._with(other, arith.andi)

    def __or__(self, other):
        return self._with(other, arith.ori)

    def __xor__(self, other):
        return self._with(other, arith.xori)

    def __lshift__(self, other):
        return self._with(other, arith.shli)

    def __rshift__(self, other):
        return self._with(other, arith.shrui)

    def __mod__(self, other):
        return self._with(other, arith.remui)

    def __floordiv__(self, other):
        return self._with(other, arith.divui)


class Predicate:
    """A condition, one bit a thread."""

    def __init__(self, value):
        self.value = value

    def __and__(self, other):
        return Predicate(arith.andi(self.value, other.value))

    def __or__(self, other):
        return Predicate(arith.ori(self.value, other.value))

    def __invert__(self):
        true = arith.constant(ir.IntegerType.get_signless(1), 1)
        return Predicate(arith.xori(self.value, true))


def _i32():
    return ir.IntegerType.get_signless(32)


def _i64():
    return ir.IntegerType.get_signless(64)


def scalar(x) -> Reg:
    """A number of the kernel's, the same in all threads."""
    # Passed by, for the same reason as in `thread`.
    return _asm("mov.b32 $0, $1;", "r", Reg(x), stays=True)


def word(x: int) -> Reg:
    x &= 0xFFFFFFFF
    return Reg(arith.constant(_i32(), ir.IntegerAttr.get(_i32(), x - (x >> 31) * 2**32)))


def real(x: float) -> Reg:
    return Reg(arith.constant(ir.F32Type.get(), float(x)))


def thread() -> Reg:
    """Number of the thread in its warpgroup."""
    # Read where it is asked for: what follows from it would otherwise be computed before a loop,
    # and fill registers.
    return _asm("mov.u32 $0, %tid.x;", "r", stays=True) & 127


def less(a: Reg, b: Reg | int) -> Predicate:
    """a < b, both signed."""
    b = b if isinstance(b, Reg) else word(b)
    return Predicate(arith.cmpi(arith.CmpIPredicate.slt, a.value, b.value))


def between(x: Reg, low: float, high: float) -> Predicate:
    """low < x < high in float32; false for NaN."""
    over = arith.cmpf(arith.CmpFPredicate.OGT, x.value, real(low).value)
    under = arith.cmpf(arith.CmpFPredicate.OLT, x.value, real(high).value)
    return Predicate(arith.andi(over, under))


def select(condition: Predicate, a: Reg, b: Reg) -> Reg:
    return Reg(arith.select(condition.value, a.value, b.value))


def larger(a: Reg, b: Reg) -> Reg:
    return Reg(arith.maxui(a.value, b.value))


def bits(x: Reg) -> Reg:
    """A float32's bits."""
    return Reg(arith.bitcast(_i32(), x.value)) if x.is_float else x


def from_bits(x: Reg) -> Reg:
    return Reg(arith.bitcast(ir.F32Type.get(), x.value))


def to_float(x: Reg) -> Reg:
    return Reg(arith.uitofp(ir.F32Type.get(), x.value))


def _asm(code: str, out: str, *inputs: Reg, stays: bool = False) -> Reg:
    """stays: where it is written, and is not moved into a branch that only some threads take."""
    kind = {"r": _i32(), "f": ir.F32Type.get()}[out]
    constraints = ",".join(["=" + out, *("f" if x.is_float else "r" for x in inputs)])
    values = [x.value for x in inputs]
    asm = llvm.inline_asm(kind, values, code, constraints, has_side_effects=stays, asm_dialect=0)
    return Reg(asm)


def fma(a: Reg, b: Reg, c: Reg) -> Reg:
    return _asm("fma.rn.f32 $0, $1, $2, $3;", "f", a, b, c)


def rsqrt(x: Reg) -> Reg:
    return _asm("rsqrt.approx.f32 $0, $1;", "f", x)


def reciprocal(x: Reg) -> Reg:
    return _asm("rcp.approx.f32 $0, $1;", "f", x)


def halves_toward_zero(low: Reg, high: Reg) -> Reg:
    """Two float32 -> two float16, rounded towards zero."""
    return _asm("cvt.rz.f16x2.f32 $0, $1, $2;", "r", high, low)


def halves_at_least(x: Reg, limit: float) -> Reg:
    """For each of two float16: all ones if it is `limit` or more, else zero."""
    both = int(np.float16(limit).view(np.uint16)) * 0x10001
    return _asm("set.ge.u32.f16x2 $0, $1, $2;", "r", x, word(both))


def add_halves_saturated(x: Reg, y: Reg) -> Reg:
    """For each of two float16: x + y between 0 and 1."""
    return _asm("add.rn.sat.f16x2 $0, $1, $2;", "r", x, y)


def add_halves(x: Reg, y: Reg) -> Reg:
    """For each of two float16: x + y."""
    return _asm("add.rn.f16x2 $0, $1, $2;", "r", x, y)


def bfloats(low: Reg, high: Reg) -> Reg:
    """Two float32 -> two bfloat16, to nearest."""
    return _asm("cvt.rn.bf16x2.f32 $0, $1, $2;", "r", high, low)


def float_of_half(x: Reg) -> Reg:
    """The float16 in the low half of x, as float32."""
    return _asm("{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.f32.f16 $0, l; }", "f", x)


def e4m3s(low: Reg, high: Reg) -> Reg:
    """Two float32 -> two float8_e4m3fn, to nearest, in the low half."""
    code = "{ .reg .b16 x; cvt.rn.satfinite.e4m3x2.f32 x, $1, $2; mov.b32 $0, {x, 0}; }"
    return _asm(code, "r", high, low)


def halves_of_e4m3s(x: Reg) -> Reg:
    """The two float8_e4m3fn in the low half of x, as two float16."""
    code = "{ .reg .b16 l, h; mov.b32 {l, h}, $1; cvt.rn.f16x2.e4m3x2 $0, l; }"
    return _asm(code, "r", x)


def permute(a: Reg, b: Reg, selector: Reg | int) -> Reg:
    """Four of the eight bytes of a (0 to 3) and b (4 to 7): nibble i of selector is byte i's."""
    selector = selector if isinstance(selector, Reg) else word(selector)
    return _asm("prmt.b32 $0, $1, $2, $3;", "r", a, b, selector)


def dot_bytes(a: Reg, b: Reg, c: Reg) -> Reg:
    """c + the sum of the products of the four bytes of a and b."""
    return _asm("dp4a.u32.u32 $0, $1, $2, $3;", "r", a, b, c)


def exchange(x: Reg, distance: int) -> Reg:
    """x of the thread whose number in the warp differs in the bit `distance`."""
    kind = "f" if x.is_float else "r"
    return _asm(f"shfl.sync.bfly.b32 $0, $1, {distance}, 31, -1;", kind, x, stays=True)


def any_in_warp(condition: Predicate) -> Predicate:
    code = (
        "{ .reg .pred p; setp.ne.u32 p, $1, 0; vote.sync.any.pred p, p, -1; selp.u32 $0, 1, 0, p; }"
    )
    vote = _asm(code, "r", Reg(arith.extui(_i32(), condition.value)), stays=True)
    return Predicate(arith.cmpi(arith.CmpIPredicate.ne, vote.value, word(0).value))


def multiply_add(a: Sequence[Reg], b: Sequence[Reg], c: Sequence[Reg]) -> list[Reg]:
    """The warp's mma.m16n8k16 of bfloat16: fragments of a @ b + c."""
    f32 = ir.F32Type.get()
    out = llvm.inline_asm(
        llvm.StructType.get_literal([f32] * 4),
        [x.value for x in (*a, *b, *c)],
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{$0, $1, $2, $3}, {$4, $5, $6, $7}, {$8, $9}, {$10, $11, $12, $13};",
        ",".join(["=f"] * 4 + ["r"] * 6 + ["f"] * 4),
        has_side_effects=True,  # stays, as in _asm
        asm_dialect=0,
    )
    return [Reg(llvm.extractvalue(f32, out, [i])) for i in range(4)]


def barrier() -> None:
    """Of the warpgroup."""
    mgpu.utils.warpgroup_barrier()


def barrier_of_block() -> None:
    gpu.barrier()


def forget() -> None:
    """What is loaded after this is read from memory, also if it has been loaded before."""
    llvm.inline_asm(None, [], "", "~{memory}", has_side_effects=True, asm_dialect=0)


def when(condition: Predicate) -> AbstractContextManager:
    """Runs the block in the threads where the condition holds."""
    return mgpu.utils.when(condition.value)


def either(condition: Predicate, f: Callable[[], list[Reg]], g: Callable[[], list[Reg]]):
    """f() where the condition holds, else g()."""
    kinds: list = []

    def traced(h):
        out = h()
        kinds[:] = [x.value.type for x in out]
        return out

    # The types are known once a branch is traced: into an operation that is thrown away.
    probe = scf.IfOp(condition.value)
    with ir.InsertionPoint(probe.then_block):
        traced(f)
        scf.yield_([])
    probe.operation.erase()
    op = scf.IfOp(condition.value, kinds, has_else=True)
    for block, h in ((op.then_block, f), (op.else_block, g)):
        assert block is not None
        with ir.InsertionPoint(block):
            scf.yield_([x.value for x in h()])
    return [Reg(x) for x in op.results]


def until(body: Callable[[Reg], tuple[list[Reg], Predicate]], count: int) -> list[Reg]:
    """The `count` float32 of body(0); of body(1) in a warp of which a thread asks for that."""
    f32 = ir.F32Type.get()
    op = scf.WhileOp([f32] * count, [word(0).value])
    before, after = op.before.blocks.append(_i32()), op.after.blocks.append(*[f32] * count)
    with ir.InsertionPoint(before):
        out, again = body(Reg(before.arguments[0]))
        scf.condition(any_in_warp(again).value, [x.value for x in out])
    with ir.InsertionPoint(after):
        scf.yield_([word(1).value])
    return [Reg(x) for x in op.results]


def shape(ref) -> Sequence[int]:
    """Of an array in memory."""
    return ir.MemRefType(ref.type).shape


def address(ref, row: Reg, row_bytes: int, offset: Reg | int = 0) -> Reg:
    """Of byte row * row_bytes + offset of an array in global or shared memory."""
    offset = offset if isinstance(offset, Reg) else word(offset)
    row64, offset64 = (arith.extsi(_i64(), x.value) for x in (row, offset))
    size = arith.constant(_i64(), row_bytes)
    place = arith.addi(arith.muli(row64, size), offset64)
    pointer = mgpu.utils.memref_ptr(ref)
    if llvm.PointerType(pointer.type).address_space == 0:
        pointer = llvm.addrspacecast(llvm.PointerType.get(_GLOBAL), pointer)
    byte = ir.IntegerType.get_signless(8)
    return Reg(mgpu.utils.getelementptr(pointer, [place], byte))


def further(place: Reg, offset: int) -> Reg:
    """An address `offset` bytes on."""
    return Reg(_at(place, offset))


def load(place: Reg, count: int) -> list[Reg]:
    """`count` words from an address, up to four at a time."""
    out = []
    for start in range(0, count, 4):
        size = min(4, count - start)
        here = _at(place, 4 * start)
        if size == 1:
            out.append(Reg(llvm.load(_i32(), here, alignment=4)))
            continue
        loaded = llvm.load(ir.VectorType.get((size,), _i32()), here, alignment=4 * size)
        out += [Reg(llvm.extractelement(loaded, word(i).value)) for i in range(size)]
    return out


def store(place: Reg, words: Sequence[Reg]) -> None:
    """Words to an address, up to four at a time."""
    for start in range(0, len(words), 4):
        some = words[start : start + 4]
        here = _at(place, 4 * start)
        if len(some) == 1:
            llvm.store(bits(some[0]).value, here, alignment=4)
            continue
        value = llvm.mlir_undef(ir.VectorType.get((len(some),), _i32()))
        for i, x in enumerate(some):
            value = llvm.insertelement(value, bits(x).value, word(i).value)
        llvm.store(value, here, alignment=4 * len(some))


def store_half(place: Reg, x: Reg) -> None:
    """The low 16 bits of x to an address."""
    half = ir.IntegerType.get_signless(16)
    llvm.store(arith.trunci(half, x.value), place.value, alignment=2)


def _at(place: Reg, offset: int):
    byte = ir.IntegerType.get_signless(8)
    return mgpu.utils.getelementptr(place.value, [offset], byte) if offset else place.value
