"""Times of calls on the first device.

Every time is of one call in a run over several copies of its input, together larger than the
device's caches. On a GPU it is what the profiler sums over the call's kernels; `wall` includes
the gaps between them. After a run of tens of thousands of kernels the profiler gives zeros: such
a time is `wall`, and says nothing of its kernels.
"""

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp


_SECONDS = 0.1  # of a run over and over: what takes longer is repeated less


def copies(total: int, nbytes: int) -> int:
    """How many inputs of `nbytes` bytes take `total` bytes together, but for the one in use."""
    return 1 + math.ceil(total / nbytes) if nbytes < total else 1


def copy_rate(repeat: int, gpu: bool) -> float:
    """Bytes per second, read plus written, of a copy that no cache holds."""
    x = jnp.zeros((256 if gpu else 16) << 20, jnp.float32)
    one = jnp.float32(1)
    measured = measure(lambda one, x: x + one, one, [(x,)], repeat, gpu)
    return 2 * x.nbytes / measured["us"] * 1e6


def measure(
    f,
    shared,
    inputs: Sequence[tuple],
    repeat: int,
    gpu: bool,
    check: Callable[[Any], Mapping[str, Any]] = lambda result: {},
) -> dict[str, Any]:
    """Medians, in microseconds a call, of f(shared, *input) over the inputs in turn.

    repeat: at most so many runs over all inputs are timed at once. check: is given what the first
    input's call returned, by the program that is timed; what it returns is put beside the times.
    """
    f = jax.jit(f)  # traced and lowered once for all inputs
    every = jax.jit(lambda shared, inputs: [f(shared, *x) for x in inputs])
    checked = check(jax.block_until_ready(every(shared, inputs))[0])
    start = time.perf_counter()
    jax.block_until_ready(every(shared, inputs))
    repeat = max(1, min(repeat, int(_SECONDS / (time.perf_counter() - start))))
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        jax.block_until_ready([every(shared, inputs) for _ in range(repeat)])
        seconds.append((time.perf_counter() - start) / repeat / len(inputs))
    wall = statistics.median(seconds) * 1e6
    if not gpu:
        return {**checked, "us": wall, "wall_us": wall}
    from jax.experimental.mosaic.gpu import profiler  # CUPTI; only on GPUs

    iterations = max(2, repeat)  # of one run it would return the run alone
    profiled: Any = profiler.measure(every, aggregate=False, iterations=iterations)
    _, runs = profiled(shared, inputs)
    per_call = [sum(ms for _, ms in run) * 1e3 / len(inputs) for run in runs]
    if not statistics.median(per_call):
        return {**checked, "us": wall, "wall_us": wall}
    kernels: dict[str, float] = {}
    for name, ms in runs[len(runs) // 2]:
        kernels[name[:80]] = kernels.get(name[:80], 0.0) + ms * 1e3 / len(inputs)
    return {
        **checked,
        "us": statistics.median(per_call),
        "wall_us": wall,
        "launches": len(runs[0]) / len(inputs),
        "kernels_us": kernels,
    }
