"""`jaxgds bench quality`: perplexity and KL of compressed caches against a bf16 one.

A text is read in chunks: each attends to the earlier ones as the cache keeps them, and to itself
in bf16. The models and their files come from the repository's examples/, not from a package.
"""

# matplotlib and examples/ are optional.
# pyright: reportMissingImports=false

import importlib
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np

import pallas_kernels as pk


FORMATS = ("fp8", "K8V8", "K4V4", "K4V3", "K3V3", "K3V2", "K2V2")
# Name, number of texts, tokens in each.
MODELS = {
    "smollm2": ("SmolLM2-135M-Instruct", 2, 2048),
    "gemma3": ("Gemma-3-270M", 2, 2048),
}


@dataclass(frozen=True)
class Settings:
    """What every packed format is measured with: all combinations of these."""

    windows: Sequence[int] = (128,)
    sinks: Sequence[int] = (4,)
    key_offset: Sequence[bool] = (True,)


def load(model: str, folder: Path | str, windows: int, tokens: int) -> tuple[Any, np.ndarray, str]:
    """The model, a text [windows, tokens] for it, and the text's name; downloads what is missing.

    Raises ValueError where examples/ or what it imports is missing, or the text is too short.
    """
    folder = Path(folder)
    try:
        download = importlib.import_module("examples.download")
        code = importlib.import_module(f"examples.{model}")
    except ModuleNotFoundError as e:
        raise ValueError(
            f"{e.name} is missing: the models are example code; run this from a checkout of the "
            "repository, after pip install -e '.[examples]'"
        ) from e
    reader = code.open_gguf(code.fetch(folder))
    text = download.fetch(download.PROSE, folder).read_text()
    articles = "\n\n".join(line.strip() for line in text.splitlines())
    ids = code.read_tokenizer(reader).encode(articles).ids
    if len(ids) < windows * tokens:
        raise ValueError(f"the text has {len(ids)} tokens, not {windows=} times {tokens=}")
    body = tokens - len(code.START)
    ids = np.array(ids[: windows * body], np.int32).reshape(windows, body)
    start = np.tile(np.array(code.START, np.int32), (windows, 1))
    return code.read_model(reader), np.concatenate([start, ids], axis=1), download.PROSE.member


def cases(formats: Sequence[str], settings: Settings = Settings()) -> dict[str, Any]:
    """Caches by name: the dense ones ("bf16" always, first) and each format in every setting."""
    found: dict[str, Any] = {"bf16": "bf16"}
    lists = (settings.windows, settings.sinks, settings.key_offset)
    varied = [len(x) > 1 for x in lists]
    for name in formats:
        if name in ("bf16", "fp8"):
            found[name] = name
            continue
        if not (match := re.fullmatch(r"K(\d)V(\d)", name)):
            raise ValueError(f"{name!r} is not a format such as K4V4, or fp8")
        for window, sinks, offset in itertools.product(*lists):
            fmt = pk.KVFormat(int(match[1]), int(match[2]), window, sinks, key_offset=offset)
            parts = (f"window {window}", f"sinks {sinks}", "offset" if offset else "no offset")
            found[", ".join([name, *itertools.compress(parts, varied)])] = fmt
    return found


def run(model: Any, tokens: np.ndarray, caches: dict[str, Any], chunk: int = 64) -> dict[str, Any]:
    """Measures each cache; plain JSON types. model: of examples/; caches: of `cases`.

    Each result: bits (a packed number, its share of the scale included), perplexity,
    delta (relative to bf16's perplexity), kl (mean KL(bf16 || cache) of the next-token
    distributions, in nats) and the format's settings.
    """
    perplexity = importlib.import_module("examples.perplexity")
    if not 0 < chunk <= tokens.shape[1]:
        raise ValueError(f"{chunk=} is not in [1, {tokens.shape[1]}], the tokens of a window")
    quality = perplexity.compare(model, tokens, caches, chunk)
    head_dim, bf16 = model.config.head_dim, quality["bf16"].perplexity
    results = []
    for name, fmt in caches.items():
        row = {"name": name, "bits": {"bf16": 16.0, "fp8": 8.0}.get(name)}
        if isinstance(fmt, pk.KVFormat):
            row["bits"] = fmt.bytes_per_token(1, head_dim) * 8 / (2 * head_dim)
            row |= {x: getattr(fmt, x) for x in ("window", "sinks", "key_offset")}
        found = quality[name]
        row |= {
            "perplexity": found.perplexity,
            "delta": found.perplexity / bf16 - 1,
            "kl": float(found.kl),
        }
        results.append(row)
    return {
        "machine": {"device": jax.devices()[0].device_kind, "jax": jax.__version__},
        "shape": {"windows": tokens.shape[0], "tokens": tokens.shape[1], "chunk": chunk},
        "head_dim": head_dim,
        "results": results,
    }


def table(found: dict[str, Any]) -> str:
    """`run`'s result as text for people."""
    rows = found["results"]
    width = max(len(row["name"]) for row in rows) + 2
    lines = [f"{'cache':{width}}{'bits':>6}{'perplexity':>12}{'delta':>9}{'KL':>10}"]
    for row in rows:
        lines.append(
            f"{row['name']:{width}}{row['bits']:>6.2f}{row['perplexity']:>12.3f}"
            f"{row['delta']:>9.2%}{row['kl']:>10.5f}"
        )
    shape = found["shape"]
    origin = "".join(f", {found[key]}" for key in ("model", "text") if key in found)
    lines.append(
        f"{shape['windows']} windows of {shape['tokens']} tokens in chunks of {shape['chunk']}"
        f"{origin}\nbits: of a packed number, with its share of the scale; KL in nats"
    )
    return "\n".join(lines)


def plot(found: dict[str, Any], file: str) -> None:
    """Draws KL against bits per number; needs matplotlib."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for row in found["results"]:
        if row["name"] != "bf16":
            axes.plot(row["bits"], row["kl"], "s" if row["name"] == "fp8" else "o", color="C0")
            place = {"xytext": (5, 3), "textcoords": "offset points"}
            axes.annotate(row["name"], (row["bits"], row["kl"]), fontsize=7, **place)
    axes.margins(x=0.2)
    axes.set(yscale="log", xlabel="bits per number, scale included", ylabel="KL to bf16, nats")
    axes.set_title(found.get("model", ""), fontsize=10)
    figure.savefig(file, dpi=150)
