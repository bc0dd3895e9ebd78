"""`jaxgds bench encode`: appends to a compressed cache, in place, against the copy bandwidth.

An append of one token goes to a cache of several pages, in which it completes none; longer ones
fill an empty cache. What a kernel's last timed append has left is compared with what xla's has.
Times are those of `timing`.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

import pallas_kernels as pk
from jaxgds.bench import sweep, timing
from jaxgds.bench.decode import format_of, full_cache
from pallas_kernels import packing


FORMATS = ("K8V4", "K4V4", "K3V3")
# Of the codes, how many may differ from xla's: of values next to the middle between two levels.
_TOLERANCE = 1e-3
_MOST_COPIES = 16  # few tokens come from the device's cache then, as from a layer before
_XLA_COPIES = 2  # it waits for its many launches; more copies only take longer to compile
_CHECKED = 512  # pages of a larger pool whose codes are compared


@dataclass(frozen=True)
class Sizes:
    """What is swept, and how large. tokens: of an append. nbytes: of what a run goes over."""

    tokens: Sequence[int]
    batches: Sequence[int]
    head_dim: int = 128
    kv_heads: int = 8
    dtype: str = "bfloat16"
    nbytes: int = 256 << 20
    repeat: int = 20

    def __post_init__(self):
        sweep.check_positive(self)


GPU = Sizes(tokens=(1, 64, 2048, 32768), batches=(1, 8))
CPU = Sizes(tokens=(1, 256), batches=(1,), head_dim=64, kv_heads=2, nbytes=1, repeat=3)


def run(
    sizes: Sizes, formats: Sequence[str] = FORMATS, report=print, keep=lambda found: None
) -> dict[str, Any]:
    """Checks and times each format at each size on the first device.

    Plain JSON types: machine, copy_rate (bytes per second, read and written), results (one a
    case; "error" in place of times for one that is wrong or does not fit). After every case `keep`
    is given what there is so far. Raises ValueError for a format that is not like K4V4.
    """
    settings = [format_of(name) for name in formats]
    machine, gpu = sweep.begin(report)
    rate = timing.copy_rate(sizes.repeat, gpu)
    shape = {"head_dim": sizes.head_dim, "kv_heads": sizes.kv_heads, "dtype": sizes.dtype}
    results = []
    measured = {"machine": machine, "shape": shape, "copy_rate": rate, "results": results}
    for batch, tokens in product(sizes.batches, sizes.tokens):
        for name, fmt in zip(formats, settings, strict=True):
            by_xla: list[pk.KVCache] = []
            for implementation in ("xla", "mosaic_gpu") if gpu else ("xla",):
                case = partial(_append, sizes, batch, tokens, fmt, implementation, gpu, by_xla)
                text = f"{name} {implementation}, batch {batch}, {tokens} tokens"
                row = {"name": name, "implementation": implementation}
                row |= sweep.outcome(case, text, report)
                results.append({"batch": batch, "tokens": tokens, **row})
                keep(measured)
    return measured


def _append(
    sizes: Sizes,
    batch: int,
    tokens: int,
    fmt: pk.KVFormat,
    implementation: str,
    gpu: bool,
    by_xla: list[pk.KVCache],
) -> dict[str, Any]:
    """Times of an append. by_xla: where xla leaves the cache that a kernel's has to equal."""
    before = fmt.sinks + fmt.window + 2 * fmt.page_size if tokens == 1 else 0
    nbytes = _bytes(sizes, batch, before, tokens, fmt)
    append = partial(pk.KVCache.append, implementation=cast(Any, implementation))
    xla = implementation == "xla"

    def in_place(_, refs, k, v):
        cache = replace(jax.tree.map(lambda ref: ref[...], refs), lengths=_lengths(batch, before))
        after = append(cache, k, v)
        for ref, x in zip(jax.tree.leaves(refs), jax.tree.leaves(after), strict=True):
            ref[...] = x
        return after.lengths  # to wait for

    most = _XLA_COPIES if xla else _MOST_COPIES
    shape = (fmt, batch, before + tokens, sizes.kv_heads, sizes.head_dim)
    inputs = []
    for i in range(min(most, timing.copies(sizes.nbytes, nbytes))):
        cache = full_cache(i, *shape) if before else _empty(*shape)
        new = (batch, tokens, sizes.kv_heads, sizes.head_dim)
        k, v = (sweep.noise(1000 + 2 * i + j, new, sizes.dtype) for j in range(2))
        inputs.append((jax.tree.map(jax.new_ref, cache), k, v))
    measured = timing.measure(in_place, None, inputs, sizes.repeat, gpu)
    # Each append was to the same cache, whatever the one before had left in it.
    after = jax.tree.map(jax.freeze, inputs[0][0])
    error = 0.0
    if xla:
        by_xla.append(after)
    elif not by_xla:
        raise RuntimeError("not checked: xla's append has failed")
    elif not (error := difference(after, by_xla[0])) <= _TOLERANCE:
        raise ArithmeticError(f"wrong: {error:.1e} of the codes differ from xla's")
    return {"bytes": nbytes, "codes_unlike_xla": error, **measured}


@partial(jax.jit, static_argnums=(0, 1, 2, 3, 4))  # compiled at once, not array by array
def _empty(fmt: pk.KVFormat, batch: int, max_len: int, kv_heads: int, head_dim: int) -> pk.KVCache:
    return pk.KVCache.create(fmt, batch, max_len, kv_heads, head_dim)


def _bytes(sizes: Sizes, batch: int, before: int, tokens: int, fmt: pk.KVFormat) -> int:
    """Bytes that an append has to read (new tokens, old ones that are packed) and to write."""
    vector = 2 * sizes.kv_heads * sizes.head_dim  # of a key and a value
    packed = fmt.packed(before + tokens) - fmt.packed(before)
    kept = min(tokens, fmt.sinks + fmt.ring_slots)  # in bf16
    old = max(0, packed - max(0, tokens - fmt.window))
    read = tokens * vector * jnp.dtype(sizes.dtype).itemsize + old * vector * 2
    written = packed * fmt.bytes_per_token(sizes.kv_heads, sizes.head_dim) + kept * vector * 2
    return int(batch * (read + written))


def difference(one: pk.KVCache, other: pk.KVCache) -> float:
    """The share of codes that differ; ArithmeticError if anything else does."""
    for name in ("lengths", "page_table", "recent_k", "recent_v", "sink_k", "sink_v"):
        if not np.array_equal(getattr(one, name), getattr(other, name)):
            raise ArithmeticError(f"wrong: {name} differs from xla's")
    for name in ("k_scale", "v_scale", "key_offset"):
        a, b = (np.asarray(getattr(x, name)).astype(np.float32) for x in (one, other))
        # A number that is as near to two levels changes its vector's scale by about a hundredth.
        off = np.abs(a - b) / np.maximum(np.abs(b), 1e-5)
        if not (off.max(initial=0) < 2.0**-4 and np.mean(off > 2.0**-6) < _TOLERANCE):
            text = f"{np.sum(off > 2.0**-6)} of {off.size}, by up to {off.max():.2%}"
            raise ArithmeticError(f"wrong: {name} differs from xla's: {text}")
    # So many whatever the size of the pool: unpacking is compiled once for a format.
    pages = np.linspace(0, len(one.k_scale) - 1, _CHECKED).round().astype(int)
    differ = []
    for planes, bits in (("k_planes", one.fmt.key_bits), ("v_planes", one.fmt.value_bits)):
        both = [[np.asarray(plane)[pages] for plane in getattr(x, planes)] for x in (one, other)]
        differ.append(float(_unlike(*both, bits)))
    return sum(differ) / 2


@partial(jax.jit, static_argnums=2)
def _unlike(one, other, bits: int) -> jax.Array:
    a, b = (packing.unpack(tuple(map(jnp.asarray, x)), bits) for x in (one, other))
    return jnp.mean(a != b)


def _lengths(batch: int, before: int) -> jax.Array:
    return jnp.full(batch, before, jnp.int32)


def table(found: dict[str, Any]) -> str:
    """`run`'s result as text for people."""
    rate = found["copy_rate"]
    lines = [
        sweep.heading(found),
        f"copy: {rate / 1e9:.1f} GB/s (read and written)",
        f"{'batch':>5}{'tokens':>8}  {'':6}{'':12}{'us':>10}{'wall':>10}{'GB/s':>8}{'of copy':>8}"
        f"{'x xla':>8}{'launches':>9}",
    ]
    for row in found["results"]:
        start = f"{row['batch']:5}{row['tokens']:8}  {row['name']:6}{row['implementation']:12}"
        if "us" not in row:
            lines.append(f"{start}  {row['error']}")
            continue
        speed = row["bytes"] / row["us"] * 1e6
        same = ("batch", "tokens", "name")
        ratio = sweep.speedup(found, row, same, lambda x: x["implementation"] == "xla")
        lines.append(
            f"{start}{row['us']:10.1f}{row['wall_us']:10.1f}{speed / 1e9:8.1f}{speed / rate:8.2f}"
            f"{f'{ratio:.1f}' if ratio else '-':>8}{row.get('launches', '-'):>9}"
        )
    return "\n".join(lines)


def plot(found: dict[str, Any], file: str) -> None:
    """Draws the share of the copy bandwidth against tokens, a panel a batch; needs matplotlib."""
    rows = [row for row in found["results"] if "us" in row]
    figure, panels = sweep.panels(rows)
    kinds = list(dict.fromkeys((row["name"], row["implementation"]) for row in rows))
    for batch, axes in panels.items():
        for kind in kinds:
            points = [
                (row["tokens"], row["bytes"] / row["us"] * 1e6 / found["copy_rate"])
                for row in rows
                if (row["name"], row["implementation"], row["batch"]) == (*kind, batch)
            ]
            sweep.line(axes, points, " ".join(kind), dashed=kind[1] == "xla")
        axes.set(xscale="log", xlabel="new tokens", ylabel="share of copy", title=f"batch {batch}")
    title = f"append, {found['machine']['device']}"
    sweep.save(figure, next(iter(panels.values())), title, file)
