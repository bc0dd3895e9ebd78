"""What the decode kernels for Hopper and Blackwell share: the launch, and what a thread block does.

A block has a split of the packed tokens of one sequence and KV head. Pages arrive in shared memory
through TMA, a few fetches ahead. The block of split 0 also attends to sinks and ring (`exact`), and
has fewer pages for it.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array

from pallas_kernels.cache import KVCache
from pallas_kernels.format import KVFormat
from pallas_kernels.mosaic import exact, levels
from pallas_kernels.mosaic.exact import LOWEST, TILE, capped
from pallas_kernels.mosaic.tiles import (
    along_columns,
    along_rows,
    lines,
    rotation_matrix,
    store_result,
    store_row,
)


SHARED_MEMORY = 224 * 1024  # of a multiprocessor, less what it keeps of four blocks for itself
# Packed tokens, of a few bits, that take as long as a token of sinks and ring.
_PACKED_PER_EXACT = 4


@dataclass(frozen=True)
class Options:
    """What is known when a kernel is compiled. at_once: tokens of a fetch; stages: fetches ahead.

    The others: as in `decode_hopper.attention_parts`.
    """

    fmt: KVFormat
    factor: float
    soft_cap: float | None
    sliding_window: int | None
    interpret: bool
    at_once: int
    stages: int
    splits: int


class Pages(NamedTuple):
    """Codes, plane by plane, and scales: of the pool of pages, or of `stages` fetches of them."""

    k: tuple
    k_scale: Any
    v: tuple
    v_scale: Any

    def each(self) -> tuple:
        return (*self.k, self.k_scale, *self.v, self.v_scale)

    def of(self, slot) -> "Pages":
        """One fetch's refs."""
        k, v = (tuple(x.at[slot] for x in planes) for planes in (self.k, self.v))
        return Pages(k, self.k_scale.at[slot], v, self.v_scale.at[slot])


class Inputs(NamedTuple):
    """What a kernel reads in global memory, as arrays and then as refs.

    q: the sum of its parts; recent, sinks: keys and values; sinks, offset: None without them.
    """

    lengths: Any
    table: Any
    tables: Any  # `levels.both_tables`
    rotation: Any  # of queries, times the root of head_dim
    q: tuple
    pool: Pages
    recent: tuple
    sinks: tuple | None
    offset: Any


def pool(cache: KVCache) -> Pages:
    return Pages(lines(cache.k_planes), cache.k_scale, lines(cache.v_planes), cache.v_scale)


def fetched(cache: KVCache, stages: int, at_once: int) -> tuple[Pages, int]:
    """Shapes and dtypes of what takes `stages` fetches in shared memory, and its bytes."""
    page_size = cache.fmt.page_size
    pages = at_once // page_size

    def of(x):
        if x.ndim == 4:
            shape = (stages, pages * x.shape[2], x.shape[3])
        else:
            # TMA writes to multiples of 128 bytes: each page's scales get a line of their own.
            shape = (stages, pages, max(64, page_size))
        return jax.ShapeDtypeStruct(shape, x.dtype)

    tiles = jax.tree.map(of, pool(cache))
    return tiles, sum(x.size * x.dtype.itemsize for x in tiles.each())


def launch(
    kernel: Callable,
    options: Options,
    q_parts: tuple[Array, ...],
    cache: KVCache,
    order: np.ndarray,
    parts: int,
    scratch_types: tuple,
) -> tuple[Array, Array]:
    """kernel(options, Inputs, outputs, sums of exponentials, *scratch), in each block.

    order: of the coordinates of a rotated query; parts: of the outputs that are of pages.
    """
    fmt = cache.fmt
    batch, heads, rows, d = q_parts[0].shape
    rotation = np.sqrt(d) * rotation_matrix(d, fmt.seed).T[order]
    return plgpu.kernel(
        functools.partial(kernel, options),
        out_type=(
            jax.ShapeDtypeStruct((batch, heads, parts + 1, d, rows), jnp.float32),
            jax.ShapeDtypeStruct((batch, heads, parts + 2, rows), jnp.float32),
        ),
        scratch_types=scratch_types,
        grid=(batch, heads, options.splits),
        grid_names=("batch", "head", "split"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if options.interpret else None,
    )(
        Inputs(
            cache.lengths,
            cache.page_table,
            levels.both_tables(fmt),
            jnp.asarray(np.round(rotation), jnp.bfloat16),
            q_parts,
            pool(cache),
            (cache.recent_k, cache.recent_v),
            (cache.sink_k, cache.sink_v) if fmt.sinks else None,
            cache.key_offset if fmt.key_offset else None,
        )
    )


@dataclass(frozen=True)
class Block:
    """A thread block: first, last: its fetches; pages, packed: pages and tokens of the sequence.

    tiles: where fetches go, `ready`: the barriers that say so; oldest: position of the first token
    to attend to, None for all.
    """

    options: Options
    given: Inputs
    tiles: Pages
    ready: Any
    batch: Any
    head: Any
    split: Any
    pages: Any
    packed: Any
    oldest: Any
    first: Any
    last: Any

    def pages_of(self, i):
        """The pages of fetch i; beyond the last page it again, whose tokens are masked."""
        count = self.options.at_once // self.options.fmt.page_size
        if count == 1:
            return (self.given.table[self.batch, i],)
        last = jnp.maximum(self.pages - 1, 0)
        return tuple(
            self.given.table[self.batch, jnp.minimum(i * count + j, last)] for j in range(count)
        )

    def start(self, q_parts, q_ready):
        """Brings the queries to q_parts, and starts the first fetches."""
        for part, part_s in zip(self.given.q, q_parts, strict=True):
            plgpu.copy_gmem_to_smem(part.at[self.batch, self.head], part_s, q_ready)
        for slot in range(self.options.stages):

            @pl.when(self.first + slot < self.last)
            def _(slot=slot):
                self.fetch(self.pages_of(self.first + slot), slot)

        plgpu.barrier_wait(q_ready)

    def fetch(self, pages, slot):
        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                for j, page in enumerate(pages):
                    for plane, tile in zip(self.given.pool.each(), self.tiles.each(), strict=True):
                        n = plane.shape[2]
                        if len(plane.shape) == 3:
                            here = tile.at[slot, j, :n]
                        else:
                            here = tile.at[slot, j * n : (j + 1) * n]
                        source = plane.at[page, self.head]
                        plgpu.copy_gmem_to_smem(source, here, self.ready.at[slot])

    def offset(self, q_parts):
        """What the key offset adds to the scores of each query."""
        vector = self.given.offset.at[self.batch, self.head]
        return exact.products(q_parts, vector, self.options.interpret) * self.options.factor

    def attend_exactly(self, q_parts, tile, arrived, p_parts, out, lse, matmul):
        """In the block of split 0: to sinks and ring, the last part of the result."""
        options, given, part = self.options, self.given, out.shape[2] - 1

        @pl.when(self.split == 0)
        def _():
            recent, sinks = (
                x and [y.at[self.batch, self.head] for y in x] for x in (given.recent, given.sinks)
            )
            result, result_lse = exact.attend(
                q_parts,
                sinks,
                recent,
                given.lengths[self.batch],
                self.packed,
                options.factor,
                tile,
                arrived,
                p_parts,
                options.interpret,
                options.soft_cap,
                self.oldest,
                matmul,
            )
            store_result(out.at[self.batch, self.head, part], result, options.interpret)
            store_row(lse.at[self.batch, self.head, part], result_lse, options.interpret)
            if given.offset is not None and options.soft_cap is None:
                added = self.offset(q_parts)
                store_row(lse.at[self.batch, self.head, part + 1], added, options.interpret)

    def finished(self, s, offset, tokens, i, part=0):
        """Scores [tokens, queries]: with the offset's, capped, LOWEST where there is no token.

        tokens: `levels.tokens` or its like, of this part of fetch i.
        """
        options, fmt = self.options, self.options.fmt
        m, rows = s.shape
        if offset is not None:
            s = s + along_columns(offset, m)
        if options.soft_cap is not None:
            s = capped(s, options.soft_cap)
        if self.oldest is not None or fmt.page_size < options.at_once:
            token = tokens(fmt.value_bits, interpret=options.interpret)
            token += (i * options.at_once + part * m).astype(jnp.float32)
            outside = token >= self.packed.astype(jnp.float32)
            if self.oldest is not None:
                outside |= token < (self.oldest - fmt.sinks).astype(jnp.float32)
            s = s + along_rows(jnp.where(outside, LOWEST, 0.0), rows)
        return s


def block(options: Options, given: Inputs, tiles: Pages, ready) -> Block:
    """This one."""
    fmt, at_once = options.fmt, options.at_once
    batch, head, split = (lax.axis_index(name) for name in ("batch", "head", "split"))
    # A sequence that overflowed gives NaN later; here it must stay within its table.
    pages = jnp.maximum(given.lengths[batch] - fmt.sinks - fmt.window, 0) // fmt.page_size
    pages = jnp.minimum(pages, given.table.shape[1])
    packed = pages * fmt.page_size
    start, fetches, oldest = 0, (packed + at_once - 1) // at_once, None
    if options.sliding_window is not None:
        oldest = given.lengths[batch] - options.sliding_window
        start = jnp.minimum(jnp.maximum(oldest - fmt.sinks, 0) // at_once, fetches)
    as_fetches = -(-fmt.ring_slots // TILE) * _PACKED_PER_EXACT * TILE // at_once

    def fetch_of(split):
        of_all = (fetches - start + as_fetches) * split // options.splits - as_fetches
        return start + jnp.maximum(of_all, 0)

    first, last = fetch_of(split), fetch_of(split + 1)
    return Block(
        options, given, tiles, ready, batch, head, split, pages, packed, oldest, first, last
    )
