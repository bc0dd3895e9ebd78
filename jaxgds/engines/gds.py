"""GPUDirect Storage through kvikio and cuFile: files -> device memory, past the CPU's memory.

cuFile moves whole blocks of 4 KiB, and into memory that is registered with it; it registers whole
allocations, and XLA's arrays all lie in one that may fill the GPU. So what lies in whole blocks in
the file and in an array is read there, unregistered. All else goes to a small registered staging
buffer per thread, widened to whole blocks, and one copy on the device, at some hundred times the
storage's rate, takes what is wanted to where it belongs.
"""

import functools
import importlib.util
import os
import threading
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from jaxgds.engines import cuda, cufile, cufile_config
from jaxgds.engines.cufile import CuFileError, Staging
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.gds_proof import counted, since, start_counting
from jaxgds.engines.gds_proof import missing as missing
from jaxgds.engines.host import direct, truncated
from jaxgds.engines.numa import near
from jaxgds.engines.parts import copy_pieces
from jaxgds.engines.pinned import PinnedEngine, ordinal_of
from jaxgds.engines.posix import BLOCK
from jaxgds.index import Extent
from jaxgds.plan import MAX_READ, Read
from jaxgds.progress import Arrived, ignore, traced
from jaxgds.workers import run_threads


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


# What a thread stages at once. Reads straight into arrays are as large as cuFile's configuration
# says, which also sets the number of threads; a read that is scattered must be staged whole.
WINDOW = 16 << 20
# For less, cuFile costs more than it saves.
MIN_READ = 64 << 10


class GdsEngine:
    """Raw reads onto one GPU go through cuFile, the others the pinned way.

    Args:
      ordinals: the GPUs.
      proof: use cuFile only for files of which it is proven that it moves them directly; otherwise
        its compatibility mode will do, which reads by way of host memory: `path` is then
        "gds-compat", and `note` says so too.
      strict: raise CuFileError if cuFile fails; otherwise all is then read the pinned way, and
        `note` says so.

    Raises:
      NotImplementedError: kvikio is not installed.
      ValueError: cuFile does not take its configuration.
    """

    max_read = MAX_READ

    def __init__(self, ordinals: Sequence[int], *, proof: bool, strict: bool = False):
        if importlib.util.find_spec("kvikio") is None:
            raise NotImplementedError(
                "the gds engine needs kvikio: install jaxgds[cuda13] or [cuda12]"
            )
        self.path, self.note = "pinned", ""  # "gds" only once reads are counted
        self._ordinals, self._proof, self._strict = ordinals, proof, strict
        self._settings = cufile_config.settings()

    def read(
        self,
        plan: Callable[[], Sequence[Read]],
        buffers: Sequence["Buffer"],
        arrived: Arrived = ignore,
    ) -> None:
        start_counting()
        reads = plan()
        mine, others, why = self._share_out(reads, [ordinal_of(buffer) for buffer in buffers])
        path = "pinned"
        if any(mine.values()):
            before = counted()  # after the trial reads, which prove nothing about these
            try:
                _run(mine, self._settings, buffers, arrived)
                path, said = proven_path(*since(before, counted()))
                why += [said] if said else []
            except CuFileError as e:
                if self._strict:
                    raise
                mine, others = {}, list(reads)
                why.append(f"cuFile failed, and all was read again without it: {e}")
        if others:
            pinned = PinnedEngine()
            pinned.read(lambda: others, buffers, arrived)
            why += [pinned.note] if pinned.note else []
            path = "mixed" if any(mine.values()) else "pinned"
        self.path = path
        self.note = "; ".join(dict.fromkeys(why))

    def _share_out(
        self, reads: Sequence[Read], ordinals: Sequence[int]
    ) -> tuple[dict[int, list[Read]], list[Read], list[str]]:
        """(reads through cuFile of each GPU, the other reads, why they are)."""
        mine: dict[int, list[Read]] = defaultdict(list)
        others: list[Read] = []
        why: list[str] = []
        for read in reads:
            reason = unfit(read, ordinals)
            if reason is None and self._proof:
                assert isinstance(read.source, Extent)
                reason = unproven(read.source.file, self._ordinals[0])
            if reason is None:
                mine[next(gpus(read, ordinals))].append(read)
            else:
                others.append(read)
                why.append(reason)
        return mine, others, why


def _run(
    mine: Mapping[int, Sequence[Read]],
    settings: cufile_config.Settings,
    buffers: Sequence["Buffer"],
    arrived: Arrived,
) -> None:
    size = settings.request_bytes
    with cufile.files() as files:
        run_threads(
            [
                functools.partial(_work, ordinal, todo, size, buffers, files, arrived)
                for ordinal, todo in ((o, iter(r)) for o, r in mine.items())
                for _ in range(min(settings.threads, len(mine[ordinal])))
            ]
        )


def proven_path(direct: int, posix: int) -> tuple[str, str]:
    """(path, note) of reads by cuFile, by how many of them it counted as direct and as not."""
    if not direct:
        return "gds-compat", (
            "cuFile counted no direct read: it ran in its compatibility mode, through host memory"
        )
    if posix:
        return "mixed", (
            f"cuFile counted {direct} direct reads and {posix} in its compatibility mode"
        )
    return "gds", ""


def unfit(read: Read, ordinals: Sequence[int]) -> str | None:
    """Why a read is none for cuFile; None if it is one.

    Args:
      ordinals: of each destination, the GPU.
    """
    if read.codec != "raw":
        return f"{read.codec} data is decoded on the CPU"
    if read.source_nbytes < MIN_READ:
        return "small reads are faster without cuFile"
    if len(set(gpus(read, ordinals))) > 1:
        return "what several GPUs take parts of is read once, into host memory"
    return None


def gpus(read: Read, ordinals: Sequence[int]) -> Iterator[int]:
    return (ordinals[p.destination] for s in read.segments for p in s.pieces)


def windows(offset: int, nbytes: int, limit: int) -> Iterator[tuple[int, int]]:
    """Cuts a range of a file at multiples of `limit`: (offset, bytes) of each part."""
    stop = offset + nbytes
    while offset < stop:
        end = min(stop, (offset // limit + 1) * limit)
        yield offset, end - offset
        offset = end


def _work(
    ordinal: int,
    todo: Iterator[Read],
    request_bytes: int,
    buffers: Sequence["Buffer"],
    files: "OpenFiles[cufile.File]",
    arrived: Arrived,
    stop: threading.Event,
) -> None:
    near(ordinal)
    cuda.use(ordinal)
    staging = Staging(WINDOW)
    try:
        for read in todo:
            if stop.is_set():
                break
            with traced("read"):
                _carry_out(read, request_bytes, buffers, files, staging)
                # The copy takes a hundredth of the read's time: to overlap them gains nothing.
                cuda.call("cuStreamSynchronize", staging.stream)
            arrived(read.source_nbytes)
    finally:
        staging.close()


def _carry_out(
    read: Read,
    request_bytes: int,
    buffers: Sequence["Buffer"],
    files: "OpenFiles[cufile.File]",
    staging: Staging,
) -> None:
    source = read.source
    assert isinstance(source, Extent)
    with files.open(source.file, read.array) as file:
        _copy(read, source, request_bytes, file, buffers, staging)


def _copy(
    read: Read,
    source: Extent,
    request_bytes: int,
    file: cufile.File,
    buffers: Sequence["Buffer"],
    staging: Staging,
) -> None:
    (segment,) = read.segments
    if source.offset + source.nbytes > file.nbytes:
        raise truncated(source, read.array, source.offset + source.nbytes - file.nbytes)
    whole = direct(segment)
    if whole is None:
        start = file.stage(source.offset, source.nbytes, staging)
        copy_pieces(segment.pieces, start, buffers, staging.stream, on_device=True)
        return
    dst = buffers[whole.destination].pointer + whole.dst_offset - source.offset
    for offset, nbytes in windows(source.offset, source.nbytes, request_bytes):
        if not (offset % BLOCK or nbytes % BLOCK or (dst + offset) % BLOCK):
            file.read(offset, nbytes, dst + offset)
            continue
        cuda.call("cuStreamSynchronize", staging.stream)
        start = file.stage(offset, nbytes, staging)
        cuda.call("cuMemcpyDtoDAsync_v2", dst + offset, start, nbytes, staging.stream)


def unproven(file: str, ordinal: int) -> str | None:
    """Why it is not proven that cuFile reads the file system of `file` directly; None if it is."""
    try:
        return _unproven(os.stat(file).st_dev, ordinal, file)
    except OSError:
        return None  # whoever reads it says what is wrong


_tried: dict[tuple[int, int], str | None] = {}
_trying = threading.Lock()


def _unproven(device: int, ordinal: int, file: str) -> str | None:
    with _trying:
        if (device, ordinal) not in _tried:
            _tried[device, ordinal] = _try(file, ordinal)
        return _tried[device, ordinal]


def _try(file: str, ordinal: int) -> str | None:
    """Reads one window of `file` and looks whether cuFile counts it as a direct one."""
    folder = os.path.dirname(file)
    try:
        cuda.use(ordinal)
        start_counting()
        staging = Staging(WINDOW)
        try:
            before = counted()
            with cufile.files() as files, files.open(file, "") as opened:
                opened.read(0, min(WINDOW, opened.nbytes), staging.pointer)
        finally:
            staging.close()
    except (RuntimeError, OSError) as e:
        return f"cuFile cannot read from {folder}: {e}"
    if not since(before, counted())[0]:
        return f"cuFile reads {folder} in its compatibility mode"
    return None
