"""`jaxgds bench prefill`: attention of a prompt, read in chunks over a compressed cache.

Against bf16 flash attention of the whole prompt at once. What is timed is the attention of all
chunks (each over a full cache of so many tokens), not the appends between them, which `jaxgds bench
encode` times. Times are those of `timing`.
"""

# matplotlib is optional.
# pyright: reportMissingImports=false

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp

import pallas_kernels as pk
from jaxgds.bench import sweep, timing
from jaxgds.bench.decode import format_of, full_cache


FORMATS = ("K4V4", "K3V3")
_TOLERANCE = 1e-2  # relative, in the Euclidean norm
_CHECKED = 128  # queries of the last chunk that are compared with xla's


@dataclass(frozen=True)
class Sizes:
    """What is swept, and how large. seqs: tokens of a prompt; chunk: of them read at a time."""

    seqs: Sequence[int]
    batches: Sequence[int]
    chunk: int = 4096
    head_dim: int = 128
    group: int = 8
    kv_heads: int = 8
    repeat: int = 5

    def __post_init__(self):
        sweep.check_positive(self)
        for seq in self.seqs:
            if seq % self.chunk:
                raise ValueError(f"{seq=} is not a multiple of chunk={self.chunk}")


GPU = Sizes(seqs=(8192, 32768), batches=(1,))
CPU = Sizes(seqs=(256,), batches=(1,), chunk=128, head_dim=64, group=2, kv_heads=1, repeat=1)


def run(
    sizes: Sizes, formats: Sequence[str] = FORMATS, report=print, keep=lambda found: None
) -> dict[str, Any]:
    """Checks and times each format at each size on the first device.

    Plain JSON types: machine, shape, results (one a case; "error" in place of times for one that
    is wrong or does not fit). After every case `keep` is given what there is so far. Raises
    ValueError for a format that is not like K4V4.
    """
    settings = [format_of(name) for name in formats]
    machine, gpu = sweep.begin(report)
    names = ("chunk", "head_dim", "group", "kv_heads")
    shape = {name: getattr(sizes, name) for name in names}
    results = []
    measured = {"machine": machine, "shape": shape, "results": results}
    for batch, seq in product(sizes.batches, sizes.seqs):
        baseline = "cudnn" if gpu else "xla"
        cases: list[tuple[str, Callable[[], dict[str, Any]]]] = [
            (f"bf16 {baseline}", partial(_bf16, sizes, batch, seq, baseline, gpu))
        ]
        for name, fmt in zip(formats, settings, strict=True):
            cases.append((name, partial(_compressed, sizes, batch, seq, fmt, gpu)))
        for name, case in cases:
            found = sweep.outcome(case, f"{name}, batch {batch}, {seq} tokens", report)
            results.append({"name": name, "batch": batch, "seq": seq, **found})
            keep(measured)
    return measured


def flops(sizes: Sizes, batch: int, seq: int) -> int:
    """Of a causal attention: two products, each over half of all pairs of tokens."""
    return 2 * batch * seq * (seq + 1) * sizes.kv_heads * sizes.group * sizes.head_dim


def _prompt(sizes: Sizes, batch: int, seq: int) -> list[jax.Array]:
    heads = (sizes.kv_heads * sizes.group, sizes.kv_heads, sizes.kv_heads)
    return [
        sweep.noise(1000 + i, (batch, seq, n, sizes.head_dim), jnp.bfloat16)
        for i, n in enumerate(heads)
    ]


def _bf16(sizes: Sizes, batch: int, seq: int, implementation: str, gpu: bool) -> dict[str, Any]:
    attention: Any = jax.nn.dot_product_attention
    attend = partial(attention, is_causal=True, implementation=implementation)
    q, k, v = _prompt(sizes, batch, seq)
    measured = timing.measure(attend, q, [(k, v)], sizes.repeat, gpu)
    return {"flops": flops(sizes, batch, seq), **measured}


def _compressed(sizes: Sizes, batch: int, seq: int, fmt: pk.KVFormat, gpu: bool) -> dict[str, Any]:
    full = full_cache(0, fmt, batch, seq, sizes.kv_heads, sizes.head_dim)
    implementation = "mosaic_gpu" if gpu else "xla"
    attend = partial(pk.prefill_attention, implementation=implementation)
    q, k, v = _prompt(sizes, batch, seq)

    def of(cache, tokens):
        return replace(cache, lengths=jnp.full(batch, tokens, jnp.int32))

    def chunks(q, k, v, cache):
        outputs = []
        for start in range(0, seq, sizes.chunk):
            here = slice(start, start + sizes.chunk)
            outputs.append(attend(q[:, here], k[:, here], v[:, here], of(cache, start)))
        return outputs

    def check(got):
        last = seq - sizes.chunk

        @jax.jit  # compiled at once, not operation by operation
        def want_and_got(q, k, v, cache, got):
            q, k, v = (x[:, last : last + _CHECKED] for x in (q, k, v))
            want = pk.prefill_attention(q, k, v, of(cache, last), implementation="xla")
            return want, got[:, :_CHECKED]

        want, few = want_and_got(q, k, v, full, got[-1])
        return {"error_to_xla": sweep.checked_error(few, want, _TOLERANCE)}

    measured = timing.measure(chunks, q, [(k, v, full)], sizes.repeat, gpu, check)
    return {
        "implementation": implementation,
        "flops": flops(sizes, batch, seq),
        **measured,
    }


def table(found: dict[str, Any]) -> str:
    """`run`'s result as text for people."""
    lines = [
        sweep.heading(found),
        f"{'batch':>5}{'tokens':>8}  {'':12}{'us':>10}{'wall':>10}{'TFLOP/s':>9}{'of bf16':>8}"
        f"{'launches':>9}",
    ]
    for row in found["results"]:
        start = f"{row['batch']:5}{row['seq']:8}  {row['name']:12}"
        if "us" not in row:
            lines.append(f"{start}  {row['error']}")
            continue
        bf16 = sweep.speedup(found, row, ("batch", "seq"), lambda x: x["name"].startswith("bf16"))
        lines.append(
            f"{start}{row['us']:10.1f}{row['wall_us']:10.1f}{row['flops'] / row['us'] / 1e6:9.1f}"
            f"{f'{bf16:.2f}' if bf16 else '-':>8}{row.get('launches', '-'):>9}"
        )
    return "\n".join(lines)


def plot(found: dict[str, Any], file: str) -> None:
    """Draws floating-point operations per second against tokens; needs matplotlib."""
    from matplotlib.figure import Figure

    rows = [row for row in found["results"] if "us" in row]
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for name, batch in dict.fromkeys((row["name"], row["batch"]) for row in rows):
        points = [
            (row["seq"], row["flops"] / row["us"] / 1e6)
            for row in rows
            if (row["name"], row["batch"]) == (name, batch)
        ]
        sweep.line(axes, points, f"{name}, batch {batch}", dashed=" " in name)
    axes.set(xscale="log", xlabel="tokens of the prompt", ylabel="TFLOP/s")
    axes.set_ylim(0)
    title = f"prefill attention, {found['machine']['device']}"
    sweep.save(figure, axes, title, file)
