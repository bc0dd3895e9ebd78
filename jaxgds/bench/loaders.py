"""One loader, one checkpoint, one fresh process: prints what it measured as one JSON line.

`python -m jaxgds.bench.loaders LOADER PATH REPEAT`. The first call is what a cold start
feels: imports are done and JAX has its first array, nothing else is warm.
"""

# Peers and matplotlib are optional.
# pyright: reportMissingImports=false

import gc
import glob
import json
import os
import sys
import threading
import time
from collections.abc import Callable
from typing import Any


LONG = 10.0  # seconds: a call that takes longer is the last one


def main(loader: str, path: str, repeat: int) -> None:
    prepare = LOADERS[loader]
    call, finish = prepare(path)
    before = _resident()
    watch = _PeakMemory()
    watch.start()
    seconds, nbytes, first_peak, breakdown = [], 0, before, {}
    for i in range(repeat):
        gc.collect()
        start = time.perf_counter()
        result = call()
        nbytes = finish(result)
        seconds.append(time.perf_counter() - start)
        if i == 0:
            first_peak = watch.peak
            breakdown = _breakdown(loader)
        del result
        if seconds[-1] > LONG:
            break
    watch.stop()
    print(
        json.dumps(
            {
                "seconds": seconds,
                "nbytes": nbytes,
                "host_peak_bytes": max(0, first_peak - before),
                "device_extra_bytes": _device_extra(loader, nbytes),
                "breakdown": breakdown,
            }
        )
    )


def _jax() -> Any:
    import jax
    import jax.numpy as jnp

    jax.block_until_ready(jnp.zeros(8))
    return jax


def _ready(tree: Any) -> int:
    import jax

    jax.block_until_ready(tree)
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def _orbax(path: str) -> tuple[Callable, Callable]:
    jax = _jax()
    import orbax.checkpoint as ocp

    item = ocp.PyTreeCheckpointHandler().metadata(_epath(path))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(
        lambda m: jax.ShapeDtypeStruct(m.shape, m.dtype, sharding=device), _tree(item)
    )
    args = ocp.args.PyTreeRestore(
        item=target, restore_args=ocp.checkpoint_utils.construct_restore_args(target)
    )

    def call() -> Any:
        with ocp.Checkpointer(ocp.PyTreeCheckpointHandler()) as checkpointer:
            return checkpointer.restore(path, args=args)

    return call, _ready


def _epath(path: str) -> Any:
    from etils import epath

    return epath.Path(path)


def _tree(metadata: Any) -> Any:
    return metadata.tree if hasattr(metadata, "tree") else metadata


def _jaxgds_orbax(path: str) -> tuple[Callable, Callable]:
    import jaxgds.orbax

    jaxgds.orbax.install(strict=True)
    return _orbax(path)


def _jaxgds_cpu_decodes(path: str) -> tuple[Callable, Callable]:
    os.environ["JAXGDS_ZSTD"] = "cpu"
    return _jaxgds_orbax(path)


def _jaxgds_prepared(path: str) -> tuple[Callable, Callable]:
    jax = _jax()
    import ml_dtypes

    import jaxgds
    from jaxgds.bench.checkpoints import PREPARED, SHAPE

    name, _, count = os.path.basename(path).rpartition("-")
    mesh = jax.make_mesh((PREPARED[name],), ("tp",), devices=jax.devices()[: PREPARED[name]])
    by_rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("tp"))
    jax.block_until_ready(jax.device_put(jax.numpy.zeros(8), by_rows))  # on every device
    array = jax.ShapeDtypeStruct(SHAPE, ml_dtypes.bfloat16, sharding=by_rows)
    target = {f"layer_{i:03d}": array for i in range(int(count))}
    return lambda: jaxgds.load(path, target, strict=True), _ready


def _jaxgds_safetensors(path: str) -> tuple[Callable, Callable]:
    _jax()
    import jaxgds

    return lambda: jaxgds.load(path, strict=True), _ready


def _safetensors_flax(path: str) -> tuple[Callable, Callable]:
    _jax()
    from safetensors.flax import load_file

    (file,) = glob.glob(os.path.join(path, "*.safetensors"))
    return lambda: load_file(file), _ready


def _torch_ready(tensors: dict) -> int:
    import torch

    torch.cuda.synchronize()
    return sum(t.nbytes for t in tensors.values())


def _instanttensor(path: str) -> tuple[Callable, Callable]:
    import instanttensor
    import torch

    torch.zeros(8, device="cuda")
    files = glob.glob(os.path.join(path, "*.safetensors"))

    def call() -> dict:
        with instanttensor.safe_open(files, framework="pt", device=0) as f:
            return dict(f.tensors())

    return call, _torch_ready


def _fastsafetensors(path: str) -> tuple[Callable, Callable]:
    import torch
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    torch.zeros(8, device="cuda")
    files = glob.glob(os.path.join(path, "*.safetensors"))
    keep = []

    def call() -> dict:
        while keep:
            keep.pop().close()
        loader = SafeTensorsFileLoader(SingleGroup(), "cuda:0", nogds=True)
        loader.add_filenames({0: files})
        buffers = loader.copy_files_to_device()
        keep.extend([loader, buffers])
        return {key: buffers.get_tensor(key) for key in loader.get_keys()}

    return call, _torch_ready


def _safetensors_torch(path: str) -> tuple[Callable, Callable]:
    import torch
    from safetensors.torch import load_file

    torch.zeros(8, device="cuda")
    (file,) = glob.glob(os.path.join(path, "*.safetensors"))
    return lambda: load_file(file, device="cuda:0"), _torch_ready


LOADERS: dict[str, Callable[[str], tuple[Callable, Callable]]] = {
    "jaxgds": _jaxgds_orbax,
    "jaxgds (CPU decodes)": _jaxgds_cpu_decodes,
    "jaxgds (prepared)": _jaxgds_prepared,
    "orbax": _orbax,
    "jaxgds (safetensors)": _jaxgds_safetensors,
    "safetensors.flax": _safetensors_flax,
    "instanttensor": _instanttensor,
    "fastsafetensors": _fastsafetensors,
    "safetensors.torch": _safetensors_torch,
}


def _breakdown(loader: str) -> dict[str, Any]:
    if not loader.startswith("jaxgds"):
        return {}
    import jaxgds

    report = jaxgds.last_report()
    return report.to_dict() if report else {}


def _device_extra(loader: str, nbytes: int) -> int | None:
    """Peak of JAX's memory on all devices beyond the result; None where nothing counts it."""
    if "torch" in loader or loader in ("instanttensor", "fastsafetensors"):
        return None
    import jax

    stats = [device.memory_stats() or {} for device in jax.devices()]
    peaks = [s["peak_bytes_in_use"] for s in stats if "peak_bytes_in_use" in s]
    return max(0, sum(peaks) - nbytes) if peaks else None


def _resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


class _PeakMemory(threading.Thread):
    """Samples resident memory (VmHWM cannot be reset without root).

    Not too often: each time takes the interpreter from a loader that is measured.
    """

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = _resident()
        self._done = threading.Event()

    def run(self) -> None:
        while not self._done.wait(0.02):
            self.peak = max(self.peak, _resident())

    def stop(self) -> None:
        self._done.set()
        self.join()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]))
