"""Prefill attention on Blackwell: one thread block per (sequence, KV head, 256 queries).

As on Hopper (`prefill_hopper`): flash attention in rotated space, over the packed tokens and then
the dense ones, in tiles of 64 or 128 tokens. Three warpgroups share the work (two for head_dim 256,
whose output fills half of tensor memory):

    producer   codes (TMA) -> registers -> float16 K and V in shared memory; dense tiles: TMA only
    consumers  128 queries each, a thread each: S = q K^T into tensor memory, softmax, P over S,
               O += P V in tensor memory

While one consumer's softmax runs, the other's products do. O is rescaled only when a query's
largest score has grown 2**8-fold: until then p just gets larger. Compiled ahead of time and
interpreted, not yet run.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float16

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import blackwell, levels, prefill_block
from pallas_kernels.mosaic.exact import LOWEST, capped
from pallas_kernels.mosaic.prefill_block import (
    Barriers,
    Keys,
    Options,
    Sources,
    Tiles,
    tile_tokens,
)
from pallas_kernels.mosaic.prefill_tiles import PART, produce_tiles
from pallas_kernels.mosaic.row_levels import LAYOUT, ROWS
from pallas_kernels.mosaic.tiles import along_rows, full, smem


_COLUMNS = 32  # tokens whose scores a thread has in registers at a time
_HIDDEN = 2.0**100  # less than any score; a power of two, which loses no digits
_GROWTH = 8.0  # log2 of what p may exceed 1 by
# Registers of a consumer's thread and of a producer's, where three warpgroups share 504.
_REGISTERS = (208, 88)
_BY_ROW = LAYOUT.reduce(1)


@dataclass(frozen=True)
class Queries:
    """Rotated queries, as the Blackwell kernel takes them: for each token those of its group.

    scores = scale * (x @ k), to the base 2; bias: what is then to be added. place: of the token
    in the chunk.
    """

    x: Float16[Array, "batch kv_heads rows head_dim"]
    scale: Float[Array, "batch kv_heads rows"]
    bias: Float[Array, "batch kv_heads rows"] | None
    place: Float[Array, " rows"]


class Inputs(NamedTuple):
    """What the kernel reads in global memory, as arrays and then as refs."""

    lengths: Any
    base: Any
    table: Any
    tables: Any  # `levels.tables_of_lanes`
    place: Any  # this and what follows: of `Queries` and `Keys`
    q: Any
    sources: Sources
    scale: Any
    bias: Any


def consumers(head_dim: int) -> int:
    return 1 if head_dim == 256 else 2


def block_rows(head_dim: int) -> int:
    """Queries of a thread block, of which q.x has a multiple."""
    return ROWS * consumers(head_dim)


def attention(
    q: Queries,
    keys: Keys,
    cache: KVCache,
    group: int,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    interpret: bool = False,
) -> Float16[Array, "batch kv_heads rows head_dim"]:
    """Softmax attention in rotated space, in the units of keys.v. soft_cap: to the base 2."""
    fmt = cache.fmt
    batch, heads, rows, d = q.x.shape
    tile, number = tile_tokens(d), consumers(d)
    # Each consumer has `tile` columns of 32 bits, of which P, in 16 bits, fills the first half.
    scores_then_p = plgpu.RefUnion(
        plgpu.TMEM((ROWS, number * tile), jnp.float32),
        plgpu.TMEM((ROWS, 2 * number * tile), jnp.float16, packed=True),
    )
    options = Options(fmt, group, soft_cap, sliding_window, interpret)
    tiles, barriers = prefill_block.scratch(cache, block_rows(d), number)
    kernel = plgpu.kernel(
        functools.partial(_kernel, options),
        out_type=jax.ShapeDtypeStruct(q.x.shape, jnp.float16),
        scratch_types=(
            smem((number, ROWS, d), jnp.float16),
            tiles,
            scores_then_p,
            plgpu.TMEM((ROWS, number * d), jnp.float32),
            plgpu.Barrier(num_barriers=number),
            barriers,
            plgpu.Barrier(num_barriers=number, orders_tensor_core=True),
            plgpu.Barrier(num_barriers=number, orders_tensor_core=True),
        ),
        grid=(batch, heads, rows // block_rows(d)),
        grid_names=("batch", "head", "block"),
        num_threads=number + 1,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return kernel(
        Inputs(
            keys.lengths,
            keys.base,
            cache.page_table,
            levels.tables_of_lanes(fmt),
            q.place,
            q.x,
            prefill_block.sources(keys, cache),
            q.scale,
            q.bias,
        )
    )


def _kernel(
    options: Options,
    given: Inputs,
    out,
    q_s,
    tiles: Tiles,
    scores_then_p,
    o_t,
    q_ready,
    barriers: Barriers,
    scored,
    added,
):
    fmt, interpret = options.fmt, options.interpret
    soft_cap, sliding_window = options.soft_cap, options.sliding_window
    (k_s, v_s), (k_ready, v_ready), (k_read, v_read) = tiles.tiles, barriers.ready, barriers.read
    lengths, base = given.lengths, given.base
    batch, head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    warpgroup = lax.axis_index("warpgroup")
    stages, tile, d = k_s.shape
    rows, count = block_rows(d), consumers(d)
    # The longest blocks first.
    block = given.q.shape[2] // rows - 1 - block

    # The tiles that this block attends to, of its first query and its last one.
    packed = base[batch] // tile
    ahead = lengths[batch] - base[batch]  # dense tokens before the chunk
    start = jnp.int32(0)
    newest = ahead + (block * rows + rows - 1) // options.group
    end = packed + jnp.minimum(newest // tile, given.sources.k.shape[2] // tile - 1) + 1
    whole = packed + (ahead + block * rows // options.group + 1) // tile  # from here on masked
    if sliding_window is not None:
        oldest = lengths[batch] + block * rows // options.group + 1 - sliding_window
        start = jnp.maximum(oldest - fmt.sinks, 0) // tile
        whole = start

    def slot_of(i):
        return lax.rem(i - start, stages)

    def produce():
        words = levels.load_tables(given.tables, interpret)
        sides = prefill_block.sides(fmt, words, given.sources, tiles, barriers, (batch, head))
        produce_tiles(fmt, given.table.at[batch], (start, packed, end), sides, interpret)

    def consume(number):
        here = pl.ds(block * rows + number * ROWS, ROWS)
        q_here, o = q_s.at[number], o_t.at[:, pl.ds(number * d, d)]
        s_t, p_t = (
            ref.at[:, pl.ds(number * (ref.shape[1] // count), tile)] for ref in scores_then_p
        )
        parts = range(0, tile, _COLUMNS)
        plgpu.copy_gmem_to_smem(given.q.at[batch, head, here], q_here, q_ready.at[number])
        scale, bias = (
            x if x is None else _load_rows(x.at[batch, head, here], interpret)
            for x in (given.scale, given.bias)
        )
        position = _load_rows(given.place.at[here], interpret) + lengths[batch].astype(jnp.float32)
        plgpu.async_store_tmem(o, full((ROWS, d), 0.0, LAYOUT))
        plgpu.commit_tmem()
        plgpu.barrier_wait(q_ready.at[number])

        def places(i):
            """What `hidden` needs of tile i, one a row."""
            after = position - (i * tile).astype(jnp.float32)
            if sliding_window is None:  # only dense tiles are masked
                return (after,)
            is_packed = (i < packed).astype(jnp.float32)
            first = base[batch].astype(jnp.float32)
            sinks = fmt.sinks + first - (i * tile).astype(jnp.float32)
            rest = (is_packed, sinks - is_packed * (sinks + 1), first)
            return after, *(_by_row(x, interpret) for x in rest)

        def hidden(part, places, unit):
            """What to add to scores: 0, or -_HIDDEN and less where a query does not see the token.

            All arithmetic: as many predicates as a thread has scores would take registers. So
            would what is kept to be used again: in units of its own it is not the same.
            """
            column = plgpu.broadcasted_iota(jnp.int32, (ROWS, _COLUMNS), 1, layout=LAYOUT) + part
            after, *rest = (along_rows(x, _COLUMNS) for x in places)
            after = after * unit - column.astype(jnp.float32) * unit
            seen = jnp.minimum(after, 0.0)
            if sliding_window is not None:
                is_packed, sinks, first = rest
                place = column % PART
                ordered = levels.code_of_slot(fmt.value_bits, PART, place) - place + fmt.sinks
                after = after - is_packed * (ordered.astype(jnp.float32) * unit)
                is_sink = sinks * unit - column.astype(jnp.float32) * unit
                after = after + jnp.minimum(jnp.maximum(is_sink, 0.0), unit) * first
                seen = jnp.minimum(jnp.minimum(after, 0.0), (sliding_window - 1) * unit - after)
            return seen * (_HIDDEN / unit)

        def scores(part, places, unit=1.0):
            s = blackwell.load_tmem(s_t.at[:, part : part + _COLUMNS], interpret)
            s = s * along_rows(scale, _COLUMNS)
            if bias is not None:
                s = s + along_rows(bias, _COLUMNS)
            if soft_cap is not None:
                s = capped(s, soft_cap)
            return s + hidden(part, places, unit) if places else s

        def step(i, state, masked):
            total, largest = state
            slot = slot_of(i)
            plgpu.barrier_wait(k_ready.at[slot])
            plgpu.tcgen05_mma(s_t, q_here, k_s.at[slot].T, scored.at[number], accumulate=False)
            plgpu.barrier_wait(scored.at[number])
            plgpu.barrier_arrive(k_read.at[slot])
            # Twice over the scores, in parts: all of them at once would not fit in registers.
            now = places(i) if masked else ()
            top = largest
            for part in parts:
                top = jnp.maximum(top, jnp.max(scores(part, now), axis=1))
            over = blackwell.publish(top - largest, _GROWTH, interpret, _BY_ROW, alone=False)

            def rescale(total, largest):
                down = jnp.exp2(largest - top)
                for column in range(0, d, PART):
                    part = o.at[:, column : column + PART]
                    x = blackwell.load_tmem(part, interpret) * along_rows(down, PART)
                    plgpu.wait_load_tmem()
                    plgpu.async_store_tmem(part, x)
                return total * down, top

            total, largest = lax.cond(over != 0, rescale, lambda *x: x, total, largest)
            ps = []
            for part in parts:
                p = jnp.exp2(scores(part, now, _HIDDEN) - along_rows(largest, _COLUMNS))
                total = total + jnp.sum(p, axis=1)
                ps.append(p.astype(jnp.float16))
            plgpu.wait_load_tmem()  # P lies where the scores did
            for part, p in zip(parts, ps, strict=True):
                plgpu.async_store_tmem(p_t.at[:, part : part + _COLUMNS], p)
            plgpu.commit_tmem()
            plgpu.barrier_wait(v_ready.at[slot])
            plgpu.tcgen05_mma(o, p_t, v_s.at[slot].T, added.at[number])
            plgpu.barrier_wait(added.at[number])
            plgpu.barrier_arrive(v_read.at[slot])
            return total, largest

        state = full((ROWS,), 0.0, _BY_ROW), full((ROWS,), LOWEST, _BY_ROW)
        whole_end = jnp.minimum(whole, end)
        if sliding_window is None:
            state = lax.fori_loop(start, whole_end, functools.partial(step, masked=False), state)
        total, _ = lax.fori_loop(whole_end, end, functools.partial(step, masked=True), state)
        # Through tensor memory again: there its layout changes to one that is stored in lines.
        for column in range(0, d, PART):
            part = o.at[:, column : column + PART]
            x = blackwell.load_tmem(part, interpret) * along_rows(1 / total, PART)
            plgpu.wait_load_tmem()
            plgpu.async_store_tmem(part, x)
            plgpu.commit_tmem()
            x = plgpu.async_load_tmem(part).astype(jnp.float16)
            q_here.at[:, column : column + PART][...] = x
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(q_here, out.at[batch, head, here])
        plgpu.wait_smem_to_gmem(0)

    @pl.when(warpgroup < count)
    def _():
        if count > 1 and not interpret:
            plgpu.set_max_registers(_REGISTERS[0], action="increase")
        consume(warpgroup)

    @pl.when(warpgroup == count)
    def _():
        if count > 1 and not interpret:
            plgpu.set_max_registers(_REGISTERS[1], action="decrease")
        produce()


def _load_rows(ref, interpret):
    """float32 ref [128] in global memory -> one a row, that is a thread."""
    return ref[...] if interpret else plgpu.load(ref, layout=_BY_ROW, optimized=False)


def _by_row(x, interpret):
    """A scalar, once a row."""
    x = jnp.full((ROWS,), x, jnp.float32)
    return x if interpret else plgpu.layout_cast(x, _BY_ROW)
