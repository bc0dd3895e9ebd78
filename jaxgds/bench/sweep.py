"""What the benchmarks of kernels share: the machine, cases that may fail, baselines, drawing."""

# matplotlib is optional.
# pyright: reportMissingImports=false

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


type Row = Mapping[str, Any]  # one of a run's results


def check_positive(sizes: Any) -> None:
    """ValueError if a number among the fields of a dataclass of sizes is not positive."""
    for name, value in vars(sizes).items():
        if not isinstance(value, str) and np.min(value) < 1:
            raise ValueError(f"{name}={value} is not positive")


def begin(report: Callable[[str], object]) -> tuple[dict[str, str], bool]:
    """(what the first device is, whether it is a GPU)."""
    device = jax.devices()[0]
    gpu = device.platform == "gpu"
    if not gpu:
        report("no GPU here: only the xla implementation is measured, and the sizes say little")
    machine = {
        "device_platform": device.platform,
        "device": device.device_kind,
        "jax": jax.__version__,
    }
    return machine, gpu


def outcome(
    case: Callable[[], dict[str, Any]], text: str, report: Callable[[str], object]
) -> dict[str, Any]:
    """What a case returns, or its error: of one that is wrong or does not fit.

    Reports it after the text, and the seconds that the case took, of which most are compilation.
    """
    start = time.perf_counter()
    try:
        found = case()
    except (RuntimeError, ArithmeticError) as e:
        found = {"error": (str(e).splitlines() or [repr(e)])[0]}
    said = f"{found['us']:.1f} us" if "us" in found else found["error"]
    report(f"{text}: {said} ({time.perf_counter() - start:.1f} s)")
    return found


@partial(jax.jit, static_argnames=("shape", "dtype"))
def noise(seed, shape: tuple[int, ...], dtype) -> jax.Array:
    """Bytes, or for another dtype numbers in [-2, 2), that look random: a hash of their place.

    jax.random takes seconds to compile for every shape, and memory beside its result.
    """

    def mixed(x):  # a bijection of 32 bits
        x = (x ^ x >> np.uint32(16)) * np.uint32(0x7FEB352D)
        x = (x ^ x >> np.uint32(15)) * np.uint32(0x846CA68B)
        return x ^ x >> np.uint32(16)

    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * np.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    x = mixed(place ^ mixed(jnp.asarray(seed).astype(jnp.uint32) + np.uint32(1)))
    if jnp.dtype(dtype) == jnp.uint8:
        return (x >> np.uint32(24)).astype(jnp.uint8)
    signed = jax.lax.bitcast_convert_type(x, jnp.int32).astype(jnp.float32)
    return (signed * np.float32(2.0**-30)).astype(dtype)


def checked_error(got: Any, want: Any, tolerance: float) -> float:
    """How far `got` is from `want`, relative in the Euclidean norm; ArithmeticError if too far."""
    one, other = (np.asarray(x, np.float64) for x in (got, want))
    error = float(np.linalg.norm(one - other) / np.linalg.norm(other))
    if not error <= tolerance:
        raise ArithmeticError(f"wrong: the result differs from xla's by {error:.1e}")
    return error


def heading(found: dict[str, Any]) -> str:
    """A table's first line: the machine and the shape."""
    shape = ", ".join(f"{name} {value}" for name, value in found["shape"].items())
    return f"{found['machine']['device']}, jax {found['machine']['jax']}, {shape}"


def speedup(
    found: dict[str, Any], row: Row, same: Sequence[str], baseline: Callable[[Row], bool]
) -> float | None:
    """How many times faster a row is than the first baseline that has the same `same`."""
    for other in found["results"]:
        if all(other[k] == row[k] for k in same) and baseline(other) and "us" in other:
            return other["us"] / row["us"]
    return None


def panels(rows: Sequence[Row]) -> tuple[Any, dict[int, Any]]:
    """A figure, and its axes for each batch."""
    from matplotlib.figure import Figure

    batches = sorted({row["batch"] for row in rows})
    figure = Figure(figsize=(5 * len(batches), 4), layout="constrained")
    axes = figure.subplots(1, len(batches), squeeze=False)[0]
    return figure, dict(zip(batches, axes, strict=True))


def line(axes: Any, points: Sequence[tuple[float, float]], label: str, dashed: bool) -> None:
    style = "--" if dashed else "-"
    axes.plot(*zip(*sorted(points), strict=True), style, marker="o", ms=3, label=label)


def save(figure: Any, legend_of: Any, title: str, file: str) -> None:
    legend_of.legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    figure.savefig(file, dpi=150)
