"""XLA-owned memory for what is read.

The buffers are written behind XLA's back, which it does not forbid but does not
promise to support: so they are fresh, unaliased and ready before the first
write, nothing reads them until the last write is done, and all of it happens here
and in the engines.
"""

import functools
import itertools
import math
import mmap
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental.buffer_callback import buffer_callback
from jax.sharding import Mesh, PartitionSpec, SingleDeviceSharding

from jaxgds.allocation_calls import Call, Spec, calls
from jaxgds.engines import Buffer
from jaxgds.engines.pages import advise
from jaxgds.scatter import Destination


class Allocation:
    """Uninitialised memory for each destination, on the first of its devices.

    Compiling the programs that allocate takes longer than many a read, so it happens in the
    background, from `start` on: `buffers` are there at once, each one's `pointer` when its memory
    is.

    Attributes:
      buffers: one per destination.
      order: per destination, the number of the program call that allocates it.
    """

    def __init__(self, destinations: Sequence[Destination], dtypes: Sequence[np.dtype]):
        specs = [(d.shape, t) for d, t in zip(destinations, dtypes, strict=True)]
        self._calls = calls(specs, [d.devices[0] for d in destinations])
        self._x64 = bool(jax.config.jax_enable_x64)  # a thread's own setting, perhaps
        self.order = [0] * len(destinations)
        slots: list[Callable[[], int]] = [int] * len(destinations)
        self._done: list[Future[dict[int, jax.Array]]] = []
        for number, call in enumerate(self._calls):
            done: Future[dict[int, jax.Array]] = Future()
            self._done.append(done)
            for i in itertools.chain.from_iterable(batch for _, batch in call):
                self.order[i] = number
                slots[i] = functools.partial(_pointer, done, i)
        self.buffers = [
            Buffer(slots[i], math.prod(d.shape) * t.itemsize, d.devices[0])
            for i, (d, t) in enumerate(zip(destinations, dtypes, strict=True))
        ]
        self._lowered = threading.Event()
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begins to allocate; returns when the first program is lowered.

        For that is Python, which whatever else the caller did would slow down several times.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="jaxgds-allocate")
            self._thread.start()
            self._lowered.wait()

    def wait(self) -> None:
        """Returns when nothing is being allocated."""
        if self._thread is not None:
            self._thread.join()

    def drop(self) -> None:
        """Lets go of the memory, which a kept traceback would hold on to by this object.

        Threads that were left behind have the buffers that they write into.
        """
        self.wait()
        self.buffers, self._done = [], []

    def arrays(self) -> list[jax.Array]:
        """One single-device array per destination; waits until all are allocated."""
        self.start()
        self.wait()
        made: dict[int, jax.Array] = {}
        for done in self._done:
            made |= done.result()
        pointers = {b.pointer for b in self.buffers if b.nbytes}
        if len(pointers) != sum(b.nbytes > 0 for b in self.buffers):
            raise RuntimeError("XLA returned one buffer for two arrays; please report this")
        return [made[i] for i in range(len(self.buffers))]

    def _run(self) -> None:
        try:
            with own_settings(self._x64):
                for call, done in zip(self._calls, self._done, strict=True):
                    done.set_result(self._allocate(call))
        except BaseException as e:
            for done in self._done:
                if not done.done():
                    done.set_exception(e)
        finally:
            self._lowered.set()

    def _allocate(self, call: Call) -> dict[int, jax.Array]:
        (devices,) = {tuple(self.buffers[i].device for i in batch) for _, batch in call}
        # A mesh needs an axis to shard; scalars are not worth a program.
        sized = tuple((shape, dtype) for (shape, dtype), _ in call if shape)
        program = _program(sized, devices, self._x64) if sized else None
        self._lowered.set()
        results = iter(program.compiled() if program else ())
        arrays: dict[int, jax.Array] = {}
        for (shape, dtype), batch in call:
            shards = _shards(next(results), devices) if shape else _scalars(dtype, devices)
            arrays.update(zip(batch, shards, strict=True))
        jax.block_until_ready(list(arrays.values()))
        for i, array in arrays.items():
            if self.buffers[i].device.platform == "cpu":
                _huge_pages(array.unsafe_buffer_pointer(), self.buffers[i].nbytes)
        return arrays


@contextmanager
def own_settings(x64: bool) -> Iterator[None]:
    """For a thread of a restore: the caller's x64, and no checks.

    Its programs give out memory not written yet, which may look like NaN, or cast NaN.
    """
    with (
        jax.enable_x64(x64),
        jax.debug_nans(False),
        jax.debug_infs(False),
        jax.disable_jit(False),
    ):
        yield


def _pointer(done: "Future[dict[int, jax.Array]]", i: int) -> int:
    return done.result()[i].unsafe_buffer_pointer()


class Program:
    """An `empty_program`, lowered at once and compiled when it is first wanted."""

    def __init__(self, specs: tuple[Spec, ...], devices: tuple[jax.Device, ...]):
        self._lowered = empty_program(specs, devices).lower()

    @functools.cached_property
    def compiled(self) -> jax.stages.Compiled:
        # There is nothing to schedule: the scheduler's model of the GPU takes a third of the time.
        with suppress(jax.errors.JaxRuntimeError):  # no such option
            return self._lowered.compile({"xla_gpu_enable_latency_hiding_scheduler": False})
        return self._lowered.compile()


@functools.lru_cache(maxsize=512)
def _program(
    specs: tuple[Spec, ...], devices: tuple[jax.Device, ...], x64: bool
) -> Program:  # x64: JAX's setting, on which it depends what it gives for 64-bit dtypes
    return Program(specs, devices)


def empty_program(specs: tuple[Spec, ...], devices: tuple[jax.Device, ...]) -> jax.stages.Wrapped:
    """A jitted function: per spec, an array of which each device has one uninitialised shard.

    On CPU `lax.empty` is a fill with zeros, so there the output of a callback that does nothing is
    used. XLA would merge two `lax.empty` of one shape: they differ in trailing axes of size 1.
    """

    def fill() -> list[jax.Array]:
        seen: Counter[Spec] = Counter()
        made = []
        for shape, dtype in specs:
            seen[shape, dtype] += 1
            ones = (1,) * (seen[shape, dtype] - 1)
            made.append(lax.empty((*shape, *ones), jnp.dtype(dtype)).reshape(shape))
        return made

    if devices[0].platform == "cpu":
        shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in specs]
        fill = buffer_callback(lambda ctx, out: None, shapes, has_side_effect=True)
    if len(devices) == 1:  # lowered in half the time
        return jax.jit(fill, out_shardings=SingleDeviceSharding(devices[0]))
    mesh = Mesh(np.array(devices), ("device",))
    spec = PartitionSpec("device")
    return jax.jit(jax.shard_map(fill, mesh=mesh, in_specs=(), out_specs=spec, check_vma=False))


def _shards(array: jax.Array, devices: Sequence[jax.Device]) -> list[jax.Array]:
    return [array.addressable_data(i) for i in range(len(devices))]


def _scalars(dtype: np.dtype, devices: Sequence[jax.Device]) -> list[jax.Array]:
    return [jax.device_put(np.zeros((), dtype), d, may_alias=False) for d in devices]


def _huge_pages(pointer: int, nbytes: int) -> None:
    """Asks for huge pages, which make the first touch of a large buffer several times cheaper."""
    page = mmap.PAGESIZE
    start = -(-pointer // page) * page
    size = (pointer + nbytes) // page * page - start
    if size >= 2 << 20:
        advise(start, size, mmap.MADV_HUGEPAGE)
