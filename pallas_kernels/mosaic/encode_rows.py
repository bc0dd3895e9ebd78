"""What a warpgroup does to encode a tile of 64 tokens of one KV head: keys, or values.

Values turn through shared memory, as one byte a code, to be packed along tokens. The program is
written once, over `ops`: `lanes` emits machine code, `lanes_numpy` computes.
"""

import numpy as np

from pallas_kernels.mosaic import encode_rotate, encode_round
from pallas_kernels.mosaic.encode_threads import TILE, Threads
from pallas_kernels.packing import plane_bits


PAD = 16  # bytes after each row of codes in shared memory, against bank conflicts


def tables(head_dim: int, seed: int, bits: tuple[int, int]) -> np.ndarray:
    """int32: those of `encode_rotate`, and of `encode_round` for the bits of keys and of values.

    Constants that are read from memory stay in registers; others would be moved there for each use.
    """
    parts = encode_rotate.tables(head_dim, seed), *map(encode_round.table, bits)
    return np.concatenate(parts).view(np.int32)


def keys(threads: Threads, warpgroup=None, offset=None) -> None:
    """Encodes a tile of keys; offset: what `key_offset` has left for the warpgroup, if any."""
    ops, fmt, arrays, d = threads.ops, threads.sizes.fmt, threads.arrays, threads.d
    bits = fmt.key_bits
    for position, active, *rotated in encode_rotate.rotated_rows(threads, warpgroup, offset):
        words, scale = encode_round.rounded(threads, True, *rotated)
        planes = encode_round.pack(ops, bits, words, threads.column)
        with ops.when(active):
            page, place = threads.page(position)
            row = page * fmt.page_size + place
            _store_scale(threads, row, scale)
            for ref, width, plane in zip(arrays.planes, plane_bits(bits), planes, strict=True):
                row_bytes = d * width // 8
                here = ops.address(ref, row, row_bytes, threads.column * (row_bytes // 4))
                if row_bytes >= 16:
                    ops.store(here, plane)
                else:  # of 16 channels' signs two threads have made a word
                    with ops.when(ops.less(threads.column & 1, 1)):
                        ops.store(here, plane)


def values(threads: Threads, warpgroup, codes) -> None:
    """Encodes a tile of values; codes: uint8 [warpgroups, TILE, head_dim + PAD], shared memory."""
    ops, fmt, arrays, d = threads.ops, threads.sizes.fmt, threads.arrays, threads.d
    bits, size = fmt.value_bits, fmt.page_size
    both = encode_rotate.rotated_rows(threads)
    ops.barrier()  # the codes of the tile before have been read
    for row, (position, active, *rotated) in zip(threads.rows, both, strict=True):
        words, scale = encode_round.rounded(threads, False, *rotated)
        row = warpgroup * TILE + row
        ops.store(ops.address(codes, row, d + PAD, threads.column * threads.quarter), words)
        with ops.when(active):
            page, place = threads.page(position)
            _store_scale(threads, page * size + place, scale)
    ops.barrier()
    run = min(size, 32)  # tokens that a thread packs, of four channels
    items = d // 4 * (TILE // run)
    for first in range(0, items, 128):
        item = threads.thread + first
        channels, token = (item % (d // 4)) * 4, item // (d // 4) * run
        position = threads.place.start + token
        active = ops.less(item, items) & ops.less(position, threads.place.end)
        with ops.when(active):
            page, place = threads.page(position)
            column = ops.address(codes, warpgroup * TILE + token, d + PAD, channels)
            rows = [ops.load(ops.further(column, i * (d + PAD)), 1)[0] for i in range(run)]
            turned = [encode_round.turn(ops, rows[i : i + 4]) for i in range(0, run, 4)]
            for i in range(4):
                row = page * d + (channels + i)
                planes = encode_round.pack(ops, bits, [x[i] for x in turned], None)
                for ref, width, plane in zip(arrays.planes, plane_bits(bits), planes, strict=True):
                    here = ops.address(ref, row, size * width // 8, place // 8 * width)
                    if run * width // 8 == 2:
                        ops.store_half(here, plane[0])
                    else:
                        ops.store(here, plane)


def recent(threads: Threads, tile) -> None:
    """Writes new tokens to the sinks and to the ring.

    Of the ring, a tile writes the slots that it alone has read; tile: its number, a word.
    """
    ops, sizes, place, d = threads.ops, threads.sizes, threads.place, threads.d
    slots, sinks = sizes.fmt.ring_slots, sizes.fmt.sinks

    def copy(condition, position, ref, row):
        with ops.when(condition & ~ops.less(position, place.length)):
            first = threads.column * threads.quarter
            words = threads.load_new(position, first, threads.quarter // 2)
            ops.store(ops.address(ref, row, d * 2, first * 2), words)

    for row in threads.rows:
        position = place.start + row
        last = place.total - 1
        mine = ops.less(tile * TILE + row, slots) & ops.less(position, place.total)
        # The newest token of this slot.
        newest = position + (last - position) // slots * slots
        copy(mine, newest, threads.arrays.recent, threads.cache_row(position % slots, slots))
        for start in range(0, sinks, TILE):
            slot = row + start
            position = slot - sinks
            mine = ops.less(slot, sinks) & ops.less(tile, 1) & ops.less(position, place.total)
            copy(mine, position, threads.arrays.sink, threads.cache_row(slot, sinks))


def _store_scale(threads: Threads, row, scale) -> None:
    ops = threads.ops
    with ops.when(ops.less(threads.column, 1)):
        here = ops.address(threads.arrays.scale, row, 2)
        ops.store_half(here, ops.bfloats(scale, scale))
