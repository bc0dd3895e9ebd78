"""`jaxgds plan`: memory, context and load time of a model on a mesh, by arithmetic alone.

Weights are counted as `jaxgds prepare` lays them out, caches as `pallas_kernels.KVCache` and a
dense cache lay them out; so a plan is what a process allocates, up to the memory kept for
activations, which is the caller's guess. GB are 10^9 bytes, GiB 2^30.
"""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from jaxgds import models
from jaxgds.jobs import make_jobs
from jaxgds.prepared import Array
from jaxgds.rules import Mesh, Rules, shipped
from jaxgds.sources import Model, Tensor, tree_keys
from pallas_kernels import KVFormat


KV_AXIS = "tp"  # KV heads are split over it; each index of the other axes has sequences of its own

type Weights = Literal["bf16", "fp8"]
type KV = KVFormat | Literal["bf16", "fp8"]


@dataclass(frozen=True)
class Gpu:
    """Memory as the maker states it, and what its PCIe link was measured to carry, a second."""

    name: str
    hbm_bytes: float
    pcie_rate: float = 55e9  # PCIe 5.0 x16 of an H100, from pinned memory


GPUS = {gpu.name: gpu for gpu in (Gpu("H100", 80e9), Gpu("H200", 141e9), Gpu("B200", 180e9))}


@dataclass(frozen=True)
class Setup:
    """What a model is to be served on.

    Attributes:
      weights: "bf16", or "fp8" as `jaxgds prepare --quantize fp8` makes it.
      activation_bytes: of each GPU, kept for activations and the compiler's temporary buffers.
      storage_rate: of the file system as a whole, bytes a second.
      network_rate: into each host, bytes a second.
      host_gpus: GPUs in a host.
    """

    gpu: Gpu
    mesh: Mesh
    weights: Weights = "bf16"
    activation_bytes: float = 5e9
    storage_rate: float = 94 * 2**30
    network_rate: float = 150e9
    host_gpus: int = 8

    def __post_init__(self):
        for name in ("storage_rate", "network_rate", "host_gpus"):
            if not getattr(self, name) > 0:
                raise ValueError(f"{name}={getattr(self, name)} is not positive")
        if not 0 <= self.activation_bytes < math.inf:
            raise ValueError(f"activation_bytes={self.activation_bytes} is no number of bytes")


def read_gpu(text: str) -> Gpu:
    """A GPU by its name, or by its memory in GB. Raises ValueError for anything else."""
    if text.upper() in GPUS:
        return GPUS[text.upper()]
    try:
        size = float(text)
    except ValueError:
        size = math.nan
    if not 0 < size < math.inf:
        raise ValueError(f"GPU {text!r}: expected one of {', '.join(GPUS)}, or its memory in GB")
    return Gpu(f"{size:g} GB GPU", size * 1e9)


def read_kv(text: str) -> KV:
    """bf16, fp8 or a packed format such as K4V3. Raises ValueError for anything else."""
    if text == "bf16" or text == "fp8":
        return text
    if not (match := re.fullmatch(r"K(\d)V(\d)", text.upper())):
        raise ValueError(f"{text!r} is not a KV format such as K4V4, bf16 or fp8")
    return KVFormat(int(match[1]), int(match[2]))


def kv_nbytes(kv: KV, batch: int, max_len: int, kv_heads: int, head_dim: int) -> int:
    """Bytes of one layer's cache for `batch` sequences of up to `max_len` tokens each."""
    if not isinstance(kv, KVFormat):
        return 4 * batch + 2 * batch * max_len * kv_heads * head_dim * (2 if kv == "bf16" else 1)
    vectors = batch * kv_heads
    pages = max(1, kv.packed(max_len) // kv.page_size)
    page = (kv.key_bits + kv.value_bits) * kv.page_size * head_dim // 8 + 2 * 2 * kv.page_size
    recent = 2 * (kv.sinks + kv.ring_slots) * head_dim * 2  # bf16 keys and values
    offset, table, length = 4 * head_dim, 4 * pages, 4
    return vectors * (pages * page + recent + offset) + batch * (table + length)


def kv_token_nbytes(kv: KV, kv_heads: int, head_dim: int) -> float:
    """Bytes that one more token takes in one layer of a long sequence."""
    if isinstance(kv, KVFormat):
        return kv.bytes_per_token(kv_heads, head_dim)
    return 2 * kv_heads * head_dim * (2 if kv == "bf16" else 1)


def longest(kv: KV, batch: int, free: float, layers: int, kv_heads: int, head_dim: int) -> int:
    """The largest `max_len` whose caches fit into `free` bytes; 0 if none does."""

    def fits(n: int) -> bool:
        return layers * kv_nbytes(kv, batch, n, kv_heads, head_dim) <= free

    low, high = 0, 1
    while fits(high):
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low


def plan(
    config: Mapping[str, Any],
    setup: Setup,
    kvs: Sequence[KV] = ("bf16", "fp8", KVFormat(4, 4), KVFormat(4, 3), KVFormat(3, 3)),
    sequences: Sequence[int] = (1, 8, 64),
    rules: Rules | None = None,
) -> dict[str, Any]:
    """What a model takes on each GPU, how long its context can be, and how fast it can load.

    Args:
      config: the model's config.json.
      sequences: numbers of sequences over the whole mesh, each to be served at once.
      rules: how parameters are sharded; None takes those that ship for the family.

    Returns:
      Plain JSON types. hbm: bytes on the fullest GPU, by use. kv: one entry per format, with
      token_nbytes (of one more token, on each GPU), tokens (over all sequences, of long ones) and
      context (number of sequences -> tokens each). load: seconds that storage, network and PCIe
      need at least, each alone; the slowest sets the pace.

    Raises:
      ValueError: model, rules and mesh do not fit each other, or the weights do not fit the GPU.
    """
    if not sequences or min(sequences) < 1:
        raise ValueError(f"{sequences=} are not numbers of sequences")
    arrays = weights(config, setup, rules)
    layers, heads, head_dim = models.kv_shape(config)
    tp = setup.mesh.axes.get(KV_AXIS, 1)
    replicas = setup.mesh.size // tp
    if heads % tp and tp % heads:
        raise ValueError(f"{heads} KV heads do not split over {KV_AXIS}={tp} GPUs")
    local_heads = max(heads // tp, 1)
    resident = sum(a.chunk_nbytes for a in arrays)
    free = setup.gpu.hbm_bytes - resident - setup.activation_bytes
    if free <= 0:
        raise ValueError(
            f"{resident / 1e9:.1f} GB of weights and {setup.activation_bytes / 1e9:.1f} GB for "
            f"activations do not fit into the {setup.gpu.hbm_bytes / 1e9:.0f} GB of one "
            f"{setup.gpu.name}: use more GPUs (--mesh)"
            + ("" if setup.weights == "fp8" else " or --weights fp8")
        )
    shape = (layers, local_heads, head_dim)
    dense = layers * kv_token_nbytes("bf16", local_heads, head_dim)
    formats = []
    for kv in kvs:
        token = layers * kv_token_nbytes(kv, local_heads, head_dim)
        context = {n: longest(kv, -(-n // replicas), free, *shape) for n in sequences}
        formats.append(
            {
                "name": kv_name(kv),
                "token_nbytes": token,
                "ratio": dense / token,
                "tokens": int(free // token) * replicas,
                "context": context,
            }
        )
    total = sum(math.prod(a.shape) * a.dtype.itemsize for a in arrays)
    return {
        "model": {
            "parameters": sum(math.prod(s) for s in models.parameters(config).values()),
            "layers": layers,
            "kv_heads": heads,
            "head_dim": head_dim,
            "max_position_embeddings": config.get("max_position_embeddings"),
        },
        "gpu": setup.gpu.name,
        "mesh": dict(setup.mesh.axes),
        "weights": setup.weights,
        "local_kv_heads": local_heads,
        "hbm": {
            "weights": resident,
            "activations": setup.activation_bytes,
            "kv_cache": free,
            "total": setup.gpu.hbm_bytes,
        },
        "kv": formats,
        "load": {"weight_bytes": total, **load_seconds(arrays, setup)},
    }


def weights(config: Mapping[str, Any], setup: Setup, rules: Rules | None = None) -> list[Array]:
    """The arrays that `jaxgds prepare` would make of the model, each with its shards."""

    def read(_: Any) -> np.ndarray:
        raise AssertionError("a plan reads nothing")

    bf16 = np.dtype("bfloat16")
    shapes = models.parameters(config)
    tensors = tuple(Tensor(tree_keys(name), shape, bf16, read) for name, shape in shapes.items())
    model = Model("plan", "config.json", tensors, {}, config, {}, {})
    method = "fp8" if setup.weights == "fp8" else None
    jobs = make_jobs(model, rules or shipped(config), setup.mesh, method)
    return [a for job in jobs for a in (job.array, job.scale) if a is not None]


def load_seconds(arrays: Sequence[Array], setup: Setup) -> dict[str, float]:
    """Least time to read each byte once per host and to bring each GPU its shards, by limit."""
    size, mesh = setup.mesh.size, setup.mesh
    per_host: list[float] = []
    for first in range(0, size, setup.host_gpus):
        ranks = range(first, min(first + setup.host_gpus, size))
        parts = {spec: len({part(mesh, spec, rank) for rank in ranks}) for spec in _specs(arrays)}
        per_host.append(sum(parts[a.spec] * a.chunk_nbytes for a in arrays))
    return {
        "storage": sum(per_host) / setup.storage_rate,
        "network": max(per_host) / setup.network_rate,
        "pcie": sum(a.chunk_nbytes for a in arrays) / setup.gpu.pcie_rate,
    }


def _specs(arrays: Sequence[Array]) -> set[Any]:
    return {a.spec for a in arrays}


def part(mesh: Mesh, spec: Any, rank: int) -> tuple[int, ...]:
    """Which part of an array with this spec a rank holds."""
    at, left = {}, rank
    for axis, size in reversed(list(mesh.axes.items())):
        left, at[axis] = divmod(left, size)
    found = []
    for axes in spec:
        index = 0
        for axis in axes:
            index = index * mesh.axes[axis] + at[axis]
        found.append(index)
    return tuple(found)


def kv_name(kv: KV) -> str:
    """What `read_kv` reads: bf16, fp8, or a name such as K4V4."""
    return kv if isinstance(kv, str) else f"K{kv.key_bits}V{kv.value_bits}"


def table(found: Mapping[str, Any]) -> str:
    """`plan`'s result as text for people."""
    model, hbm, load = found["model"], found["hbm"], found["load"]
    mesh = ",".join(f"{axis}={n}" for axis, n in found["mesh"].items())
    gb = lambda n: f"{n / 1e9:.2f} GB"  # noqa: E731
    lines = [
        f"{model['parameters'] / 1e9:.2f} billion parameters, weights in {found['weights']} "
        f"({gb(load['weight_bytes'])}), on {found['gpu']} with mesh {mesh}",
        f"HBM per GPU: {gb(hbm['weights'])} weights + {gb(hbm['activations'])} activations + "
        f"{gb(hbm['kv_cache'])} KV cache = {gb(hbm['total'])}",
        f"KV cache: {model['layers']} layers, {found['local_kv_heads']} of {model['kv_heads']} "
        f"heads on each GPU, head_dim {model['head_dim']}",
        "",
    ]
    counts = list(found["kv"][0]["context"]) if found["kv"] else []
    head = ["KV", "bytes/token", "ratio", "tokens in all", *(f"{n} seq." for n in counts)]
    rows = [head]
    for kv in found["kv"]:
        context = [f"{n:,}" for n in kv["context"].values()]
        token = f"{kv['token_nbytes']:,.0f}"
        rows.append([kv["name"], token, f"{kv['ratio']:.2f}x", f"{kv['tokens']:,}", *context])
    lines += columns(rows)
    slowest = max(("storage", "network", "pcie"), key=lambda name: load[name])
    lines += [
        "bytes/token: on each GPU; N seq.: the longest context of each of N sequences at once",
        "",
        "Load, at least: "
        + ", ".join(f"{name} {load[name]:.2f} s" for name in ("storage", "network", "pcie"))
        + f"; {slowest} sets the pace",
    ]
    if (share := 1 - hbm["activations"] / hbm["total"]) > 0.75:
        lines.append(
            f"JAX takes 75 % of a GPU by itself: XLA_PYTHON_CLIENT_MEM_FRACTION has to be above "
            f"{share:.2f} for all of this."
        )
    if (limit := model["max_position_embeddings"]) is not None:
        lines.append(f"The model itself was made for contexts of up to {limit:,} tokens.")
    return "\n".join(lines)


def columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of cells as lines: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [c.rjust(w) for c, w in zip(row, widths, strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells[1:]]).rstrip())
    return lines
