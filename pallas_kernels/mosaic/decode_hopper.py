"""Decode attention over packed pages on Hopper: one thread block per (sequence, KV head, split).

A block is one warpgroup. Each page is a tile of 64 tokens, which arrives in shared memory through
TMA, `stages` pages ahead:

    K codes -> registers ─ wgmma with q ──> scores, tokens on M, queries on N
    V codes -> registers                    p = exp2(score * k_scale - shift)
                └───────── wgmma with ──── p * v_scale / unit (through shared memory)

The codes of K and V never leave the registers as anything wider than float16. `shift` and `unit`
keep p and p * v_scale in float16's range. They change only when one of them leaves it: the vote
on that is part of the one barrier per page that publishes p to the other warps. The first page
always changes them.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, nvvm
from jaxtyping import Array, Float

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import levels
from pallas_kernels.mosaic.config import Config


TILE = levels.ROWS  # tokens
_LIMIT = 2.0**12  # of p * max(1, v_scale / unit); float16 ends at 65504
_LOWEST = -1e30


def packed_attention(
    q: Float[Array, "batch kv_heads group head_dim"],
    cache: KVCache,
    config: Config,
    interpret: bool = False,
) -> tuple[
    Float[Array, "batch kv_heads splits head_dim rows"],
    Float[Array, "batch kv_heads splits rows"],
]:
    """Softmax of each split of the packed pages over its own tokens, without the key offset.

    q: rotated and times log2(e) * scale. Returns, float32, the rotated outputs and the base-2
    logarithms of the sums of exponentials (-inf for a split without pages); rows is the group
    padded to a multiple of 8.
    """
    fmt = cache.fmt
    batch, heads, group, d = q.shape
    rows = -(-group // 8) * 8
    q = jnp.pad(q, ((0, 0), (0, 0), (0, rows - group), (0, 0)))
    q = q[..., levels.slots(fmt.key_bits, d)]
    q_scale = jnp.maximum(jnp.max(jnp.abs(q), axis=(2, 3)), 1e-30)
    q = (q / q_scale[..., None, None]).astype(jnp.float16)
    # A sequence that overflowed gives NaN later; here it must stay within its table.
    pages_per_seq = cache.page_table.shape[1]
    pages = jnp.minimum(cache.packed_lengths // fmt.page_size, pages_per_seq)
    splits, stages = config.splits_for(batch * heads, pages_per_seq), config.stages
    planes = (
        *map(_lines, cache.k_planes),
        cache.k_scale,
        *map(_lines, cache.v_planes),
        cache.v_scale,
    )
    tiled = (
        plgpu.TilingTransform((8, 64)),  # pyright: ignore[reportAbstractUsage]
        plgpu.SwizzleTransform(128),  # pyright: ignore[reportAbstractUsage]
    )

    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            key_bits=fmt.key_bits,
            value_bits=fmt.value_bits,
            key_planes=len(cache.k_planes),
            stages=stages,
            splits=splits,
            interpret=interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, splits, d, rows), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, splits, rows), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((rows, d), jnp.float16, transforms=tiled),
            plgpu.SMEM((2, rows, TILE), jnp.float16, transforms=tiled),
            tuple(plgpu.SMEM((stages, *x.shape[2:]), x.dtype) for x in planes),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=len(planes), num_barriers=stages),
        ),
        grid=(batch, heads, splits),
        grid_names=("batch", "head", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    tables = np.concatenate([levels.tables(fmt.key_bits), levels.tables(fmt.value_bits)])
    return kernel(pages, cache.page_table, jnp.asarray(tables), q_scale, q, *planes)


def _lines(plane):
    """A page's rows as lines of 128 bytes, as TMA likes them (the rows may be 8 bytes short)."""
    return plane.reshape(*plane.shape[:2], -1, 128)


def _kernel(
    pages,
    table,
    tables,
    q_scale,
    q,
    *refs,
    key_bits,
    value_bits,
    key_planes,
    stages,
    splits,
    interpret,
):
    *planes, out, lse, q_s, p_s, tiles, q_ready, ready = refs
    batch, head, split = (lax.axis_index(name) for name in ("batch", "head", "split"))
    rows, d = q_s.shape
    first = pages[batch] * split // splits
    last = pages[batch] * (split + 1) // splits

    def fetch(page, slot):
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                for plane, tile in zip(planes, tiles, strict=True):
                    plgpu.copy_gmem_to_smem(plane.at[page, head], tile.at[slot], ready.at[slot])

    plgpu.copy_gmem_to_smem(q.at[batch, head], q_s, q_ready)
    for slot in range(stages):

        @pl.when(first + slot < last)
        def _(slot=slot):
            fetch(table[batch, first + slot], slot)

    plgpu.barrier_wait(q_ready)

    def col(x):
        return plgpu.layout_cast(x, plgpu.Layout.WGMMA.reduce(0))

    def full(shape, value, layout: Any = plgpu.Layout.WGMMA):
        return plgpu.layout_cast(jnp.full(shape, value, jnp.float32), layout)

    def along_rows(x):
        return lax.broadcast_in_dim(x, (TILE, rows), (0,))

    def along_queries(x, m=TILE):
        return lax.broadcast_in_dim(x, (m, rows), (1,))

    key_scale = q_scale[batch, head]
    k_table, v_table = ((tables[i], tables[i + 1]) for i in (0, 2))

    def step(i, carry):
        (acc, total, shift, per_unit), page_ahead, slot = carry
        plgpu.barrier_wait(ready.at[slot])
        now = [tile.at[slot] for tile in tiles]
        k_tiles, k_scale, v_tiles, v_scale = (
            now[:key_planes],
            now[key_planes],
            now[key_planes + 1 : -1],
            now[-1],
        )

        k = levels.load_levels(
            k_tiles, k_table, key_bits, TILE, d, rows_of=value_bits, interpret=interpret
        )
        s = _matmul(k, q_s, interpret)
        v = levels.load_levels(v_tiles, v_table, value_bits, d, TILE, interpret=interpret)
        k_scale = levels.load_scales(k_scale, value_bits, interpret=interpret) * key_scale
        v_scale = levels.load_scales(v_scale, value_bits, interpret=interpret)
        s = s * along_rows(k_scale)
        v_scaled = v_scale * per_unit
        weight = jnp.maximum(v_scaled, 1.0)
        p_now = p_s.at[lax.rem(i - first, 2)]

        p = jnp.exp2(s - along_queries(shift))
        _store_transposed(p_now, p * along_rows(v_scaled), interpret)
        over = _publish(p * along_rows(weight), interpret)

        # All warps hold this page's codes in registers now: its slot is free.
        @pl.when(i + stages < last)
        def _():
            fetch(page_ahead, slot)

        page_ahead = table[batch, jnp.minimum(i + stages + 1, last - 1)]

        def adapt(acc, total, shift, per_unit, p):
            del p
            largest = jnp.max(v_scale)
            new = jnp.where(largest > 0, 1 / largest, per_unit)
            v_scaled = v_scale * new
            excess = along_rows(jnp.log2(jnp.maximum(v_scaled, 1.0)))
            raised = jnp.maximum(shift, col(jnp.max(s + excess, axis=0)))
            down = jnp.exp2(shift - raised)
            p = jnp.exp2(s - along_queries(raised))
            _store_transposed(p_now, p * along_rows(v_scaled), interpret)
            plgpu.commit_smem()
            acc = acc * along_queries(down * (new / per_unit), d)
            return acc, total * along_queries(down), raised, new, p

        acc, total, shift, per_unit, p = lax.cond(
            over != 0, adapt, lambda *x: x, acc, total, shift, per_unit, p
        )
        acc = _matmul(v, p_now, interpret, acc)
        slot = jnp.where(slot + 1 == stages, 0, slot + 1)
        return (acc, total + p, shift, per_unit), page_ahead, slot

    page_ahead = table[batch, jnp.maximum(jnp.minimum(first + stages, last - 1), 0)]
    start = (
        full((d, rows), 0.0),
        full((TILE, rows), 0.0),
        full((rows,), _LOWEST, plgpu.Layout.WGMMA.reduce(0)),
        jnp.float32(1),
    )
    acc, total, shift, per_unit = lax.fori_loop(first, last, step, (start, page_ahead, 0))[0]
    total = col(jnp.sum(total, axis=0))
    scaled = acc * along_queries(1 / (jnp.maximum(total, 1e-30) * per_unit), d)
    _store_result(out.at[batch, head, split], scaled, interpret)
    _store_lse(lse.at[batch, head, split], shift + jnp.log2(total), interpret)


def _matmul(a, b, interpret, acc=None) -> Any:
    """acc + a @ b.T, a in registers [m, k], b in shared memory [n, k]."""
    if interpret:
        product = jnp.dot(a.astype(jnp.float32), b[...].astype(jnp.float32).T)
        return product if acc is None else acc + product

    def multiply(acc_ref):
        plgpu.wgmma(acc_ref, a, b.T)
        if acc is None:
            return acc_ref[...]

    if acc is None:
        return pl.run_scoped(multiply, plgpu.ACC((a.shape[0], b.shape[0]), jnp.float32))
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


def _store_transposed(ref, x, interpret):
    """x [m, n] in wgmma's accumulator layout -> float16 ref [n, m] in shared memory."""
    x = x.astype(jnp.float16)
    if interpret:
        ref[...] = x.T
    else:
        ref.T[...] = plgpu.layout_cast(x, plgpu.Layout.WGMMA_TRANSPOSED)


def _publish(x, interpret):
    """Barrier after which wgmma sees the shared memory written; is any x in the block too large?"""
    if interpret:
        return jnp.any(x > _LIMIT).astype(jnp.int32)

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
            [largest, arith.constant(f32, _LIMIT)],
            "{ .reg .pred p, q; setp.gt.f32 p, $1, $2; bar.red.or.pred q, 1, 128, p;"
            " selp.u32 $0, 1, 0, q; }",
            "=r,f,f",
            has_side_effects=True,
            asm_dialect=0,
        )
        return mgpu.FragmentedArray.splat(any_over, (), is_signed=True)

    return publish(x)


def _store_result(ref, x, interpret):
    """x [m, n] in wgmma's accumulator layout -> ref in global memory, two columns a thread."""
    if interpret:
        ref[...] = x
        return

    @levels.inline(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA))
    def store(_, ref, x):
        x.store_untiled(ref, optimized=False)

    store(ref, x)


def _store_lse(ref, x, interpret):
    if interpret:
        ref[...] = x
        return

    @levels.inline(arg_types=(plgpu.RefType(), plgpu.Layout.WGMMA.reduce(0)))
    def store(_, ref, x):
        x.store_untiled(ref, optimized=False)

    store(ref, x)
