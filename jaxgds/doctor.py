"""`jaxgds doctor`: which path a restore takes on this machine and file system, and why."""

import glob
import os
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from jaxgds.advice import advice
from jaxgds.engines import ENGINES, cufile_config, gds_proof, numa
from jaxgds.errors import CheckpointError
from jaxgds.inspect import inspect


NETWORK = ("nfs", "nfs4", "lustre", "cifs", "ceph", "beegfs", "fuse.gcsfuse", "9p", "virtiofs")


def doctor(path: str | None = None) -> dict[str, Any]:
    """Facts about the machine, and about the file system of `path`, as plain JSON types.

    Raises:
      FileNotFoundError: `path` does not exist.
    """
    found: dict[str, Any] = {"machine": _machine(), "devices": [], "gds": _gds()}
    found["forced_engine"] = os.environ.get("JAXGDS_ENGINE") or None
    try:
        found["devices"] = _devices()
    except (RuntimeError, AssertionError) as e:  # without a word for a plugin that is missing
        asked = os.environ.get("JAX_PLATFORMS", "")
        found["jax_error"] = str(e) or f"JAX_PLATFORMS={asked} asks for what is not installed here"
    if path is not None:
        found["path"] = _file_system(path)
        try:
            found["checkpoint"] = inspect(path)["total"]
        except CheckpointError:  # any directory may be asked about
            pass
    found["verdict"] = _verdict(found)
    found["advice"] = advice(found)
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
            "numa_node": numa.numa_node(d.local_hardware_id) if d.platform == "gpu" else None,
        }
        for d in jax.local_devices()
    ]


def _gds() -> dict[str, Any]:
    """What GPUDirect Storage needs, looked at one by one; presence alone proves nothing."""
    try:
        kvikio = next(version(n) for n in ("kvikio-cu13", "kvikio-cu12") if _installed(n))
    except StopIteration:
        kvikio = None
    p2p, error = False, None
    try:
        p2p = cufile_config.settings().peer_to_peer
    except ValueError as e:
        error = str(e)
    nvfs = f"{gds_proof.NVIDIA_FS}/version"
    return {
        "nvidia_driver": os.path.exists("/proc/driver/nvidia/version"),
        "nvidia_fs": _read(nvfs) if os.path.exists(nvfs) else None,
        "kvikio": kvikio,
        "cufile_json": os.environ.get("CUFILE_ENV_PATH_JSON"),
        "cufile_error": error,
        "p2pdma": p2p,
        "ready": gds_proof.missing() is None,
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
        "numa_node": _drive_node(os.stat(full).st_dev),
    }


def _drive_node(device: int) -> int | None:
    """The NUMA node of the drive that holds a file system; None for network and memory."""
    here = f"/sys/dev/block/{os.major(device)}:{os.minor(device)}"
    for folder in (f"{here}/device/device", f"{here}/../device/device", f"{here}/device"):
        try:
            node = int(_read(f"{folder}/numa_node"))
        except (OSError, ValueError):
            continue
        return node if node >= 0 else None
    return None


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
    """Which path a restore takes here, one sentence each."""
    if error := found.get("jax_error"):
        return [f"JAX does not start, so nothing can be restored: {error}"]
    forced, gpu = found["forced_engine"], any(d["platform"] == "gpu" for d in found["devices"])
    if forced not in (None, *ENGINES):
        return [f"JAXGDS_ENGINE={forced} names no engine, and restores fail: unset it."]
    if forced and gpu == (forced == "host"):
        return [
            f"JAXGDS_ENGINE={forced} is no engine for JAX's devices: restores are left to Orbax, "
            "and safetensors go through numpy. Unset it."
        ]
    if not gpu:
        return ["JAX sees no GPU: restores take the host path (preadv into host memory)."]
    gds = found["gds"]
    if forced == "gds" and gds["kvikio"] is None:
        return [
            "JAXGDS_ENGINE=gds needs kvikio, which is not installed: restores are left to Orbax, "
            "and safetensors go through numpy."
        ]
    if forced == "gds" and gds["cufile_error"]:
        return [f"Restores fail, as JAXGDS_ENGINE asks for gds: {gds['cufile_error']}"]
    if forced == "gds" and not gds["ready"]:
        return [
            "Restores take the gds-compat path, as JAXGDS_ENGINE asks for gds: cuFile reads by way "
            "of host memory, and where its allow_compat_mode is false they take the pinned path."
        ]
    if forced:
        return [f"Restores take the {forced} path, as JAXGDS_ENGINE asks for."]
    if not gds["ready"]:
        return ["Restores take the pinned path: reads into pinned memory, asynchronous copies."]
    return [
        "Restores try GPUDirect Storage, and take the pinned path where a trial read does not "
        "prove that it works."
    ]


def table(found: dict[str, Any]) -> str:
    """`doctor`'s result as text for people."""
    lines = []
    for part in ("machine", "gds", "path"):
        for key, value in found.get(part, {}).items():
            if value is None:
                continue
            shown = f"{value / 1e9:.1f} GB" if key.endswith("_bytes") else value
            lines.append(f"{part:8} {key.removesuffix('_bytes'):14} {shown}")
    for i, device in enumerate(found["devices"]):
        limit = device["bytes_limit"]
        memory = f", {limit / 1e9:.0f} GB for XLA" if limit else ""
        lines.append(f"device   {i:<14} {device['kind']} ({device['platform']}){memory}")
    steps = [f"- {text}" for text in found["advice"]]
    return "\n".join([*lines, "", *found["verdict"], *steps])


def _installed(name: str) -> bool:
    try:
        version(name)
    except PackageNotFoundError:
        return False
    return True


def _read(file: str) -> str:
    with open(file) as f:
        return f.read().strip()
