"""`jaxgds bench coldstart`: from the start of a process to its first token, part by part.

A naive script (stock Orbax restores, then the step compiles) against one in which both overlap
(and imports overlap with the start of the devices) and all layers share one program, each in fresh
processes on the same prepared checkpoint, with and without a compilation cache; and one that keeps
the executables, so that nothing is traced.
"""

# matplotlib is optional.
# pyright: reportMissingImports=false

import json
import math
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from jaxgds import models
from jaxgds.capacity import Weights, columns
from jaxgds.prepare import prepare
from jaxgds.rules import Mesh
from jaxgds.scatter import Box
from jaxgds.sources import Model, Tensor, tree_keys


# Name -> loader, and whether the compilation cache is off, empty, or as a cold case left it.
CASES = {
    "jaxgds, cache cold": ("jaxgds", "cold"),
    "jaxgds, cache warm": ("jaxgds", "warm"),
    "jaxgds, executables kept": ("kept", "warm"),
    "naive": ("naive", None),
    "naive, cache warm": ("naive", "warm"),
}
PARTS = ("imports", "jax_init", "build", "load", "compile", "load_and_compile", "prefill")


def run(
    folder: str | os.PathLike[str],
    config: Mapping[str, Any],
    weights: Weights = "bf16",
    devices: int = 1,
    prompt: int = 256,
    repeat: int = 1,
    report=print,
    keep=lambda found: None,
) -> dict[str, Any]:
    """Makes the checkpoint in `folder` (kept for the next run) and measures every case.

    Args:
      config: config.json of a model that examples/serve_llama.py serves.
      devices: over how many the model is split.
      prompt: tokens of the prompt, read at once.
      repeat: processes for each case; the one with the median total is reported.
      keep: given the result so far after every case.

    Returns:
      Plain JSON types. results: for each case seconds (of each part; those of `load` and `compile`
      are parts of `load_and_compile` where that is given), compile_seconds (`compile` in parts:
      making the KV caches, tracing and lowering, XLA, or reading executables), total, and
      after_init (from when JAX was ready). A case that failed has error.

    Raises:
      ValueError: another model than a Llama, or no checkout of the repository with its examples/.
    """
    if config["model_type"] != "llama":  # said before gigabytes are written
        raise ValueError(
            f"model_type={config['model_type']!r}: examples/serve_llama.py serves only llama"
        )
    root = Path(__file__).parents[2]
    if not (root / "examples" / "serve_llama.py").exists():
        raise ValueError(
            "the model is example code: run this from a checkout of the repository, after "
            "pip install -e '.[examples]'"
        )
    folder = Path(folder).absolute()
    layers = models.kv_shape(config)[0]
    size = sum(math.prod(shape) for shape in models.parameters(config).values())
    path = folder / f"coldstart-{weights}-{layers}x{size}-tp{devices}"
    if not path.exists():
        report(f"checkpoint {path}: {size / 1e9:.2f} billion random parameters in {weights}")
        make(path, config, weights, devices)
    results = []
    found = {
        "weights": weights,
        "devices": devices,
        "layers": layers,
        "parameters": size,
        "prompt": prompt,
        "cores": len(os.sched_getaffinity(0)),
        "results": results,
    }
    with tempfile.TemporaryDirectory(prefix="jaxgds-compiled-") as cache:
        for name, (loader, state) in CASES.items():
            runs = []
            for i in range(repeat):
                report(f"{name}, process {i + 1} of {repeat}")
                if state == "cold":
                    shutil.rmtree(cache)
                    os.mkdir(cache)
                where = cache if state else ""
                runs.append(_measure(loader, path, where, devices, prompt, root))
                report(f"  {runs[-1]}")
            results.append({"name": name, **_median(runs)})
            keep(found)
    tokens = {row["token"] for row in results if "token" in row}
    if len(tokens) > 1:
        raise ArithmeticError(f"the cases disagree on the first token: {sorted(tokens)}")
    return found


def make(path: Path, config: Mapping[str, Any], weights: Weights, devices: int = 1) -> None:
    """Prepares a checkpoint of random numbers for so many devices, without a source on disk."""
    rng = np.random.default_rng(0)
    block = (rng.standard_normal(1 << 23, np.float32) * 0.02).astype(ml_dtypes.bfloat16)

    def read(box: Box) -> np.ndarray:
        shape = [stop - start for start, stop in box]
        if len(shape) == 1:  # norms
            return np.ones(shape, ml_dtypes.bfloat16)
        return np.resize(block[: math.prod(shape)], shape)

    tensors = tuple(
        Tensor(tree_keys(name), shape, block.dtype, read)
        for name, shape in models.parameters(config).items()
    )
    configs = {"config.json": json.dumps(config).encode()}
    model = Model("random", "random numbers", tensors, {}, config, configs, {})
    path.parent.mkdir(parents=True, exist_ok=True)
    prepare(model, path, mesh=Mesh({"tp": devices}), method="fp8" if weights == "fp8" else None)


def _measure(
    loader: str, path: Path, cache: str, devices: int, prompt: int, root: Path
) -> dict[str, Any]:
    options = [loader, path, cache, devices, prompt, time.monotonic()]
    done = subprocess.run(
        [sys.executable, "-m", "jaxgds.bench.coldstart_run", *map(str, options)],
        capture_output=True,
        text=True,
        cwd=root,
    )
    if done.returncode:
        return {"error": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    found = json.loads(done.stdout.strip().splitlines()[-1])
    s = found["seconds"]
    return {**found, "after_init": found["total"] - s["imports"] - s["jax_init"]}


def _median(runs: list[dict[str, Any]]) -> dict[str, Any]:
    for row in runs:
        if "error" in row:
            return row
    ordered = sorted(runs, key=lambda row: row["total"])
    return {**ordered[len(ordered) // 2], "totals": [row["total"] for row in runs]}


def table(found: Mapping[str, Any]) -> str:
    """`run`'s result as text for people."""
    good = [row for row in found["results"] if "error" not in row]
    device = good[0]["device"] if good else "nothing ran"
    gigabytes = good[0]["weight_bytes"] / 1e9 if good else 0
    head = ("seconds", "imports", "JAX init", "build", "load", "compile", "both", "prefill")
    rows: list[tuple[str, ...]] = [(*head, "total", "after init")]
    for row in good:
        cells = [f"{row['seconds'][p]:.2f}" if p in row["seconds"] else "" for p in PARTS]
        rows.append((row["name"], *cells, f"{row['total']:.2f}", f"{row['after_init']:.2f}"))
    lines = [
        f"{found['devices']} x {device}, {found['cores']} cores: {found['layers']} layers, "
        f"{gigabytes:.2f} GB of weights in {found['weights']}, {found['prompt']} tokens of prompt",
        *columns(rows),
        "both: from when loading and compiling began together until both were done",
    ]
    for row in good:
        if parts := row.get("compile_seconds"):  # older runs lack it
            lines.append(
                f"compile, {row['name']}: " + ", ".join(f"{p} {x:.2f}" for p, x in parts.items())
            )
    lines += [f"{r['name']}: {r['error']}" for r in found["results"] if "error" in r]
    for row in good:
        s = row["seconds"]
        if row["name"] == "jaxgds, cache cold":
            best, what = max(s["load"], s["compile"]), "max(load, compile)"
        elif row["name"] in ("jaxgds, cache warm", "jaxgds, executables kept"):
            best, what = s["load"] + s["prefill"], "load + prefill"
        else:
            continue
        name, after = row["name"].rpartition(" ")[2], row["after_init"] / best
        lines.append(f"{name}: after init {after:.2f} of {what}, in all {row['total'] / best:.2f}")
    return "\n".join(lines)


def plot(found: Mapping[str, Any], file: str) -> None:
    """Draws the parts of each case as one bar; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [row for row in found["results"] if "error" not in row][::-1]
    figure = Figure(figsize=(8, 1.4 + 0.5 * len(rows)), layout="constrained")
    axes = figure.subplots()
    left = np.zeros(len(rows))
    for i, part in enumerate(PARTS):
        widths = np.array(
            [
                0.0
                if part in ("load", "compile") and "load_and_compile" in row["seconds"]
                else row["seconds"].get(part, 0.0)
                for row in rows
            ]
        )
        axes.barh(range(len(rows)), widths, left=left, label=part.replace("_", " "), color=f"C{i}")
        left += widths
    axes.set_yticks(range(len(rows)), [row["name"] for row in rows])
    axes.set_xlabel("seconds to the first token")
    axes.set_title(rows[0]["device"] if rows else "", fontsize=10)
    axes.legend(fontsize=8)
    figure.savefig(file, dpi=150)
