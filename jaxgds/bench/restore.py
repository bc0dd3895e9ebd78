"""`jaxgds bench restore`: loaders on the same bytes, in fresh processes, against the ceilings."""

# Peers and matplotlib are optional.
# pyright: reportMissingImports=false

import contextlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jaxgds.bench import ceilings, checkpoints
from jaxgds.bench.loaders import LOADERS


NEEDS = {
    "instanttensor": ("instanttensor", "torch"),
    "fastsafetensors": ("fastsafetensors", "torch"),
    "safetensors.torch": ("safetensors", "torch"),
    "safetensors.flax": ("safetensors", "flax"),
}
GPU_ONLY = ("jaxgds (CPU decodes)", "instanttensor", "fastsafetensors", "safetensors.torch")
# What loaders read, if not safetensors.
FORMATS_OF = {
    "jaxgds": checkpoints.ORBAX,
    "jaxgds (CPU decodes)": ("orbax-zstd",),
    "jaxgds (prepared)": tuple(checkpoints.PREPARED),
    "orbax": checkpoints.ORBAX,
}


def cases(formats: Sequence[str], gpu: bool) -> list[tuple[str, str]]:
    """(loader, format) pairs that this machine can run."""
    pairs = []
    for name in formats:
        for loader in LOADERS:
            if name not in FORMATS_OF.get(loader, ("safetensors",)):
                continue
            if loader in GPU_ONLY and not gpu:
                continue
            if all(importlib.util.find_spec(module) for module in NEEDS.get(loader, ())):
                pairs.append((loader, name))
    return pairs


def run(
    folder: str,
    formats: Sequence[str] = checkpoints.FORMATS,
    nbytes: int = 2 << 30,
    repeat: int = 3,
    cold: bool = False,
    processes: int = 1,
    report=print,
    keep=lambda found: None,
) -> dict[str, Any]:
    """Makes the checkpoints in `folder` (kept for the next run) and measures every case.

    Args:
      nbytes: size of each checkpoint's arrays.
      repeat: calls per process; the first and the best are reported.
      cold: drop the files from the page cache before each process, which then makes one call, and
        is the only one.
      processes: for each case; the median of their first calls is reported.
      report: told what is being done, and what came of it.
      keep: given the result so far after every case.

    Returns:
      Plain JSON types: machine, ceilings (bytes per second), results (one per case).
    """
    machine = _machine()
    gpu, devices = machine["device_platform"] == "gpu", machine["devices"]
    for name in formats:
        if (count := checkpoints.PREPARED.get(name, 1)) > devices:
            raise ValueError(f"{name} needs {count} devices, and there are {devices}")
    for name in formats:
        report(f"checkpoint {name} in {folder}")
        checkpoints.make(folder, (name,), nbytes)
    paths = checkpoints.make(folder, tuple(formats), nbytes)
    limits: dict[str, float | None] = {"pinned_to_device": _in_process("pinned_rate()")}
    some = _files(paths[formats[0]])
    try:
        ceilings.drop_page_cache(some)
        limits["direct_read"] = ceilings.read_rate(some, direct=True)
    except OSError:  # tmpfs
        limits["direct_read"] = None
    results = []
    found = {"machine": machine, "cold": cold, "ceilings": limits, "results": results}
    for loader, name in cases(formats, gpu):
        files = _files(paths[name])
        left = cached = direct = None
        if cold:
            # Twice, before each case: below this machine's cache a hypervisor or a server may
            # keep what is read, for the ceiling or for the loader that comes after another.
            with contextlib.suppress(OSError):  # no O_DIRECT
                direct = max(ceilings.read_rate(files, direct=True) for _ in range(2))
            left = ceilings.drop_page_cache(files)
        else:
            # Of each checkpoint: how its pages lie in memory can halve the rate.
            cached = max(ceilings.read_rate(files, direct=False) for _ in range(2))
        report(f"{loader} on {name}")
        row = {
            "loader": loader,
            "format": name,
            "cached_before": left,
            "page_cache_read": cached,
            "direct_read": direct,
            **_measure(loader, paths[name], *((1, 1) if cold else (repeat, processes))),
        }
        rates = "{first_gbps:.2f} GB/s first, {best_gbps:.2f} best"
        report("  " + (row.get("error") or rates.format(**row)))
        results.append(row)
        keep(found)
    return found


def _measure(loader: str, path: str, repeat: int, processes: int) -> dict[str, Any]:
    runs = [_process(loader, path, repeat) for _ in range(processes)]
    for run in runs:
        if "error" in run:
            return run
    runs.sort(key=lambda run: run["seconds"][0])
    median = runs[processes // 2]
    firsts = [run["seconds"][0] for run in runs]
    best, nbytes = min(min(run["seconds"]) for run in runs), median["nbytes"]
    rates = {
        "first_gbps": nbytes / firsts[processes // 2] / 1e9,
        "best_gbps": nbytes / best / 1e9,
    }
    return {**median, "first_seconds": firsts, **rates}


def _process(loader: str, path: str, repeat: int) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "jaxgds.bench.loaders", loader, path, str(repeat)],
        capture_output=True,
        text=True,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    return json.loads(done.stdout.strip().splitlines()[-1])


def _in_process(expression: str) -> float | None:
    """Evaluates a ceiling in a process of its own, so that this one never holds the GPU."""
    code = f"from jaxgds.bench.ceilings import *; print(repr({expression}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    text = done.stdout.strip().splitlines()[-1]
    return None if text == "None" else float(text)


def _files(path: str) -> list[str]:
    found = []
    for folder, _, names in os.walk(path):
        files = [os.path.join(folder, name) for name in names]
        found += [file for file in files if os.path.getsize(file) > 1 << 20]
    return sorted(found)


def _machine() -> dict[str, Any]:
    code = "import jax; d = jax.devices(); print(d[0].platform, d[0].device_kind, len(d), sep='|')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    kind = done.stdout.strip().splitlines()[-1].split("|")
    versions = {}
    for name in ("jax", "orbax-checkpoint", "tensorstore", *{n for v in NEEDS.values() for n in v}):
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return {
        "device_platform": kind[0],
        "device": kind[1],
        "devices": int(kind[2]),
        "cores": len(os.sched_getaffinity(0)),
        "python": platform.python_version(),
        "versions": versions,
    }


def table(found: dict[str, Any]) -> str:
    """`run`'s result as text for people."""
    machine, limits = found["machine"], found["ceilings"]
    lines = [
        f"{machine['device']}, {machine['cores']} cores, "
        f"{'page cache dropped' if found['cold'] else 'files in the page cache'}"
    ]
    lines += [f"ceiling {k}: {v / 1e9:.1f} GB/s" for k, v in limits.items() if v is not None]
    lines.append(
        f"{'loader':22}{'checkpoint':16}{'first':>8}{'best':>8}{'of ceiling':>12}"
        f"{'page cache':>12}{'host peak':>11}{'device +':>10}{'plan':>7}   (GB/s, GB, s)"
    )
    for row in found["results"]:
        start = f"{row['loader']:22}{row['format']:16}"
        if "error" in row:
            lines.append(f"{start}  {row['error']}")
            continue
        ceiling = limits["pinned_to_device"]
        if found["cold"]:
            ceiling = row.get("direct_read") or limits["direct_read"]  # older runs lack the first
        share = f"{row['best_gbps'] * 1e9 / ceiling:.2f}" if ceiling else "-"
        extra = row["device_extra_bytes"]
        device = "-" if extra is None else f"{extra / 1e9:.2f}"
        cached = row.get("page_cache_read")
        cache = f"{cached / 1e9:.1f}" if cached else "-"
        lines.append(
            f"{start}{row['first_gbps']:8.2f}{row['best_gbps']:8.2f}{share:>12}{cache:>12}"
            f"{row['host_peak_bytes'] / 1e9:11.2f}{device:>10}{_planned(row.get('breakdown')):>7}"
        )
        if left := row.get("cached_before"):
            lines.append(f"{'':22}not cold: {left:.1%} of its pages stayed in the page cache")
    return "\n".join(lines)


def _planned(breakdown: dict[str, Any] | None) -> str:
    """Seconds of a first call until it knew what to read."""
    if not breakdown:
        return "-"
    return f"{breakdown['index_seconds'] + breakdown['plan_seconds']:.2f}"


def plot(found: dict[str, Any], file: str) -> None:
    """Draws first and best rates as horizontal bars; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [r for r in found["results"] if "error" not in r][::-1]
    figure = Figure(figsize=(8, 1.2 + 0.45 * len(rows)), layout="constrained")
    axes = figure.subplots()
    places = range(len(rows))
    axes.barh(places, [r["best_gbps"] for r in rows], 0.7, color="#b7c9e2", label="best call")
    axes.barh(places, [r["first_gbps"] for r in rows], 0.35, color="#2a5599", label="first call")
    axes.set_yticks(places, [f"{r['loader']}\n{r['format']}" for r in rows], fontsize=8)
    for name, rate in found["ceilings"].items():
        if rate:
            axes.axvline(rate / 1e9, color="#888", linewidth=1, linestyle="--")
            axes.text(rate / 1e9, len(rows) - 0.4, name, fontsize=7, rotation=90, va="top")
    axes.set_xlabel("GB/s")
    axes.set_title(found["machine"]["device"], fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
