"""What the kernels do with tiles: products, transposed stores, the barrier between warps."""

import functools
import math
from collections.abc import Iterable
from functools import cache as memoize
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array

from pallas_kernels import rotation as rotations
from pallas_kernels.mosaic import levels


LIMIT = 2.0**12  # of p * max(1, v_scale / unit); float16 ends at 65504


@memoize
def rotation_matrix(head_dim: int, seed: int) -> np.ndarray:
    """The matrix of `rotation.rotate`, float32: rotate(x) = x @ matrix, unrotate its transpose."""
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < head_dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = rotations.signs(head_dim, seed)[:, None]
    return (signs * hadamard / math.sqrt(head_dim)).astype(np.float32)


def lines(planes: Iterable[Array]) -> tuple[Array, ...]:
    """Pages' rows as lines of 128 bytes, as TMA likes them (the rows may be 8 bytes short)."""
    return tuple(x.reshape(*x.shape[:2], -1, 128) for x in planes)


def smem(shape, dtype):
    """Shared memory whose last axis is laid out for wgmma, 64 of 16 bits at a time."""
    tiled = (
        plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )
    return plgpu.SMEM(shape, dtype, transforms=tiled)


def matmul(a, b, interpret, acc=None) -> Any:
    """acc + a @ b.T, a in registers or shared memory [m, k], b in shared memory [n, k]."""
    if interpret:
        product = jnp.dot(a[...].astype(jnp.float32), b[...].astype(jnp.float32).T)
        return product if acc is None else acc + product

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b.T)
        if acc is None:
            return acc_ref[...]

    if acc is None:
        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def two_products(first, second, use, then, read, at_once: bool, interpret) -> tuple:
    """(acc + p @ v.T, *use(q @ k.T)) of first = q, k and second = p, v, acc.

    As `matmul`; then: called after `use`; read: when v has been read. at_once: the second product
    goes on while `use` and `then` run, which takes more registers.
    """
    (q, k), (p, v, acc) = first, second
    if interpret or not at_once:
        acc = matmul(p, v, interpret, acc)
        read()
        used = use(matmul(q, k, interpret))
        then()
        return acc, *used

    def multiply(s_ref, acc_ref):
        acc_ref[...] = acc
        plgpu.wgmma(s_ref, q, k.T)
        plgpu.wgmma(acc_ref, p, v.T)
        # Tied together, so that LLVM moves none of it behind the second product.
        used = lax.optimization_barrier(use(plgpu.wgmma_accumulator_load(s_ref, wait_n=1)))
        then()
        both = lax.optimization_barrier((acc_ref[...], *used))
        read()
        return both

    accumulators = plgpu.ACC((q.shape[0], k.shape[0]), jnp.float32), plgpu.ACC(acc.shape, acc.dtype)
    return pl.run_scoped(multiply, *accumulators)


def full(shape, value, layout: Any = plgpu.Layout.WGMMA):
    """A constant, float32, in wgmma's accumulator layout or another."""
    return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)


def column(x):
    """x [n], one for each of an accumulator's columns, in the layout that `along_columns` takes."""
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0))


def along_rows(x, n: int):
    """x [m], one a row -> [m, n]."""
    return lax.broadcast_in_dim(x, (*x.shape, n), (0,))


def along_columns(x, m: int):
    """x [n], one a column -> [m, n]."""
    return lax.broadcast_in_dim(x, (m, *x.shape), (1,))


def load_rows(ref, interpret):
    """ref [m] in global memory -> float32, one for each of an accumulator's rows."""
    if interpret:
        return ref[...].astype(jnp.float32)
    x = plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(1), optimized=False)
    return x.astype(jnp.float32)


def load_columns(ref, interpret):
    """float32 ref [n] in global memory -> one for each of an accumulator's columns."""
    if interpret:
        return ref[...]
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(0), optimized=False)


def load_tile(ref, interpret):
    """float32 ref [m, n] in global memory -> wgmma's accumulator layout."""
    return ref[...] if interpret else plgpu.load(ref, layout=plgpu.Layout.WGMMA, optimized=False)


def load_transposed(ref, interpret):
    """16-bit ref [n, m] in shared memory -> float32 [m, n] in wgmma's accumulator layout."""
    if interpret:
        return ref[...].T.astype(jnp.float32)
    x = plgpu.layout_cast(ref.T[...], plgpu.Layout.WGMMA_TRANSPOSED)
    return plgpu.layout_cast(x, plgpu.Layout.WGMMA).astype(jnp.float32)


def store_transposed(ref, x, interpret):
    """x [m, n] in wgmma's accumulator layout -> 16-bit ref [n, m] in shared memory."""
    x = x.astype(ref.dtype)
    if interpret:
        ref[...] = x.T
    else:
        ref.T[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def store_two_parts(refs, x, interpret):
    """x as the sum of refs[0] and refs[1], with twice bfloat16's digits; see `store_transposed`."""
    high = x.astype(jnp.bfloat16)
    store_transposed(refs[0], high, interpret)
    store_transposed(refs[1], x - high.astype(jnp.float32), interpret)


def publish(x, interpret):
    """Barrier after which wgmma sees the shared memory written; is any x in the block too large?"""
    if interpret:
        return jnp.any(x > LIMIT).astype(jnp.int32)

    @levels.inline(
        arg_types=(plgpu.Layout.WGMMA,),
        return_type=levels.array((), jnp.int32, plgpu.Layout.WG_SPLAT(())),
    )
    def publish(_, x):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        values = [
            llvm.extractelement(r, arith.constant(i32, i))
            for r in x.registers.flat
            for i in range(ir.VectorType(r.type).shape[0])
        ]
        largest = functools.reduce(arith.maxnumf, values)
        nvvm.fence_proxy(nvvm.ProxyKind.async_shared, space=nvvm.SharedSpace.shared_cta)
        # Barrier 1 is the first warpgroup's; 0 is the whole block's.
        any_over = llvm.inline_asm(
            i32,
            [largest, arith.constant(f32, LIMIT)],
            "{ .reg .pred p, q; setp.gt.f32 p, $1, $2; bar.red.or.pred q, 1, 128, p;"
            " selp.u32 $0, 1, 0, q; }",
            "=r,f,f",
            has_side_effects=True,
            asm_dialect=0,
        )
        return mgpu.FragmentedArray.splat(any_over, (), is_signed=True)

    return publish(x)


def warp_any(x, limit: float, interpret):
    """Is any x [m], one for each of an accumulator's rows, over the limit? int32, for each warp.

    Warps may differ, so what depends on it must not need all of the warpgroup.
    """
    if interpret:
        return jnp.any(x > limit).astype(jnp.int32)

    @levels.inline(
        arg_types=(plgpu.Layout.WGMMA.reduce(1),),
        return_type=levels.array((), jnp.int32, plgpu.Layout.WG_SPLAT(())),
    )
    def vote(_, x):
        f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)
        values = [llvm.extractelement(r, arith.constant(i32, 0)) for r in x.registers.flat]
        largest = functools.reduce(arith.maxnumf, values)
        over = llvm.inline_asm(
            i32,
            [largest, arith.constant(f32, limit)],
            "{ .reg .pred p, q; setp.gt.f32 p, $1, $2; vote.sync.any.pred q, p, -1;"
            " selp.u32 $0, 1, 0, q; }",
            "=r,f,f",
            has_side_effects=True,
            asm_dialect=0,
        )
        return mgpu.FragmentedArray.splat(over, (), is_signed=True)

    return vote(x)


def store_result(ref, x, interpret):
    """x [m, n] in wgmma's accumulator layout -> ref in global memory, two columns a thread."""
    if interpret:
        ref[...] = x
        return

    @levels.inline(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, ref, x):
        x.store_untiled(ref, optimized=False)

    store(ref, x)


def store_row(ref, x, interpret):
    if interpret:
        ref[...] = x
        return

    @levels.inline(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA.reduce(0)))
    def store(_, ref, x):
        x.store_untiled(ref, optimized=False)

    store(ref, x)
