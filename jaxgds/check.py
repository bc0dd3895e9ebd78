"""`jaxgds prepare --check`: proves a prepared checkpoint against its description and its source."""

import json
import math
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxgds import quantize, sources
from jaxgds.errors import CheckpointError
from jaxgds.index import Index, StoredArray, open_index
from jaxgds.prepared import DESCRIPTION
from jaxgds.progress import Arrived, shown
from jaxgds.scatter import Box, slabs
from jaxgds.sources import Model, Tensor
from jaxgds.values import read_whole
from jaxgds.verify import damaged_files, verify


SAMPLES = 4  # parts of each tensor that are compared with the source
SAMPLE_BYTES = 256 << 10  # of each of them


@dataclass(frozen=True)
class _Entry:
    """What the description says of one array.

    Attributes:
      origin: the tensor of the source it was made from.
      chunks: index of a chunk -> its checksum.
      scale: of a quantised array, the one with its scales.
      contract: the dimension over which a scale is shared.
    """

    dtype: str
    shape: tuple[int, ...]
    origin: str
    chunks: Mapping[tuple[int, ...], str]
    scale: str | None
    contract: int


def check(
    destination: str | os.PathLike[str], source: str | os.PathLike[str] | None = None
) -> dict[str, Any]:
    """Reads all of a prepared checkpoint, and samples of its source; shows its progress.

    Args:
      source: where the source is now; None looks where it was.

    Returns:
      problems: what is wrong, in words; and how much was looked at: arrays, chunks, bytes, and
        sampled_bytes (compared with the source).

    Raises:
      CheckpointError: there is no prepared checkpoint, or no source; or its description, its index
        or the source is damaged.
    """
    destination = os.path.abspath(os.fspath(destination))
    entries, recorded = _read_description(os.path.join(destination, DESCRIPTION))
    source = source or recorded
    if not os.path.exists(source):
        raise CheckpointError(
            f"{destination}: its source {source} is gone; say where it is now: "
            "jaxgds prepare --check SRC DST"
        )
    index, model = open_index(destination), sources.open_model(source)
    found = {"source": model.path, "destination": destination, "arrays": len(entries)}
    if wrong := list(_structure(entries, index, model)):
        return found | {"problems": [*damaged_files(destination), *wrong]}
    samples = {t.name: _samples(t) for t in model.tensors}
    sampled = sum(_size(box) * t.dtype.itemsize for t in model.tensors for box in samples[t.name])
    verified = verify(destination)
    arrays = {name: index.array(name) for name in entries}
    with shown(sampled, "check", after=0) as moved:
        differ = _values(entries, arrays, model, samples, moved)
    return found | {
        "chunks": verified["chunks"],
        "bytes": verified["bytes"],
        "sampled_bytes": sampled,
        "problems": [*verified["problems"], *differ],
    }


def _read_description(file: str) -> tuple[dict[str, _Entry], str]:
    """The arrays of a prepared checkpoint, and the path of its source."""
    content = read_whole(file)
    if content is None:
        raise CheckpointError(f"{file}: not a prepared checkpoint: no such file")
    try:
        description = json.loads(content)
        entries = {
            name: _Entry(
                entry["dtype"],
                tuple(entry["shape"]),
                entry["from"],
                {
                    tuple(map(int, filter(None, index.split(".")))): checksum
                    for index, checksum in entry["chunks"].items()
                },
                entry.get("scale"),
                entry.get("contract", 0),
            )
            for name, entry in description["arrays"].items()
        }
        return entries, description["source"]["path"]
    except (ValueError, LookupError, TypeError, AttributeError) as e:
        raise CheckpointError(f"{file}: damaged: {e!r}") from e


def _structure(entries: Mapping[str, _Entry], index: Index, model: Model) -> Iterator[str]:
    """What is wrong with names, shapes and dtypes."""
    if differ := set(index.names()) ^ entries.keys():
        yield f"arrays that are not both stored and described: {sorted(differ)[:8]}"
    tensors = {t.name: t for t in model.tensors}
    if differ := {entry.origin for entry in entries.values()} ^ tensors.keys():
        yield f"tensors that are not both in the source and described: {sorted(differ)[:8]}"
    scales = _scales(entries)
    for name in sorted(entries.keys() & set(index.names())):
        entry, array = entries[name], index.array(name)
        stored = array.layout.shape, array.layout.dtype.name
        if stored != (entry.shape, entry.dtype):
            yield f"{name}: stored as {stored}, described as {(entry.shape, entry.dtype)}"
        if set(np.ndindex(array.grid)) != entry.chunks.keys():
            yield f"{name}: stored in {array.grid} chunks, described as {len(entry.chunks)} others"
        tensor = tensors.get(entry.origin)
        if tensor and name not in scales and tensor.shape != entry.shape:
            yield f"{name}: its shape is {entry.shape}, in the source {tensor.shape}"


def _scales(entries: Mapping[str, _Entry]) -> set[str | None]:
    return {entry.scale for entry in entries.values()}


def _values(
    entries: Mapping[str, _Entry],
    arrays: Mapping[str, StoredArray],
    model: Model,
    samples: Mapping[str, Sequence[Box]],
    moved: Arrived,
) -> list[str]:
    """Compares samples of each tensor; what differs."""
    tensors, scales = {t.name: t for t in model.tensors}, _scales(entries)
    problems = []
    for name, entry in entries.items():
        if name in scales:
            continue
        tensor, read = tensors[entry.origin], sources.read_box(arrays[name])
        scale = sources.read_box(arrays[entry.scale]) if entry.scale else None
        for box in samples[tensor.name]:
            x = tensor.read(box)
            moved(x.nbytes)
            try:
                got = read(box)
                if scale is None:
                    same = x.astype(got.dtype).tobytes() == got.tobytes()
                else:
                    same = _same_quantised(x, got, scale, box, tensor.shape, entry.contract)
            except CheckpointError as e:
                problems.append(str(e))
                continue
            if not same:
                at = ", ".join(f"{a}:{b}" for a, b in box)
                problems.append(f"{name}[{at}] is not what the source has there")
    return problems


def _same_quantised(
    x: np.ndarray, got: np.ndarray, scale: Any, box: Box, shape: tuple[int, ...], contract: int
) -> bool:
    """Whether `got` is `x` quantised; the scales are proven where the box has whole channels."""
    scales = scale(tuple((0, 1) if d == contract else r for d, r in enumerate(box)))
    try:
        maxima = quantize.channel_maxima(x, contract)
    except quantize.NotFiniteError:
        return False
    if box[contract] == (0, shape[contract]):
        proven = quantize.scales(maxima).tobytes() == scales.tobytes()
    else:
        proven = bool((maxima <= scales * quantize.LARGEST * (1 + 1e-6)).all())
    return proven and quantize.encode(x, scales).tobytes() == got.tobytes()


def _size(box: Box) -> int:
    return math.prod(stop - start for start, stop in box)


def _samples(tensor: Tensor) -> list[Box]:
    """A few boxes of a tensor, its first and last among them, in order; always the same ones."""
    boxes = list(slabs(tensor.shape, max(SAMPLE_BYTES // tensor.dtype.itemsize, 1)))
    some = random.Random(tensor.name).sample(range(len(boxes)), min(SAMPLES - 2, len(boxes)))
    return [boxes[i] for i in sorted({0, *some, len(boxes) - 1})]


def table(found: Mapping[str, Any]) -> str:
    """`check`'s result as text for people."""
    lines = [f"{found['destination']}: {found['arrays']} arrays"]
    if "chunks" in found:
        lines += [
            f"{found['chunks']} chunks ({found['bytes'] / 1e9:.2f} GB) read and their checksums "
            "compared",
            f"{found['sampled_bytes'] / 1e6:.1f} MB of samples compared with {found['source']}",
        ]
    problems = found["problems"]
    lines += [f"WRONG  {problem}" for problem in problems[:20]]
    if len(problems) > 20:
        lines.append(f"and {len(problems) - 20} more")
    return "\n".join([*lines, "no problems found" if not problems else f"{len(problems)} problems"])
