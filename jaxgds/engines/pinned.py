"""GPUs without GPUDirect Storage: files -> pinned ring -> asynchronous copies to the device."""

import functools
import io
import itertools
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING

from jaxgds.engines import cuda
from jaxgds.engines.copier import Copier
from jaxgds.engines.device_zstd import Decoder
from jaxgds.engines.files import OpenFiles, make_room
from jaxgds.engines.gpu_frames import Frame, for_gpus
from jaxgds.engines.host import direct, fill, opened, plain_files
from jaxgds.engines.numa import by_node, near
from jaxgds.engines.parts import Parts, in_turns, merged, raw_parts, scatter
from jaxgds.engines.posix import DirectFile, direct_files
from jaxgds.engines.ring import COPIERS_PER_GPU, PINNERS, Copies, Lane, Ring, Slot
from jaxgds.index import Extent
from jaxgds.plan import Read
from jaxgds.progress import Arrived, ignore, traced
from jaxgds.scatter import MAX_STAGED
from jaxgds.workers import Target, run_threads


if TYPE_CHECKING:
    from jaxgds.engines import Buffer


class PinnedEngine:
    """Reads onto GPUs through the process's pinned ring.

    Args:
      ring: None takes the ring that all restores of this process share.

    Raises:
      NotImplementedError: there is no NVIDIA driver here.
    """

    path = "pinned"
    max_read = 1 << 30  # its one thread cuts them itself: fewer reads are planned sooner

    def __init__(self, ring: Ring | None = None):
        cuda.driver()
        self.note = ""
        self._ring = ring or _process_ring()

    def read(
        self,
        plan: Callable[[], Sequence[Read]],
        buffers: Sequence["Buffer"],
        arrived: Arrived = ignore,
    ) -> None:
        with self._ring.busy, plain_files() as plain, direct_files() as files:
            self.note = _Restore(self._ring, buffers, plain, files, arrived).run(plan)


@functools.cache
def _process_ring() -> Ring:
    return Ring()


class _Restore:
    """One call of `read`.

    What is raw is one thread's work for all GPUs on a NUMA node: several would wait for each other,
    to have the interpreter. Each lane has one for what is compressed. A lane's slots are the
    copier's once the lane is pinned and has nothing to decode.
    """

    def __init__(
        self,
        ring: Ring,
        buffers: Sequence["Buffer"],
        plain: OpenFiles[io.FileIO],
        files: OpenFiles[DirectFile],
        arrived: Arrived,
    ):
        self._ring, self._buffers, self._arrived = ring, buffers, arrived
        self._plain, self._files = plain, files
        self._ordinals = [ordinal_of(buffer) for buffer in buffers]
        self._gpus = sorted(set(self._ordinals))
        # Held for as long as one of the threads may write into them.
        self._lanes = ring.lanes(self._gpus)
        self._copying = self._lanes[: COPIERS_PER_GPU * len(self._gpus)]
        self._raw: dict[int, Iterator[Read]] = {}
        self._decoded: dict[int, Iterator[Read]] = {}
        self._frames: dict[int, list[Frame]] = {}  # for the GPU itself to decode
        self._left: list[tuple[Read, str]] = []  # by the GPU, to the CPU
        self._decoders: list[Decoder] = []  # that are done
        self._planned = threading.Event()
        self._decoding: set[Lane] = set()
        self._unpinned: dict[Lane, Exception] = {}
        self._slow: OSError | None = None

    def run(self, plan: Callable[[], Sequence[Read]]) -> str:
        """Returns what to note."""

        def share_out() -> list[Target]:
            try:
                reads = plan()
                encoded = [r for r in reads if not is_raw(r)]
                self._frames, decoded = for_gpus(encoded, self._ordinals)
                inline = all(read.codec == "raw" for read in decoded)
                # Some are for what GPUs decode, from the beginning on.
                kept = min(4 * len(self._gpus), len(self._lanes) // 2) if self._frames else 0
                lanes = self._lanes[kept:][: min(len(decoded), PINNERS if inline else 1 << 30)]
                self._raw = by_device([r for r in reads if is_raw(r)], self._ordinals)
                self._decoded = by_device(decoded, self._ordinals)
                self._decoding.update(lane for lane, _ in lanes)
            finally:
                self._planned.set()
            return [functools.partial(self._decode_all, *one) for one in lanes]

        # The first restore of a process pins its lanes while XLA compiles what allocates, and for
        # that the first copy waits. Until then one thread pins, for whoever maps memory waits for
        # those that fill it: beside four threads the compilation took 37 ms instead of 12.
        new = [(lane, home) for lane, home in self._copying if not lane.slots]
        with suppress(OSError):  # whoever pins finds it again, and notes it
            for lane, _ in new:
                lane.reserve()
        todo = iter(new)
        targets: list[Target] = [
            functools.partial(self._pin, todo, i == 0) for i in range(min(PINNERS, len(new)))
        ]
        if new:
            targets.append(make_room)
        targets += [functools.partial(self._copy, gpus) for gpus in by_node(self._gpus)]
        run_threads(targets, meanwhile=share_out, left_behind=self._ring.abandon)
        notes = []
        if decoded := sum(decoder.decoded for decoder in self._decoders):
            most = max(decoder.nbytes for decoder in self._decoders) / 1e6
            notes.append(
                f"{decoded} zstd frames decoded on GPUs, with {most:.0f} MB of memory each"
            )
        if self._left:
            left = [*itertools.chain(*self._decoded.values()), *(read for read, _ in self._left)]
            self._decoded = by_device(left, self._ordinals)
            notes.append(f"{len(self._left)} zstd frames left to the CPU: {self._left[0][1]}")
        if self._left or self._unpinned:
            notes.append(self._carry_on())
        if self._slow is not None:
            notes.append(f"some reads were waited for one by one: {self._slow}")
        return "; ".join(filter(None, notes))

    def _carry_on(self) -> str:
        """Carries out what GPUs and lanes that cannot be pinned have left; returns what to note."""
        decoding = self._lanes
        if self._unpinned:
            decoding = self._copying = [(lane, home) for lane, home in decoding if lane.slots]
        again = [functools.partial(self._decode_all, *one) for one in decoding]
        run_threads(again, left_behind=self._ring.abandon)
        if not self._unpinned:
            return ""
        again = [functools.partial(self._copy, gpus) for gpus in by_node(self._gpus)]
        run_threads(again, left_behind=self._ring.abandon)
        why = next(iter(self._unpinned.values()))
        unread = itertools.chain(*self._raw.values(), *self._decoded.values())
        if next(unread, None) is not None:
            raise MemoryError(f"no host memory can be pinned: {why}")
        left, lost = len(self._copying), sum(not lane.slots for lane in self._unpinned)
        if not lost:  # another thread had more luck
            return ""
        return f"{left} of {left + lost} pinned buffers: no more memory to pin: {why}"

    def _pin(self, lanes: Iterator[tuple[Lane, int]], at_once: bool, stop: threading.Event) -> None:
        if not at_once:
            _ = self._buffers[0].pointer  # waits until it is allocated
        for lane, home in lanes:
            if stop.is_set():
                break
            near(home)
            self._opened(lane, home)

    def _opened(self, lane: Lane, home: int) -> bool:
        """Whether a lane can be used; if not, the others do its work."""
        try:
            lane.open(home)
        except (cuda.CudaError, OSError) as e:
            self._unpinned[lane] = e
        return bool(lane.slots)

    def _decode_all(self, lane: Lane, home: int, stop: threading.Event) -> None:
        """Carries out reads of compressed data, for GPU `home` first."""
        near(home)
        copies = Copies(self._ring.streams, home)
        try:
            if not self._opened(lane, home):
                return
            for read in _todo(self._decoded, home):
                if stop.is_set():
                    break
                self._decode(read, lane, copies)
        finally:
            lane.drain()
            self._decoding.discard(lane)

    def _wait(self, stop: threading.Event) -> None:
        """Returns when the plan is made; it is empty if that failed."""
        while not (self._planned.wait(0.1) or stop.is_set()):
            pass

    def _copy(self, gpus: Sequence[int], stop: threading.Event) -> None:
        """Carries out raw reads for some GPUs, and then of others that no thread has begun."""
        near(gpus[0])
        copies = Copies(self._ring.streams, gpus[0])
        self._wait(stop)
        if not (self._raw or self._frames):
            return
        waiting = [lane for lane, home in self._copying if home in gpus]

        def more() -> list[Slot] | None:
            if not waiting:
                return None
            slots = []
            for lane in [lane for lane in waiting if lane not in self._decoding]:
                if lane.slots or lane in self._unpinned:
                    waiting.remove(lane)
                    slots += lane.slots
            return slots

        def raw(reads: Iterable[Read]) -> Parts:
            to = self._files, self._buffers, self._ordinals, self._arrived
            return raw_parts(reads, copies, *to)

        with ExitStack() as closed:
            decoders, own = [], []
            for gpu in gpus:
                parts = raw(self._raw.get(gpu, ()))
                if decoder := self._decoder(gpu, copies):
                    closed.callback(decoder.close)
                    decoders.append(decoder)
                    parts = merged(decoder.parts(), parts)
                own.append(parts)
            parts = own[0] if len(own) == 1 else in_turns(own)
            if others := [reads for gpu, reads in self._raw.items() if gpu not in gpus]:
                parts = merged(parts, raw(itertools.chain.from_iterable(others)))
            copier = Copier(self._files, copies, more, len(gpus))
            copier.run(parts, stop)
            for decoder in decoders:
                decoder.rest()
                self._left += decoder.left
            self._decoders += decoders
        self._slow = copier.slow or self._slow

    def _decoder(self, gpu: int, copies: Copies) -> Decoder | None:
        """For the frames that a GPU is to decode, if it can."""
        frames = self._frames.pop(gpu, None)
        if not frames:
            return None
        try:
            copies.stream(gpu)  # it is current now
            return Decoder(gpu, frames, copies, self._files, self._buffers, self._arrived)
        except (cuda.CudaError, OSError) as e:
            self._left += [(frame.read, str(e)) for frame in frames]
            return None

    def _decode(self, read: Read, lane: Lane, copies: Copies) -> None:
        """What is compressed, or held inline by the metadata."""
        with opened(read, self._plain) as decoded:
            for segment in read.segments:
                whole = direct(segment)
                if whole is None:
                    slot = lane.slot()
                    with traced("read"):
                        fill(decoded, slot.view[: segment.nbytes], read)
                    scatter(segment, slot, 0, copies, self._buffers, self._ordinals)
                    self._arrived(segment.nbytes)
                    continue
                ordinal = self._ordinals[whole.destination]
                for done in range(0, segment.nbytes, MAX_STAGED):
                    nbytes = min(MAX_STAGED, segment.nbytes - done)
                    slot = lane.slot()
                    with traced("read"):
                        fill(decoded, slot.view[:nbytes], read)
                    dst = self._buffers[whole.destination].pointer + whole.dst_offset
                    with traced("copy"):
                        copies.copy(slot, 0, dst + done, nbytes, ordinal)
                    self._arrived(nbytes)


def _todo(work: dict[int, Iterator[Read]], home: int) -> Iterator[Read]:
    """The reads for GPU `home`, then what the other GPUs' threads have not begun."""
    yield from work.get(home, ())
    for ordinal, reads in work.items():
        if ordinal != home:
            yield from reads


def ordinal_of(buffer: "Buffer") -> int:
    """The driver's number of the GPU that holds `buffer`."""
    ordinal = buffer.device.local_hardware_id
    assert ordinal is not None
    return ordinal


def is_raw(read: Read) -> bool:
    """Whether a read takes bytes of a file as they are."""
    return read.codec == "raw" and isinstance(read.source, Extent)


def by_device(reads: Sequence[Read], ordinals: Sequence[int]) -> dict[int, Iterator[Read]]:
    """The reads of each GPU; what several threads may draw from at once.

    Compressed reads come first, the largest before the others: one frame is one
    thread's work, and a large one that is begun last would be waited for alone.

    Args:
      ordinals: of each destination, the GPU.
    """
    work: dict[int, list[Read]] = defaultdict(list)
    for read in reads:
        first = next((p for s in read.segments for p in s.pieces), None)
        if first is not None:
            work[ordinals[first.destination]].append(read)
    for group in work.values():
        group.sort(key=lambda r: -r.source_nbytes if r.codec != "raw" else 0)
    return {ordinal: iter(group) for ordinal, group in work.items()}
