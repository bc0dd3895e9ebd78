"""`jaxgds bench decode`: decode attention over compressed caches, against bf16 and ideal FP8.

Times are those of `timing`.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from jaxgds.bench import sweep, timing
from pallas_kernels import codebook


FORMATS = ("K8V8", "K8V4", "K4V4", "K4V3", "K3V3")
_TOLERANCE = 1e-2  # of float32 queries: relative, in the Euclidean norm


@dataclass(frozen=True)
class Sizes:
    """What is swept, and how large. nbytes: of the copies that a run goes over."""

    seqs: Sequence[int]
    batches: Sequence[int]
    head_dim: int = 128
    group: int = 8
    kv_heads: int = 8
    nbytes: int = 256 << 20
    repeat: int = 20

    def __post_init__(self):
        sweep.check_positive(self)


GPU = Sizes(seqs=(4096, 32768, 131072), batches=(1, 8))
CPU = Sizes(seqs=(1024,), batches=(1,), head_dim=64, group=4, kv_heads=2, nbytes=1, repeat=3)


def run(sizes: Sizes, formats: Sequence[str] = FORMATS, report=print) -> dict[str, Any]:
    """Checks and times each format at each size on the first device.

    Plain JSON types: machine, copy_rate (bytes per second, read and written), results (one a
    case; "error" in place of times for one that is wrong or does not fit). Raises ValueError for
    a format that is not like K4V4.
    """
    settings = [format_of(name) for name in formats]
    machine, gpu = sweep.begin(report)
    rate = timing.copy_rate(sizes.repeat, gpu)
    results = []
    for batch, seq in product(sizes.batches, sizes.seqs):
        tokens = batch * seq * sizes.kv_heads * sizes.head_dim
        ideal = {"name": "ideal FP8", "bytes": 2 * tokens, "us": 2 * tokens / rate * 1e6}
        cases: list[tuple[str, Callable[[], dict[str, Any]]]] = [("ideal FP8", lambda x=ideal: x)]
        for implementation in ("cudnn", "xla") if gpu else ("xla",):
            name = f"bf16 {implementation}"
            cases.append((name, partial(_bf16, sizes, batch, seq, implementation, gpu)))
        for name, fmt in zip(formats, settings, strict=True):
            cases.append((name, partial(_compressed, sizes, batch, seq, fmt, gpu)))
        for name, case in cases:
            report(f"{name}, batch {batch}, {seq} tokens")
            results.append({"name": name, "batch": batch, "seq": seq, **sweep.outcome(case)})
    shape = {"head_dim": sizes.head_dim, "group": sizes.group, "kv_heads": sizes.kv_heads}
    return {"machine": machine, "shape": shape, "copy_rate": rate, "results": results}


def format_of(name: str) -> pk.KVFormat:
    """The settings that a name such as K4V4 (bits of keys, of values) stands for."""
    if not (match := re.fullmatch(r"K(\d)V(\d)", name)):
        raise ValueError(f"{name!r} is not a format such as K4V4")
    return pk.KVFormat(int(match[1]), int(match[2]))


def _compressed(sizes: Sizes, batch: int, seq: int, fmt: pk.KVFormat, gpu: bool) -> dict[str, Any]:
    static = (fmt, batch, seq, sizes.kv_heads, sizes.head_dim)
    shape = jax.eval_shape(partial(full_cache, 0, *static))
    nbytes = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shape))
    make = jax.jit(full_cache, static_argnums=(1, 2, 3, 4, 5))
    caches = [make(i, *static) for i in range(timing.copies(sizes.nbytes, nbytes))]
    q = jax.random.normal(jax.random.key(1), (batch, sizes.kv_heads * sizes.group, sizes.head_dim))
    implementation = "mosaic_gpu" if gpu else "xla"
    attend = partial(pk.decode_attention, implementation=implementation)
    error = 0.0
    if gpu:
        want = pk.decode_attention(q, caches[0], implementation="xla")
        error = sweep.checked_error(jax.jit(attend)(q, caches[0]), want, _TOLERANCE)
    measured = timing.measure(
        attend, q.astype(jnp.bfloat16), [(cache,) for cache in caches], sizes.repeat, gpu
    )
    return {
        "implementation": implementation,
        "bytes": nbytes,  # all of it is read: the cache is full
        "error_to_xla": error,
        **measured,
    }


def full_cache(
    seed, fmt: pk.KVFormat, batch: int, seq: int, kv_heads: int, head_dim: int
) -> pk.KVCache:
    """A full cache of random codes, its pages in random order."""
    cache = pk.KVCache.create(fmt, batch, seq, kv_heads, head_dim)
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 20))

    def codes(plane, bits):
        # At 8 bits without the largest exponents and NaN.
        mask = np.uint8(0xB7 if bits == 8 else 0xFF)
        return jax.random.bits(next(keys), plane.shape, jnp.uint8) & mask

    def normal(x):
        return jax.random.normal(next(keys), x.shape, jnp.bfloat16)

    def scales(x, bits):
        spread = jax.random.uniform(next(keys), x.shape, jnp.bfloat16, 0.5, 2.0)
        return spread * jnp.bfloat16(1 / codebook.divisor(bits))

    table = jax.random.permutation(next(keys), cache.page_table.size)
    return replace(
        cache,
        lengths=jnp.full(batch, seq, jnp.int32),
        sink_k=normal(cache.sink_k),
        sink_v=normal(cache.sink_v),
        recent_k=normal(cache.recent_k),
        recent_v=normal(cache.recent_v),
        page_table=table.reshape(cache.page_table.shape).astype(jnp.int32),
        k_planes=tuple(codes(x, fmt.key_bits) for x in cache.k_planes),
        v_planes=tuple(codes(x, fmt.value_bits) for x in cache.v_planes),
        k_scale=scales(cache.k_scale, fmt.key_bits),
        v_scale=scales(cache.v_scale, fmt.value_bits),
    )


def _bf16(sizes: Sizes, batch: int, seq: int, implementation: str, gpu: bool) -> dict[str, Any]:
    shape = (batch, seq, sizes.kv_heads, sizes.head_dim)
    nbytes = 4 * math.prod(shape)
    keys = jax.random.split(jax.random.key(0, impl="rbg"), 2 * timing.copies(sizes.nbytes, nbytes))
    normal = jax.jit(lambda key: jax.random.normal(key, shape, jnp.bfloat16))
    inputs = [(normal(k), normal(v)) for k, v in zip(keys[::2], keys[1::2], strict=True)]
    q = jnp.ones((batch, 1, sizes.kv_heads * sizes.group, sizes.head_dim), jnp.bfloat16)
    attention: Any = jax.nn.dot_product_attention
    attend = partial(attention, implementation=implementation)
    return {"bytes": nbytes, **timing.measure(attend, q, inputs, sizes.repeat, gpu)}


def table(found: dict[str, Any]) -> str:
    """`run`'s result as text for people."""
    rate = found["copy_rate"]
    lines = [
        sweep.heading(found),
        f"copy: {rate / 1e9:.1f} GB/s (read and written)",
        f"{'batch':>5}{'tokens':>8}  {'':14}{'us':>10}{'wall':>10}{'GB/s':>8}{'of copy':>8}"
        f"{'x cuDNN':>8}{'x FP8':>7}{'launches':>9}",
    ]
    for row in found["results"]:
        start = f"{row['batch']:5}{row['seq']:8}  {row['name']:14}"
        if "us" not in row:
            lines.append(f"{start}  {row['error']}")
            continue
        speed = row["bytes"] / row["us"] * 1e6
        wall = f"{row['wall_us']:.1f}" if "wall_us" in row else "-"
        ratios = [
            sweep.speedup(found, row, ("batch", "seq"), lambda x, name=name: x["name"] == name)
            for name in ("bf16 cudnn", "ideal FP8")
        ]
        cudnn, fp8 = (f"{x:.2f}" if x else "-" for x in ratios)
        lines.append(
            f"{start}{row['us']:10.1f}{wall:>10}{speed / 1e9:8.1f}{speed / rate:8.2f}"
            f"{cudnn:>8}{fp8:>7}{row.get('launches', '-'):>9}"
        )
    return "\n".join(lines)


def plot(found: dict[str, Any], file: str) -> None:
    """Draws time against tokens, a panel for each batch; needs matplotlib."""
    rows = [row for row in found["results"] if "us" in row]
    figure, panels = sweep.panels(rows)
    for batch, axes in panels.items():
        for name in dict.fromkeys(row["name"] for row in rows):
            points = [(r["seq"], r["us"]) for r in rows if (r["name"], r["batch"]) == (name, batch)]
            sweep.line(axes, points, name, dashed=" " in name)
        axes.set(xscale="log", yscale="log", xlabel="tokens", ylabel="us", title=f"batch {batch}")
    title = f"decode attention, {found['machine']['device']}"
    sweep.save(figure, next(iter(panels.values())), title, file)
