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


# These, and the sizes below, in the order in which a run that is cut off is of most use.
FORMATS = ("K4V4", "K8V8", "K8V4", "K4V3", "K3V3")
_TOLERANCE = 1e-2  # relative, in the Euclidean norm; rounding the result to bf16 takes 1e-3
# The arrays of a cache that have a row for each sequence, but for its table.
_OF_SEQUENCES = ("lengths", "sink_k", "sink_v", "recent_k", "recent_v", "key_offset")
_OF_QUERIES = 1000  # the seed of their noise: far from those of keys and values


type Pages = dict[str, Any]


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


GPU = Sizes(seqs=(32768, 4096, 131072), batches=(8, 1))
CPU = Sizes(seqs=(1024,), batches=(1,), head_dim=64, group=4, kv_heads=2, nbytes=1, repeat=3)


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
    shape = {"head_dim": sizes.head_dim, "group": sizes.group, "kv_heads": sizes.kv_heads}
    cases = list(product(sizes.batches, sizes.seqs))
    results = []
    measured = {"machine": machine, "shape": shape, "copy_rate": rate, "results": results}

    def add(name: str, batch: int, seq: int, case: Callable[[], dict[str, Any]]):
        found = sweep.outcome(case, f"{name}, batch {batch}, {seq} tokens", report)
        results.append({"name": name, "batch": batch, "seq": seq, **found})
        results.sort(key=lambda row: (row["batch"], row["seq"]))
        keep(measured)

    for batch, seq in cases:
        tokens = batch * seq * sizes.kv_heads * sizes.head_dim
        ideal = {"bytes": 2 * tokens, "us": 2 * tokens / rate * 1e6}
        results.append({"name": "ideal FP8", "batch": batch, "seq": seq, **ideal})
        for implementation in ("cudnn", "xla") if gpu else ("xla",):
            case = partial(_bf16, sizes, batch, seq, implementation, gpu)
            add(f"bf16 {implementation}", batch, seq, case)
    for name, fmt in zip(formats, settings, strict=True):
        pages = _pages_for_all(sizes, fmt)
        for batch, seq in cases:
            add(name, batch, seq, partial(_compressed, sizes, batch, seq, fmt, pages, gpu))
        del pages  # before those of the next format are made
    return measured


def format_of(name: str) -> pk.KVFormat:
    """The settings that a name such as K4V4 (bits of keys, of values) stands for."""
    if not (match := re.fullmatch(r"K(\d)V(\d)", name)):
        raise ValueError(f"{name!r} is not a format such as K4V4")
    return pk.KVFormat(int(match[1]), int(match[2]))


def _pages_for_all(sizes: Sizes, fmt: pk.KVFormat) -> Pages:
    """As many pages as the largest case takes that fits into memory; all cases use the same.

    So they, and xla's attention over them, are compiled once for a format.
    """
    needed = set()
    for batch, seq in product(sizes.batches, sizes.seqs):
        shape = _shape(fmt, batch, seq, sizes.kv_heads, sizes.head_dim)
        needed.add(shape.page_table.size * timing.copies(sizes.nbytes, _nbytes(shape)))
    for count in sorted(needed, reverse=True):
        try:
            pages = random_pages(fmt, count, sizes.kv_heads, sizes.head_dim)
            return jax.block_until_ready(pages)
        except RuntimeError:
            continue
    return {}


def _shape(fmt: pk.KVFormat, batch: int, seq: int, kv_heads: int, head_dim: int) -> pk.KVCache:
    return jax.eval_shape(lambda: pk.KVCache.create(fmt, batch, seq, kv_heads, head_dim))


def _nbytes(shape: pk.KVCache) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shape))


def _compressed(
    sizes: Sizes, batch: int, seq: int, fmt: pk.KVFormat, pages: Pages, gpu: bool
) -> dict[str, Any]:
    static = (fmt, batch, seq, sizes.kv_heads, sizes.head_dim)
    nbytes = _nbytes(_shape(*static))
    caches = [full_cache(i, *static, pages) for i in range(timing.copies(sizes.nbytes, nbytes))]
    heads = sizes.kv_heads * sizes.group
    q = sweep.noise(_OF_QUERIES, (batch, heads, sizes.head_dim), jnp.bfloat16)
    implementation = "mosaic_gpu" if gpu else "xla"

    def check(got):
        which = [0, batch - 1]
        want = _by_xla(q, caches[0], which, max(sizes.seqs))
        return {"error_to_xla": sweep.checked_error(np.asarray(got)[which], want, _TOLERANCE)}

    def attend(shared, own):
        q, pages = shared
        cache = replace(caches[0], **own, **pages)
        return pk.decode_attention(q, cache, implementation=implementation)

    # The pages once: of arguments larger than the device's memory XLA complains, in every call.
    names = ("page_table", *_OF_SEQUENCES)
    inputs = [({name: getattr(cache, name) for name in names},) for cache in caches]
    measured = timing.measure(attend, (q, pages), inputs, sizes.repeat, gpu, check)
    # All of the bytes are read: the cache is full.
    return {"implementation": implementation, "bytes": nbytes, **measured}


def _by_xla(q: jax.Array, cache: pk.KVCache, which: Sequence[int], longest: int) -> jax.Array:
    """What xla's attention gives for some of the sequences, in float32.

    Its arrays have the same shapes whatever the batch and the tokens of a sequence: it is compiled
    once for a format.
    """
    parts = {name: getattr(cache, name) for name in _OF_SEQUENCES}
    q, parts = _take((q, parts), np.asarray(which))
    table = np.asarray(cache.page_table)[which]
    most = cache.fmt.packed(longest) // cache.fmt.page_size
    table = np.pad(table, ((0, 0), (0, max(0, most - table.shape[1]))))
    few = replace(cache, max_len=longest, page_table=jnp.asarray(table), **parts)
    return _attend_by_xla(q, few)


@jax.jit  # compiled at once, not operation by operation
def _attend_by_xla(q, cache):
    return pk.decode_attention(q.astype(jnp.float32), cache, implementation="xla")


@jax.jit
def _take(arrays, which):
    return jax.tree.map(lambda x: x[which], arrays)


def full_cache(
    seed: int,
    fmt: pk.KVFormat,
    batch: int,
    seq: int,
    kv_heads: int,
    head_dim: int,
    pages: Pages | None = None,
) -> pk.KVCache:
    """A full cache of random codes, its pages in random order.

    pages: what it takes its own from, those of seed 0 first; by default it has pages of its own.
    """
    cache = _shape(fmt, batch, seq, kv_heads, head_dim)
    count = cache.page_table.size
    first = count * seed
    if pages is None:
        pages, first = random_pages(fmt, count, kv_heads, head_dim, seed), 0
    if not pages or first + count > len(pages["k_scale"]):
        raise RuntimeError("out of memory: there are not so many pages")
    order = first + np.random.default_rng(seed).permutation(count)
    lengths = np.full(batch, seq, np.int32)

    def noise(i, x):
        return sweep.noise(4 * seed + i, x.shape, x.dtype)

    return replace(
        cache,
        lengths=jnp.asarray(lengths),
        sink_k=noise(0, cache.sink_k),
        sink_v=noise(1, cache.sink_v),
        recent_k=noise(2, cache.recent_k),
        recent_v=noise(3, cache.recent_v),
        key_offset=jnp.zeros(cache.key_offset.shape, cache.key_offset.dtype),
        page_table=jnp.asarray(order.reshape(cache.page_table.shape).astype(np.int32)),
        **pages,
    )


@partial(jax.jit, static_argnums=(0, 1, 2, 3))
def random_pages(
    fmt: pk.KVFormat, count: int, kv_heads: int, head_dim: int, seed: int = 0
) -> Pages:
    """Pages of random codes: the fields of a KVCache that hold them."""
    create = partial(pk.KVCache.create, fmt, 1, 1, kv_heads, head_dim, num_pages=count)
    cache = jax.eval_shape(create)
    seeds = iter(range(8))

    def noise(x):
        return sweep.noise(8 * seed + next(seeds), x.shape, x.dtype)

    def codes(planes, bits):
        # At 8 bits without the largest exponents and NaN.
        return tuple(noise(x) & np.uint8(0xB7 if bits == 8 else 0xFF) for x in planes)

    def scales(x, bits):  # from 0.5 to 2
        return (1.25 + 0.375 * noise(x)) * jnp.bfloat16(1 / codebook.divisor(bits))

    return {
        "k_planes": codes(cache.k_planes, fmt.key_bits),
        "v_planes": codes(cache.v_planes, fmt.value_bits),
        "k_scale": scales(cache.k_scale, fmt.key_bits),
        "v_scale": scales(cache.v_scale, fmt.value_bits),
    }


def _bf16(sizes: Sizes, batch: int, seq: int, implementation: str, gpu: bool) -> dict[str, Any]:
    shape = (batch, seq, sizes.kv_heads, sizes.head_dim)
    nbytes = 4 * math.prod(shape)
    # More of them would not make xla's passes slower, only longer to compile.
    most = 4 if implementation == "xla" else math.inf
    inputs = [
        tuple(sweep.noise(2 * i + j, shape, jnp.bfloat16) for j in range(2))
        for i in range(int(min(most, timing.copies(sizes.nbytes, nbytes))))
    ]
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
