"""`jaxgds inspect`: what a checkpoint holds, and how much of it can be read in place."""

import math
import os
from collections import Counter
from typing import Any

from jaxgds.index import StoredArray, open_index
from jaxgds.load import item_directory
from jaxgds.safetensors import is_safetensors, open_safetensors


PAGE = 4096  # what direct I/O wants offsets and sizes to be multiples of


def inspect(path: str) -> dict[str, Any]:
    """Arrays and layout of a checkpoint, from its metadata alone, as plain JSON types.

    Returns:
      arrays: name, dtype, shape, chunk (shape), chunks (count), codec, nbytes, stored_nbytes,
        direct_nbytes (stored raw), aligned_nbytes (raw, offset and size multiples of 4 KiB),
        or name and error for an array with an encoding that is not read;
      total: the sums, and the number of data files.

    Raises:
      CheckpointError: no checkpoint, or a damaged one.
    """
    if is_safetensors(path):
        index = open_safetensors(path)
    else:
        index = open_index(item_directory(os.path.abspath(path)))
    files: set[str] = set()
    arrays = []
    for name in index.names():
        try:
            arrays.append(_describe(index.array(name), files))
        except NotImplementedError as e:
            arrays.append({"name": name, "error": str(e)})
    total: dict[str, Any] = {"arrays": len(arrays), "files": len(files)}
    for key in ("chunks", "nbytes", "stored_nbytes", "direct_nbytes", "aligned_nbytes"):
        total[key] = sum(a.get(key, 0) for a in arrays)
    total["codecs"] = dict(Counter(a.get("codec", "other") for a in arrays))
    return {"path": path, "arrays": arrays, "total": total}


def _describe(array: StoredArray, files: set[str]) -> dict[str, Any]:
    layout = array.layout
    stored = direct = aligned = chunks = 0
    for _, source in array.chunks():
        chunks += 1
        if isinstance(source, bytes):
            stored += len(source)
            continue
        files.add(source.file)
        stored += source.nbytes
        if layout.codec == "raw":
            direct += source.nbytes
            if source.offset % PAGE == 0 and source.nbytes % PAGE == 0:
                aligned += source.nbytes
    return {
        "name": array.name,
        "dtype": str(layout.dtype),
        "shape": list(layout.shape),
        "chunk": list(layout.chunk),
        "chunks": chunks,
        "codec": layout.codec,
        "nbytes": math.prod(layout.shape) * layout.dtype.itemsize,
        "stored_nbytes": stored,
        "direct_nbytes": direct,
        "aligned_nbytes": aligned,
    }


def table(found: dict[str, Any]) -> str:
    """`inspect`'s result as text for people."""
    head = ("array", "dtype", "shape", "chunk", "chunks", "codec", "bytes")
    rows: list[tuple[str, ...]] = [head]
    for a in found["arrays"]:
        if "error" in a:
            rows.append((a["name"], a["error"], "", "", "", "", ""))
            continue
        shape, chunk = ("x".join(map(str, a[k])) or "scalar" for k in ("shape", "chunk"))
        size = _size(a["nbytes"])
        rows.append((a["name"], a["dtype"], shape, chunk, str(a["chunks"]), a["codec"], size))
    widths = [max(len(row[i]) for row in rows) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(w) for cell, w in zip(r, widths, strict=True)).rstrip() for r in rows
    ]
    total = found["total"]
    stored = max(total["stored_nbytes"], 1)
    lines += [
        "",
        f"{total['arrays']} array{'s' if total['arrays'] != 1 else ''}, {_size(total['nbytes'])} "
        f"({_size(total['stored_nbytes'])} stored) in {total['chunks']} chunks "
        f"and {total['files']} files",
        f"read in place (not compressed): {total['direct_nbytes'] / stored:.0%} of stored bytes",
        f"read in place and 4 KiB-aligned: {total['aligned_nbytes'] / stored:.0%}",
    ]
    return "\n".join(lines)


def _size(nbytes: int) -> str:
    for unit, scale in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if nbytes >= scale:
            return f"{nbytes / scale:.2f} {unit}"
    return f"{nbytes} B"
