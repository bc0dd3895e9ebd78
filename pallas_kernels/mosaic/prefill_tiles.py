"""What producer warpgroups of the prefill kernels do: bring tiles of K and V to shared memory.

Of packed tokens the codes come through TMA; they are decoded in registers, scaled (half an
instruction an element) and written as float16, laid out for the tensor cores. Dense tiles come
through TMA as they are.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

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
class Side:
    """The keys, or the values, of one sequence and KV head: where they are and where they go.

    In global memory: planes, of all pages [pages, lines, 128]; scale, of the packed vectors
    [packed]; dense, keys [dense, d] or values [d, dense]. table: the words of `levels.tables`.

    In shared memory, with an axis of stages in front: codes [lines, 128] and scales [tile] of a
    tile, and the barrier that says that they are there; tiles, keys [tile, d] or values [d, tile],
    with one barrier that says so and one that they have been read. used: places of tiles that were
    taken before the first tile.
    """

    kind: Literal["keys", "values"]
    planes: list
    codes: Any
    table: tuple
    scale: Any
    dense: Any
    scales: Any
    codes_ready: Any
    tiles: Any
    ready: Any
    read: Any
    used: int = 0

    def free(self, use):
        """The place for this use, once those who read what was there before have done so."""
        stages = self.tiles.shape[0]
        slot = lax.rem(use + self.used, stages)

        @pl.when(use + self.used >= stages)
        def _():
            plgpu.barrier_wait(self.read.at[slot])

        return slot


def both_sides(fmt: KVFormat, words, planes, codes, *pairs, used: int = 0) -> tuple[Side, Side]:
    """Keys and values. words, planes, codes: of both, one after the other; pairs: the rest."""
    n = len(plane_bits(fmt.key_bits))
    of_keys, of_values = zip(*pairs, strict=True)
    return (
        Side("keys", planes[:n], codes[:n], words[:2], *of_keys, used=used),
        Side("values", planes[n:], codes[n:], words[2:], *of_values),
    )


def produce_tiles(fmt: KVFormat, pages, span, sides: Sequence[Side], interpret):
    """Fills the tiles span[0] to span[2] of each side, those before span[1] packed.

    pages: of the sequence.
    """
    start, packed, end = span
    packed_end = jnp.minimum(packed, end)
    code_stages, tile = sides[0].scales.shape
    pages_at_once, cut = max(1, tile // fmt.page_size), max(1, fmt.page_size // tile)

    def pages_of(i):
        ids = [i // cut * pages_at_once + j for j in range(pages_at_once)]
        return tuple(pages[jnp.minimum(j, pages.shape[0] - 1)] for j in ids)

    def packed_tile(i, ids):
        """ids: the pages of the tile that is fetched next, read one tile before."""
        code, ahead = lax.rem(i - start, code_stages), i + code_stages
        following = pages_of(ahead + 1)
        for side in sides:
            slot = side.free(i - start)
            plgpu.barrier_wait(side.codes_ready.at[code])
            decode = _decode_keys if side.kind == "keys" else _decode_values
            decode(side, fmt, i, code, slot, interpret)
            plgpu.commit_smem()
            plgpu.barrier_arrive(side.ready.at[slot])

            # All warps have read these codes.
            @pl.when(ahead < packed_end)
            def _(side=side):
                _fetch(side, fmt, ids, ahead, code)

        return following

    def dense_tile(i, _):
        for side in sides:
            slot = side.free(i - start)
            here = pl.ds((i - packed) * tile, tile)
            source = side.dense.at[here] if side.kind == "keys" else side.dense.at[:, here]
            plgpu.copy_gmem_to_smem(source, side.tiles.at[slot], side.ready.at[slot])

    for ahead in range(code_stages):

        @pl.when(start + ahead < packed_end)
        def _(i=start + ahead, code=ahead):
            for side in sides:
                _fetch(side, fmt, pages_of(i), i, code)

    lax.fori_loop(start, packed_end, packed_tile, pages_of(start + code_stages))
    lax.fori_loop(jnp.maximum(start, packed), end, dense_tile, None)


def _fetch(side: Side, fmt: KVFormat, ids, i, code):
    """Starts to copy tile i's codes, of these pages, and its scales."""
    tile, cut = side.scales.shape[1], max(1, fmt.page_size // side.scales.shape[1])

    @plgpu.warp_map
    def _(warp):
        @pl.when(warp == 0)
        def _():
            ready = side.codes_ready.at[code]
            for j, page in enumerate(ids):
                for source, to in zip(side.planes, side.codes, strict=True):
                    n = to.shape[1] // len(ids)
                    source = source.at[page]
                    if side.kind == "keys" and cut > 1:  # the lines of these tokens alone
                        source = source.at[pl.ds(lax.rem(i, cut) * n, n)]
                    plgpu.copy_gmem_to_smem(source, to.at[code, j * n : (j + 1) * n], ready)
            source = side.scale.at[pl.ds(i * tile, tile)]
            plgpu.copy_gmem_to_smem(source, side.scales.at[code], ready)


def _decode_keys(side: Side, fmt: KVFormat, i, code, slot, interpret):
    del i
    tile, d = side.tiles.shape[1:]
    width = min(d, 128)  # as few registers at a time as can be
    for part in range(tile // PART):
        here = slice(part * PART, (part + 1) * PART)
        scale = _load(side.scales.at[code, here], 1, interpret)
        for column in range(0, d, width):
            only = slice(column, column + width)
            x = levels.load_levels(
                _part_of(side.codes, code, part, tile // PART),
                side.table,
                fmt.key_bits,
                PART,
                d,
                rows_of=fmt.value_bits,
                columns=only,
                interpret=interpret,
            )
            side.tiles.at[slot, here, only][...] = x * along_rows(scale, width)


def _decode_values(side: Side, fmt: KVFormat, i, code, slot, interpret):
    d, tile = side.tiles.shape[1:]
    for part in range(tile // PART):
        if fmt.page_size <= PART:
            refs, number = _part_of(side.codes, code, part, tile // PART), 0
        else:
            cut = max(1, fmt.page_size // tile)
            refs, number = [ref.at[code] for ref in side.codes], part + lax.rem(i, cut)
        here = slice(part * PART, (part + 1) * PART)
        scale = _load(side.scales.at[code, here], 0, interpret)
        for row in range(0, d, PART):  # as few registers at a time as can be
            only = slice(row, row + PART)
            x = levels.load_levels(
                refs,
                side.table,
                fmt.value_bits,
                d,
                PART,
                page_size=fmt.page_size,
                part=number,
                only=only,
                interpret=interpret,
            )
            side.tiles.at[slot, only, here][...] = x * along_columns(scale, PART)


def _part_of(codes, code, part: int, parts: int):
    """The codes of one part of a tile, where parts lie one after another."""
    sizes = [ref.shape[1] // parts for ref in codes]
    return [ref.at[code, part * n : (part + 1) * n] for ref, n in zip(codes, sizes, strict=True)]


def _load(ref, axis: int, interpret):
    """float16 ref [n] in shared memory, one a row (axis 1 is reduced) or one a column (axis 0)."""
    if interpret:
        return ref[...]
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA.reduce(axis), optimized=False)
