"""Which zstd frames GPUs are to decode (device_zstd.py), and which are left to the CPU."""

import os
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

from jaxgds.engines.host import direct
from jaxgds.index import Extent
from jaxgds.plan import Read


# Smaller frames are decoded sooner by a core; and so are those that became much smaller, which are
# made of matches, one after the other, where a GPU has nothing to do at once.
MIN_BYTES, MIN_RATIO = 1 << 20, 0.6
MIN_TOTAL = 128 << 20  # decoded: the cores have less than that done before a GPU begins


class Frame(NamedTuple):
    """A frame that becomes `nbytes` bytes in a row of one destination, from `offset` on."""

    read: Read
    source: Extent
    destination: int
    offset: int
    nbytes: int


def frame(read: Read) -> Frame | None:
    """What a GPU may decode of `read`; None if that is for the CPU."""
    source = read.source
    if read.codec != "zstd" or not isinstance(source, Extent):
        return None
    pieces = [direct(segment) for segment in read.segments]
    if not pieces or pieces[0] is None:
        return None
    destination, offset, nbytes = pieces[0].destination, pieces[0].dst_offset, 0
    for piece in pieces:
        if piece is None or (piece.destination, piece.dst_offset) != (destination, offset + nbytes):
            return None
        nbytes += piece.nbytes
    if source.nbytes < max(MIN_BYTES, MIN_RATIO * nbytes):
        return None
    return Frame(read, source, destination, offset, nbytes)


def for_gpus(
    reads: Sequence[Read], ordinals: Sequence[int]
) -> tuple[dict[int, list[Frame]], list[Read]]:
    """By GPU the frames that it is to decode, and the reads that are left.

    JAXGDS_ZSTD=cpu leaves all, and gpu none that a GPU may decode, however little it is.

    Args:
      ordinals: of each destination, the GPU.

    Raises:
      ValueError: the environment variable is something else.
    """
    who = os.environ.get("JAXGDS_ZSTD") or "auto"
    if who not in ("auto", "cpu", "gpu"):
        raise ValueError(f"JAXGDS_ZSTD={who!r}: expected auto, cpu or gpu")
    frames: dict[int, list[Frame]] = defaultdict(list)
    left = []
    for read in reads:
        found = frame(read) if who != "cpu" else None
        if found is None:
            left.append(read)
        else:
            frames[ordinals[found.destination]].append(found)
    if who == "auto":
        for ordinal, some in list(frames.items()):
            if sum(one.nbytes for one in some) < MIN_TOTAL:
                left += [one.read for one in frames.pop(ordinal)]
    return frames, left
