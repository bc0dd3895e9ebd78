"""The functions of `lanes` over numpy arrays of 128, the threads of a warpgroup, in step.

For interpretation on a machine without a GPU. A barrier is then nothing to wait for, and a branch
runs in all threads, with its stores where the condition holds. Arrays in memory are numpy's.
"""

import contextlib
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np


THREADS = 128
_conditions = [np.ones(THREADS, bool)]  # of the branches that are being run


@dataclass(frozen=True)
class _Place:
    """A byte of one of several arrays, for each thread."""

    arrays: tuple[np.ndarray, ...]  # bytes
    which: np.ndarray
    offset: np.ndarray


def word(x: int):
    return np.full(THREADS, x & 0xFFFFFFFF, np.uint32)


def real(x: float):
    return np.full(THREADS, x, np.float32)


def thread():
    return np.arange(THREADS, dtype=np.uint32)


def less(a, b):
    b = b if isinstance(b, np.ndarray) else word(b)
    return a.view(np.int32) < b.view(np.int32)


def between(x, low, high):
    return (x > np.float32(low)) & (x < np.float32(high))


def select(condition, a, b):
    if not isinstance(a, _Place):
        return np.where(condition, a, b)
    which = np.where(condition, a.which, b.which + len(a.arrays))
    return _Place(a.arrays + b.arrays, which, np.where(condition, a.offset, b.offset))


larger = np.maximum


def bits(x):
    return x.view(np.uint32)


def from_bits(x):
    return x.view(np.float32)


def to_float(x):
    return x.astype(np.float32)


def fma(a, b, c):
    return (a.astype(np.float64) * b + c).astype(np.float32)


def rsqrt(x):
    return np.float32(1) / np.sqrt(x)


def reciprocal(x):
    return np.float32(1) / x


def _join(low, high):
    return low.astype(np.uint32) | high.astype(np.uint32) << 16


def halves_toward_zero(low, high):
    def half(x):
        near = x.astype(np.float16)
        over = np.abs(near.astype(np.float32)) > np.abs(x)
        return near.view(np.uint16) - over.astype(np.uint16)

    return _join(half(low), half(high))


def halves_at_least(x, limit):
    return np.where(x.view(np.float16) >= np.float16(limit), 0xFFFF, 0).astype(np.uint16).view("u4")


def add_halves_saturated(x, y):
    x, y = (x.view(np.float16).astype(np.float64) for x in (x, y))
    return np.clip(x + y, 0, 1).astype(np.float16).view(np.uint32)


def add_halves(x, y):
    return (x.view(np.float16) + y.view(np.float16)).view(np.uint32)


def bfloats(low, high):
    return _join(*(x.astype(jnp.bfloat16).view(np.uint16) for x in (low, high)))


def float_of_half(x):
    return x.astype(np.uint16).view(np.float16).astype(np.float32)


def e4m3s(low, high):
    low, high = (x.astype(jnp.float8_e4m3fn).view(np.uint8).astype("u4") for x in (low, high))
    return low | high << 8


def halves_of_e4m3s(x):
    both = x.astype(np.uint16).view(jnp.float8_e4m3fn).astype(np.float16)
    return both.view(np.uint32)


def permute(a, b, selector):
    source = np.stack([a, b], -1).view(np.uint8)  # [threads, 8]
    selector = selector if isinstance(selector, np.ndarray) else word(selector)
    chosen = np.stack([selector >> 4 * i & 7 for i in range(4)], -1)
    return np.take_along_axis(source, chosen, 1).view(np.uint32)[:, 0]


def dot_bytes(a, b, c):
    products = a.view(np.uint8).astype(np.uint32) * b.view(np.uint8)
    return c + products.reshape(-1, 4).sum(1, dtype=np.uint32)


def exchange(x, distance):
    return x[np.arange(THREADS) ^ distance]


def any_in_warp(condition):
    return np.repeat(condition.reshape(-1, 32).any(1), 32)


def multiply_add(a, b, c):
    lane = np.arange(32)
    row, column = lane // 4, lane % 4 * 2

    def bfloat(x):
        return (np.stack([x << 16, x & np.uint32(0xFFFF0000)], -1).view(np.float32)).astype(float)

    out = [np.empty(THREADS, np.float32) for _ in range(4)]
    for warp in range(0, THREADS, 32):
        here = slice(warp, warp + 32)
        left, right = np.empty((16, 16)), np.empty((16, 8))
        for i in range(4):
            values = bfloat(a[i][here])
            for j in range(2):
                left[row + i % 2 * 8, column + i // 2 * 8 + j] = values[:, j]
                if i < 2:
                    right[column + 8 * i + j, row] = bfloat(b[i][here])[:, j]
        product = left @ right
        for i in range(4):
            out[i][here] = product[row + i // 2 * 8, column + i % 2] + c[i][here]
    return out


def barrier():
    pass


barrier_of_block = barrier


def forget():
    pass


@contextlib.contextmanager
def when(condition):
    _conditions.append(_conditions[-1] & condition)
    yield
    _conditions.pop()


def either(condition, f, g):
    with when(condition):
        first = f()
    with when(~condition):
        second = g()
    return [np.where(condition, a, b) for a, b in zip(first, second, strict=True)]


def until(body, count):
    first, again = body(word(0))
    if not any_in_warp(again).any():
        return first
    second, _ = body(word(1))
    return [np.where(any_in_warp(again), b, a) for a, b in zip(first, second, strict=True)]


def shape(ref):
    return ref.shape


def address(ref, row, row_bytes, offset=0):
    place = row.view(np.int32).astype(np.int64) * row_bytes + offset
    return _Place((ref.reshape(-1).view(np.uint8),), np.zeros(THREADS, int), place)


def further(place, offset):
    return _Place(place.arrays, place.which, place.offset + offset)


def load(place, count):
    out = [np.zeros(THREADS, np.uint32) for _ in range(count)]
    for i, array in enumerate(place.arrays):
        here = _conditions[-1] & (place.which == i)
        words = array.view(np.uint32)
        for j in range(count):
            out[j][here] = words[place.offset[here] // 4 + j]
    return out


def store(place, words):
    here = _conditions[-1]
    for i, x in enumerate(words):
        place.arrays[0].view(np.uint32)[place.offset[here] // 4 + i] = x.view(np.uint32)[here]


def store_half(place, x):
    here = _conditions[-1]
    place.arrays[0].view(np.uint16)[place.offset[here] // 2] = x[here].astype(np.uint16)
