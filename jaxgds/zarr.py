"""Zarr metadata as Orbax writes it: what one array's chunks are and how they are encoded.

Pure: bytes of `.zarray` (zarr v2) or `zarr.json` (zarr v3, with or without the
`sharding_indexed` codec) in, `Layout` out. Sources: the Zarr v2 and v3 core
specifications and the v3 `sharding_indexed` codec.
"""

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes  # noqa: F401  registers bfloat16, fp8 and int4 with numpy
import numpy as np

from jaxgds.errors import CheckpointError


Codec = Literal["raw", "zstd"]
MAX_RANK = 64  # of numpy


@dataclasses.dataclass(frozen=True, slots=True)
class Layout:
    """How one array is cut into stored values.

    Attributes:
      shape: of the whole array.
      dtype: of an element; every dtype takes whole bytes in storage (int4 takes one).
      stored: shape of one stored value (a zarr chunk, or a shard of the sharding codec).
      chunk: shape of one independently encoded chunk; equals `stored` without sharding.
      codec: of one chunk.
      sharded: a stored value ends with an index of its chunks (offset and length of each).
      prefix, separator: of the key of a stored value: `<prefix><i><separator><j>`.
    """

    shape: tuple[int, ...]
    dtype: np.dtype
    stored: tuple[int, ...]
    chunk: tuple[int, ...]
    codec: Codec
    sharded: bool
    prefix: str
    separator: str

    @property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    @property
    def per_stored(self) -> tuple[int, ...]:
        """Chunks per stored value, along each axis."""
        return tuple(s // c for s, c in zip(self.stored, self.chunk, strict=True))

    def key(self, index: tuple[int, ...]) -> str:
        """Key of the stored value at `index` of the grid of stored values."""
        if not index:  # rank 0: zarr v2 says `0`, v3 says `c`
            return self.prefix.rstrip(self.separator) or "0"
        return self.prefix + self.separator.join(map(str, index))


def unfit(shape: Sequence[int], itemsize: int) -> str | None:
    """Why numpy and XLA can have no array of this shape; None if they can."""
    if len(shape) > MAX_RANK:
        return f"{len(shape)} axes are more than arrays can have"
    if math.prod(max(n, 1) for n in shape) * max(itemsize, 1) >= 2**63:
        return f"shape={tuple(shape)} is more than arrays can have"
    return None


def parse(v2: bytes | None, v3: bytes | None, name: str) -> Layout:
    """Reads `.zarray` or `zarr.json`, whichever is there.

    Raises:
      CheckpointError: the metadata is damaged.
      NotImplementedError: valid, but with an encoding that is not read here.
    """
    try:
        if v3 is not None:
            return _parse_v3(json.loads(v3), name)
        assert v2 is not None
        return _parse_v2(json.loads(v2), name)
    except CheckpointError:
        raise
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
        raise CheckpointError(f"array {name!r}: its zarr metadata is damaged ({e!r})") from e


def _parse_v2(meta: dict[str, Any], name: str) -> Layout:
    if meta["order"] != "C":
        raise NotImplementedError(f"array {name!r}: zarr order {meta['order']!r}, only 'C' is read")
    if meta["filters"]:
        raise NotImplementedError(f"array {name!r}: zarr filters {meta['filters']!r} are not read")
    compressor = meta["compressor"]
    codec = "raw" if compressor is None else compressor["id"]
    return _layout(
        name,
        shape=meta["shape"],
        dtype=meta["dtype"],
        stored=meta["chunks"],
        chunk=meta["chunks"],
        codec=codec,
        sharded=False,
        prefix="",
        separator=meta.get("dimension_separator", "."),
    )


def _parse_v3(meta: dict[str, Any], name: str) -> Layout:
    if meta["chunk_grid"]["name"] != "regular":
        raise NotImplementedError(f"array {name!r}: chunk grid {meta['chunk_grid']['name']!r}")
    stored = meta["chunk_grid"]["configuration"]["chunk_shape"]
    chunk, codecs, sharded = stored, meta["codecs"], False
    if codecs and codecs[0]["name"] == "sharding_indexed":
        if len(codecs) > 1:
            raise NotImplementedError(f"array {name!r}: codecs after sharding_indexed")
        sharding = codecs[0]["configuration"]
        index_codecs = sharding["index_codecs"]
        if (
            sharding.get("index_location", "end") != "end"
            or [c["name"] for c in index_codecs] != ["bytes", "crc32c"]
            or not _little_endian(index_codecs[0])
        ):
            raise NotImplementedError(f"array {name!r}: shard index {sharding!r}")
        chunk, codecs, sharded = sharding["chunk_shape"], sharding["codecs"], True
    names = [c["name"] for c in codecs]
    if names not in (["bytes"], ["bytes", "zstd"]):
        raise NotImplementedError(f"array {name!r}: zarr codecs {names!r}")
    if not _little_endian(codecs[0]):
        raise NotImplementedError(f"array {name!r}: big-endian data")
    encoding = meta["chunk_key_encoding"]
    v2_keys = encoding["name"] == "v2"
    separator = encoding.get("configuration", {}).get("separator", "." if v2_keys else "/")
    return _layout(
        name,
        shape=meta["shape"],
        dtype=meta["data_type"],
        stored=stored,
        chunk=chunk,
        codec="zstd" if "zstd" in names else "raw",
        sharded=sharded,
        prefix="" if v2_keys else "c" + separator,
        separator=separator,
    )


def _little_endian(codec: dict[str, Any]) -> bool:
    return codec.get("configuration", {}).get("endian", "little") == "little"


def _layout(
    name: str, *, shape, dtype, stored, chunk, codec, sharded: bool, prefix: str, separator: str
) -> Layout:
    if codec not in ("raw", "zstd"):
        raise NotImplementedError(f"array {name!r}: codec {codec!r}, only zstd and none are read")
    if dtype is None or separator not in (".", "/"):
        raise CheckpointError(f"array {name!r}: impossible {dtype=} or {separator=}")
    try:
        dt = np.dtype(dtype)
    except TypeError as e:
        raise NotImplementedError(f"array {name!r}: dtype {dtype!r}") from e
    # bfloat16 and its like are of kind V; np.void are bytes, records and subarrays.
    if dt.byteorder == ">" or dt.kind not in "biufcV" or dt.type is np.void:
        raise NotImplementedError(f"array {name!r}: dtype {dtype!r}")
    if dt.type in (np.longdouble, np.clongdouble):
        raise NotImplementedError(f"array {name!r}: dtype {dtype!r} is another on each machine")
    shape, stored, chunk = tuple(shape), tuple(stored), tuple(chunk)
    sizes = [*shape, *stored, *chunk]
    if not all(type(n) is int and n >= 0 for n in sizes) or not (
        len(shape) == len(stored) == len(chunk)
    ):
        raise CheckpointError(f"array {name!r}: {shape=} does not fit {stored=}, {chunk=}")
    if any(c == 0 or s % c for s, c in zip(stored, chunk, strict=True)):
        raise CheckpointError(f"array {name!r}: chunks {chunk} do not divide shards {stored}")
    if why := unfit(shape, dt.itemsize) or unfit(stored, dt.itemsize):
        raise CheckpointError(f"array {name!r}: {why}")
    return Layout(shape, dt, stored, chunk, codec, sharded, prefix, separator)
