"""What the benchmarks of kernels share: the machine, cases that may fail, baselines, drawing."""

# matplotlib is optional.
# pyright: reportMissingImports=false

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
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


def outcome(case: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What a case returns, or its error: of one that is wrong or does not fit."""
    try:
        return case()
    except (RuntimeError, ArithmeticError) as e:
        return {"error": str(e).splitlines()[0]}


def checked_error(got: jax.Array, want: jax.Array, tolerance: float) -> float:
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
