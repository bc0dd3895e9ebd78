"""`jaxgds prepare`: shards and quantises a checkpoint once, offline, for fast restores later.

The result is an Orbax checkpoint (zarr v2 in OCDBT) without compression, in which a chunk is one
shard of the target mesh. Each rank has a few large files of its own, and each chunk begins at a
multiple of 4 KiB: that is what direct I/O asks for, and what striped file systems like (on Lustre
give the directory stripes of 16 MiB first: `lfs setstripe -c -1 -S 16M`). Why this layout, by the
Llama-3.1-8B shapes at an eighth and at half of their size, over tp=8:

    layout, uncompressed        data files      bytes at 4 KiB-aligned offsets
                                bf16    FP8     bf16          FP8
    zarr, a file a chunk        2328   4120     100 %         100 %
    OCDBT by TensorStore         3-4    2-4     100 %         67 - 99.5 %
    OCDBT by TensorStore, zarr3  3-4      -     0.1 - 1.7 %     -
    OCDBT by `jaxgds.ocdbt`        8      8     100 %         99.6 - 100 %

(What is missing to 100 % are norms and scales that lie in the B-tree.) TensorStore packs values in
the order in which they come, so one odd length (the scales of FP8) shifts what follows, a file
mixes the shards of all ranks, and its random file names and times differ in each run.

Tensors pass through in blocks: memory stays the same whatever the size of the model. All that is
written goes to a directory beside the destination, which takes its name at the very end.
"""

import errno
import importlib.metadata
import itertools
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from typing import Any

import numpy as np
import xxhash

from jaxgds import ocdbt, prepared, quantize, sources
from jaxgds.index import value_key
from jaxgds.jobs import Job, Method, make_jobs
from jaxgds.output import Writer, check_space, temporary, write_file
from jaxgds.progress import Arrived, shown
from jaxgds.quantize import Rows
from jaxgds.rules import Mesh, Rule, Rules, has_rules, shipped
from jaxgds.scatter import Box, slabs
from jaxgds.sources import Model, Tensor


BLOCK_BYTES = 16 << 20  # read, converted and written at a time
_SLACK = 64 << 20  # free space asked for beyond the data


def prepare(
    source: str | os.PathLike[str] | Model,
    destination: str | os.PathLike[str],
    *,
    mesh: Mesh,
    rules: Rules | None = None,
    method: Method | None = None,
    dtype: Any = None,
    file_bytes: int = prepared.FILE_BYTES,
) -> dict[str, Any]:
    """Writes a prepared checkpoint; shows its progress if stderr is a terminal.

    Args:
      source: a safetensors file or directory, an Orbax checkpoint or a GGUF file; or a model from
        elsewhere that is read tensor by tensor.
      destination: a directory that does not exist yet.
      mesh: the mesh it will be restored onto (it can be restored onto others too).
      rules: how parameters are sharded; None takes those that ship for the model's family. Without
        any, it can be prepared for one device, not quantised.
      method: "fp8" quantises the parameters whose rules have `contract`.
      dtype: of all other floating-point parameters; None leaves them as they are.
      file_bytes: where a rank's files are cut.

    Returns:
      What was done: bytes read and written, seconds, arrays, chunks, files, aligned_share (of the
      bytes of all chunks, those at 4 KiB-aligned offsets), left_out (tensor -> reason).

    Raises:
      CheckpointError: the source is damaged.
      FileExistsError: the destination exists, or another process is writing it.
      OSError: there is too little space, or writing failed.
      ValueError: source, rules and mesh do not fit each other.
    """
    start = time.perf_counter()
    destination = os.path.abspath(os.fspath(destination))
    if os.path.lexists(destination):
        raise FileExistsError(
            errno.EEXIST, "it is there already: remove it, or choose another", destination
        )
    model = source if isinstance(source, Model) else sources.open_model(source)
    if rules is None:
        one = mesh.size == 1 and method is None and not has_rules(model.config)
        rules = Rules("none", (Rule(("*",), ()),)) if one else shipped(model.config)
    jobs = make_jobs(model, rules, mesh, method, dtype)
    arrays = [a for job in jobs for a in (job.array, job.scale) if a is not None]
    places = prepared.place(arrays, mesh, file_bytes)
    written = sum(prepared.padded(e.nbytes) for e in places.values())
    with (
        temporary(destination) as folder,
        ThreadPoolExecutor(1) as reader,
        ThreadPoolExecutor(os.cpu_count()) as pool,
        shown(sum(job.tensor.nbytes for job in jobs), "prepare", after=0) as moved,
        Writer(folder, places) as writer,
    ):
        check_space(folder, written + _SLACK)  # now that what a killed run left is gone
        for job in jobs:
            try:
                _convert(job, writer, reader, pool, moved)
            except quantize.NotFiniteError as e:
                raise ValueError(f"{job.tensor.name!r} cannot be quantised: {e}") from e
        values = writer.finish()
        values |= {value_key(a.name, ".zarray"): prepared.zarray(a) for a in arrays}
        nodes, manifest = ocdbt.encode(values, prepared.NODE_FILE)
        files = {
            **model.configs,
            **prepared.orbax_files(arrays, model.empty, mesh),
            prepared.NODE_FILE: nodes,
            "manifest.ocdbt": manifest,
        }
        description = _describe(model, rules, mesh, method, jobs, writer.checksums) | {
            "files": {name: xxhash.xxh3_128_hexdigest(x) for name, x in sorted(files.items())}
        }
        files[prepared.DESCRIPTION] = json.dumps(description, indent=1).encode()
        for name, content in files.items():
            write_file(os.path.join(folder, name), content)
    inline = sum(a.chunk_nbytes for a in arrays for c in a.chunks() if a.key(c) not in places)
    aligned = sum(e.nbytes for e in places.values())
    seconds = time.perf_counter() - start
    return {
        "source": model.path,
        "destination": destination,
        "bytes_read": sum(job.tensor.nbytes for job in jobs),
        "bytes_written": written,
        "seconds": seconds,
        "gigabytes_per_second": sum(job.tensor.nbytes for job in jobs) / seconds / 1e9,
        "arrays": len(arrays),
        "quantised": sum(job.scale is not None for job in jobs),
        "chunks": sum(1 for a in arrays for _ in a.chunks()),
        "files": len({e.file for e in places.values()}),
        "aligned_share": aligned / (aligned + inline),
        "left_out": dict(model.left_out),
    }


def _convert(
    job: Job,
    writer: Writer,
    reader: Executor,
    pool: Executor,
    moved: Arrived,
) -> None:
    """Reads a tensor block by block, converts it, and writes its shards."""
    tensor, scale = job.tensor, job.scale
    boxes = list(slabs(tensor.shape, max(BLOCK_BYTES // tensor.dtype.itemsize, 1)))
    if scale is None:
        for box, x in _read_ahead(reader, tensor, boxes):
            writer.put(job.array, box, x.astype(job.array.dtype, copy=False))
            moved(x.nbytes)
        return
    contract, scales = job.contract, np.zeros(scale.shape, np.float32)
    whole = all(box[contract] == (0, tensor.shape[contract]) for box in boxes)
    if not whole:  # scales first: a block has parts of channels, and all are read once more
        for box, x in _read_ahead(reader, tensor, boxes):
            here = scales[_channels(box, contract)]
            np.maximum(here, quantize.channel_maxima(x, contract), out=here)
        scales = quantize.scales(scales)
    for box, x in _read_ahead(reader, tensor, boxes):
        encoded, here = np.empty(x.shape, quantize.FP8), scales[_channels(box, contract)]

        def encode(part: Rows, x=x, encoded=encoded, here=here) -> None:
            if whole:
                encoded[part], here[part] = quantize.quantize(x[part], contract)
            else:
                encoded[part] = quantize.encode(x[part], np.broadcast_to(here, x.shape)[part])

        axis = max((d for d in range(x.ndim) if d != contract), key=lambda d: x.shape[d])
        quantize.in_parts(encode, x.shape, axis, pool)
        writer.put(job.array, box, encoded)
        moved(x.nbytes)
    writer.put(scale, tuple((0, n) for n in scale.shape), scales)


def _channels(box: Box, contract: int) -> tuple[slice, ...]:
    """Where the channels of a box are in the array of scales."""
    return tuple(slice(0, 1) if d == contract else slice(*r) for d, r in enumerate(box))


def _read_ahead(
    reader: Executor, tensor: Tensor, boxes: Sequence[Box]
) -> Iterator[tuple[Box, np.ndarray]]:
    """The blocks of a tensor in order; the next is read while one is worked on.

    Args:
      reader: has one thread, as a tensor's blocks are read one after the other.
    """
    pending = [(box, reader.submit(tensor.read, box)) for box in boxes[:1]]
    for box in itertools.chain(boxes[1:], [None]):
        ready, future = pending.pop()
        x = future.result()
        if box is not None:
            pending.append((box, reader.submit(tensor.read, box)))
        yield ready, x


def _describe(
    model: Model,
    rules: Rules,
    mesh: Mesh,
    method: Method | None,
    jobs: Sequence[Job],
    checksums: Mapping[str, str],
) -> dict[str, Any]:
    """Of the content of `jaxgds.json`: where all comes from, and a checksum for each chunk."""
    arrays: dict[str, Any] = {}
    for job in jobs:
        for array in (job.array, job.scale):
            if array is None:
                continue
            arrays[array.name] = {
                "dtype": array.dtype.name,
                "shape": array.shape,
                "partition_spec": array.partition_spec,
                "from": job.tensor.name,
                "chunks": {".".join(map(str, c)): checksums[array.key(c)] for c in array.chunks()},
            }
        if job.scale is not None:
            arrays[job.array.name] |= {"scale": job.scale.name, "contract": job.contract}
    return {
        "jaxgds": importlib.metadata.version("jaxgds"),
        "source": {"kind": model.kind, "path": model.path, "left_out": dict(model.left_out)},
        "mesh": dict(mesh.axes),
        "rules": os.path.basename(rules.file),
        "quantize": method or "none",
        "checksum": "xxh3_128",
        "arrays": arrays,
    }


def table(found: Mapping[str, Any]) -> str:
    """`prepare`'s result as text for people."""
    lines = [
        f"{found['destination']}: {found['arrays']} arrays, {found['quantised']} of them "
        f"quantised, in {found['chunks']} chunks and {found['files']} files",
        f"{found['bytes_read'] / 1e9:.2f} GB read, {found['bytes_written'] / 1e9:.2f} GB written "
        f"in {found['seconds']:.1f} s ({found['gigabytes_per_second']:.2f} GB/s read)",
        f"{found['aligned_share']:.2%} of the bytes at 4 KiB-aligned offsets",
    ]
    lines += [f"left out: {name}: {why}" for name, why in found["left_out"].items()]
    return "\n".join(lines)
