"""One of two processes with four devices each: saves with stock Orbax, restores through jaxgds.

python two_processes.py PROCESS PORT FOLDER; run by test_two_processes.py.
"""

import os
import sys


os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"

import jax  # noqa: E402  after the number of devices is set
import numpy as np  # noqa: E402
import oracle  # noqa: E402
import orbax.checkpoint as ocp  # noqa: E402
from jax.experimental import multihost_utils  # noqa: E402
from jax.sharding import Mesh, NamedSharding  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402
from safetensors.numpy import save_file  # noqa: E402

import jaxgds  # noqa: E402
import jaxgds.orbax  # noqa: E402


def make(shape, dtype, sharding):
    data = np.random.default_rng(0).integers(0, 100, shape).astype(dtype)
    return jax.make_array_from_callback(shape, sharding, lambda index: data[index])


def local_bytes(tree) -> int:
    """Bytes of the distinct shards on this process's devices."""
    return sum(
        sum({str(s.index): s.data.nbytes for s in x.addressable_shards}.values())
        for x in jax.tree.leaves(tree)
    )


def main(process: int, port: str, folder: str) -> None:
    jax.distributed.initialize(f"127.0.0.1:{port}", num_processes=2, process_id=process)
    devices = np.array(jax.devices())
    assert len(devices) == 8 and jax.local_device_count() == 4
    by_rows = NamedSharding(Mesh(devices, "x"), P("x"))
    by_columns = NamedSharding(Mesh(devices, "x"), P(None, "x"))
    both = NamedSharding(Mesh(devices.reshape(2, 4), ("x", "y")), P("y", "x"))
    everywhere = NamedSharding(Mesh(devices, "x"), P())
    tree = {
        "rows": make((64, 32), np.float32, by_rows),
        "columns": make((16, 64), np.int16, by_columns),
        "both": make((16, 16), np.float32, both),
        "replicated": make((40, 8), np.float32, everywhere),
    }
    for name, context in (("raw", False), ("zstd", True)):
        handler = ocp.PyTreeCheckpointHandler(use_compression=context)
        with ocp.Checkpointer(handler) as c:
            c.save(f"{folder}/{name}", ocp.args.PyTreeSave(tree))
    ocp.v1.save(f"{folder}/v1", tree)
    with ocp.CheckpointManager(f"{folder}/manager") as manager:
        manager.save(0, args=ocp.args.StandardSave(tree))

    def restore(name, target):
        if name == "v1":
            return ocp.v1.load(f"{folder}/v1", target)
        if name == "manager":
            with ocp.CheckpointManager(f"{folder}/manager") as manager:
                return manager.restore(0, args=ocp.args.StandardRestore(target))
        with ocp.StandardCheckpointer() as c:
            return c.restore(f"{folder}/{name}", target)

    for name in ("raw", "zstd", "v1", "manager"):
        for sharding in (None, by_rows, by_columns, both, everywhere):
            target = jax.tree.map(
                lambda x, s=sharding: jax.ShapeDtypeStruct(
                    x.shape, x.dtype, sharding=s or x.sharding
                ),
                tree,
            )
            stock = restore(name, target)
            with jaxgds.orbax.installed(strict=True):
                ours = restore(name, target)
            oracle.assert_same(ours, stock)
            report = oracle.last_report()
            assert report.bytes_restored == local_bytes(ours)
            if name == "raw" and sharding in (None, by_rows):
                # Chunks of the save are shards or smaller: what is read is what is needed. Only
                # "columns" by rows needs parts of rows, and "both" by rows whole ones.
                assert report.bytes_read == report.bytes_restored, (process, name, sharding)

    # safetensors: whole rows of "columns", of which each process takes its own columns.
    if process == 0:
        whole = {
            name: np.random.default_rng(0).integers(0, 100, x.shape).astype(x.dtype)
            for name, x in tree.items()
        }
        save_file(whole, f"{folder}/model.safetensors")
    multihost_utils.sync_global_devices("safetensors")
    for sharding in (None, by_rows, by_columns, both, everywhere):
        wanted = jax.tree.map(
            lambda x, s=sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s or x.sharding),
            tree,
        )
        ours = jaxgds.load(f"{folder}/model.safetensors", wanted, strict=True)
        for name, x in ours.items():
            oracle.assert_same(x, make(x.shape, x.dtype, wanted[name].sharding))
        report = oracle.last_report()
        assert report.bytes_restored == local_bytes(ours)
        if sharding in (by_rows, everywhere):
            assert report.bytes_read == report.bytes_restored, (process, sharding)

    # A damaged file: both processes raise, neither waits for the other for ever.
    multihost_utils.sync_global_devices("damage")
    if process == 0:
        for root, _, files in os.walk(f"{folder}/raw"):
            for file in files:
                if os.path.basename(root) == "d" and "process" in root:
                    os.truncate(os.path.join(root, file), 50)
    multihost_utils.sync_global_devices("damaged")
    with jaxgds.orbax.installed():
        try:
            restore("raw", target)
        except jaxgds.CheckpointError as e:
            print("raised", e)
        else:
            raise AssertionError("a truncated file was restored")
    print(f"process {process} ok", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], sys.argv[3])
