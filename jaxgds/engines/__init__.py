"""The only I/O of this package: fill buffers with the bytes that a plan names."""

import os
from collections.abc import Callable, Sequence
from typing import Protocol

import jax

from jaxgds.engines import gds as gds
from jaxgds.engines.host import HostEngine as HostEngine
from jaxgds.engines.pinned import PinnedEngine as PinnedEngine
from jaxgds.plan import Read
from jaxgds.progress import Arrived, ignore


ENGINES = ("gds", "pinned", "host")


class Buffer:
    """Memory that XLA owns and nobody else reads or writes until the reads are done.

    It lives as long as its Buffer, which a thread that hangs in a read may hold for long.

    Args:
      pointer: a function that waits until it is allocated, returns its address, and keeps it
        alive; or the address of memory that is never freed.
      nbytes: its size.
      device: the device it is on.
    """

    __slots__ = ("_owner", "_pointer", "device", "nbytes")

    def __init__(self, pointer: int | Callable[[], int], nbytes: int, device: jax.Device):
        self._pointer, self.nbytes, self.device = pointer, nbytes, device
        self._owner = pointer

    @property
    def pointer(self) -> int:
        pointer = self._pointer
        if not isinstance(pointer, int):
            pointer = self._pointer = pointer()
        return pointer


class Engine(Protocol):
    """Fills the buffers of a plan's destinations.

    Attributes:
      path: what the report calls it, once it has read: "gds", "gds-compat", "pinned" or "host";
        "mixed" if gds left some reads to pinned, or cuFile some to its compatibility mode.
      note: for the report: what else there is to know about the path; may be "".
      max_read: bytes of a raw read, which is one thread's work.
    """

    path: str
    note: str
    max_read: int

    def read(
        self,
        plan: Callable[[], Sequence[Read]],
        buffers: Sequence[Buffer],
        arrived: Arrived = ignore,
    ) -> None:
        """Fills the buffers.

        Returns, or raises, only when nothing touches them any more.

        Args:
          plan: makes the reads; called once, on the calling thread, while the engine's own threads
            get ready.
          buffers: of each destination the memory.
          arrived: is called, by any thread, with each number of bytes that was read.

        Raises:
          CheckpointError: a file is shorter than the metadata says, or does not decode.
        """
        ...


def engine_for(
    devices: set[jax.Device], force: str | None = None, *, strict: bool = False
) -> Engine:
    """The engine for arrays on `devices`.

    Args:
      force: "gds", "pinned" or "host"; None asks the environment variable JAXGDS_ENGINE, and
        else picks: on GPUs "gds" where it is proven to work, otherwise "pinned".
      strict: if "gds" fails, "pinned" must not take its place. cuFile's compatibility mode is no
        failure where its configuration allows it; "allow_compat_mode": false there forbids it.

    Raises:
      ValueError: there is no engine of that name.
      NotImplementedError: there is none for the devices' platform, or not the forced one.
    """
    name = force or os.environ.get("JAXGDS_ENGINE") or None
    if name not in (None, *ENGINES):
        raise ValueError(f"no engine {name!r}; there are {', '.join(ENGINES)}")
    platforms = {device.platform for device in devices}
    if platforms == {"cpu"} and name in (None, "host"):
        return HostEngine()
    if platforms == {"gpu"} and name != "host":
        ordinals = sorted(device.local_hardware_id for device in devices)
        if name == "gds" or (name is None and gds.missing() is None):
            return gds.GdsEngine(ordinals, proof=name is None, strict=strict)
        return PinnedEngine()
    forced = f"no engine {name!r}" if name else "no engine"
    raise NotImplementedError(f"{forced} for {'+'.join(sorted(platforms))} devices")
