"""`jaxgds plan --table`: the figures that AWS published for this recipe beside this project's.

Source: "Accelerate LLM model loading and increase context windows with GPUDirect on Amazon FSx
for Lustre and TurboQuant" (AWS, 2026): 8 H200, a file system of 94 GiB/s, nothing cached.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from jaxgds import capacity, models
from jaxgds.rules import Mesh
from pallas_kernels import KVFormat


# model, weights, GB, seconds, what vLLM takes without it
LOADS: tuple[tuple[str, capacity.Weights, float, float, str], ...] = (
    ("llama-3.1-70b", "bf16", 141, 2.17, "3 min"),
    ("llama-3.1-70b", "fp8", 72, 1.28, "3 min"),
    ("llama-3.1-405b", "bf16", 812, 10.4, "18 min"),
    ("llama-3.1-405b", "fp8", 408, 6.4, "18 min"),
)
# KV format, this project's nearest, thousands of tokens on 8 H200 and on 8 B200 with 405B in FP8
CAPACITIES: tuple[tuple[str, capacity.KV, int, int], ...] = (
    ("FP16", "bf16", 82, 131),
    ("K4/V4", KVFormat(4, 4), 310, 495),
    ("K4/V3", KVFormat(4, 3), 412, 660),
)
_MODEL = "llama-3.1-405b"


def compare() -> dict[str, Any]:
    """Both tables, as plain JSON types; this project's side is by arithmetic, not measured."""
    h200 = capacity.Setup(capacity.GPUS["H200"], Mesh({"tp": 8}))
    loads = []
    for model, weights, gigabytes, seconds, vllm in LOADS:
        setup = replace(h200, weights=weights)
        arrays = capacity.weights(models.read_config(model), setup)
        loads.append(
            {
                "model": model,
                "weights": weights,
                "published": {"gigabytes": gigabytes, "seconds": seconds, "vllm": vllm},
                "weight_bytes": sum(a.chunk_nbytes for a in arrays) * setup.mesh.size,
                "limits": capacity.load_seconds(arrays, setup),
            }
        )
    config = models.read_config(_MODEL)
    kvs: list[capacity.KV] = [kv for _, kv, _, _ in CAPACITIES]
    fp8 = replace(h200, weights="fp8")
    planned = {
        name: capacity.plan(config, replace(fp8, gpu=capacity.GPUS[name]), kvs, (1,))
        for name in ("H200", "B200")
    }
    capacities = [
        {
            "kv": capacity.kv_name(kv),
            "token_nbytes": planned["H200"]["kv"][i]["token_nbytes"],
            "ratio": planned["H200"]["kv"][i]["ratio"],
            "tokens": {gpu: p["kv"][i]["tokens"] for gpu, p in planned.items()},
            "published": {
                "kv": name,
                "ratio": h200_k / CAPACITIES[0][2],
                "tokens": {"H200": h200_k * 1000, "B200": b200_k * 1000},
            },
        }
        for i, (name, kv, h200_k, b200_k) in enumerate(CAPACITIES)
    ]
    free = {gpu: p["hbm"]["kv_cache"] for gpu, p in planned.items()}
    return {"loads": loads, "capacities": capacities, "kv_cache_bytes": free}


def table(found: Mapping[str, Any]) -> str:
    """`compare`'s result as text for people, with the arithmetic where the two differ."""
    loads: list[tuple[str, ...]] = [
        ("load", "weights", "AWS: GB", "s", "GiB/s", "vLLM", "here: GB", "s at least")
    ]
    for load in found["loads"]:
        aws, limits = load["published"], load["limits"]
        rate = aws["gigabytes"] * 1e9 / aws["seconds"] / 2**30
        loads.append(
            (
                load["model"],
                load["weights"],
                f"{aws['gigabytes']}",
                f"{aws['seconds']:.2f}",
                f"{rate:.0f}",
                aws["vllm"],
                f"{load['weight_bytes'] / 1e9:.0f}",
                f"{max(limits.values()):.2f}",
            )
        )
    kvs: list[tuple[str, ...]] = [
        ("KV", "AWS: H200", "B200", "ratio", "here: bytes/token", "H200", "B200", "ratio")
    ]
    for kv in found["capacities"]:
        aws, here = kv["published"], kv["tokens"]
        kvs.append(
            (
                kv["published"]["kv"],
                *(f"{aws['tokens'][gpu] // 1000}K" for gpu in ("H200", "B200")),
                f"{aws['ratio']:.2f}x",
                f"{kv['token_nbytes']:,.0f}",
                *(f"{here[gpu] // 1000:,}K" for gpu in ("H200", "B200")),
                f"{kv['ratio']:.2f}x",
            )
        )
    dense = found["capacities"][0]
    free, token = found["kv_cache_bytes"]["H200"], dense["token_nbytes"]
    times = free / (dense["published"]["tokens"]["H200"] * token)
    k4v4, k4v3, k3v3 = (512 / (2 * 2 + n * 128 / 8) for n in (8, 7, 6))
    notes = f"""
AWS's seconds were measured; those here are the least that the slowest limit allows (94 GiB/s of
storage, 150 GB/s of network a host, 55 GB/s of PCIe a GPU). Sizes here are what the GPUs hold of
a checkpoint that `jaxgds prepare` made.

Tokens are those of all sequences together: Llama 3.1 405B in FP8 on 8 GPUs of one kind. The two
sides differ, and we believe that the published one is too small. In bf16 a token takes
    126 layers x 8 KV heads / 8 GPUs x 128 numbers x 2 (K and V) x 2 bytes = {token:,.0f} bytes
on each GPU, and an H200 has 141 GB - weights - 5 GB for activations = {free / 1e9:.1f} GB for them:
    {free / 1e9:.1f} GB / {token:,.0f} bytes = {free / token / 1e6:.2f} million tokens
The published 82K would be right if a token took {times:.0f} times as much. What carries over are
the ratios. There, the 3.76x of K4/V4 belong to a 32-bit norm per vector: 256 bytes / (64 + 4).
With the 16-bit scale of this project it is 256 / (64 + 2) = {k4v4:.2f}x. The 5x of K4/V3 seem to
be those of K3/V3, 512 / (50 + 50) = {k3v3:.2f}x: K4/V3 has 4 and 3 bits for 16 and 16, which with
no scale at all is {32 / 7:.2f}x, and with a 16-bit one 512 / (66 + 50) = {k4v3:.2f}x."""
    return "\n".join([*capacity.columns(loads), "", *capacity.columns(kvs), notes])
