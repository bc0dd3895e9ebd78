"""Zarr metadata as Orbax writes it: what one array's chunks are and how they are encoded.

Pure: bytes of `.zarray` (zarr v2) or `zarr.json` (zarr v3, with or without the
`sharding_indexed` codec) in, `Layout` out. Sources: the Zarr v2 and v3 core
specifications and the v3 `sharding_indexed` codec.
"""

import dataclasses
import functools
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Literal

import ml_dtypes  # noqa: F401  registers bfloat16, fp8 and int4 with numpy
import numpy as np

from jaxgds.errors import CheckpointError


Codec = Literal["raw", "zstd"]
_CODECS = {"bytes": {"endian"}, "zstd": {"level", "checksum"}, "crc32c": set()}
_KINDS = {"endian": str, "level": int, "checksum": bool}
_SHARDING = {"chunk_shape", "codecs", "index_codecs", "index_location"}
MAX_RANK = 64  # of numpy
_FP8 = "e3m4|e4m3b11fnuz|e4m3fn|e4m3fnuz|e5m2|e5m2fnuz|e8m0fnu"
_SMALL = rf"bfloat16|int[24]|float4_e2m1fn|float8_({_FP8})"
_V2_DTYPE = re.compile(rf"[<|]b1|[<|][iu]1|<[iu][248]|<f[248]|<c(8|16)|{_SMALL}")
_V3_DTYPE = re.compile(rf"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)|{_SMALL}")


@dataclasses.dataclass(frozen=True)
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

    @functools.cached_property
    def chunk_nbytes(self) -> int:
        return math.prod(self.chunk) * self.dtype.itemsize

    @functools.cached_property
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
    _check_format(meta, 2, name)
    if meta["order"] != "C":
        raise NotImplementedError(f"array {name!r}: zarr order {meta['order']!r}, only 'C' is read")
    if meta["filters"] not in (None, []):
        raise NotImplementedError(f"array {name!r}: zarr filters {meta['filters']!r} are not read")
    _check_dtype(meta["dtype"], _V2_DTYPE, name)
    compressor = meta["compressor"]
    codec = "raw" if compressor is None else compressor["id"]
    if compressor is not None and not (
        compressor.keys() <= {"id", "level"} and type(compressor.get("level", 1)) is int
    ):
        raise NotImplementedError(f"array {name!r}: compressor {compressor!r}")
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


def _check_format(meta: dict[str, Any], version: int, name: str) -> None:
    if type(meta["zarr_format"]) is not int or meta["zarr_format"] != version:
        raise CheckpointError(f"array {name!r}: zarr_format {meta['zarr_format']!r}")


def _check_dtype(dtype: Any, known: re.Pattern[str], name: str) -> None:
    if dtype is None:
        raise ValueError("a dtype of null")
    try:
        if isinstance(dtype, str) and known.fullmatch(dtype) and np.dtype(dtype):
            return
    except TypeError:
        pass
    raise NotImplementedError(f"array {name!r}: dtype {dtype!r}")


def _parse_v3(meta: dict[str, Any], name: str) -> Layout:
    _check_format(meta, 3, name)
    what = f"array {name!r}"
    kind, grid = _extension(meta["chunk_grid"], {"chunk_shape"}, what)
    if kind != "regular":
        raise NotImplementedError(f"array {name!r}: chunk grid {kind!r}")
    stored = grid["chunk_shape"]
    chunk, codecs, sharded = stored, meta["codecs"], False
    if codecs and codecs[0]["name"] == "sharding_indexed":
        if len(codecs) > 1:
            raise NotImplementedError(f"array {name!r}: codecs after sharding_indexed")
        _, sharding = _extension(codecs[0], _SHARDING, what)
        index_codecs = _codecs(sharding["index_codecs"], what)
        if (
            sharding.get("index_location", "end") != "end"
            or list(index_codecs) != ["bytes", "crc32c"]
            or not _little_endian(index_codecs, False)
        ):
            raise NotImplementedError(f"array {name!r}: shard index {sharding!r}")
        chunk, codecs, sharded = sharding["chunk_shape"], sharding["codecs"], True
    _check_dtype(meta["data_type"], _V3_DTYPE, name)
    found = _codecs(codecs, what)
    names = list(found)
    if names not in (["bytes"], ["bytes", "zstd"]):
        raise NotImplementedError(f"array {name!r}: zarr codecs {names!r}")
    if not _little_endian(found, np.dtype(meta["data_type"]).itemsize == 1):
        raise NotImplementedError(f"array {name!r}: big-endian data")
    encoding, configuration = _extension(meta["chunk_key_encoding"], {"separator"}, what)
    v2_keys = encoding == "v2"
    if not v2_keys and encoding != "default":
        raise NotImplementedError(f"array {name!r}: chunk keys {encoding!r}")
    separator = configuration.get("separator", "." if v2_keys else "/")
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


def _extension(value: dict[str, Any], known: set[str], what: str) -> tuple[str, dict[str, Any]]:
    """Name and configuration; NotImplementedError if there is more, which may change the rest."""
    configuration = value.get("configuration", {})
    if more := value.keys() - {"name", "configuration"} | configuration.keys() - known:
        raise NotImplementedError(f"{what}: {value['name']!r} has {sorted(more)}")
    for key, kind in _KINDS.items():
        if key in configuration and type(configuration[key]) is not kind:
            raise ValueError(f"{value['name']!r} has {key}={configuration[key]!r}")
    return value["name"], configuration


def _codecs(chain: list[dict[str, Any]], what: str) -> dict[str, dict[str, Any]]:
    """Name -> configuration, in order; codecs that are not known may have any."""
    named = [
        _extension(c, _CODECS.get(c["name"], set(c.get("configuration", ()))), what) for c in chain
    ]
    if len(dict(named)) < len(named):
        raise ValueError("a codec occurs twice")
    return dict(named)


def _little_endian(codecs: dict[str, dict[str, Any]], single_bytes: bool) -> bool:
    endian = codecs["bytes"].get("endian")
    return endian == "little" or (endian is None and single_bytes)


def _layout(
    name: str, *, shape, dtype, stored, chunk, codec, sharded: bool, prefix: str, separator: str
) -> Layout:
    if codec not in ("raw", "zstd"):
        raise NotImplementedError(f"array {name!r}: codec {codec!r}, only zstd and none are read")
    if separator not in (".", "/"):
        raise CheckpointError(f"array {name!r}: impossible {separator=}")
    try:
        dt = np.dtype(dtype)
    except TypeError as e:
        raise NotImplementedError(f"array {name!r}: dtype {dtype!r}") from e
    # bfloat16 and its like are of kind V; np.void are bytes, records and subarrays.
    if dt.byteorder == ">" or dt.kind not in "biufcV" or dt.type is np.void:
        raise NotImplementedError(f"array {name!r}: dtype {dtype!r}")
    if not all(isinstance(n, list) for n in (shape, stored, chunk)):
        raise CheckpointError(f"array {name!r}: {shape=}, {stored=}, {chunk=} are no lists")
    shape, stored, chunk = tuple(shape), tuple(stored), tuple(chunk)
    sizes = [*shape, *stored, *chunk]
    if not all(type(n) is int and n >= 0 for n in sizes) or not (
        len(shape) == len(stored) == len(chunk)
    ):
        raise CheckpointError(f"array {name!r}: {shape=} does not fit {stored=}, {chunk=}")
    if any(s == 0 or c == 0 or s % c for s, c in zip(stored, chunk, strict=True)):
        raise CheckpointError(f"array {name!r}: chunks {chunk} do not divide shards {stored}")
    if why := unfit(shape, dt.itemsize) or unfit(stored, dt.itemsize):
        raise CheckpointError(f"array {name!r}: {why}")
    return Layout(shape, dt, stored, chunk, codec, sharded, prefix, separator)
