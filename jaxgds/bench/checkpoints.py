"""The checkpoints that `jaxgds bench restore` reads: the same bf16 arrays in several formats."""

import math
import os
import shutil
import subprocess
import sys

import ml_dtypes
import numpy as np

from jaxgds.output import check_space


SHAPE = (8192, 8192)  # one weight matrix: 128 MiB of bf16
DEVICES = 8  # that the last two of Orbax's are sharded over
MANY = 1000  # arrays of the last, each cut by rows

ORBAX = ("orbax-raw", "orbax-zstd", "orbax-columns", "orbax-many")
FORMATS = (*ORBAX, "safetensors")
# As `jaxgds prepare` writes them, for that many devices of a mesh; measured when asked for.
PREPARED = {"prepared-tp1": 1, "prepared-tp2": 2}


def make(folder: str, formats: tuple[str, ...], nbytes: int) -> dict[str, str]:
    """Writes the checkpoints that are not there yet; returns format -> path.

    Each is written by a process of its own, on CPU devices, so that the caller's memory and
    devices stay as they are.
    """
    paths = {}
    for name in formats:
        count = max(1, round(nbytes / (math.prod(SHAPE) * 2)))  # of SHAPE
        path = paths[name] = os.path.join(folder, f"{name}-{count}")
        if os.path.exists(path):
            continue
        env = {**os.environ, "JAX_PLATFORMS": "cpu"}
        env["XLA_FLAGS"] = f"--xla_force_host_platform_device_count={DEVICES}"
        os.makedirs(folder, exist_ok=True)
        check_space(folder, nbytes)
        subprocess.run(
            [sys.executable, "-m", "jaxgds.bench.checkpoints", name, path, str(count)],
            check=True,
            env=env,
        )
    return paths


def weights(count: int) -> dict[str, np.ndarray]:
    """`count` matrices that look like weights: normal, 0.02 wide, none alike."""
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((SHAPE[0] // 8, SHAPE[1]), np.float32)
    block = np.tile((rows * 0.02).astype(ml_dtypes.bfloat16).view(np.uint16), (8, 1))
    # Shifted copies lie too far apart for a compressor's window to notice.
    return {
        f"layer_{i:03d}": np.roll(block, 4099 * i + 1, axis=1).view(ml_dtypes.bfloat16)
        for i in range(count)
    }


def _cut(whole: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """MANY arrays, of the rows of fewer."""
    rows = np.concatenate(list(whole.values()))
    each = len(rows) // MANY // DEVICES * DEVICES
    return {f"array_{i:04d}": rows[i * each : (i + 1) * each] for i in range(MANY)}


def _prepare(path: str, found: dict[str, np.ndarray], devices: int) -> None:
    from jaxgds.prepare import prepare
    from jaxgds.rules import Mesh, Rule, Rules
    from jaxgds.sources import Model, Tensor, tree_keys

    tensors = tuple(
        Tensor(tree_keys(name), x.shape, x.dtype, lambda box, x=x: x[tuple(slice(*s) for s in box)])
        for name, x in found.items()
    )
    model = Model("random", "random numbers", tensors, {}, None, {}, {})
    by_rows = Rules("by rows", (Rule(("*",), (("tp",), ())),))
    prepare(model, path, mesh=Mesh({"tp": devices}), rules=by_rows)


def _write(name: str, path: str, count: int) -> None:
    if name == "safetensors":
        from safetensors.numpy import save_file

        os.makedirs(path + ".tmp", exist_ok=True)
        save_file(weights(count), os.path.join(path + ".tmp", "model.safetensors"))
        shutil.move(path + ".tmp", path)
        return
    if name in PREPARED:
        _prepare(path, weights(count), PREPARED[name])
        return
    import jax
    import orbax.checkpoint as ocp
    from jax.sharding import Mesh, NamedSharding, PartitionSpec

    mesh = Mesh(np.array(jax.devices()), ("x",))
    specs = {"orbax-columns": PartitionSpec(None, "x"), "orbax-many": PartitionSpec("x")}
    where = NamedSharding(mesh, specs[name]) if name in specs else jax.devices()[0]
    found = weights(count)
    if name == "orbax-many":
        found = _cut(found)
    tree = {k: jax.device_put(v, where) for k, v in found.items()}
    handler = ocp.PyTreeCheckpointHandler(use_compression=name == "orbax-zstd")
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(os.path.abspath(path), args=ocp.args.PyTreeSave(tree))


if __name__ == "__main__":
    _write(sys.argv[1], sys.argv[2], int(sys.argv[3]))
