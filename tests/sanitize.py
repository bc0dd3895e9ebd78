"""The Hopper kernels once each at small sizes, for compute-sanitizer (make sanitize).

    compute-sanitizer --tool memcheck --report-api-errors no --error-exitcode 1 \
        python tests/sanitize.py prefill-k4v4-d128
    compute-sanitizer --tool racecheck --error-exitcode 1 python tests/sanitize.py

API errors are not findings: XLA asks the driver for functions that it may lack. What the kernels
are compared with, and the caches, are made on the CPU: each program that XLA runs on the GPU takes
the sanitizer seconds. Arguments: the cases to run, default all; --list prints their names. make has
a process for each: memcheck itself has crashed in one that ran them all. Ends with 1 if a result
is wrong.
"""

import os
import sys
from collections.abc import Callable
from functools import partial
from typing import Any


# memcheck sees no further than an allocation, and XLA's pool is one; a graph hides its kernels.
os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
os.environ["XLA_PYTHON_CLIENT_ALLOCATOR"] = "platform"
os.environ["XLA_FLAGS"] = " ".join(
    (
        os.environ.get("XLA_FLAGS", ""),
        "--xla_gpu_enable_command_buffer=",
        "--xla_gpu_autotune_level=0",
    )
).strip()
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "0")

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

import pallas_kernels as pk  # noqa: E402


K4V4 = pk.KVFormat(window=20)
K3V3 = pk.KVFormat(3, 3, window=9, sinks=2, page_size=16)
LENGTHS = (230, 90)  # of the two sequences: neither ends with a page
NEW = 70

type Case = tuple[Callable[..., Any], tuple[Any, ...]]


def numbers(seed: int, *shape: int) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.bfloat16)


def filled(fmt: pk.KVFormat, head_dim: int, lengths: tuple[int, ...] = LENGTHS) -> pk.KVCache:
    shape = (len(lengths), max(LENGTHS), 1, head_dim)
    cache = pk.KVCache.create(fmt, shape[0], shape[1] + NEW, 1, head_dim)
    k, v = numbers(0, *shape) + 1, numbers(1, *shape)
    return cache.append(k, v, jnp.asarray(lengths, jnp.int32))


def cases() -> dict[str, Case]:
    """By name, a function of the implementation and the arguments, and these."""

    def decode(implementation, q, cache, **options):
        return pk.decode_attention(q, cache, implementation=implementation, **options)

    def prefill(implementation, q, k, v, cache, lengths):
        return pk.prefill_attention(q, k, v, cache, lengths=lengths, implementation=implementation)

    def append(implementation, cache, k, v, lengths):
        return cache.append(k, v, lengths, implementation)

    def new(count: int, head_dim: int) -> tuple[jax.Array, jax.Array]:
        return numbers(2, 2, count, 1, head_dim), numbers(3, 2, count, 1, head_dim)

    # One token that completes a page, in the first sequence.
    page = K4V4.sinks + K4V4.window + 3 * K4V4.page_size - 1
    some = jnp.asarray([NEW, 17], jnp.int32)
    one = jnp.ones(2, jnp.int32)
    q = numbers(4, 2, NEW, 4, 128)
    return {
        "decode-k4v4-d128": (
            partial(decode, sliding_window=100),
            (2 * numbers(5, 2, 4, 128), filled(K4V4, 128)),
        ),
        "decode-k3v3-d64": (decode, (2 * numbers(6, 2, 8, 64), filled(K3V3, 64))),
        "append-some": (append, (filled(K4V4, 128), *new(NEW, 128), some)),
        "append-one": (append, (filled(K4V4, 128, (page, 30)), *new(1, 128), one)),
        "append-k3v3-d64": (append, (filled(K3V3, 64), *new(NEW, 64), some)),
        "prefill-k4v4-d128": (prefill, (2 * q, *new(NEW, 128), filled(K4V4, 128), some)),
    }


def run(case: Case, implementation: str, device: jax.Device) -> Any:
    """As one program: what is traced asks nothing of the GPU in between."""
    function, arguments = case
    with jax.default_device(device):
        arguments = jax.device_put(arguments, device)
        return jax.device_get(jax.jit(partial(function, implementation))(*arguments))


def compared(x: Any) -> list[np.ndarray]:
    """What is to be nearly equal; of a cache, whose codes may differ here and there, the tokens."""
    return [np.asarray(y, np.float64) for y in (x.dequantize() if hasattr(x, "fmt") else (x,))]


def main(names: list[str]) -> int:
    if names == ["--list"]:
        with jax.default_device(jax.devices("cpu")[0]):
            print(*cases())
        return 0
    cpu, gpu = jax.devices("cpu")[0], jax.devices()[0]
    if getattr(gpu, "compute_capability", None) != "9.0":
        print(f"{gpu} is no Hopper GPU", file=sys.stderr)
        return 2
    wrong = 0
    with jax.default_device(cpu):
        found = cases()
        for name in names or found:
            want = compared(run(found[name], "xla", cpu))
            got = compared(jax.device_put(run(found[name], "mosaic_gpu", gpu), cpu))
            errors = [
                np.linalg.norm(a - b) / np.linalg.norm(b) for a, b in zip(got, want, strict=True)
            ]
            good = max(errors) < 1e-2
            wrong += not good
            print(f"{name}: {'ok' if good else 'WRONG'}, relative error {max(errors):.1e}")
    return min(wrong, 1)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
