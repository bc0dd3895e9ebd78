"""What one warpgroup of the prefill kernels does: bring the tiles of K and V to shared memory.

Of packed tokens the codes come through TMA; they are decoded in registers, scaled (half an
instruction an element) and written as float16, laid out for the tensor cores. Dense tiles come
through TMA as they are.
"""

from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.format import KVFormat
from pallas_kernels.mosaic import levels
from pallas_kernels.mosaic.tiles import along_columns, along_rows
from pallas_kernels.packing import plane_bits


PART = 64  # tokens, or channels, that are decoded at a time


@dataclass(frozen=True)
class Sources:
    """What is read from global memory, of one sequence and KV head.

    planes: of all pages [pages, lines, 128]; scales: of the packed keys and values, float16
    [packed]; k [dense, d], v [d, dense]: float16.
    """

    planes: list
    scales: list
    k: Any
    v: Any


@dataclass(frozen=True)
class Tiles:
    """Shared memory, all with an axis of stages in front, and its barriers.

    codes [lines, 128]: of a tile; scales [tile]; k [tile, d], v [d, tile]; k_read, v_read: arrived
    at by those who have read a tile.
    """

    codes: Any
    scales: Any
    codes_ready: Any
    k: Any
    v: Any
    k_ready: Any
    v_ready: Any
    k_read: Any
    v_read: Any


def produce_tiles(fmt: KVFormat, tables, pages, span, sources, tiles, interpret):
    """Fills the tiles span[0] to span[2], those before span[1] packed.

    tables: the words of `levels.tables` of keys and values; pages: of the sequence.
    """
    start, packed, end = span
    stages, tile, d = tiles.k.shape
    code_stages = tiles.codes[0].shape[0]
    parts = tile // PART
    key_planes = len(plane_bits(fmt.key_bits))
    pages_at_once, cut = max(1, tile // fmt.page_size), max(1, fmt.page_size // tile)
    k_table, v_table = tables[:2], tables[2:]
    packed_end = jnp.minimum(packed, end)

    def slot_of(i, of=stages):
        return lax.rem(i - start, of)

    def fetch(i):
        slot = slot_of(i, code_stages)
        ids = [pages[i // cut * pages_at_once + j] for j in range(pages_at_once)]

        @plgpu.warp_map
        def _(warp):
            @pl.when(warp == 0)
            def _():
                ready = tiles.codes_ready.at[slot]
                for j, page in enumerate(ids):
                    for plane, (source, to) in enumerate(
                        zip(sources.planes, tiles.codes, strict=True)
                    ):
                        n = to.shape[1] // pages_at_once
                        source = source.at[page]
                        if plane < key_planes and cut > 1:
                            source = source.at[pl.ds(lax.rem(i, cut) * n, n)]
                        here = to.at[slot, j * n : (j + 1) * n]
                        plgpu.copy_gmem_to_smem(source, here, ready)
                for source, to in zip(sources.scales, tiles.scales, strict=True):
                    here = source.at[pl.ds(i * tile, tile)]
                    plgpu.copy_gmem_to_smem(here, to.at[slot], ready)

    def part_of(refs, slot, part):
        """The codes of one part of a tile, where parts lie one after another."""
        sizes = [ref.shape[1] // parts for ref in refs]
        return [ref.at[slot, part * n : (part + 1) * n] for ref, n in zip(refs, sizes, strict=True)]

    def keys_of(i, slot, code):
        for part in range(parts):
            here = slice(part * PART, (part + 1) * PART)
            x = levels.load_levels(
                part_of(tiles.codes[:key_planes], code, part),
                k_table,
                fmt.key_bits,
                PART,
                d,
                rows_of=fmt.value_bits,
                interpret=interpret,
            )
            scale = _load(tiles.scales[0].at[code, here], 1, interpret)
            tiles.k.at[slot, here][...] = x * along_rows(scale, d)

    def values_of(i, slot, code):
        for part in range(parts):
            refs = tiles.codes[key_planes:]
            if fmt.page_size <= PART:
                refs, number = part_of(refs, code, part), 0
            else:
                refs, number = [ref.at[code] for ref in refs], part + lax.rem(i, cut)
            here = slice(part * PART, (part + 1) * PART)
            scale = _load(tiles.scales[1].at[code, here], 0, interpret)
            for row in range(0, d, PART):  # as few registers at a time as can be
                only = slice(row, row + PART)
                x = levels.load_levels(
                    refs,
                    v_table,
                    fmt.value_bits,
                    d,
                    PART,
                    page_size=fmt.page_size,
                    part=number,
                    only=only,
                    interpret=interpret,
                )
                tiles.v.at[slot, only, here][...] = x * along_columns(scale, PART)

    def packed_tile(i, _):
        slot, code = slot_of(i), slot_of(i, code_stages)
        plgpu.barrier_wait(tiles.codes_ready.at[code])
        for decode, read, ready in (
            (keys_of, tiles.k_read, tiles.k_ready),
            (values_of, tiles.v_read, tiles.v_ready),
        ):
            wait_if_used(read, i)
            decode(i, slot, code)
            plgpu.commit_smem()
            plgpu.barrier_arrive(ready.at[slot])

        # All warps have read these codes.
        @pl.when(i + code_stages < packed_end)
        def _():
            fetch(i + code_stages)

    def dense_tile(i, _):
        slot, here = slot_of(i), pl.ds((i - packed) * tile, tile)
        wait_if_used(tiles.k_read, i)
        plgpu.copy_gmem_to_smem(sources.k.at[here], tiles.k.at[slot], tiles.k_ready.at[slot])
        wait_if_used(tiles.v_read, i)
        plgpu.copy_gmem_to_smem(sources.v.at[:, here], tiles.v.at[slot], tiles.v_ready.at[slot])

    def wait_if_used(read, i):
        @pl.when(i - start >= stages)
        def _():
            plgpu.barrier_wait(read.at[slot_of(i)])

    for ahead in range(code_stages):

        @pl.when(start + ahead < packed_end)
        def _(i=start + ahead):
            fetch(i)

    lax.fori_loop(start, packed_end, packed_tile, None)
    lax.fori_loop(jnp.maximum(start, packed), end, dense_tile, None)


def _load(ref, axis: int, interpret):
    """float16 ref [n] in shared memory, one a row (axis 1 is reduced) or one a column (axis 0)."""
    if interpret:
        return ref[...]
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)
