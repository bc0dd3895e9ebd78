"""What a user can see while a restore runs: a line on the terminal, and marks in a profile."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import jax


type Arrived = Callable[[int], object]


@contextmanager
def shown(nbytes: int, what: str = "restore", after: float = 1) -> Iterator[Arrived]:
    """A function to call with each number of bytes that has arrived, of `nbytes` in all.

    After `after` seconds a line shows how many these are, GB/s and the time left: on a terminal,
    unless the environment variable JAXGDS_PROGRESS is 0.
    """
    if not sys.stderr.isatty() or os.environ.get("JAXGDS_PROGRESS") == "0":
        yield ignore
        return
    from tqdm import tqdm  # not worth its import where nobody looks

    class Bar(tqdm):
        monitor_interval = 0  # no thread that stays

    with Bar(desc=what, total=nbytes, unit="B", unit_scale=True, delay=after, leave=False) as bar:
        yield bar.update


def ignore(nbytes: int) -> None:
    """For who shows nothing."""


def traced(what: str) -> jax.profiler.TraceAnnotation:
    """A context manager that marks its block in a profile of `jax.profiler` as "jaxgds <what>"."""
    return jax.profiler.TraceAnnotation(f"jaxgds {what}")
