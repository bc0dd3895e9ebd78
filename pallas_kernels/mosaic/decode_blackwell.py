"""Decode attention on Blackwell: one thread block per (sequence, KV head, split).

A block is one warpgroup. It rotates the queries, which are few, itself. Pages arrive in shared
memory through TMA, `stages` tiles of 128 tokens ahead. Of each tile, a thread takes a token of K
and then a channel of V:

    K codes -> registers -> tensor memory ─ tcgen05 with q ──> scores, tokens on M, queries on N
    V codes -> registers -> tensor memory   p = exp2(score * k_scale - shift)
                                └────────── tcgen05 with ── p * v_scale / unit (shared memory)

The levels are e4m3 exactly. q and p have float16's digits: as sums of three e4m3 parts, each with
columns of its own, of which a group of queries leaves enough. `shift` and `unit` keep p in range;
they change only when it leaves it: the vote on that is part of the one barrier per tile that
publishes p. The first tile always changes them.

For head_dim 64 the threads take the channels of V twice, for a half of the tile each: the halves
are then splits of their own.

What is not about tiles it has in common with Hopper's: `decode_block`. Blocks
take turns on a multiprocessor, so that one decodes while another waits for its tensor core; there
is no further specialisation of warps. Compiled ahead of time and interpreted, not yet run.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.mosaic import gpu as mgpu
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import blackwell, exact, levels, row_levels
from pallas_kernels.mosaic.blackwell import PARTS
from pallas_kernels.mosaic.config import Config
from pallas_kernels.mosaic.decode_block import (
    SHARED_MEMORY,
    Inputs,
    Options,
    Pages,
    block,
    fetched,
    launch,
)
from pallas_kernels.mosaic.exact import LOWEST
from pallas_kernels.mosaic.row_levels import LAYOUT, ROWS
from pallas_kernels.mosaic.tiles import (
    along_columns,
    along_rows,
    full,
    load_transposed,
    smem,
    store_row,
)
from pallas_kernels.packing import plane_bits


_COLUMNS = 512  # of a multiprocessor's tensor memory
_TOP = 2.0**8  # e4m3 ends at 448
_ADAPTED = 2.0**4  # the largest p * v_scale / unit when they have been adapted; above _TOP they are


def attention_parts(
    q_parts: tuple[BFloat16[Array, "batch kv_heads rows head_dim"], ...],
    cache: KVCache,
    factor: float,
    config: Config,
    interpret: bool = False,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[
    Float[Array, "batch kv_heads parts+1 head_dim rows"],
    Float[Array, "batch kv_heads parts+2 rows"],
]:
    """As `decode_hopper.attention_parts`. parts: splits, or for head_dim 64 twice as many."""
    fmt = cache.fmt
    batch, heads, rows, d = q_parts[0].shape
    stages = -(-config.stages // 2)  # of two of Hopper's tiles each
    tiles, used = fetched(cache, stages, ROWS)
    used += 2 * d * (exact.TILE + 3 * rows) + PARTS * rows * (d + ROWS) + 4 * rows * exact.TILE
    accumulators = d // ROWS or 2
    columns = d // 4 + max(d, ROWS) * min(d, ROWS) // (4 * ROWS)
    columns += PARTS * rows * (1 + accumulators)
    # Three have the registers: see the tests of ahead-of-time compilation.
    in_tensor_memory = _COLUMNS // 2 ** math.ceil(math.log2(columns))
    resident = min(SHARED_MEMORY // used or 1, in_tensor_memory, 3)
    at_most = cache.page_table.shape[1] * fmt.page_size
    if sliding_window is not None:
        at_most = min(at_most, sliding_window + 2 * ROWS)
    config = replace(config, blocks=config.blocks * resident // 4)
    splits = config.splits_for(batch * heads, -(-at_most // ROWS))
    parts = splits * (2 if d < ROWS else 1)

    def tmem(*shape, dtype=jnp.float32):
        return plgpu.TMEM(shape, dtype, packed=dtype != jnp.float32)

    scratch_types = (
        smem((rows, d), jnp.float16),
        tuple(smem((rows, d), jnp.bfloat16) for _ in q_parts),
        blackwell.smem8((PARTS * rows, d)),
        smem((exact.TILE, d), jnp.bfloat16),
        blackwell.smem8((PARTS * rows, ROWS)),
        tuple(smem((rows, exact.TILE), jnp.bfloat16) for _ in range(2)),
        plgpu.SMEM((rows,), jnp.float32),
        jax.tree.map(
            lambda x, layout: plgpu.SMEM(x.shape, x.dtype, transforms=layout),
            tiles,
            _layouts(fmt, d),
        ),
        tmem(ROWS, d, dtype=jnp.float8_e4m3fn),
        tuple(tmem(ROWS, min(d, ROWS), dtype=jnp.float8_e4m3fn) for _ in range(0, d, ROWS)),
        tmem(ROWS, PARTS * rows),
        tuple(tmem(ROWS, PARTS * rows) for _ in range(accumulators)),
        plgpu.Barrier(num_arrivals=len(q_parts)),
        plgpu.Barrier(),
        plgpu.Barrier(num_arrivals=ROWS // fmt.page_size * len(tiles.each()), num_barriers=stages),
        plgpu.Barrier(orders_tensor_core=True),
        plgpu.Barrier(orders_tensor_core=True),
    )
    options = Options(fmt, factor, soft_cap, sliding_window, interpret, ROWS, stages, splits)
    order = row_levels.order(fmt.key_bits, d)
    return launch(_kernel, options, q_parts, cache, order, parts, scratch_types)


def _layouts(fmt, d: int) -> Pages:
    """How pages lie in shared memory."""

    def of(bits: int, row: int):
        return tuple(
            row_levels.transforms(row * width // 8, d * fmt.page_size * width // 8)
            for width in plane_bits(bits)
        )

    return Pages(of(fmt.key_bits, d), (), of(fmt.value_bits, fmt.page_size), ())


def _kernel(
    options: Options,
    given: Inputs,
    out,
    lse,
    q_s,
    q_parts,
    q_8,
    dense_tile,
    p_8,
    p_parts,
    offset_s,
    tiles: Pages,
    k_t,
    v_t,
    s_t,
    acc_t,
    q_ready,
    arrived,
    ready,
    scored,
    added,
):
    fmt, stages, interpret = options.fmt, options.stages, options.interpret
    rows, d = q_s.shape
    this = block(options, given, tiles, ready)
    batch, head, split, first, last = this.batch, this.head, this.split, this.first, this.last

    this.start(q_parts, q_ready)
    q_scale = exact.rotate_queries(
        given.rotation,
        q_parts,
        options.factor / math.sqrt(d),
        dense_tile,
        arrived,
        q_s,
        interpret,
        blackwell.matmul,
    )
    rotated = load_transposed(q_s, interpret) * _TOP
    blackwell.store_parts(q_8, rotated, plgpu.Layout.WGMMA, interpret)

    offset = None
    if options.soft_cap is not None and fmt.key_offset:
        store_row(offset_s, this.offset(q_parts), interpret)  # changes its layout
        plgpu.commit_smem()
        offset = _load_row(offset_s, interpret)
    this.attend_exactly(q_parts, dense_tile, arrived, p_parts, out, lse, blackwell.matmul)

    k_table, v_table = ((given.tables[i], given.tables[i + 1]) for i in (0, 2))
    layouts = _layouts(fmt, d)
    zeros = full((ROWS, PARTS * rows), 0.0, LAYOUT)
    for acc in acc_t:
        plgpu.async_store_tmem(acc, zeros)
    blackwell.publish(zeros, 1.0, interpret)
    plgpu.tcgen05_commit_arrive(added)  # nothing is being added yet

    def part_of(ref, j):
        return blackwell.load_tmem(ref.at[:, j * rows : (j + 1) * rows], interpret)

    def step(i, carry):
        (total, shift, per_unit), ahead, slot = carry
        plgpu.barrier_wait(ready.at[slot])
        k_tiles, k_scale, v_tiles, v_scale = tiles.of(slot)
        k = row_levels.load_keys(
            k_tiles,
            layouts.k,
            k_table,
            fmt.key_bits,
            d,
            fmt.value_bits,
            interpret=interpret,
        )
        plgpu.async_store_tmem(k_t, k)
        plgpu.commit_tmem()
        plgpu.tcgen05_mma(s_t, k_t, q_8.T, scored, accumulate=False)

        channels = [
            row_levels.load_values(
                v_tiles,
                layouts.v,
                v_table,
                fmt.value_bits,
                d,
                fmt.page_size,
                i * ROWS,
                interpret=interpret,
            )
            for i in range(len(v_t))
        ]
        k_scale, v_scale = (
            row_levels.load_scales(x, fmt.value_bits, fmt.page_size, interpret=interpret)
            for x in (k_scale, v_scale)
        )
        plgpu.barrier_wait(added)  # the tile before: its V and p may be overwritten
        for ref, v in zip(v_t, channels, strict=True):
            plgpu.async_store_tmem(ref, v)

        plgpu.barrier_wait(scored)
        s = blackwell.sum_parts(lambda j: part_of(s_t, j))
        s = s * along_rows(k_scale * (q_scale / _TOP), rows)
        s = this.finished(s, offset, row_levels.tokens, i)
        v_scaled = v_scale * per_unit
        weight = jnp.maximum(v_scaled, 1 / _TOP)  # p itself may be large where v is small

        def store(p):
            blackwell.store_parts(p_8, p, LAYOUT, interpret)

        p = jnp.exp2(s - along_columns(shift, ROWS))
        store(p * along_rows(v_scaled, rows))
        over = blackwell.publish(p * along_rows(weight, rows), _TOP, interpret)

        # All warps hold this tile's codes in registers now: its slot is free.
        @pl.when(i + stages < last)
        def _():
            this.fetch(ahead, slot)

        ahead = this.pages_of(jnp.minimum(i + stages + 1, last - 1))

        def adapt(total, shift, per_unit, p):
            del p
            largest = jnp.max(v_scale)
            new = jnp.where(largest > 0, _ADAPTED / largest, per_unit)
            raised = jnp.maximum(shift, jnp.max(s, axis=0))
            down = jnp.exp2(shift - raised)
            p = jnp.exp2(s - along_columns(raised, ROWS))
            store(p * along_rows(v_scale * new, rows))
            for acc in acc_t:
                parts = [part_of(acc, j) for j in range(PARTS)]
                plgpu.wait_load_tmem()
                for j, part in enumerate(parts):
                    scaled = part * along_columns(down * (new / per_unit), ROWS)
                    plgpu.async_store_tmem(acc.at[:, j * rows : (j + 1) * rows], scaled)
            blackwell.publish(p, 1.0, interpret)
            return total * along_columns(down, ROWS), raised, new, p

        total, shift, per_unit, p = lax.cond(
            over != 0, adapt, lambda *x: x, total, shift, per_unit, p
        )
        for j, acc in enumerate(acc_t):
            if d < ROWS:
                plgpu.tcgen05_mma(acc, v_t[0], p_8.at[:, j * d : (j + 1) * d].T)
            else:
                plgpu.tcgen05_mma(acc, v_t[j], p_8.T)
        plgpu.tcgen05_commit_arrive(added)
        slot = jnp.where(slot + 1 == stages, 0, slot + 1)
        return (total + p, shift, per_unit), ahead, slot

    ahead = this.pages_of(jnp.maximum(jnp.minimum(first + stages, last - 1), 0))
    state = (
        full((ROWS, rows), 0.0, LAYOUT),
        full((rows,), LOWEST, LAYOUT.reduce(0)),
        jnp.float32(1),
    )
    total, shift, per_unit = lax.fori_loop(first, last, step, (state, ahead, 0))[0]
    plgpu.barrier_wait(added)

    def outputs(j):
        return blackwell.sum_parts(lambda part: part_of(acc_t[j], part))

    def norm(total):
        return along_columns(1 / (jnp.maximum(total, 1e-30) * per_unit), ROWS)

    def store_out(ref, x):
        _store(ref, x, LAYOUT, interpret)

    if d < ROWS:
        lane = plgpu.broadcasted_iota(jnp.int32, (ROWS, rows), 0, layout=LAYOUT)
        totals = [jnp.sum(jnp.where(x, total, 0.0), axis=0) for x in (lane < d, lane >= d)]
        x = jnp.where(lane < d, outputs(0) * norm(totals[0]), outputs(1) * norm(totals[1]))
        store_out(out.at[batch, head, pl.ds(2 * split, 2)], x)
    else:
        totals = [jnp.sum(total, axis=0)]
        for j in range(len(acc_t)):
            here = out.at[batch, head, split, j * ROWS : (j + 1) * ROWS]
            store_out(here, outputs(j) * norm(totals[0]))
    for j, x in enumerate(totals):
        here = lse.at[batch, head, len(totals) * split + j]
        _store(here, shift + jnp.log2(x), LAYOUT.reduce(0), interpret)


def _store(ref, x, layout, interpret):
    """x -> ref in global memory, which holds as much, a row of x a thread."""
    if interpret:
        ref[...] = x.reshape(ref.shape)
        return

    @levels.inline(arg_types=(plgpu.RefType(), layout))
    def store(_, ref, x):
        if len(ref.type.shape) > len(x.shape):
            ref = mgpu.utils.memref_fold(ref, 0, 2)
        x.store_untiled(ref, optimized=False)

    store(ref, x)


def _load_row(ref, interpret):
    """float32 ref [n] in shared memory -> all of it in each thread."""
    return ref[...] if interpret else plgpu.load(ref, layout=LAYOUT.reduce(0), optimized=False)
