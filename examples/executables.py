"""Executables in a file, so that the next process neither traces nor compiles.

JAX's own compilation cache spares it XLA's work only: tracing and lowering, in Python, come before.
The file is for the same code, versions, devices and shapes. It is code itself: use only your own.
"""

import hashlib
import os
import pickle
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
from jax.experimental.serialize_executable import deserialize_and_load, serialize
from jax.sharding import Mesh

import pallas_kernels.mosaic  # noqa: F401  (loads the library that its kernels are linked with)


def load(file: Path, arguments: Sequence[tuple], mesh: Mesh) -> list[Any] | None:
    """The executables that `save` wrote for such arguments; None if there are none."""
    if not file.exists():
        return None
    with file.open("rb") as opened:
        if pickle.load(opened) != key(arguments, mesh):
            return None
        kept = pickle.load(opened)

    devices = list(mesh.devices.flat)
    return [
        deserialize_and_load(
            payload, jax.tree.structure((given, {})), results, execution_devices=devices
        )
        for (payload, results), given in zip(kept, arguments, strict=True)
    ]


def save(file: Path, programs: Sequence[Any], arguments: Sequence[tuple], mesh: Mesh) -> None:
    """Writes what this process compiled; what it took from JAX's own cache lacks functions."""
    # Without what the arguments look like: that names devices of this process.
    kept = [serialize(program)[::2] for program in programs]
    temporary = file.with_name(f"{file.name}.{os.getpid()}")
    temporary.write_bytes(pickle.dumps(key(arguments, mesh)) + pickle.dumps(kept))
    temporary.replace(file)


def key(arguments: Sequence[tuple], mesh: Mesh) -> str:
    """Of all that the executables depend on."""
    leaves, structure = jax.tree.flatten(arguments)
    device = mesh.devices.flat[0]
    parts = [str(structure), device.device_kind, device.client.platform_version]
    parts += [version("jax"), version("jaxlib"), os.environ.get("XLA_FLAGS", "")]
    parts += [f"{x.shape}{x.dtype}{getattr(x, 'sharding', '')}" for x in leaves]
    root = Path(__file__).parents[1]
    for folder in ("examples", "pallas_kernels"):
        parts += [file.read_text() for file in sorted((root / folder).rglob("*.py"))]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
