"""zstd frames that a GPU decodes: what is staged in its memory, and the kernels of zstd.cu.

Of a frame that a core decodes at a GB/s a GPU decodes all blocks at once, straight into the array.
Frames are staged in pieces, in lanes. A piece takes a millisecond whatever its size, for each
Huffman stream is one thread's work: so a launch decodes the pieces of all lanes of a group, while
the lanes of other groups are filled.

Nothing that a GPU says about a frame is final: what it finds damaged or cannot decode is left to
the CPU, which says what is wrong with it. And it is asked only if it decodes a trial frame right.
"""

import ctypes
import functools
from collections import deque
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import zstandard

from jaxgds.engines import cuda
from jaxgds.engines.files import OpenFiles
from jaxgds.engines.gpu_frames import Frame
from jaxgds.engines.parts import Parts, cut
from jaxgds.engines.pinned_memory import Pinned
from jaxgds.engines.posix import DirectFile
from jaxgds.engines.ring import Copies, Slot
from jaxgds.engines.zstd_kernels import (
    FIRST,
    LAST,
    Order,
    Status,
    kernels,
    launch,
    reason,
    workspace_nbytes,
)
from jaxgds.index import Extent
from jaxgds.plan import Read
from jaxgds.progress import Arrived


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


PIECE = 8 << 20
_AT_ONCE = PIECE // 2  # bytes of it read at once
# Of a group, and groups: with such pieces 228 MB of device memory. Three groups gave 34 GB/s and
# not 45 (10 GB in memory, an H200).
LANES, GROUPS = 5, 4
# In front of a piece the GPU puts what it could not decode of the piece before.
HEADROOM = (128 << 10) + 64

_UNREAD = "no pinned memory to read it into"
# Of the pinned memory: all of it, and where that for orders and statuses ends.
_PINNED, _TRIAL = 1 << 20, 1 << 16
_proven: set[int] = set()  # GPUs that have decoded the trial frame


@functools.cache
def _trial() -> bytes:
    """Data that takes all kernels: codes, matches, runs, and what does not become smaller."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(75_000, np.float32) * 0.02).view(np.uint16)[1::2].tobytes()
    return weights + weights[50_000:90_000] + bytes(140_000) + rng.bytes(140_000)


@dataclass(slots=True)
class _Lane:
    """Decodes one frame after the other. pointer: of its staging memory, after the headroom."""

    pointer: int
    order: Order
    status: Status
    frame: Frame | None = None
    done: int = 0  # bytes of the frame that are staged, or are being read


@dataclass(slots=True)
class _Group:
    """Lanes whose pieces are decoded together."""

    lanes: list[_Lane]
    stream: int
    copied: int  # events
    decoded: int
    workspaces: int  # in device memory
    orders: int
    host: int  # of the orders and then the statuses, in pinned memory
    parts: int = 0  # not staged yet
    full: bool = False  # no other part is to come


class Decoder:
    """Decodes frames on one GPU, which is current, with memory of its own until it is closed.

    Args:
      frames: on this GPU.

    Attributes:
      nbytes: of device memory.
      decoded: how many frames.
      left: frames that the CPU has to decode, each with the GPU's reason.

    Raises:
      CudaError: it has too little memory, or does not take the kernels.
    """

    def __init__(
        self,
        ordinal: int,
        frames: Sequence[Frame],
        copies: Copies,
        files: OpenFiles[DirectFile],
        buffers: Sequence["Buffer"],
        arrived: Arrived,
    ):
        self._ordinal, self._copies, self._files = ordinal, copies, files
        self._buffers, self._arrived = buffers, arrived
        # The largest first: one that is begun last would be waited for alone.
        self._frames = deque(sorted(frames, key=lambda frame: -frame.source.nbytes))
        self.decoded = 0
        self.left: list[tuple[Read, str]] = []
        kernels(ordinal)  # before memory is taken: the driver may refuse them
        lanes = min(LANES, -(-len(frames) // GROUPS))
        orders = -(-lanes * ctypes.sizeof(Order) // 256) * 256
        each = lanes * (workspace_nbytes() + HEADROOM + PIECE) + orders
        self.nbytes = GROUPS * each
        self._groups: list[_Group] = []
        with ExitStack() as made:
            pinned = self._pinned = Pinned(_PINNED)  # given back when nobody holds it
            pinned.lock(ordinal)
            made.callback(pinned.close)
            memory = cuda.allocate(self.nbytes)
            made.callback(cuda.free, memory)
            for i in range(GROUPS):
                at = memory + i * each
                self._groups.append(self._group(at, at + each - orders, i, lanes, pinned, made))
            if ordinal not in _proven:
                self._prove(self._groups[0], made)
                _proven.add(ordinal)
            self._made = made.pop_all()

    def _group(
        self,
        memory: int,
        orders: int,
        number: int,
        lanes: int,
        pinned: Pinned,
        made: ExitStack,
    ) -> _Group:
        """Group `number`, with device memory for its lanes and for their orders."""
        at = number * lanes * (ctypes.sizeof(Order) + ctypes.sizeof(Status))
        host_orders = (Order * lanes).from_buffer(pinned.view, at)
        statuses = (Status * lanes).from_buffer(pinned.view, at + ctypes.sizeof(host_orders))
        staging = memory + lanes * workspace_nbytes() + HEADROOM
        stream = cuda.stream()
        made.callback(cuda.call, "cuStreamDestroy_v2", stream)
        events = []
        for _ in range(2):
            events.append(cuda.event())
            made.callback(cuda.call, "cuEventDestroy_v2", events[-1])
            made.callback(cuda.wait, events[-1])
        made.callback(cuda.call, "cuStreamSynchronize", stream)
        return _Group(
            [
                _Lane(staging + i * (HEADROOM + PIECE), host_orders[i], statuses[i])
                for i in range(lanes)
            ],
            stream,
            *events,
            workspaces=memory,
            orders=orders,
            host=pinned.pointer + at,
        )

    def parts(self) -> Parts:
        """What is to be read next; None while all lanes are full."""
        while True:
            for group in self._groups:
                self._end(group)
            group = next((g for g in self._groups if not g.full and self._has_work(g)), None)
            if group is not None:
                for lane in group.lanes:
                    if lane.frame is None and self._frames:
                        lane.frame, lane.done = self._frames.popleft(), 0
                    lane.order.nbytes = lane.order.flags = 0
                    if lane.frame is not None:
                        yield from self._piece(group, lane, lane.frame)
                group.full = True
                self._launch_if_staged(group)
                self._groups.append(self._groups.pop(self._groups.index(group)))  # in turns
            elif any(g.full for g in self._groups):
                yield None
            else:
                return

    def _has_work(self, group: _Group) -> bool:
        return bool(self._frames) or any(lane.frame is not None for lane in group.lanes)

    def _piece(self, group: _Group, lane: _Lane, frame: Frame) -> Parts:
        source, order = frame.source, lane.order
        nbytes = min(PIECE, source.nbytes - lane.done)
        order.piece, order.nbytes = lane.pointer, nbytes
        order.flags = FIRST * (not lane.done) + LAST * (lane.done + nbytes == source.nbytes)
        group.parts += -(-nbytes // _AT_ONCE)
        part = Extent(source.file, source.offset + lane.done, nbytes)
        lane.done += nbytes

        def staged(at_piece: int, nbytes: int, slot: Slot, at: int) -> None:
            self._copies.copy(slot, at, lane.pointer + at_piece, nbytes, self._ordinal)
            group.parts -= 1
            self._launch_if_staged(group)

        yield from cut(frame.read, part, _AT_ONCE, self._files, staged)

    def _launch_if_staged(self, group: _Group) -> None:
        if group.parts or not group.full:
            return
        for lane in group.lanes:
            if lane.frame is not None and lane.order.flags & FIRST:
                # Asked for as late as possible: it may still be being allocated.
                lane.order.out = self._buffers[lane.frame.destination].pointer + lane.frame.offset
                lane.order.capacity = lane.frame.nbytes
        self._launch(group)
        cuda.submit("cuEventRecord", group.decoded, group.stream)

    def _launch(self, group: _Group) -> None:
        """Queues what the group's orders say, and the statuses' way to the host."""
        count, stream = len(group.lanes), group.stream
        nbytes = count * ctypes.sizeof(Order)
        # Behind what it is about, for a copy of another stream would wait for its turn on the bus.
        copying = self._copies.stream(self._ordinal)
        cuda.submit("cuMemcpyHtoDAsync_v2", group.orders, group.host, nbytes, copying)
        cuda.submit("cuEventRecord", group.copied, copying)
        cuda.submit("cuStreamWaitEvent", stream, group.copied, 0)
        launch(self._ordinal, count, stream, group.workspaces, group.orders)
        statuses, each = group.host + nbytes, ctypes.sizeof(Status)
        cuda.copy_rows_to_host(group.workspaces, workspace_nbytes(), statuses, each, count, stream)

    def _prove(self, group: _Group, made: ExitStack) -> None:
        """Raises CudaError if this GPU does not decode a frame to what it was made of."""
        data = _trial()
        encoded = zstandard.ZstdCompressor(level=1).compress(data)
        view, host = self._pinned.view, self._pinned.pointer
        memory = cuda.allocate(HEADROOM + 2 * len(data))
        made.callback(cuda.free, memory)
        made.callback(cuda.call, "cuStreamSynchronize", group.stream)
        piece, out = memory + HEADROOM, memory + HEADROOM + len(data)
        view[_TRIAL : _TRIAL + len(encoded)] = encoded
        nbytes = len(encoded)
        copying = self._copies.stream(self._ordinal)
        cuda.submit("cuMemcpyHtoDAsync_v2", piece, host + _TRIAL, nbytes, copying)
        order, status = group.lanes[0].order, group.lanes[0].status
        order.piece, order.nbytes, order.out, order.capacity = piece, nbytes, out, len(data)
        order.flags = FIRST | LAST
        self._launch(group)
        cuda.copy_rows_to_host(out, len(data), host + _TRIAL, len(data), 1, group.stream)
        cuda.call("cuStreamSynchronize", group.stream)
        if status.error or not status.finished or view[_TRIAL : _TRIAL + len(data)] != data:
            why = f"status {status.error}"
            raise cuda.CudaError(f"a trial frame was not decoded to what it was made of ({why})")

    def _end(self, group: _Group) -> None:
        """Looks what became of the pieces of a group that is decoded."""
        if not group.full or group.parts:
            return
        if not (cuda.done(group.copied) and cuda.done(group.decoded)):
            return
        group.full = False
        for lane in group.lanes:
            if lane.frame is None:
                continue
            status = lane.status
            whole = (status.finished, status.produced, status.consumed) == (
                1,
                lane.frame.nbytes,
                lane.frame.source.nbytes,
            )
            last = lane.order.flags & LAST
            if status.error or status.has_checksum or (last and not whole):
                self.left.append((lane.frame.read, reason(status)))
                lane.frame = None
            elif last:
                self._arrived(lane.frame.nbytes)
                self.decoded += 1
                lane.frame = None

    def rest(self) -> None:
        """Leaves all that is not decoded to the CPU."""
        for group in self._groups:
            for lane in group.lanes:
                if lane.frame is not None:
                    self.left.append((lane.frame.read, _UNREAD))
                    lane.frame = None
        self.left += [(frame.read, _UNREAD) for frame in self._frames]

    def close(self) -> None:
        """Returns when the GPU has done what was launched, and gives all memory back."""
        with cuda.current(self._ordinal):
            self._made.close()
