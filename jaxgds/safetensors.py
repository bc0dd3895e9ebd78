"""safetensors headers -> the same index that Orbax checkpoints have.

Accepts what the reference implementation accepts (safetensors' `Metadata::validate`):
tensors in offset order leave no hole and do not overlap, and end where the file ends.
"""

import json
import math
import os
import struct
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray, value_key
from jaxgds.zarr import Layout


MAX_HEADER = 100_000_000  # the reference implementation's limit

DTYPES: Mapping[str, np.dtype] = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "U8": np.uint8,
        "I8": np.int8,
        "U16": np.uint16,
        "I16": np.int16,
        "U32": np.uint32,
        "I32": np.int32,
        "U64": np.uint64,
        "I64": np.int64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "C64": np.complex64,
    }.items()
}


class SafetensorsIndex:
    """The tensors of one or more safetensors files, by name."""

    def __init__(self, path: str, arrays: dict[str, StoredArray]):
        self.path = path
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self) -> list[str]:
        return sorted(self._arrays)

    def array(self, name: str) -> StoredArray:
        """Raises CheckpointError if there is no tensor of that name."""
        try:
            return self._arrays[name]
        except KeyError:
            some = ", ".join(map(repr, self.names()[:8]))
            raise CheckpointError(f"{self.path}: no tensor {name!r}; it has {some}, ...") from None


def is_safetensors(path: str) -> bool:
    """Whether `path` is a safetensors file or index, or a directory of safetensors files."""
    if os.path.isdir(path):
        return any(name.endswith(".safetensors") for name in os.listdir(path))
    return path.endswith((".safetensors", ".safetensors.index.json"))


def open_safetensors(path: str) -> SafetensorsIndex:
    """Opens a file, a `*.safetensors.index.json`, or a directory (its index if it has one).

    Raises:
      CheckpointError: damaged, a tensor in two files, or an index that points outside its
        directory.
    """
    files: dict[str, set[str] | None] = {}  # file -> the tensors to take; None takes all
    if os.path.isdir(path):
        names = sorted(os.listdir(path))
        indices = [n for n in names if n.endswith(".safetensors.index.json")]
        if len(indices) > 1:
            raise CheckpointError(f"{path}: has several indices, name one of {indices}")
        if indices:
            return open_safetensors(os.path.join(path, indices[0]))
        files = {os.path.join(path, n): None for n in names if n.endswith(".safetensors")}
    elif path.endswith(".json"):
        files = dict(_weight_map(path))
    else:
        files = {path: None}
    arrays: dict[str, StoredArray] = {}
    for file, wanted in files.items():
        found = read_header(file)
        if wanted is not None and not wanted <= found.keys():
            missing = sorted(wanted - found.keys())
            raise CheckpointError(f"{file}: lacks {missing[:8]}, which {path} says it holds")
        for name, array in found.items():
            if wanted is not None and name not in wanted:
                continue
            if name in arrays:
                raise CheckpointError(f"{path}: tensor {name!r} is in two files, {file} is one")
            arrays[name] = array
    return SafetensorsIndex(path, arrays)


def read_header(file: str) -> dict[str, StoredArray]:
    """The tensors of one file, from its header alone.

    Raises:
      CheckpointError: the header is not what the format allows, or does not fit the file.
      NotImplementedError: a dtype that takes less than a byte.
    """
    try:
        with open(file, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            prefix = f.read(8)
            if len(prefix) < 8:
                raise CheckpointError(f"{file}: too short for a safetensors header")
            (length,) = struct.unpack("<Q", prefix)
            if length > MAX_HEADER or length + 8 > size:
                raise CheckpointError(
                    f"{file}: a header of {length} bytes does not fit; not a safetensors file, "
                    "or truncated"
                )
            text = f.read(length)
    except OSError as e:
        raise CheckpointError(f"{file}: cannot be read: {e}") from e
    try:
        if not text.startswith(b"{"):
            raise ValueError("it does not start with '{'")
        header = json.loads(text.decode(), object_pairs_hook=_unique)
        _check_metadata(header.pop("__metadata__", None))
        tensors = [_tensor(name, info) for name, info in header.items()]
    except (ValueError, KeyError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{file}: damaged safetensors header: {e!r}") from e
    end = 0
    for name, _, start, stop in sorted(tensors, key=lambda t: t[2:]):
        if start != end or stop < start:
            raise CheckpointError(
                f"{file}: tensor {name!r} lies at [{start}, {stop}), not from {end} on"
            )
        end = stop
    if end + 8 + length != size:
        raise CheckpointError(
            f"{file}: has {size} bytes, but its header asks for {end + 8 + length}; truncated?"
        )
    base = 8 + length
    return {
        name: StoredArray(
            name,
            layout,
            {value_key(name, layout.key((0,) * len(layout.shape))): Extent(file, base + a, b - a)},
        )
        for name, layout, a, b in tensors
    }


def _tensor(name: str, info: Mapping[str, Any]) -> tuple[str, Layout, int, int]:
    start, stop = info["data_offsets"]
    shape = tuple(info["shape"])
    if not all(type(n) is int and n >= 0 for n in (*shape, start, stop)):
        raise ValueError(f"tensor {name!r}: {shape=}, data_offsets=[{start}, {stop}]")
    if info.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"tensor {name!r} has the fields {sorted(info)}")
    dtype = DTYPES.get(info["dtype"])
    if dtype is None:
        raise NotImplementedError(f"tensor {name!r}: dtype {info['dtype']!r} is not read")
    if math.prod(shape) * dtype.itemsize != stop - start:
        raise ValueError(f"tensor {name!r}: {shape} of {dtype} does not take {stop - start} bytes")
    chunk = tuple(max(n, 1) for n in shape)
    return name, Layout(shape, dtype, chunk, chunk, "raw", False, "", "."), start, stop


def _check_metadata(metadata: Any) -> None:
    if metadata is None:
        return
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError("__metadata__ is not a map of strings")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _weight_map(path: str) -> dict[str, set[str]]:
    """File -> names of its tensors, from a `*.safetensors.index.json`."""
    folder = os.path.dirname(os.path.abspath(path))
    try:
        with open(path, "rb") as f:
            weight_map = json.load(f)["weight_map"]
        items = [(str(name), os.fspath(file)) for name, file in weight_map.items()]
    except OSError as e:
        raise CheckpointError(f"{path}: cannot be read: {e}") from e
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: damaged safetensors index: {e!r}") from e
    files: dict[str, set[str]] = {}
    for name, file in items:
        if os.path.isabs(file) or os.path.normpath(file).startswith(".."):
            raise CheckpointError(f"{path}: {name!r} points outside the directory, to {file!r}")
        files.setdefault(os.path.join(folder, file), set()).add(name)
    return files
