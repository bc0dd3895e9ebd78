"""The threads that read: stopped by the first failure or by Ctrl-C, and not waited for forever.

A system call that hangs, as on a network file system whose server is gone, cannot be ended from
here. So its thread, or the one that waits for it, is left behind: what may still be written into is
kept alive by that thread's references (see `Buffer`), and used for nothing else.
"""

import os
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

from jaxgds.interpreter import quick_switches


DEFAULT_TIMEOUT = 300.0  # seconds
MAX_TIMEOUT = 1e6
INTERRUPTED = 0.5  # seconds that Ctrl-C waits for threads

type Target = Callable[[threading.Event], None]


class _Stopped(Exception):
    """In a thread that was told to stop."""


class _Own(threading.local):
    stop: threading.Event | None = None


_own = _Own()
_reads: dict[int, tuple[float, str, str]] = {}  # thread -> since when it reads which file and array


def check_stop() -> None:
    """Ends a thread of `run_threads` that was told to stop."""
    if _own.stop is not None and _own.stop.is_set():
        raise _Stopped


class reading:
    """Around a system call on a file: says what a thread waits for, ends one told to stop.

    Thousands of reads a second pass through it, over threads that share one interpreter lock.
    """

    __slots__ = ("_what",)

    def __init__(self, file: str, array: str = ""):
        self._what = file, array

    def __enter__(self) -> None:
        check_stop()
        waits(time.monotonic(), *self._what)

    def __exit__(self, *_: object) -> None:
        waits_no_more()


def waits(since: float, file: str, array: str) -> None:
    """The calling thread waits for a read of `file` that began at `since`, of time.monotonic."""
    _reads[threading.get_ident()] = since, file, array


def waits_no_more() -> None:
    _reads.pop(threading.get_ident(), None)


def read_timeout() -> float:
    """Seconds after which a single read is given up: JAXGDS_READ_TIMEOUT; 0 means never.

    Raises:
      ValueError: the environment variable is no such number.
    """
    text = os.environ.get("JAXGDS_READ_TIMEOUT") or str(DEFAULT_TIMEOUT)
    try:
        seconds = float(text)
    except ValueError:
        seconds = -1.0
    if not 0 <= seconds <= MAX_TIMEOUT:
        raise ValueError(f"JAXGDS_READ_TIMEOUT={text!r}: expected seconds, 0 for no limit")
    return seconds


class _Started(NamedTuple):
    """A thread, and whether its target has ended.

    Before Python 3.13 a `join` that Ctrl-C interrupts takes a thread that runs for one that ended.
    """

    thread: threading.Thread
    ended: threading.Event


def run_threads(
    targets: Sequence[Target],
    meanwhile: Callable[[], Sequence[Target]] = tuple,
    left_behind: Callable[[], None] = lambda: None,
) -> None:
    """Runs each target on a thread; on the first failure tells all to stop, joins, and raises it.

    Args:
      targets: each takes the event that tells it to stop.
      meanwhile: runs on the calling thread, and returns targets to run too.
      left_behind: is called if an error is raised while threads still hang in a read.

    Raises:
      TimeoutError: all threads that still run have waited too long for a read.
    """
    timeout = read_timeout()
    begin, stop = threading.Event(), threading.Event()
    failed: list[BaseException] = []

    def run(target: Target, ended: threading.Event) -> None:
        begin.wait()
        _own.stop = stop
        try:
            if not stop.is_set():
                target(stop)
        except _Stopped:
            pass
        except BaseException as e:
            failed.append(e)
            stop.set()
        finally:
            ended.set()

    started: list[_Started] = []

    def start(targets: Sequence[Target]) -> None:
        for target in targets:
            # Daemons, for one that hangs must not keep the process from ending.
            ended = threading.Event()
            thread = threading.Thread(target=run, args=(target, ended), name="jaxgds", daemon=True)
            started.append(_Started(thread, ended))  # first, for Ctrl-C may come in start()
            try:
                thread.start()
            except Exception:
                ended.set()
                raise

    try:
        with quick_switches:
            start(targets)
            begin.set()  # not earlier: the kernel makes no thread while another one pins memory
            start(meanwhile())
            _join(started, stop, timeout)
    except BaseException as e:
        stop.set()
        begin.set()
        try:
            if isinstance(e, Exception):
                _join(started, stop, timeout)
            else:  # Ctrl-C
                end = time.monotonic() + INTERRUPTED
                for thread in started:
                    thread.ended.wait(max(0, end - time.monotonic()))
        finally:
            if not all(thread.ended.is_set() for thread in started):
                left_behind()
        raise
    if failed:
        raise failed[0]


def watched[T](work: Callable[[], T]) -> T:
    """What `work` returns, on a thread of its own, so that a read that hangs is given up."""
    result: list[T] = []
    run_threads([lambda stop: result.append(work())])
    return result[0]


def _join(threads: Sequence[_Started], stop: threading.Event, timeout: float) -> None:
    """Waits until all have ended; TimeoutError once those that have not all hang in a read."""
    while alive := [thread for thread in threads if not thread.ended.is_set()]:
        alive[0].ended.wait(min(1.0, timeout / 4) if timeout else None)
        late = time.monotonic() - timeout
        reads = [_reads.get(t.thread.ident or 0) for t in alive if not t.ended.is_set()]
        hanging = [read for read in reads if read is not None and timeout and read[0] < late]
        if hanging:
            stop.set()
            if len(hanging) == len(reads):
                _, file, array = min(hanging)
                what = f"array {array!r}" if array else "metadata"
                raise TimeoutError(
                    f"{file}: {what}: a read made no progress for {timeout:g} seconds; the "
                    "file system does not answer (JAXGDS_READ_TIMEOUT sets the limit)"
                )
    for one in threads:
        if one.thread.ident is not None:
            one.thread.join()
