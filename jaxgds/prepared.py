"""The layout of a prepared checkpoint: where each shard lies, and the files beside the data.

Pure: arrays, their PartitionSpecs and a mesh in; byte ranges and contents of files out. The small
files are what stock Orbax 0.12 writes, except that nothing in them depends on the time.
"""

import itertools
import json
import math
from base64 import urlsafe_b64encode
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgds.index import Extent, value_key
from jaxgds.ocdbt import MAX_INLINE
from jaxgds.rules import Mesh, Spec
from jaxgds.sources import name_of


PAGE = 4096  # what direct I/O wants offsets to be multiples of
FILE_BYTES = 2 << 30  # where a rank's files are cut
DESCRIPTION = "jaxgds.json"  # checksums, and what the arrays were made of
NODE_FILE = "d/btree"


@dataclass(frozen=True)
class Array:
    """One array of a prepared checkpoint; a chunk is one shard of its mesh.

    Attributes:
      keys: its path in the tree, each with Orbax's number for the type of container.
      spec: of each dimension, the mesh axes it is split over.
      parts: into how many parts each dimension is split, which divide it.
    """

    keys: tuple[tuple[str, int], ...]
    value_type: str
    shape: tuple[int, ...]
    dtype: np.dtype
    spec: Spec
    parts: tuple[int, ...]

    @property
    def name(self) -> str:
        return name_of(self.keys)

    @property
    def chunk(self) -> tuple[int, ...]:
        return tuple(n // p for n, p in zip(self.shape, self.parts, strict=True))

    @property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    def chunks(self) -> Iterator[tuple[int, ...]]:
        return itertools.product(*map(range, self.parts))

    def key(self, chunk: tuple[int, ...]) -> str:
        return value_key(self.name, ".".join(map(str, chunk)) or "0")

    @property
    def partition_spec(self) -> list[Any]:
        """As JSON: null, an axis, or a list of axes for each dimension; shortest form."""
        spec = [list(axes) if len(axes) > 1 else axes[0] if axes else None for axes in self.spec]
        while spec and spec[-1] is None:
            spec.pop()
        return spec


def place(arrays: Sequence[Array], mesh: Mesh, file_bytes: int = FILE_BYTES) -> dict[str, Extent]:
    """Where each chunk lies that is not small enough to lie in the B-tree; key -> range of a file.

    Each rank has files of its own, which hold the shards that no lower rank has, in order, each
    from a multiple of 4 KiB on.
    """
    places: dict[str, Extent] = {}
    files, ends = [0] * mesh.size, [0] * mesh.size
    for array in arrays:
        nbytes = array.chunk_nbytes
        if nbytes <= MAX_INLINE:
            continue
        for chunk in array.chunks():
            rank = mesh.owner(array.spec, chunk)
            if ends[rank] and ends[rank] + nbytes > file_bytes:
                files[rank], ends[rank] = files[rank] + 1, 0
            name = f"d/rank{rank:05d}-{files[rank]:05d}"
            places[array.key(chunk)] = Extent(name, ends[rank], nbytes)
            ends[rank] += padded(nbytes)
    return places


def padded(nbytes: int) -> int:
    return -(-nbytes // PAGE) * PAGE


def zarray(array: Array) -> bytes:
    """`.zarray`, as TensorStore writes it."""
    dtype = array.dtype.str if array.dtype.isbuiltin == 1 else array.dtype.name
    return _json(
        {
            "chunks": array.chunk,
            "compressor": None,
            "dimension_separator": ".",
            "dtype": dtype,
            "fill_value": None,
            "filters": None,
            "order": "C",
            "shape": array.shape,
            "zarr_format": 2,
        },
        separators=(",", ":"),
    )


def orbax_files(arrays: Sequence[Array], empty: Mapping[str, Any], mesh: Mesh) -> dict[str, bytes]:
    """What Orbax reads beside the arrays; file name -> content.

    Args:
      empty: nodes of the tree that hold no array, as they stand in `_METADATA`.
    """
    arrays = sorted(arrays, key=lambda a: [key for key, _ in a.keys])
    typed = [a for a in arrays if a.value_type == "jax.Array"]
    tree = {str(tuple(key for key, _ in a.keys)): _tree_entry(a) for a in arrays} | dict(empty)
    metadata = {
        "tree_metadata": dict(sorted(tree.items())),
        "use_ocdbt": True,
        "use_zarr3": False,
        "store_array_data_equal_to_fill_value": True,
        "custom_metadata": None,
    }
    checkpoint = {
        "item_handlers": "orbax.checkpoint._src.handlers.standard_checkpoint_handler"
        ".StandardCheckpointHandler",
        "metrics": {},
        "performance_metrics": {},
        "init_timestamp_nsecs": None,
        "commit_timestamp_nsecs": None,
        "custom_metadata": {},
    }
    shapes = [
        {
            "array_metadata": {
                "param_name": a.name,
                "write_shape": a.chunk,
                "chunk_shape": a.chunk,
                "ext_metadata": None,
            }
        }
        for a in typed
    ]
    shardings = {
        urlsafe_b64encode(a.name.encode()).decode(): json.dumps(_sharding(a, mesh)) for a in typed
    }
    return {
        "_METADATA": _json(metadata),
        "_CHECKPOINT_METADATA": _json(checkpoint),
        "_sharding": _json(shardings),
        "array_metadatas/process_0": _json({"array_metadatas": shapes}),
        "commit_success.txt": b"Checkpoint commit was successful",
    }


def _tree_entry(array: Array) -> dict[str, Any]:
    value: dict[str, Any] = {"value_type": array.value_type, "skip_deserialize": False}
    if array.value_type == "jax.Array":
        value["write_shape"] = array.chunk
    keys = [{"key": key, "key_type": kind} for key, kind in array.keys]
    return {"key_metadata": keys, "value_metadata": value}


def _sharding(array: Array, mesh: Mesh) -> dict[str, Any]:
    """A NamedSharding over the devices 0, 1, ... as Orbax writes it."""
    shape = tuple(mesh.axes.values())
    ids = np.arange(mesh.size).reshape(shape).tolist()

    def devices(nested: Any) -> Any:
        return [devices(n) for n in nested] if isinstance(nested, list) else {"id": nested}

    return {
        "sharding_type": "NamedSharding",
        "shape": shape,
        "axis_names": list(mesh.axes),
        "axis_types": ["AxisType.Auto"] * len(shape),
        "partition_spec": array.partition_spec,
        "device_mesh": {"mesh": devices(ids)},
    }


def _json(content: Any, **kwargs: Any) -> bytes:
    return json.dumps(content, **kwargs).encode()
