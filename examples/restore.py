"""Restore the model onto every local device, with stock Orbax or through jaxgds, and measure it.

python -m examples.restore .demo/smollm2 --loader jaxgds
"""

import argparse
import dataclasses
import hashlib
import json
import re
import time
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.sharding import Mesh

from examples import fp8
from examples.llama import Config, abstract_model


@dataclasses.dataclass(frozen=True)
class Restored:
    """What one restore, the first in its process, took.

    `peak_host_bytes` is how far the process's peak of resident memory rose above what was
    resident before; where the devices are the CPU it contains the restored weights themselves.
    """

    loader: str
    seconds: float
    peak_host_bytes: int
    weight_bytes: int
    sha256: dict[str, str]  # of each array's bytes
    report: dict | None  # jaxgds's own account
    devices: int


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="folder with config.json and the checkpoint")
    parser.add_argument("--checkpoint", default="checkpoint", help="its name in that folder")
    parser.add_argument("--loader", choices=["orbax", "jaxgds"], required=True)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()

    if args.loader == "jaxgds":
        import jaxgds.orbax

        jaxgds.orbax.install()
    use_two_cpu_devices()
    config = Config(**json.loads((args.path / "config.json").read_text()))
    mesh = Mesh(jax.devices(), ("model",))
    _, target = abstract_model(config, mesh)
    if is_fp8(args.path / args.checkpoint):
        target = fp8.quantised(target)

    jax.device_put(np.zeros(8), mesh.devices[0]).block_until_ready()  # a GPU's context is there
    reset_peak()
    before, start = memory("VmRSS"), time.perf_counter()
    state = ocp.StandardCheckpointer().restore((args.path / args.checkpoint).resolve(), target)
    jax.block_until_ready(state)
    seconds, peak = time.perf_counter() - start, memory("VmHWM") - before

    report = None
    if args.loader == "jaxgds":
        import jaxgds

        report = jaxgds.last_report()
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(state))
    result = Restored(
        args.loader,
        seconds,
        peak,
        weight_bytes,
        hashes(state),
        report.to_dict() if report else None,
        jax.device_count(),
    )
    print(f"{args.loader}: {seconds:.2f} s, {weight_bytes / seconds / 1e9:.2f} GB/s, "
          f"peak host memory +{peak / 1e6:.0f} MB")  # fmt: skip
    if args.json:
        args.json.write_text(json.dumps(dataclasses.asdict(result)))


def is_fp8(checkpoint: Path) -> bool:
    """Whether it is a prepared checkpoint with quantised weights."""
    description = checkpoint / "jaxgds.json"
    return description.exists() and json.loads(description.read_text())["quantize"] == "fp8"


def use_two_cpu_devices() -> None:
    """Give a machine without accelerators two devices to shard over; others keep theirs."""
    jax.config.update("jax_num_cpu_devices", 2)


def hashes(state: nnx.State) -> dict[str, str]:
    """The SHA-256 of each array's bytes, by its path."""
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): hashlib.sha256(
            np.ascontiguousarray(x).view(np.uint8)
        ).hexdigest()
        for path, x in jax.tree.leaves_with_path(state)
    }


def memory(field: str) -> int:
    """Bytes of this process in a field of /proc/self/status: VmRSS now, VmHWM at its peak."""
    status = Path("/proc/self/status").read_text()
    found = re.search(rf"^{field}:\s+(\d+) kB$", status, re.MULTILINE)
    return int(found[1]) * 1024 if found else 0


def reset_peak() -> None:
    """Let VmHWM count from now, where the system allows it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        pass


if __name__ == "__main__":
    main()
