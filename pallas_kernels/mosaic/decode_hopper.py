"""Decode attention on Hopper: one thread block per (sequence, KV head, split).

A block is one warpgroup. It rotates the queries, which are few, itself. Pages arrive in shared
memory through TMA, `stages` fetches ahead: as many pages as make a tile of 64 tokens, or one page
of two tiles. Of each tile:

    K codes -> registers ─ wgmma with q ──> scores, tokens on M, queries on N
    V codes -> registers                    p = exp2(score * k_scale - shift)
                └───────── wgmma with ──── p * v_scale / unit (through shared memory)

The codes of K and V never leave the registers as anything wider than float16. `shift` and `unit`
keep p and p * v_scale in float16's range. They change only when one of them leaves it: the vote
on that is part of the one barrier per tile that publishes p to the other warps. The first tile
always changes them.

The block of split 0 also attends to sinks and ring (`exact`), and has fewer pages for it.
"""

import functools
import math
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import exact, levels
from pallas_kernels.mosaic.config import Config
from pallas_kernels.mosaic.exact import LOWEST, TILE, capped
from pallas_kernels.mosaic.tiles import (
    along_columns,
    along_rows,
    column,
    full,
    matmul,
    publish,
    rotation_matrix,
    smem,
    store_result,
    store_row,
    store_transposed,
)
from pallas_kernels.packing import plane_bits


_SHARED_MEMORY = 224 * 1024  # of a multiprocessor, less what it keeps of four blocks for itself
_REGISTERS = 64 * 1024
# What 64 tokens of sinks and ring take, in tiles of a few bits.
_PACKED_PER_EXACT = 4


def attention_parts(
    q_parts: tuple[BFloat16[Array, "batch kv_heads rows head_dim"], ...],
    cache: KVCache,
    factor: float,
    config: Config,
    interpret: bool = False,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
) -> tuple[
    Float[Array, "batch kv_heads splits+1 head_dim rows"],
    Float[Array, "batch kv_heads splits+2 rows"],
]:
    """Softmax of each split of the packed pages, and of sinks and ring (last), over its own tokens.

    q: the sum of its parts, rows a multiple of 8; factor: log2(e) times the scale of the scores;
    soft_cap: in units of factor * scores.
    Returns, float32, the outputs (those of the pages still rotated) and the base-2 logarithms of
    the sums of exponentials (-inf where there are no tokens); after them what the key offset adds
    to those of the pages (anything if the format has none, or if soft_cap is given: the offset is
    then in the pages' scores).
    """
    fmt = cache.fmt
    batch, heads, rows, d = q_parts[0].shape
    planes = (
        *map(_lines, cache.k_planes),
        cache.k_scale,
        *map(_lines, cache.v_planes),
        cache.v_scale,
    )
    stages = config.stages
    pages = max(1, TILE // fmt.page_size)  # in a fetch
    fetches = -(-cache.page_table.shape[1] // pages)
    if sliding_window is not None:
        fetches = min(fetches, sliding_window // (pages * fmt.page_size) + 2)
    tiles = [(stages, pages * x.shape[2], *x.shape[3:]) for x in planes]
    # TMA writes to multiples of 128 bytes: each page's scales get a line of their own.
    scales = (stages, pages, max(TILE, fmt.page_size))
    tiles = [shape if len(shape) == 3 else scales for shape in tiles]
    used = sum(math.prod(shape) * x.dtype.itemsize for x, shape in zip(planes, tiles, strict=True))
    used += 2 * d * (TILE + 3 * rows) + 8 * rows * TILE
    # Registers a thread, as compiled: see the tests of ahead-of-time compilation.
    registers = {64: 128, 128: 128, 256: 255}[d]
    if d == 128 and (rows > 8 or fmt.value_bits == 3):
        registers = 168
    resident = min(_SHARED_MEMORY // used or 1, _REGISTERS // (128 * registers))
    config = replace(config, blocks=config.blocks * resident // 4)
    splits = config.splits_for(batch * heads, fetches)
    dense = (cache.recent_k, cache.recent_v)
    if fmt.sinks:
        dense += (cache.sink_k, cache.sink_v)
    if fmt.key_offset:
        dense += (cache.key_offset,)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            fmt=fmt,
            factor=factor,
            parts=len(q_parts),
            stages=stages,
            splits=splits,
            soft_cap=soft_cap,
            sliding_window=sliding_window,
            interpret=interpret,
        ),
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, splits + 1, d, rows), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, splits + 2, rows), jnp.float32),
        ),
        scratch_types=(
            smem((rows, d), jnp.float16),
            tuple(smem((rows, d), jnp.bfloat16) for _ in q_parts),
            smem((TILE, d), jnp.bfloat16),
            smem((2, rows, TILE), jnp.float16),
            tuple(smem((rows, TILE), jnp.bfloat16) for _ in range(2)),
            tuple(plgpu.SMEM(s, x.dtype) for s, x in zip(tiles, planes, strict=True)),
            plgpu.Barrier(num_arrivals=len(q_parts)),
            plgpu.Barrier(),
            plgpu.Barrier(num_arrivals=pages * len(planes), num_barriers=stages),
        ),
        grid=(batch, heads, splits),
        grid_names=("batch", "head", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    tables = np.concatenate([levels.tables(fmt.key_bits), levels.tables(fmt.value_bits)])
    rotation = np.sqrt(d) * rotation_matrix(d, fmt.seed).T[levels.slots(fmt.key_bits, d)]
    return kernel(
        cache.lengths,
        cache.page_table,
        jnp.asarray(tables),
        jnp.asarray(np.round(rotation), jnp.bfloat16),
        *q_parts,
        *planes,
        *dense,
    )


def _lines(plane):
    """A page's rows as lines of 128 bytes, as TMA likes them (the rows may be 8 bytes short)."""
    return plane.reshape(*plane.shape[:2], -1, 128)


def _kernel(
    lengths,
    table,
    tables,
    rotation,
    *refs,
    fmt,
    factor,
    parts,
    stages,
    splits,
    soft_cap,
    sliding_window,
    interpret,
):
    refs = list(refs)
    q, refs = refs[:parts], refs[parts:]
    key_planes, value_planes = (len(plane_bits(bits)) for bits in (fmt.key_bits, fmt.value_bits))
    planes, refs = refs[: key_planes + value_planes + 2], refs[key_planes + value_planes + 2 :]
    *dense, out, lse, q_s, q_parts, dense_tile, p_s, p_parts, tiles, q_ready, arrived, ready = refs
    batch, head, split = (lax.axis_index(name) for name in ("batch", "head", "split"))
    rows, d = q_s.shape
    # A sequence that overflowed gives NaN later; here it must stay within its table.
    pages = jnp.maximum(lengths[batch] - fmt.sinks - fmt.window, 0) // fmt.page_size
    pages = jnp.minimum(pages, table.shape[1])
    packed = pages * fmt.page_size
    pages_at_once, tiles_at_once = max(1, TILE // fmt.page_size), max(1, fmt.page_size // TILE)
    at_once = tiles_at_once * TILE
    start, fetches = 0, (packed + at_once - 1) // at_once
    oldest = None if sliding_window is None else lengths[batch] - sliding_window
    if oldest is not None:
        start = jnp.minimum(jnp.maximum(oldest - fmt.sinks, 0) // at_once, fetches)
    exact_tiles = -(-fmt.ring_slots // TILE)
    as_fetches = exact_tiles * _PACKED_PER_EXACT // tiles_at_once

    def fetch_of(split):
        of_all = (fetches - start + as_fetches) * split // splits - as_fetches
        return start + jnp.maximum(of_all, 0)

    first, last = fetch_of(split), fetch_of(split + 1)

    def pages_of(i):
        if pages_at_once == 1:
            return (table[batch, i],)
        # Beyond the last page it again, whose tokens are masked.
        return tuple(
            table[batch, jnp.minimum(i * pages_at_once + j, pages - 1)]
            for j in range(pages_at_once)
        )

    def fetch(pages, slot):
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                for j, page in enumerate(pages):
                    for plane, tile in zip(planes, tiles, strict=True):
                        n = plane.shape[2]
                        if len(plane.shape) == 3:
                            here = tile.at[slot, j, :n]
                        else:
                            here = tile.at[slot, j * n : (j + 1) * n]
                        plgpu.copy_gmem_to_smem(plane.at[page, head], here, ready.at[slot])

    for part, part_s in zip(q, q_parts, strict=True):
        plgpu.copy_gmem_to_smem(part.at[batch, head], part_s, q_ready)
    for slot in range(stages):

        @pl.when(first + slot < last)
        def _(slot=slot):
            fetch(pages_of(first + slot), slot)

    plgpu.barrier_wait(q_ready)

    q_scale = exact.rotate_queries(
        rotation, q_parts, factor / math.sqrt(d), dense_tile, arrived, q_s, interpret
    )

    offset = None
    if soft_cap is not None and fmt.key_offset:
        offset = exact.products(q_parts, dense[-1].at[batch, head], interpret) * factor

    @pl.when(split == 0)
    def _():
        here = [x.at[batch, head] for x in dense]
        result, result_lse = exact.attend(
            q_parts,
            here[2:4] if fmt.sinks else None,
            here[:2],
            lengths[batch],
            packed,
            factor,
            dense_tile,
            arrived,
            p_parts,
            interpret,
            soft_cap,
            oldest,
        )
        store_result(out.at[batch, head, splits], result, interpret)
        store_row(lse.at[batch, head, splits], result_lse, interpret)
        if fmt.key_offset and soft_cap is None:
            added = exact.products(q_parts, here[-1], interpret) * factor
            store_row(lse.at[batch, head, splits + 1], added, interpret)

    k_table, v_table = ((tables[i], tables[i + 1]) for i in (0, 2))

    def tile_step(i, part, slot, state, refill):
        """The state after one of the tiles of fetch i, and what `refill`, called midway, gives."""
        acc, total, shift, per_unit = state
        k_tiles, k_scale, v_tiles, v_scale = tile_of(slot, part)
        k = levels.load_levels(
            k_tiles, k_table, fmt.key_bits, TILE, d, rows_of=fmt.value_bits, interpret=interpret
        )
        s = matmul(k, q_s, interpret)
        v = levels.load_levels(
            v_tiles,
            v_table,
            fmt.value_bits,
            d,
            TILE,
            page_size=fmt.page_size,
            part=part,
            interpret=interpret,
        )
        k_scale, v_scale = (
            levels.load_scales(x, fmt.value_bits, page_size=fmt.page_size, interpret=interpret)
            for x in (k_scale, v_scale)
        )
        k_scale = k_scale * q_scale
        s = s * along_rows(k_scale, rows)
        if offset is not None:
            s = s + along_columns(offset, TILE)
        if soft_cap is not None:
            s = capped(s, soft_cap)
        if oldest is not None or pages_at_once > 1:
            token = levels.tokens(fmt.value_bits, interpret=interpret)
            token += (i * at_once + part * TILE).astype(jnp.float32)
            outside = token >= packed.astype(jnp.float32)
            if oldest is not None:
                outside |= token < (oldest - fmt.sinks).astype(jnp.float32)
            s = s + along_rows(jnp.where(outside, LOWEST, 0.0), rows)
        v_scaled = v_scale * per_unit
        weight = jnp.maximum(v_scaled, 1.0)
        p_now = p_s.at[lax.rem(tiles_at_once * (i - first) + part, 2)]

        p = jnp.exp2(s - along_columns(shift, TILE))
        store_transposed(p_now, p * along_rows(v_scaled, rows), interpret)
        over = publish(p * along_rows(weight, rows), interpret)
        refilled = refill()

        def adapt(acc, total, shift, per_unit, p):
            del p
            largest = jnp.max(v_scale)
            new = jnp.where(largest > 0, 1 / largest, per_unit)
            v_scaled = v_scale * new
            excess = along_rows(jnp.log2(jnp.maximum(v_scaled, 1.0)), rows)
            raised = jnp.maximum(shift, column(jnp.max(s + excess, axis=0)))
            down = jnp.exp2(shift - raised)
            p = jnp.exp2(s - along_columns(raised, TILE))
            store_transposed(p_now, p * along_rows(v_scaled, rows), interpret)
            plgpu.commit_smem()
            acc = acc * along_columns(down * (new / per_unit), d)
            return acc, total * along_columns(down, TILE), raised, new, p

        acc, total, shift, per_unit, p = lax.cond(
            over != 0, adapt, lambda *x: x, acc, total, shift, per_unit, p
        )
        acc = matmul(v, p_now, interpret, acc)
        return (acc, total + p, shift, per_unit), refilled

    def tile_of(slot, part):
        """Refs of one tile: K's planes and scales, V's (planes of all tiles fetched together)."""
        now = [tile.at[slot] for tile in tiles]
        k_tiles, k_scale, v_tiles, v_scale = (
            now[:key_planes],
            now[key_planes],
            now[key_planes + 1 : -1],
            now[-1],
        )
        if tiles_at_once > 1:
            sizes = [tile.shape[0] // tiles_at_once for tile in k_tiles]
            k_tiles = [
                tile.at[part * n : (part + 1) * n] for tile, n in zip(k_tiles, sizes, strict=True)
            ]
        if pages_at_once == 1:
            here = slice(part * TILE, (part + 1) * TILE)
            k_scale, v_scale = k_scale.at[0, here], v_scale.at[0, here]
        return k_tiles, k_scale, v_tiles, v_scale

    def step(i, carry):
        state, ahead, slot = carry
        plgpu.barrier_wait(ready.at[slot])

        def refill():
            # All warps hold these codes in registers now: their slot is free.
            @pl.when(i + stages < last)
            def _():
                fetch(ahead, slot)

            return pages_of(jnp.minimum(i + stages + 1, last - 1))

        for part in range(tiles_at_once - 1):
            state, _ = tile_step(i, part, slot, state, lambda: None)
        state, ahead = tile_step(i, tiles_at_once - 1, slot, state, refill)
        slot = jnp.where(slot + 1 == stages, 0, slot + 1)
        return state, ahead, slot

    state = (
        full((d, rows), 0.0),
        full((TILE, rows), 0.0),
        full((rows,), LOWEST, plgpu.Layout.WGMMA.reduce(0)),
        jnp.float32(1),
    )
    ahead = pages_of(jnp.maximum(jnp.minimum(first + stages, last - 1), 0))
    state = lax.fori_loop(first, last, step, (state, ahead, 0))[0]
    acc, total, shift, per_unit = state
    total = column(jnp.sum(total, axis=0))
    scaled = acc * along_columns(1 / (jnp.maximum(total, 1e-30) * per_unit), d)
    store_result(out.at[batch, head, split], scaled, interpret)
    store_row(lse.at[batch, head, split], shift + jnp.log2(total), interpret)
