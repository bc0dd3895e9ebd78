"""safetensors files -> the same index that Orbax checkpoints have.

What the caller names is trusted, what a checkpoint names is not: its files lie inside its
directory, symbolic links followed. One exception keeps the Hugging Face cache working, where a
file of `models--X/snapshots/REVISION/` is a link into `models--X/blobs/`.
"""

import functools
import json
import os
import stat
import struct
from collections.abc import Iterator, Mapping

from jaxgds import safetensors_header
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, StoredArray, value_key
from jaxgds.safetensors_header import DTYPES, Tensor
from jaxgds.values import read_whole
from jaxgds.workers import reading, watched
from jaxgds.zarr import Layout, unfit


MAX_HEADER = 100_000_000  # the reference implementation's limit


class SafetensorsIndex:
    """The tensors of one or more safetensors files, by name."""

    def __init__(self, path: str, arrays: Mapping[str, StoredArray | Tensor]):
        self.path = path
        self._arrays = arrays

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def names(self) -> list[str]:
        return sorted(self._arrays)

    def array(self, name: str) -> StoredArray:
        """The tensor called `name`.

        Raises:
          CheckpointError: there is none.
          NotImplementedError: its elements take less than a byte, or no array has its shape.
        """
        array = self._arrays.get(name)
        if array is None:
            some = ", ".join(map(repr, self.names()[:8]))
            raise CheckpointError(f"{self.path}: no tensor {name!r}; it has {some}, ...")
        if isinstance(array, Tensor):
            raise NotImplementedError(
                f"{self.path}: tensor {name!r}: dtype {array.dtype} is not read; its elements take "
                "less than a byte"
            )
        if why := unfit(array.layout.shape, array.layout.dtype.itemsize):
            raise NotImplementedError(f"{self.path}: tensor {name!r}: {why}")
        return array


def is_safetensors(path: str) -> bool:
    """Whether `path` is a safetensors file or index, or a directory of safetensors files."""
    if os.path.isdir(path):
        return any(name.endswith(".safetensors") for name in _visible(path))
    return path.endswith((".safetensors", ".safetensors.index.json"))


def open_safetensors(path: str) -> SafetensorsIndex:
    """Opens a file, a `*.safetensors.index.json`, or a directory (its index if it has one).

    Raises:
      CheckpointError: damaged, a tensor in two files, or a file that an index or a link in the
        directory has outside of it.
    """
    files: dict[str, set[str] | None] = {}  # file -> the tensors to take; None takes all
    if os.path.isdir(path):
        names = _visible(path)
        indices = [n for n in names if n.endswith(".safetensors.index.json")]
        if len(indices) > 1:
            raise CheckpointError(f"{path}: has several indices, name one of {indices}")
        if indices:
            return open_safetensors(os.path.join(path, indices[0]))
        files = {_inside(path, n, path): None for n in names if n.endswith(".safetensors")}
    elif path.endswith(".json"):
        files = dict(_weight_map(path))
    else:
        files = {path: None}
    arrays: dict[str, StoredArray | Tensor] = {}
    for file, wanted in files.items():
        found = watched(functools.partial(read_header, file))
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


def _visible(folder: str) -> list[str]:
    """What is in it, but for what copying from a Mac leaves there: `._model.safetensors`."""
    return sorted(name for name in os.listdir(folder) if not name.startswith("."))


def read_header(file: str) -> dict[str, StoredArray | Tensor]:
    """The tensors of one file, from its header alone; those that cannot be read as `Tensor`.

    Raises:
      CheckpointError: the header is not what the format allows, or does not fit the file.
    """
    try:
        with reading(file):
            if not stat.S_ISREG(os.stat(file).st_mode):  # to open a pipe would wait for its writer
                raise CheckpointError(f"{file}: not a regular file")
        with reading(file), open(file, "rb") as f:
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
        tensors, end = safetensors_header.parse(text)
    except (ValueError, RecursionError) as e:
        raise CheckpointError(f"{file}: damaged safetensors header: {e!r}") from e
    if end + 8 + length != size:
        raise CheckpointError(
            f"{file}: has {size} bytes, but its header asks for {end + 8 + length}; truncated?"
        )
    return {name: _stored(name, t, file, 8 + length) for name, t in tensors.items()}


def _stored(name: str, tensor: Tensor, file: str, base: int) -> StoredArray | Tensor:
    if tensor.dtype not in DTYPES:
        return tensor
    extent = Extent(file, base + tensor.start, tensor.stop - tensor.start)
    chunk = tuple(max(n, 1) for n in tensor.shape)
    layout = Layout(tensor.shape, DTYPES[tensor.dtype], chunk, chunk, "raw", False, "", ".")
    return StoredArray(name, layout, {value_key(name, layout.key((0,) * len(chunk))): extent})


def _weight_map(path: str) -> dict[str, set[str]]:
    """File -> names of its tensors, from a `*.safetensors.index.json`."""
    folder = os.path.dirname(os.path.abspath(path))
    content = read_whole(path)
    if content is None:
        raise CheckpointError(f"{path}: no such file")
    try:
        weight_map = json.loads(content)["weight_map"]
        items = [(str(name), os.fspath(file)) for name, file in weight_map.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{path}: damaged safetensors index: {e!r}") from e
    by_file: dict[str, set[str]] = {}
    for name, file in items:
        by_file.setdefault(file, set()).add(name)
    files: dict[str, set[str]] = {}
    for file, names in by_file.items():  # `a` and `./a` are one file
        files.setdefault(_inside(folder, file, path), set()).update(names)
    return files


def _inside(folder: str, file: str, where: str) -> str:
    """`file` of `folder`, which `where` names; CheckpointError if it lies outside of it."""
    path = os.path.normpath(os.path.join(folder, file))
    if not _is_below(path, os.path.normpath(folder)):
        raise CheckpointError(f"{where}: points outside its directory, to {file!r}")
    try:
        target = os.path.realpath(path)
        if any(_is_below(target, allowed) for allowed in _allowed(os.path.realpath(folder))):
            return path
    except ValueError as e:  # a NUL
        raise CheckpointError(f"{where}: {file!r} is no name of a file: {e}") from e
    raise CheckpointError(
        f"{where}: points outside its directory: {file!r} is a symbolic link to {target}; "
        "replace it by a copy or a hard link, or load the directory where the files are"
    )


def _allowed(folder: str) -> Iterator[str]:
    """Where files of a checkpoint in `folder`, free of links, may lie."""
    yield folder
    snapshots = os.path.dirname(folder)
    repository = os.path.dirname(snapshots)
    if os.path.basename(snapshots) == "snapshots" and "--" in os.path.basename(repository):
        yield os.path.join(repository, "blobs")


def _is_below(path: str, folder: str) -> bool:
    return path.startswith(os.path.join(folder, ""))
