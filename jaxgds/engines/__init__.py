"""The only I/O of this package: fill buffers with the bytes that a plan names."""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import jax

from jaxgds.engines.host import HostEngine as HostEngine
from jaxgds.plan import Read


@dataclasses.dataclass(frozen=True, slots=True)
class Buffer:
    """Memory that XLA owns and nobody else reads or writes until the reads are done."""

    pointer: int
    nbytes: int
    device: jax.Device


class Engine(Protocol):
    """Fills the buffers of a plan's destinations.

    Attributes:
      path: what the report calls it: "gds", "pinned" or "host".
    """

    path: str

    def read(self, reads: Sequence[Read], buffers: Sequence[Buffer]) -> None:
        """Carries out `reads`; `buffers[i]` is the memory of destination i.

        Returns, or raises, only when nothing touches the buffers any more.

        Raises:
          CheckpointError: a file is shorter than the metadata says, or does not decode.
        """
        ...


def engine_for(devices: set[jax.Device]) -> Engine:
    """The engine for arrays on `devices`.

    Raises:
      NotImplementedError: there is none for their platform.
    """
    platforms = {device.platform for device in devices}
    if platforms == {"cpu"}:
        return HostEngine()
    raise NotImplementedError(f"no engine for {'+'.join(sorted(platforms))} devices")
