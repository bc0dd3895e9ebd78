"""The instructions that decode codes for tcgen05, carried out by numpy for the 128 threads.

On a GPU `test_decode_blackwell` runs them as they are. Here each has its numpy equivalent, and
shared memory is swizzled as TMA swizzles it; the oracle is the codec.
"""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import codebook, packing
from pallas_kernels.mosaic import blackwell, levels, row_levels


TILE = 128
THREADS = np.arange(TILE, dtype=np.uint32)


def word(value: Any) -> Any:
    return np.asarray(value, np.int64).astype(np.uint32)


ARITH = SimpleNamespace(
    addi=lambda a, b: word(np.int64(a) + b),
    muli=lambda a, b: word(np.int64(a) * b),
    andi=lambda a, b: a & b,
    ori=lambda a, b: a | b,
    xori=lambda a, b: a ^ b,
    shli=lambda a, b: word(np.int64(a) << np.int64(b) & 0xFFFFFFFF),
    shrui=lambda a, b: a >> b,
    extui=lambda dtype, a: a,
)


def prmt(low, high, selector):
    table = np.concatenate([np.asarray([low, high], "<u4").view(np.uint8)] * 2)
    nibbles = [selector >> 4 * i & 7 for i in range(4)]
    return word(sum(table[n].astype(np.int64) << 8 * i for i, n in enumerate(nibbles)))


def load(ref, offset, dtype, alignment: int):
    """dtype: (words, bytes of one); from bytes that each thread has an offset in."""
    count, size = dtype
    offset = np.broadcast_to(offset, TILE).astype(int)
    assert not (offset % alignment).any()

    def one(at):
        return word(sum(ref[at + i].astype(np.int64) << 8 * i for i in range(size)))

    words = [one(offset + i * size) for i in range(count)]
    return words if count > 1 else words[0]


@pytest.fixture
def numpy_threads(monkeypatch):
    for module in (levels, row_levels, blackwell):
        monkeypatch.setattr(module, "arith", ARITH)
    vectors = SimpleNamespace(get=lambda shape, dtype: (shape[0], 4))
    llvm = SimpleNamespace(extractelement=lambda vector, i: vector[int(i)])
    monkeypatch.setattr(row_levels, "ir", SimpleNamespace(VectorType=vectors))
    monkeypatch.setattr(row_levels, "llvm", llvm)
    monkeypatch.setattr(row_levels, "_thread", lambda: THREADS)
    monkeypatch.setattr(row_levels, "_decode", decode)
    monkeypatch.setattr(levels, "_c", word)
    monkeypatch.setattr(levels, "_and", lambda a, mask: a & word(mask))
    monkeypatch.setattr(levels, "_add", lambda a, constant: word(np.int64(a) + constant))
    monkeypatch.setattr(levels, "_i", lambda width: (1, width // 8))
    monkeypatch.setattr(levels, "_load", load)
    monkeypatch.setattr(levels, "_prmt", prmt)


def decode(planes, layouts, table, bits: int, n: int, words):
    fours = list(levels._fours(bits, list(words(planes)), table))
    rows = np.stack(fours, 1).astype("<u4").view(np.uint8)
    return rows.reshape(TILE, n).view(jnp.float8_e4m3fn).astype(np.float32)


def in_shared_memory(plane, transforms) -> np.ndarray:
    """Lines of 128 bytes as TMA writes them: of each eight, line i has its chunks of 16 XORed."""
    lines = np.asarray(plane).reshape(-1, 8, 16)
    if transforms:
        line, chunk = np.arange(len(lines))[:, None], np.arange(8)[None]
        lines = lines[line, chunk ^ line % 8]
    return lines.reshape(-1)


@pytest.mark.usefixtures("numpy_threads")
@pytest.mark.parametrize("page_size", [16, 32, 64, 128])
@pytest.mark.parametrize("head_dim", [64, 128, 256])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_tiles_are_decoded(bits, head_dim, page_size):
    rng = np.random.default_rng(bits + head_dim)
    k, v = rng.integers(0, 2**bits, (2, TILE, head_dim)).astype(np.uint8)
    if bits == 8:  # no code is what is not a number in e4m3
        k, v = (np.where(x & 0x7F == 0x7F, 0, x).astype(np.uint8) for x in (k, v))
    pages = v.reshape(-1, page_size, head_dim).swapaxes(1, 2)
    k_planes, v_planes = packing.pack(jnp.asarray(k), bits), packing.pack(jnp.asarray(pages), bits)
    widths, page, n = packing.plane_bits(bits), head_dim * page_size, min(head_dim, TILE)
    k_layouts = [row_levels.transforms(head_dim * w // 8, page * w // 8) for w in widths]
    v_layouts = [row_levels.transforms(page_size * w // 8, page * w // 8) for w in widths]
    k_tiles = list(map(in_shared_memory, k_planes, k_layouts))
    v_tiles = list(map(in_shared_memory, v_planes, v_layouts))
    table = word(levels.tables(bits))
    tokens = row_levels.order(bits, TILE)
    np.testing.assert_array_equal(row_levels._token(bits), tokens)

    k_got = row_levels.load_keys(k_tiles, k_layouts, table, bits, head_dim, bits, interpret=False)
    k_want = np.asarray(codebook.decode(jnp.asarray(k), bits), np.float32)
    np.testing.assert_array_equal(k_got, k_want[tokens][:, row_levels.order(bits, head_dim)])
    v_want = np.asarray(codebook.decode(jnp.asarray(v), bits), np.float32).T
    v_want = np.concatenate(np.split(v_want, TILE // n, axis=1)).reshape(-1, TILE, n)
    for i, want in enumerate(v_want):
        channel = i * TILE
        got = row_levels.load_values(
            v_tiles, v_layouts, table, bits, head_dim, page_size, channel, interpret=False
        )
        np.testing.assert_array_equal(got, want[:, row_levels.order(bits, n)])


@pytest.mark.usefixtures("numpy_threads")
@pytest.mark.parametrize("by_row", [True, False])
@pytest.mark.parametrize(("m", "n"), [(128, 8), (256, 16)])
def test_parts_are_stored_where_tcgen05_reads_them(by_row, m, n):
    """[n, m] in tiles of 8 rows of 64 bytes, whose chunks of 16 are swizzled by address bits 7, 8.

    With a row a thread, or laid out as wgmma's accumulators are.
    """
    m = TILE if by_row else m
    layout = row_levels.LAYOUT if by_row else "wgmma"
    thread = blackwell._place_of_thread(layout)
    lane = THREADS.astype(int) % 32
    row = THREADS.astype(int) if by_row else THREADS.astype(int) // 32 * 16 + lane // 4
    column = np.zeros(TILE, int) if by_row else 2 * (lane % 4)
    stored = []
    for first, start in blackwell._places(layout, m, n):
        got = thread ^ word(blackwell.swizzle(blackwell.place(first, start, m)))
        x, y = column + first, row + start
        want = (x // 8 * (m // 64) + y // 64) * 512 + x % 8 * 64 + y % 64
        np.testing.assert_array_equal(got, want ^ (want >> 7 & 3) << 4)
        stored += [*got, *(got ^ word(blackwell.place(1, 0, m)))]
    assert sorted(stored) == list(range(m * n))
