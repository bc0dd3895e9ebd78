"""What a consumer warpgroup of Hopper's prefill kernel does: attention of 64 queries of a head.

It rotates them, attends to the tiles that producers bring, and rotates the output back. Rotations
take places of keys, before the first tile and after the last one.
"""

import functools
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.exact import LOWEST, capped
from pallas_kernels.mosaic.prefill_block import Options, Sources
from pallas_kernels.mosaic.prefill_tiles import Side
from pallas_kernels.mosaic.tiles import (
    along_columns,
    along_rows,
    full,
    load_columns,
    load_rows,
    load_tile,
    matmul,
    store_result,
    two_products,
    warp_any,
)


QUERIES = 64  # of a consumer: the rows of a wgmma
# How far a score, to the base 2, may lie over the one that exponentials are taken relative to.
_SLACK = 8.0
_BY_ROW = plgpu.Layout.WGMMA.reduce(1)


class Inputs(NamedTuple):
    """What the kernel reads in global memory, as arrays and then as refs.

    q_scale, out_scale: float32 [batch, kv_heads], what scores and outputs are multiplied by.
    """

    lengths: Any
    base: Any
    count: Any
    table: Any
    q_scale: Any
    out_scale: Any
    tables: Any  # `levels.tables_of_lanes`
    columns: Any  # [2, tile]: which token of a dense tile, or a packed one, each column is
    rotations: Any  # of queries and of outputs, times the root of head_dim
    place: Any  # 0, 1, ..
    q: Any
    sources: Sources
    bias: Any  # what the key offset adds to scores; None: nothing that matters


@dataclass(frozen=True)
class Work:
    """Tiles start to end, of which all queries see those from left to whole as a whole."""

    batch: Any
    head: Any  # of keys and values
    start: Any
    left: Any
    whole: Any
    end: Any
    packed: Any  # tiles from here on are dense


def pieces(head_dim: int, tile: int) -> tuple[int, int]:
    """How many places of keys a rotation takes, and how many of its rows each holds."""
    return max(1, head_dim // tile), min(head_dim, tile)


def consume(
    options: Options, given: Inputs, sides: tuple[Side, Side], work: Work, q_head, token, q_s, out
):
    """For the queries of q_head from `token` of the chunk on; q_s: [64, d], a place for them."""
    interpret = options.interpret
    keys, values = sides
    batch, head, start, end = work.batch, work.head, work.start, work.end
    stages, tile, d = keys.tiles.shape
    used, width = pieces(d, tile)
    here = pl.ds(token, QUERIES)
    bias = None if given.bias is None else load_rows(given.bias.at[batch, q_head, here], interpret)
    place = load_rows(given.place.at[here], interpret)
    position = place + given.lengths[batch].astype(jnp.float32)
    unit = _rotate_queries(given.q.at[batch, here, q_head], keys, q_s, interpret)
    scale = unit * given.q_scale[batch, head]
    softmax = _Softmax(options, given, work, tile, scale, bias, position)

    def step(i, state, masked):
        acc, total, shift, p = state
        slot = lax.rem(i - start + used, stages)
        before = lax.rem(jnp.maximum(i - 1, start) - start, stages)
        plgpu.barrier_wait(keys.ready.at[slot])

        def weigh(s):
            plgpu.barrier_arrive(keys.read.at[slot])
            return softmax.step(i, s, total, shift, masked)

        def wait_for_values():
            @pl.when(i > start)
            def _():
                plgpu.barrier_wait(values.ready.at[lax.rem(i - start, stages)])

        def values_read():
            @pl.when(i > start)
            def _():
                plgpu.barrier_arrive(values.read.at[before])

        # The softmax of this tile goes on beside the product of the one before with V. (Waiting
        # for V between the two keeps ptxas from moving the softmax behind both products.)
        acc, p, total, shift, down, over = two_products(
            (q_s, keys.tiles.at[slot]),
            (p, values.tiles.at[before], acc),
            weigh,
            wait_for_values,
            values_read,
            at_once=not masked and d < 256,  # the others have no register left
            interpret=interpret,
        )
        acc = lax.cond(over != 0, lambda x: x * along_rows(down, d), lambda x: x, acc)
        return acc, total, shift, p.astype(jnp.float16)

    state = (
        full((QUERIES, d), 0.0),
        full((QUERIES,), 0.0, _BY_ROW),
        full((QUERIES,), LOWEST, _BY_ROW),
        full((QUERIES, tile), 0.0).astype(jnp.float16),  # times the first V, which is finite
    )
    plgpu.barrier_wait(values.ready.at[0])
    masked, unmasked = (functools.partial(step, masked=x) for x in (True, False))
    if not interpret:  # or ptxas keeps two of each, the known zeros and what they become
        state = lax.optimization_barrier(state)
    if options.sliding_window is not None:
        state = lax.fori_loop(start, work.left, masked, state)
    state = lax.fori_loop(work.left, work.whole, unmasked, state)
    state = lax.fori_loop(work.whole, end, masked, state)
    acc, total, _, p = state
    slot = lax.rem(end - 1 - start, stages)
    acc = matmul(p, values.tiles.at[slot], interpret, acc)
    plgpu.barrier_arrive(values.read.at[slot])
    exists = along_rows(place, width) < full(
        (QUERIES, width), given.count[batch].astype(jnp.float32)
    )

    def store_out(columns, x):
        x = x * given.out_scale[batch, head]
        x = jnp.where(exists, x, full((QUERIES, width), 0.0))
        to = out.at[batch, here, q_head, columns]
        store_result(to, x.astype(out.dtype), interpret)

    result = (acc * along_rows(1 / total, d)).astype(jnp.float16)
    _rotated([result], keys, end - start + used, store_out, interpret)


def _rotated(parts, keys: Side, use, store, interpret):
    """Hands `store` the columns of the sum of parts, rotated, a few at a time.

    use: of the places of keys, the rotation's first.
    """
    stages, tile, d = keys.tiles.shape
    number, width = pieces(d, tile)
    for piece in range(number):
        slot = lax.rem(use + piece, stages)
        plgpu.barrier_wait(keys.ready.at[slot])
        x = None
        for part in parts:
            x = matmul(part, keys.tiles.at[slot, :width], interpret, x)
        plgpu.barrier_arrive(keys.read.at[slot])
        store(slice(piece * width, (piece + 1) * width), x)


def _rotate_queries(q, keys: Side, q_s, interpret):
    """Writes q, in units of each query's largest coordinate, rotated to q_s; returns the units."""
    x = load_tile(q, interpret)
    unit = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1)
    unit = jnp.where(unit == 0, 1.0, unit)
    if not interpret:  # x is not to wait in float32
        x, unit = lax.optimization_barrier((x, unit))
    x = x.astype(jnp.float32) * along_rows(1 / unit, q_s.shape[1])
    parts = [x.astype(jnp.float16)]
    if jnp.dtype(q.dtype).itemsize > 2:
        parts.append((x - parts[0].astype(jnp.float32)).astype(jnp.float16))

    def store(columns, x):
        q_s.at[:, columns][...] = x.astype(jnp.float16)

    _rotated(parts, keys, jnp.int32(0), store, interpret)
    plgpu.commit_smem()
    return unit


@dataclass(frozen=True)
class _Softmax:
    """Online, of queries at `position`, from scores that lack their scale and bias."""

    options: Options
    given: Inputs
    work: Work
    tile: int
    scale: Any
    bias: Any
    position: Any

    def visible(self, i):
        """Which tokens of tile i each query attends to, bool [queries, tokens]."""
        sinks, window = self.options.fmt.sinks, self.options.sliding_window
        is_packed = (i < self.work.packed).astype(jnp.int32)
        token = load_columns(self.given.columns.at[is_packed], self.options.interpret)
        token += (i * self.tile + sinks * is_packed).astype(jnp.float32)
        if window is not None and sinks:
            after = token - self.given.base[self.work.batch].astype(jnp.float32)
            sink = (after < sinks) & (is_packed == 0)
            token = jnp.where(sink, after, token)
        tokens = along_columns(token, QUERIES)
        seen = tokens <= along_rows(self.position, self.tile)
        if window is not None:
            seen &= tokens > along_rows(self.position - window, self.tile)
        return seen

    def step(self, i, s, total, shift, masked):
        """p of tile i, total and shift with it, and what moves earlier results to that shift.

        By as much as `down`, a row, and not at all where `over` is 0.
        """
        tile, scale, soft_cap = self.tile, self.scale, self.options.soft_cap
        plain = not masked and soft_cap is None
        if plain:  # scaled below, in the same instruction that subtracts the shift
            top = jnp.max(s, axis=1) * scale
        else:
            s = s * along_rows(scale, tile)
            if self.bias is not None:
                s = s + along_rows(self.bias, tile)
            if soft_cap is not None:
                s = capped(s, soft_cap)
            if masked:
                s = jnp.where(self.visible(i), s, full((QUERIES, tile), LOWEST))
            top = jnp.max(s, axis=1)

        def adapt(total, shift):
            raised = jnp.maximum(shift, top)
            down = jnp.exp2(shift - raised)
            return total * down, raised, down

        over = warp_any(top - shift, _SLACK, self.options.interpret)
        total, shift, down = lax.cond(
            over != 0, adapt, lambda *x: (*x, full((QUERIES,), 1.0, _BY_ROW)), total, shift
        )
        if plain:
            s = s * along_rows(scale, tile)
        p = jnp.exp2(s - along_rows(shift, tile))
        total = total + jnp.sum(p, axis=1)
        return p, total, shift, down, over
