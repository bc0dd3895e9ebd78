"""Decode, append, prefill and restore at random sizes, again and again, on a GPU.

Every output equals the oracle's, and memory, threads and files stay as they were after the first
rounds. JAXGDS_SOAK is for how many seconds (600 before a release).
"""

import gc
import itertools
import os
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import jaxgds
import pallas_kernels as pk


GPUS = [d for d in jax.devices() if d.platform == "gpu"]
SECONDS = float(os.environ.get("JAXGDS_SOAK", "20"))
FORMATS = [pk.KVFormat(), pk.KVFormat(3, 8, window=20, page_size=16, sinks=0)]
OPTIONS = [
    {"soft_cap": cap, "sliding_window": window} for cap in (None, 30.0) for window in (None, 256)
]
BATCH, HEADS, GROUP, DIM, MAX_LEN, CHUNK = 3, 2, 4, 128, 2048, 96

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not GPUS, reason="no GPU")]


def test_everything_again_and_again(tmp_path):
    rng = np.random.default_rng(0)
    sources = checkpoints(tmp_path, rng)
    caches = [empty(fmt) for fmt in FORMATS]
    for which, one, options in itertools.product(range(len(caches)), (False, True), OPTIONS):
        caches[which] = advance(caches[which], rng, one, options)
    for source in sources:
        restore(*source)
    before = held()  # all is compiled, the rings are pinned
    rounds, end = 0, time.monotonic() + SECONDS
    while rounds < 8 or time.monotonic() < end:
        which, one = int(rng.integers(len(caches))), bool(rng.integers(2))
        caches[which] = advance(caches[which], rng, one, OPTIONS[rng.integers(len(OPTIONS))])
        restore(*sources[rng.integers(len(sources))])
        rounds += 1
    after = held()
    assert after[1:] == before[1:]
    assert after[0] <= before[0] + (1 << 20), f"{rounds} rounds: {before[0]} -> {after[0]} bytes"


def checkpoints(folder, rng) -> list[tuple[str, dict[str, np.ndarray]]]:
    found = []
    for i in range(4):
        shapes = {f"w{n}": tuple(rng.integers(1, 1500, 2)) for n in range(3)}
        tree = {k: rng.standard_normal(s).astype(np.float32) for k, s in shapes.items()}
        path = str(folder / f"checkpoint{i}")
        if i == 0:
            path += ".safetensors"
            save_file(tree, path)
        else:
            handler = ocp.PyTreeCheckpointHandler(use_compression=i == 1, use_ocdbt=i < 3)
            with ocp.Checkpointer(handler) as checkpointer:
                on_device = jax.tree.map(jnp.asarray, tree)
                checkpointer.save(path, args=ocp.args.PyTreeSave(on_device))
        found.append((path, tree))
    return found


def restore(path: str, expected: dict[str, np.ndarray]) -> None:
    got = jaxgds.load(path)
    for name, array in expected.items():
        np.testing.assert_array_equal(np.asarray(got[name]), array)


def empty(fmt: pk.KVFormat) -> pk.KVCache:
    return pk.KVCache.create(fmt, BATCH, MAX_LEN, HEADS, DIM)


def advance(cache: pk.KVCache, rng, one: bool, options: dict[str, Any]) -> pk.KVCache:
    """A chunk of a prompt, or one token: attention and the append, by the kernels and by xla."""
    if int(cache.lengths.max()) + CHUNK > MAX_LEN:
        cache = empty(cache.fmt)
    new = 1 if one else CHUNK
    k, v, q = (
        jnp.asarray(rng.standard_normal((BATCH, new, n, DIM)), jnp.bfloat16)
        for n in (HEADS, HEADS, HEADS * GROUP)
    )
    q *= 2  # to scores of which some are near the cap
    if one:
        cache = appended(cache, k, v, None)
        outputs = [
            pk.decode_attention(q[:, 0], cache, implementation=i, **options) for i in (None, "xla")
        ]
        return checked(cache, outputs, options)
    counts = jnp.asarray(rng.integers(0, CHUNK + 1, BATCH), jnp.int32)
    outputs = [
        pk.prefill_attention(q, k, v, cache, lengths=counts, implementation=i, **options)
        for i in ("mosaic_gpu", "xla")
    ]
    return appended(checked(cache, outputs, options), k, v, counts)


def appended(cache: pk.KVCache, k, v, counts) -> pk.KVCache:
    """The cache as the kernel leaves it. Its codes may differ from xla's here and there."""
    by_kernel, by_xla = (cache.append(k, v, counts, i) for i in ("mosaic_gpu", "xla"))
    assert (by_kernel.lengths == by_xla.lengths).all()
    for tokens in zip(by_kernel.dequantize(), by_xla.dequantize(), strict=True):
        checked(by_kernel, tokens, {"append": k.shape})
    return by_kernel


def checked(cache: pk.KVCache, outputs, options) -> pk.KVCache:
    got, expected = (np.asarray(x, np.float32) for x in outputs)
    error = np.linalg.norm(got - expected) / max(np.linalg.norm(expected), 1e-9)
    assert error < 1e-2, (error, cache.fmt, cache.lengths, options)
    return cache


def held() -> tuple[int, set[str], int]:
    """Device memory, threads' names, number of open files."""
    gc.collect()
    in_use = (GPUS[0].memory_stats() or {})["bytes_in_use"]
    return in_use, {t.name for t in threading.enumerate()}, len(os.listdir("/proc/self/fd"))
