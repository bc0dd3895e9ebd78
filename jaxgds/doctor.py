"""`jaxgds doctor`: which path a restore takes on this machine and file system, and why."""

import glob
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any


NETWORK = ("nfs", "nfs4", "lustre", "cifs", "ceph", "beegfs", "fuse.gcsfuse", "9p", "virtiofs")


def doctor(path: str | None = None) -> dict[str, Any]:
    """Facts about the machine, and about the file system of `path`, as plain JSON types.

    Raises:
      FileNotFoundError: `path` does not exist.
    """
    found: dict[str, Any] = {"machine": _machine(), "devices": _devices(), "gds": _gds()}
    if path is not None:
        found["path"] = _file_system(path)
    found["verdict"] = _verdict(found)
    return found


def _machine() -> dict[str, Any]:
    with open("/proc/meminfo") as f:
        memory = {k: int(v.split()[0]) * 1024 for k, v in (line.split(":") for line in f)}
    return {
        "cores": len(os.sched_getaffinity(0)),
        "numa_nodes": len(glob.glob("/sys/devices/system/node/node[0-9]*")) or 1,
        "memory_bytes": memory["MemTotal"],
        "available_bytes": memory["MemAvailable"],
    }


def _devices() -> list[dict[str, Any]]:
    import jax

    return [
        {
            "platform": d.platform,
            "kind": d.device_kind,
            "bytes_limit": (d.memory_stats() or {}).get("bytes_limit"),
        }
        for d in jax.local_devices()
    ]


def _gds() -> dict[str, Any]:
    """What GPUDirect Storage needs, looked at one by one; presence alone proves nothing."""
    try:
        kvikio = next(version(n) for n in ("kvikio-cu13", "kvikio-cu12") if _installed(n))
    except StopIteration:
        kvikio = None
    nvfs = "/proc/driver/nvidia-fs/version"
    return {
        "nvidia_driver": os.path.exists("/proc/driver/nvidia/version"),
        "nvidia_fs": _read(nvfs) if os.path.exists(nvfs) else None,
        "kvikio": kvikio,
        "cufile_json": os.environ.get("CUFILE_ENV_PATH_JSON"),
    }


def _file_system(path: str) -> dict[str, Any]:
    full = os.path.realpath(path)
    if not os.path.exists(full):
        raise FileNotFoundError(f"{path}: no such file or directory")
    mount = _mount(full)
    kind = mount["kind"]
    files = [full] if os.path.isfile(full) else _some_file(full)
    return {
        "path": full,
        **mount,
        "network": kind in NETWORK,
        "direct_io": _direct_io(files[0]) if files else None,
    }


def _mount(path: str) -> dict[str, str]:
    """The mount that holds `path`: /proc/self/mountinfo, longest mount point wins."""
    best = {"mount": "/", "kind": "unknown", "source": ""}
    with open("/proc/self/mountinfo") as f:
        for line in f:
            left, right = line.split(" - ", 1)
            point = left.split()[4].encode().decode("unicode_escape")
            kind, source = right.split()[:2]
            inside = path == point or path.startswith(point.rstrip("/") + "/")
            if inside and len(point) >= len(best["mount"]):
                best = {"mount": point, "kind": kind, "source": source}
    return best


def _some_file(folder: str) -> list[str]:
    for parent, _, names in os.walk(folder):
        if names:
            return [os.path.join(parent, names[0])]
    return []


def _direct_io(file: str) -> bool:
    try:
        os.close(os.open(file, os.O_RDONLY | os.O_DIRECT))
    except OSError:
        return False
    return True


def _verdict(found: dict[str, Any]) -> list[str]:
    """What follows for a restore, one sentence each."""
    platforms = {d["platform"] for d in found["devices"]}
    lines = []
    if "gpu" not in platforms:
        lines.append("JAX sees no GPU: restores take the host path (preadv into host memory).")
        if found["gds"]["nvidia_driver"]:
            lines.append("There is an NVIDIA driver: install jaxgds[cuda13] or jaxgds[cuda12].")
    else:
        lines += _gpu_verdict(found)
    where = found.get("path")
    if where and where["direct_io"] is False:
        lines.append(f"{where['kind']} gives no direct I/O: reads go through the page cache.")
    return lines


def _gpu_verdict(found: dict[str, Any]) -> list[str]:
    gds = found["gds"]
    if gds["nvidia_fs"] is None:
        return [
            "No nvidia-fs driver: restores take the pinned path (reads into pinned memory, "
            "asynchronous copies), which needs nothing else."
        ]
    if gds["kvikio"] is None:
        return ["nvidia-fs is loaded, but kvikio is not installed: restores take the pinned path."]
    return ["nvidia-fs and kvikio are there: restores try GPUDirect Storage."]


def table(found: dict[str, Any]) -> str:
    """`doctor`'s result as text for people."""
    lines = []
    for part in ("machine", "gds", "path"):
        for key, value in found.get(part, {}).items():
            shown = f"{value / 1e9:.1f} GB" if key.endswith("_bytes") and value else value
            lines.append(f"{part:8} {key.removesuffix('_bytes'):14} {shown}")
    for i, device in enumerate(found["devices"]):
        limit = device["bytes_limit"]
        memory = f", {limit / 1e9:.0f} GB for XLA" if limit else ""
        lines.append(f"device   {i:<14} {device['kind']} ({device['platform']}){memory}")
    return "\n".join([*lines, "", *found["verdict"]])


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _read(file: str) -> str:
    with open(file) as f:
        return f.read().strip()
