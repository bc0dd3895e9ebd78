"""`jaxgds verify`: reads a whole checkpoint and finds what is not what was written.

What there is to compare with: the checksum of each chunk and small file that `jaxgds prepare`
stores in jaxgds.json; the CRC-32C of OCDBT nodes (which hold small values) and of shard indices;
and the checksum that a zstd frame may end with. A chunk that has none of these is counted as
unproven: it is read, and decoded if it is compressed, and that is all that can be done.
"""

import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import xxhash
import zstandard

from jaxgds.engines.files import OpenFiles
from jaxgds.engines.host import fill, opened, plain_files, run_all
from jaxgds.errors import CheckpointError
from jaxgds.index import Index, Source, StoredArray, nbytes_of, open_index
from jaxgds.load import item_directory
from jaxgds.plan import Read
from jaxgds.prepared import DESCRIPTION
from jaxgds.progress import Arrived, shown, traced
from jaxgds.safetensors import is_safetensors, open_safetensors
from jaxgds.values import read_whole


BLOCK = 4 << 20


@dataclass(frozen=True)
class _Checksums:
    """What jaxgds.json says: array -> chunk ("0.1") -> xxh3_128, and file -> xxh3_128."""

    chunks: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    files: Mapping[str, str] = field(default_factory=dict)


def verify(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Reads all of a checkpoint; shows its progress if stderr is a terminal.

    Args:
      path: as for `jaxgds.load`.

    Returns:
      path, arrays, chunks, bytes (read), unproven (chunks without a checksum), and problems: what
      is wrong, in words, with file, offsets and array.

    Raises:
      CheckpointError: no checkpoint there, or its index is damaged.
      TimeoutError: the file system does not answer.
    """
    path = os.path.abspath(os.fspath(path))
    if is_safetensors(path):
        names = open_safetensors(path).names()
        return _found(path, len(names), len(names), 0, len(names), [])
    folder = item_directory(path)
    index = open_index(folder)
    checksums = _read_checksums(folder)
    problems = list(_files(folder, checksums))
    if lost := sorted(checksums.chunks.keys() - set(index.names())):
        problems.append(f"{folder}: arrays {lost[:8]} have checksums, but are not there")
    chunks = list(_chunks(index, checksums, problems))
    nbytes = sum(nbytes_of(source) for _, _, source, _ in chunks)
    unproven: list[str] = []
    with shown(nbytes, "verify") as arrived, plain_files() as files:

        def look(array: StoredArray, at: str, source: Source, checksum: str | None) -> None:
            try:
                with traced("verify"):
                    proven = _look(array, source, checksum, files, arrived)
                if not proven:
                    unproven.append(at)
            except CheckpointError as e:
                problems.append(f"{e} (chunk {at})")

        run_all([lambda c=chunk: look(*c) for chunk in chunks], len(os.sched_getaffinity(0)))
    return _found(path, len(index.names()), len(chunks), nbytes, len(unproven), sorted(problems))


def require(path: str | os.PathLike[str]) -> None:
    """Raises CheckpointError if `verify` finds a problem, ValueError if not all has checksums."""
    found = verify(path)
    if problems := found["problems"]:
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise CheckpointError("; ".join(problems[:8]) + more)
    if found["unproven"]:
        raise ValueError(
            f"{path}: {found['unproven']} of {found['chunks']} chunks have no checksum to verify; "
            "jaxgds prepare writes a checkpoint that has them"
        )


def _found(
    path: str, arrays: int, chunks: int, nbytes: int, unproven: int, problems: list[str]
) -> dict[str, Any]:
    return {
        "path": path,
        "arrays": arrays,
        "chunks": chunks,
        "bytes": nbytes,
        "unproven": unproven,
        "problems": problems,
    }


def _read_checksums(folder: str) -> _Checksums:
    file = os.path.join(folder, DESCRIPTION)
    content = read_whole(file)
    if content is None:
        return _Checksums()
    try:
        description = json.loads(content)
        if description["checksum"] != "xxh3_128":
            raise ValueError(f"checksums of kind {description['checksum']!r}")
        arrays = {name: dict(entry["chunks"]) for name, entry in description["arrays"].items()}
        return _Checksums(arrays, dict(description["files"]))
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as e:
        raise CheckpointError(f"{file}: damaged: {e!r}") from e


def damaged_files(folder: str) -> list[str]:
    """What is wrong with the small files of a prepared checkpoint.

    Raises:
      CheckpointError: its jaxgds.json is damaged.
    """
    return list(_files(folder, _read_checksums(folder)))


def _files(folder: str, checksums: _Checksums) -> Iterator[str]:
    for name, checksum in checksums.files.items():
        file = os.path.join(folder, name)
        if os.path.isabs(name) or ".." in name.split("/"):
            yield f"{os.path.join(folder, DESCRIPTION)}: {name!r} is no file of the checkpoint"
            continue
        try:
            content = read_whole(file)
        except CheckpointError as e:
            yield str(e)
            continue
        if content is None:
            yield f"{file}: cannot be read: it is not there"
        elif xxhash.xxh3_128_hexdigest(content) != checksum:
            yield f"{file} fails its checksum"


def _chunks(
    index: Index, checksums: _Checksums, problems: list[str]
) -> Iterator[tuple[StoredArray, str, Source, str | None]]:
    """Each chunk of each array: its index, its place, its checksum if there is one."""
    index.fetch(index.names())
    for name in index.names():
        expected = dict(checksums.chunks.get(name, {}))
        described = name in checksums.chunks
        try:
            array = index.array(name)
            array.check_stored()
            for at, source in array.chunks():
                array.check_chunk(source)
                key = ".".join(map(str, at))
                if described and key not in expected:
                    problems.append(f"array {name!r}: its chunk {key} has no checksum")
                yield array, key, source, expected.pop(key, None)
        except (CheckpointError, NotImplementedError) as e:
            problems.append(str(e))
        else:
            if expected:
                problems.append(f"array {name!r}: chunks {sorted(expected)[:8]} are not there")


def _look(
    array: StoredArray,
    source: Source,
    checksum: str | None,
    files: OpenFiles[Any],
    arrived: Arrived,
) -> bool:
    """Reads one chunk, and returns whether its bytes are proven. CheckpointError if damaged."""
    where = (
        "inline value"
        if isinstance(source, bytes)
        else f"{source.file} [{source.offset}, {source.offset + source.nbytes})"
    )
    proven = isinstance(source, bytes)  # its node had a checksum
    if checksum is not None:
        digest = xxhash.xxh3_128()
        for block in _blocks(Read(array.name, source, "raw", ()), nbytes_of(source), files):
            digest.update(block)
            arrived(len(block))
        if digest.hexdigest() != checksum:
            raise CheckpointError(f"{where}: array {array.name!r}: fails its checksum")
        return True
    read = Read(array.name, source, array.layout.codec, ())
    if read.codec == "zstd":
        start = Read(array.name, source, "raw", ())
        (head,) = _blocks(start, min(18, read.source_nbytes), files)
        try:
            proven |= zstandard.get_frame_parameters(bytes(head)).has_checksum
        except zstandard.ZstdError as e:
            raise CheckpointError(f"{where}: array {array.name!r}: damaged: {e}") from e
    for _ in _blocks(read, array.layout.chunk_nbytes, files):
        pass
    arrived(read.source_nbytes)
    return proven


def _blocks(read: Read, nbytes: int, files: OpenFiles[Any]) -> Iterator[memoryview]:
    """The first decoded bytes of a read."""
    buffer = memoryview(np.empty(min(nbytes, BLOCK), np.uint8))
    with opened(read, files) as decoded:
        for done in range(0, nbytes, BLOCK):
            block = buffer[: min(BLOCK, nbytes - done)]
            fill(decoded, block, read)
            yield block


def table(found: Mapping[str, Any]) -> str:
    """`verify`'s result as text for people."""
    problems, unproven = found["problems"], found["unproven"]
    lines = [
        f"{found['path']}: {found['arrays']} arrays in {found['chunks']} chunks, "
        f"{found['bytes'] / 1e9:.2f} GB read"
    ]
    lines += [f"DAMAGED  {problem}" for problem in problems[:20]]
    if len(problems) > 20:
        lines.append(f"and {len(problems) - 20} more")
    if unproven:
        lines.append(
            f"{unproven} chunks have no checksum: a change in them would not be noticed "
            "(jaxgds prepare writes checksums)"
        )
    return "\n".join([*lines, f"{len(problems)} problems" if problems else "no problems found"])
