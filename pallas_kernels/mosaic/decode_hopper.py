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

What is not about tiles it has in common with Blackwell's: `decode_block`.
"""

import math
from dataclasses import replace

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, BFloat16, Float

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import exact, levels
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
from pallas_kernels.mosaic.exact import LOWEST, TILE
from pallas_kernels.mosaic.tiles import (
    along_columns,
    along_rows,
    column,
    full,
    matmul,
    publish,
    smem,
    store_result,
    store_row,
    store_transposed,
)


_REGISTERS = 64 * 1024


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
    at_once = max(TILE, fmt.page_size)
    fetches = -(-cache.page_table.shape[1] * fmt.page_size // at_once)
    if sliding_window is not None:
        fetches = min(fetches, sliding_window // at_once + 2)
    others = 2 * d * (TILE + 3 * rows) + 8 * rows * TILE
    # Of the largest pages (8 bits, 128 tokens of 256) fewer fit.
    stages = config.stages
    while stages > 1 and fetched(cache, stages, at_once)[1] + others > SHARED_MEMORY:
        stages -= 1
    tiles, used = fetched(cache, stages, at_once)
    used += others
    # Registers a thread, as compiled: see the tests of ahead-of-time compilation.
    registers = {64: 128, 128: 128, 256: 255}[d]
    if d == 128 and (rows > 8 or fmt.value_bits == 3):
        registers = 168
    resident = min(SHARED_MEMORY // used or 1, _REGISTERS // (128 * registers))
    config = replace(config, blocks=config.blocks * resident // 4)
    splits = config.splits_for(batch * heads, fetches)
    scratch_types = (
        smem((rows, d), jnp.float16),
        tuple(smem((rows, d), jnp.bfloat16) for _ in q_parts),
        smem((TILE, d), jnp.bfloat16),
        smem((2, rows, TILE), jnp.float16),
        tuple(smem((rows, TILE), jnp.bfloat16) for _ in range(2)),
        jax.tree.map(lambda x: plgpu.SMEM(x.shape, x.dtype), tiles),
        plgpu.Barrier(num_arrivals=len(q_parts)),
        plgpu.Barrier(),
        plgpu.Barrier(
            num_arrivals=at_once // fmt.page_size * len(tiles.each()), num_barriers=stages
        ),
    )
    options = Options(fmt, factor, soft_cap, sliding_window, interpret, at_once, stages, splits)
    order = levels.slots(fmt.key_bits, d)
    return launch(_kernel, options, q_parts, cache, order, splits, scratch_types)


def _kernel(
    options: Options,
    given: Inputs,
    out,
    lse,
    q_s,
    q_parts,
    dense_tile,
    p_s,
    p_parts,
    tiles: Pages,
    q_ready,
    arrived,
    ready,
):
    fmt, stages, interpret = options.fmt, options.stages, options.interpret
    rows, d = q_s.shape
    this = block(options, given, tiles, ready)
    batch, head, split, first, last = this.batch, this.head, this.split, this.first, this.last
    pages_at_once, tiles_at_once = max(1, TILE // fmt.page_size), max(1, fmt.page_size // TILE)

    this.start(q_parts, q_ready)
    q_scale = exact.rotate_queries(
        given.rotation,
        q_parts,
        options.factor / math.sqrt(d),
        dense_tile,
        arrived,
        q_s,
        interpret,
    )
    offset = None
    if options.soft_cap is not None and fmt.key_offset:
        offset = this.offset(q_parts)
    this.attend_exactly(q_parts, dense_tile, arrived, p_parts, out, lse, matmul)
    k_table, v_table = ((given.tables[i], given.tables[i + 1]) for i in (0, 2))

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
        s = this.finished(s, offset, levels.tokens, i, part)
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
        k_tiles, k_scale, v_tiles, v_scale = tiles.of(slot)
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
                this.fetch(ahead, slot)

            return this.pages_of(jnp.minimum(i + stages + 1, last - 1))

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
    ahead = this.pages_of(jnp.maximum(jnp.minimum(first + stages, last - 1), 0))
    state = lax.fori_loop(first, last, step, (state, ahead, 0))[0]
    acc, total, shift, per_unit = state
    total = column(jnp.sum(total, axis=0))
    scaled = acc * along_columns(1 / (jnp.maximum(total, 1e-30) * per_unit), d)
    store_result(out.at[batch, head, split], scaled, interpret)
    store_row(lse.at[batch, head, split], shift + jnp.log2(total), interpret)
