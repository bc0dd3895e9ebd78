"""What keeps a restore from its best speed, and the command that changes it. Pure."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any


# File systems that cuFile reads directly, with nvidia-fs or the kernel's peer-to-peer DMA.
GDS_KINDS = ("ext4", "xfs", "lustre", "nfs", "nfs4", "beegfs", "gpfs", "wekafs")
# One H100 takes what this many cores read from the page cache.
CORES_PER_GPU = 8
# Of a checkout, wherever the command runs; a wheel has none.
_NVME = Path(__file__).parents[1] / "configs" / "cufile" / "nvme.json"
NVME_JSON = str(_NVME) if _NVME.exists() else "configs/cufile/nvme.json (of the repository)"
# Share of a checkpoint that direct reads should find at multiples of 4 KiB.
ALIGNED = 0.95

type Found = Mapping[str, Any]  # what `doctor` found


def advice(found: Found) -> list[str]:
    """One text per problem: what it is, what it costs, and what to do."""
    return [text for check in _CHECKS for text in check(found)]


def _gpus(found: Found) -> list[Mapping[str, Any]]:
    return [d for d in found["devices"] if d["platform"] == "gpu"]


def _no_gpu_support(found: Found) -> Iterator[str]:
    if not _gpus(found) and found["gds"]["nvidia_driver"]:
        yield (
            "There is an NVIDIA driver, but JAX sees no GPU: its CUDA plugin is not installed. "
            "Run: pip install 'jaxgds[cuda13]' (driver 580 or newer) or 'jaxgds[cuda12]'"
        )


def _no_nvidia_fs(found: Found) -> Iterator[str]:
    gds = found["gds"]
    if not _gpus(found) or gds["ready"]:
        return
    if gds["kvikio"] is None:
        yield (
            "kvikio is not installed, so GPUDirect Storage cannot be used; reads go through pinned "
            "host memory. Run: pip install 'jaxgds[cuda13]' (or [cuda12])"
        )
    if gds["cufile_error"] is not None:
        yield (
            f"cuFile does not start with its configuration, so reads go through pinned host "
            f"memory. {gds['cufile_error']}"
        )
    elif gds["nvidia_fs"] is None and not gds["p2pdma"]:
        yield (
            "No nvidia-fs driver, so GPUDirect Storage cannot be used; reads go through pinned "
            "host memory, which is as fast as the PCIe link wherever the storage is slower. "
            "Run: sudo apt install nvidia-gds && sudo modprobe nvidia-fs; or, for local NVMe on "
            f"Linux 6.2 and newer: export CUFILE_ENV_PATH_JSON={NVME_JSON}"
        )


def _no_gds_on_file_system(found: Found) -> Iterator[str]:
    where = found.get("path")
    if _gpus(found) and found["gds"]["ready"] and where and where["kind"] not in GDS_KINDS:
        yield (
            f"{where['mount']} is {where['kind']}, which GPUDirect Storage does not read; reads go "
            f"through pinned host memory. Copy the checkpoint to one of: {', '.join(GDS_KINDS)}"
        )


def _no_direct_io(found: Found) -> Iterator[str]:
    where = found.get("path")
    if where and where["direct_io"] is False:
        yield (
            f"{where['mount']} ({where['kind']}) refuses O_DIRECT: what is not in the page cache "
            "is copied through it, which costs a core for each few GB/s. Nothing to do if the "
            "files are hot; otherwise copy them to ext4, xfs or Lustre"
        )


def _compressed(found: Found) -> Iterator[str]:
    checkpoint = found.get("checkpoint")
    if checkpoint and checkpoint["codecs"].get("zstd"):
        share = 1 - checkpoint["direct_nbytes"] / max(checkpoint["stored_nbytes"], 1)
        decoded = "the CPU decodes it at well under 1 GB/s a core, and it cannot be read in place"
        if _gpus(found):
            decoded = (
                "a GPU decodes the chunks that it takes as a whole, the CPU all others at well "
                "under 1 GB/s a core, and GPUDirect Storage cannot read it"
            )
        yield (
            f"{share:.0%} of the checkpoint is compressed (Orbax's default): {decoded}. "
            f"Run: jaxgds prepare {found['path']['path']} DST; or save with "
            "PyTreeCheckpointHandler(use_compression=False)"
        )


def _unaligned(found: Found) -> Iterator[str]:
    checkpoint = found.get("checkpoint")
    if not checkpoint or not _gpus(found) or not found["gds"]["ready"]:
        return  # pinned reads do not mind
    share = checkpoint["aligned_nbytes"] / max(checkpoint["direct_nbytes"], 1)
    if checkpoint["direct_nbytes"] and share < ALIGNED:
        yield (
            f"Only {share:.0%} of the bytes lie at multiples of 4 KiB: GPUDirect Storage reads the "
            "others through a staging buffer. "
            f"Run: jaxgds prepare {found['path']['path']} DST"
        )


def _far_memory(found: Found) -> Iterator[str]:
    where = found.get("path")
    nodes = {d["numa_node"] for d in _gpus(found)} - {None}
    if not where or not nodes:
        return
    storage = where["numa_node"]
    if storage is not None and storage not in nodes:
        yield (
            f"The storage of {where['mount']} is on NUMA node {storage}, the GPUs are on "
            f"{sorted(nodes)}: reads cross the link between the processors. Use a drive and GPUs "
            f"of one node, and run: numactl --cpunodebind={storage} --membind={storage} ..."
        )


def _few_threads(found: Found) -> Iterator[str]:
    cores, wanted = found["machine"]["cores"], CORES_PER_GPU * len(_gpus(found))
    if cores < wanted:
        yield (
            f"{cores} cores for {len(_gpus(found))} GPUs: from the page cache a core reads 3 to 6 "
            f"GB/s, a GPU takes 25 to 55. Give the process {wanted} cores or more (taskset, "
            "--cpus-per-task, the container's limit)"
        )


def _little_device_memory(found: Found) -> Iterator[str]:
    checkpoint, gpus = found.get("checkpoint"), _gpus(found)
    limits = [d["bytes_limit"] for d in gpus if d["bytes_limit"]]
    if not checkpoint or not limits or checkpoint["nbytes"] <= sum(limits):
        return
    yield (
        f"The checkpoint's {checkpoint['nbytes'] / 1e9:.1f} GB are more than the "
        f"{sum(limits) / 1e9:.1f} GB that XLA may use of {len(limits)} GPUs: it takes three "
        "quarters of each by default. Run with XLA_PYTHON_CLIENT_MEM_FRACTION=0.95, or restore "
        "onto more GPUs"
    )


_CHECKS: tuple[Callable[[Found], Iterator[str]], ...] = (
    _no_gpu_support,
    _no_nvidia_fs,
    _no_gds_on_file_system,
    _no_direct_io,
    _compressed,
    _unaligned,
    _far_memory,
    _few_threads,
    _little_device_memory,
)
