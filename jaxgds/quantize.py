"""FP8 weights: e4m3 numbers with one float32 scale per output channel.

    weight ~ quantised * scale,    scale = max |weight| of the channel / 448

Beside `weight` lies `weight_scale`, of size 1 in the dimension that is summed over, so that the
product above broadcasts; compressed-tensors, the format of many FP8 models on Hugging Face, has the
same names and shapes.

Plain numpy, on a part of a tensor at a time. On float32 input the quantised numbers were those of
Qwix 0.1.8 (`qarray.quantize`, e4m3fn, channel-wise), and the scales the same within one unit in
the last place. Qwix itself does not fit here: it takes whole `jax.Array`s, so a tensor would have
to be on a device at once, and of bf16 weights it makes bf16 scales, off by up to 0.4 %.
"""

import itertools
import math
from collections.abc import Callable, Sequence
from concurrent.futures import Executor

import ml_dtypes
import numpy as np


FP8 = np.dtype(ml_dtypes.float8_e4m3fn)
LARGEST = np.float32(448)  # of e4m3fn, which has no infinity
type Rows = tuple[slice, ...]
_SMALLEST_SCALE = np.sqrt(np.finfo(np.float32).tiny)  # channels of zeros get the scale 1


class NotFiniteError(ValueError):
    """There is a number that is not finite, which no scale could represent."""


def channel_maxima(x: np.ndarray, contract: int) -> np.ndarray:
    """Largest magnitude along the dimension `contract`, which is kept with size 1, as float32.

    Raises:
      NotFiniteError: of an infinity or NaN.
    """
    largest = np.abs(x.astype(np.float32)).max(axis=contract, keepdims=True)
    if not np.isfinite(largest).all():
        raise NotFiniteError("it has numbers that are not finite")
    return largest


def scales(maxima: np.ndarray) -> np.ndarray:
    """The scales of channels whose largest magnitudes are `maxima`."""
    scale = maxima / LARGEST
    return np.where(scale < _SMALLEST_SCALE, np.float32(1), scale)


def encode(x: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """`x / scale` rounded to nearest even; `scale` broadcasts against `x`."""
    return np.clip(x.astype(np.float32) / scale, -LARGEST, LARGEST).astype(FP8)


def quantize(x: np.ndarray, contract: int) -> tuple[np.ndarray, np.ndarray]:
    """`x` in FP8, and the scales of its channels, with size 1 in the dimension `contract`."""
    scale = scales(channel_maxima(x, contract))
    return encode(x, scale), scale


def in_parts[T](
    work: Callable[[Rows], T], shape: Sequence[int], axis: int, pool: Executor
) -> list[T]:
    """`work` on slices of about a million elements of an array, along `axis`, several at once.

    numpy lets go of the interpreter lock meanwhile.
    """
    count = max(1, min(shape[axis], math.prod(shape) >> 20))
    cuts = [shape[axis] * i // count for i in range(count + 1)]
    parts = [(slice(None),) * axis + (slice(a, b),) for a, b in itertools.pairwise(cuts)]
    return list(pool.map(work, parts))
