"""Tensor by tensor out of a checkpoint, in pieces that fit in memory: what `prepare` reads.

A tensor is asked for boxes that are whole along all but its leading dimensions, in the order in
which they lie in memory; so every file is read front to back once, and a compressed chunk, of
whatever size, is decoded as a stream.
"""

import functools
import itertools
import json
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import zstandard

from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, Source, StoredArray, open_index
from jaxgds.load import item_directory
from jaxgds.safetensors import is_safetensors, open_safetensors
from jaxgds.saved import random_keys
from jaxgds.scatter import Box
from jaxgds.values import read_whole


DICT = 2  # Orbax's number for a key of a dict
# What a directory of weights has beside them that serving needs too.
CONFIGS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
)


@dataclass(frozen=True)
class Tensor:
    """One array of a checkpoint.

    Attributes:
      keys: its path in the tree, each with Orbax's number for the type of container.
      value_type: Orbax's name for what it restores as.
      read: box -> the elements in it. Boxes of one tensor are best asked for in order.
    """

    keys: tuple[tuple[str, int], ...]
    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[Box], np.ndarray]
    value_type: str = "jax.Array"

    @property
    def name(self) -> str:
        return name_of(self.keys)

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class Model:
    """A checkpoint that is to be prepared.

    Attributes:
      kind: "safetensors", "orbax" or "gguf".
      empty: nodes of the tree without arrays (None, empty containers), as in Orbax's `_METADATA`.
      config: the model's config.json; None if there is none.
      configs: file name -> content, of the small files that go with the weights.
      left_out: tensor -> why it is no part of the model.
    """

    kind: str
    path: str
    tensors: tuple[Tensor, ...]
    empty: Mapping[str, Any]
    config: Mapping[str, Any] | None
    configs: Mapping[str, bytes]
    left_out: Mapping[str, str]


def name_of(keys: tuple[tuple[str, int], ...]) -> str:
    return ".".join(key for key, _ in keys)


def open_model(path: str | os.PathLike[str]) -> Model:
    """Opens a safetensors file or directory, an Orbax checkpoint or a GGUF file.

    Raises:
      CheckpointError: there is none, or a damaged one.
      ValueError: it holds what a prepared checkpoint cannot (names that are prefixes of others,
        strings, PRNG keys, tensors without elements).
      NotImplementedError: an encoding that is not read, or the gguf package is missing.
    """
    path = os.path.abspath(os.fspath(path))
    if path.endswith(".gguf"):
        from jaxgds.gguf_source import open_gguf

        model = open_gguf(path)
    elif not os.path.exists(path):
        raise CheckpointError(f"{path}: no such file or directory")
    elif is_safetensors(path):
        model = _open_safetensors(path)
    else:
        model = _open_orbax(path)
    _check_tree(model)
    return model


def _open_safetensors(path: str) -> Model:
    index = open_safetensors(path)
    arrays = sorted(map(index.array, index.names()), key=_place)
    tensors = tuple(
        Tensor(tree_keys(a.name), a.layout.shape, a.layout.dtype, _Reader(a).read) for a in arrays
    )
    config, configs = _configs([path if os.path.isdir(path) else os.path.dirname(path)])
    return Model("safetensors", path, tensors, {}, config, configs, {})


def tree_keys(name: str) -> tuple[tuple[str, int], ...]:
    """The path in a tree of dicts of a name whose parts are joined by dots."""
    return tuple((part, DICT) for part in name.split("."))


def _place(array: StoredArray) -> tuple[str, int]:
    """Where the array begins, so that files are read front to back."""
    _, source = next(array.chunks(), ((), b""))
    return (source.file, source.offset) if isinstance(source, Extent) else ("", 0)


def _open_orbax(path: str) -> Model:
    folder = item_directory(path)
    index = open_index(folder)
    if keys := random_keys(folder):
        raise ValueError(f"{folder}: {list(keys)[:8]} are PRNG keys, which are no weights")
    file = os.path.join(folder, "_METADATA")
    content = read_whole(file) or b""
    try:
        tree = json.loads(content)["tree_metadata"]
        leaves = [
            (
                tuple((k["key"], k["key_type"]) for k in node["key_metadata"]),
                node["value_metadata"]["value_type"],
                node["value_metadata"]["skip_deserialize"],
            )
            for node in tree.values()
        ]
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file}: damaged checkpoint metadata: {e!r}") from e
    tensors = []
    for keys, kind, empty in leaves:
        if empty:
            continue
        if kind not in ("jax.Array", "np.ndarray", "scalar"):
            raise ValueError(f"{folder}: {name_of(keys)!r} is a {kind}, not an array")
        array = index.array(name_of(keys))
        read = _Reader(array).read
        kind = "scalar" if kind == "scalar" else "jax.Array"
        tensors.append(Tensor(keys, array.layout.shape, array.layout.dtype, read, kind))
    nodes = {key: node for key, node in tree.items() if node["value_metadata"]["skip_deserialize"]}
    config, configs = _configs([folder, os.path.dirname(folder), path])
    return Model("orbax", path, tuple(tensors), nodes, config, configs, {})


def _configs(folders: list[str]) -> tuple[dict[str, Any] | None, dict[str, bytes]]:
    """The model's config, and all small files of the first folder that has one."""
    for folder in folders:
        found = {}
        for name in CONFIGS:
            content = read_whole(os.path.join(folder, name))
            if content is not None:
                found[name] = content
        if found:
            try:
                return json.loads(found["config.json"]) if "config.json" in found else None, found
            except ValueError as e:
                raise CheckpointError(f"{folder}/config.json: damaged: {e}") from e
    return None, {}


def _check_tree(model: Model) -> None:
    paths = {tuple(key for key, _ in t.keys) for t in model.tensors}
    if len(paths) < len(model.tensors):
        raise ValueError(f"{model.path}: several of its tensors would have the same name")
    for t in model.tensors:
        if 0 in t.shape:
            raise ValueError(f"{model.path}: {t.name!r} has no elements, which Orbax cannot store")
        path = tuple(key for key, _ in t.keys)
        for n in range(1, len(path)):
            if path[:n] in paths:
                raise ValueError(
                    f"{model.path}: {'.'.join(path[:n])!r} is a tensor, and {t.name!r} would "
                    "lie below it in the tree"
                )


def read_box(array: StoredArray) -> Callable[[Box], np.ndarray]:
    """A function box -> elements, for an array of safetensors or of Orbax."""
    return _Reader(array).read


class _Reader:
    """Reads boxes of one stored array; keeps a stream for each compressed chunk it is within."""

    def __init__(self, array: StoredArray):
        self._array = array
        self._streams: dict[tuple[int, ...], _Stream] = {}

    def read(self, box: Box) -> np.ndarray:
        layout = self._array.layout
        chunks = list(chunks_in(box, layout.chunk))
        out = np.empty([stop - start for start, stop in box], layout.dtype)
        for index in chunks:
            corner = [i * c for i, c in zip(index, layout.chunk, strict=True)]
            common = [
                (max(start, at), min(stop, at + c))
                for (start, stop), at, c in zip(box, corner, layout.chunk, strict=True)
            ]
            local = [(a - at, b - at) for (a, b), at in zip(common, corner, strict=True)]
            target = tuple(
                slice(a - start, b - start) for (a, b), (start, _) in zip(common, box, strict=True)
            )
            part = self._part(index, local)
            if len(chunks) == 1:
                return part
            out[target] = part
        return out

    def _part(self, index: tuple[int, ...], box: list[tuple[int, int]]) -> np.ndarray:
        """The elements of a chunk in `box`, relative to the chunk."""
        layout = self._array.layout
        # Leading dimensions of which one index is wanted, then one range, then whole dimensions:
        # one run of bytes. What a later dimension has too much of is cut off afterwards.
        first = next((d for d, (a, b) in enumerate(box) if b - a > 1), len(box))
        strides = [math.prod(layout.chunk[d + 1 :]) for d in range(len(box))]
        start = sum(a * strides[d] for d, (a, _) in enumerate(box[: first + 1]))
        shape = [b - a for a, b in box[: first + 1]] + list(layout.chunk[first + 1 :])
        size = layout.dtype.itemsize
        data = self._bytes(index, start * size, math.prod(shape) * size)
        whole = np.frombuffer(data, layout.dtype).reshape(shape)
        rest = tuple(slice(a, b) for a, b in box[first + 1 :])
        return whole[(slice(None),) * min(first + 1, len(box)) + rest]

    def _bytes(self, index: tuple[int, ...], start: int, nbytes: int) -> bytes | memoryview:
        layout, source = self._array.layout, self._array.chunk(index)
        where = f"array {self._array.name!r}: its chunk {index}"
        if layout.codec == "raw":
            have = len(source) if isinstance(source, bytes) else source.nbytes
            if have != layout.chunk_nbytes:
                raise CheckpointError(f"{where} has {have} bytes, not {layout.chunk_nbytes}")
            return read_range(source, start, nbytes, where)
        stream = self._streams.get(index)
        if stream is None or stream.at > start:
            stream = _Stream(source, where)
        data = stream.take(start, nbytes)
        self._streams[index] = stream
        if stream.at == layout.chunk_nbytes:
            del self._streams[index]
        return data


def chunks_in(box: Box, chunk: tuple[int, ...]) -> Iterator[tuple[int, ...]]:
    """Indices of the chunks that a box touches, in order."""
    return itertools.product(
        *(range(a // c, -(-b // c)) for (a, b), c in zip(box, chunk, strict=True))
    )


def read_range(source: Source, start: int, nbytes: int, where: str) -> bytes | memoryview:
    """Part of a value. Raises CheckpointError if its file does not hold it."""
    if isinstance(source, bytes):
        return source[start : start + nbytes]
    view, done = memoryview(np.empty(nbytes, np.uint8)), 0
    try:
        fd = os.open(source.file, os.O_RDONLY | os.O_CLOEXEC)
        try:
            while done < nbytes:
                n = os.preadv(fd, [view[done:]], source.offset + start + done)
                if n == 0:
                    raise CheckpointError(f"{where}: {source.file} is truncated")
                done += n
        finally:
            os.close(fd)
    except OSError as e:
        raise CheckpointError(f"{where}: {source.file} cannot be read: {e}") from e
    return view


class _Stream:
    """The decoded bytes of one zstd frame, front to back."""

    def __init__(self, source: Source, where: str):
        self._source, self._where = source, where
        encoded: Any = _Bytes(source, where)  # of a file's methods, only read is called
        self._reader = zstandard.ZstdDecompressor().stream_reader(encoded)
        self.at = 0

    def take(self, start: int, nbytes: int) -> bytes:
        try:
            while self.at < start:
                self._advance(min(start - self.at, 1 << 20))
            return self._advance(nbytes)
        except zstandard.ZstdError as e:
            raise CheckpointError(f"{self._where} cannot be decompressed: {e}") from e

    def _advance(self, nbytes: int) -> bytes:
        parts, left = [], nbytes
        while left:
            part = self._reader.read(left)
            if not part:
                raise CheckpointError(f"{self._where} decompresses to too few bytes")
            parts.append(part)
            left -= len(part)
        self.at += nbytes
        return parts[0] if len(parts) == 1 else b"".join(parts)


class _Bytes:
    """A value as the file-like object that the decompressor reads from."""

    def __init__(self, source: Source, where: str):
        self._read = functools.partial(read_range, source, where=where)
        self._left = len(source) if isinstance(source, bytes) else source.nbytes
        self._at = 0

    def read(self, size: int) -> bytes:
        data = bytes(self._read(start=self._at, nbytes=min(size, self._left)))
        self._at += len(data)
        self._left -= len(data)
        return data
