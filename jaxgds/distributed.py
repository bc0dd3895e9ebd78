"""Processes that fail together: what one of them raised, the others say too, and none hangs."""

import itertools
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from jax._src import distributed  # the store that `jax.distributed` keeps has no public name


_blocks = itertools.count()


@contextmanager
def fail_together(grace: float = 10.0) -> Iterator[None]:
    """Ends a block in every process of `jax.distributed` when one process fails in it.

    A process whose block raises tells the others. These wait for it, mostly: in a collective, or
    for Orbax. Their main thread is interrupted, and the block raises `RuntimeError` with the
    number of the process that failed and its reason. As the group is broken then, a process that
    still runs `grace` seconds later is ended with status 1 (one that waits inside of XLA cannot
    be interrupted). A process that dies without a word is noticed by JAX itself, after the
    `heartbeat_timeout_seconds` of `jax.distributed.initialize`.

    Without several processes it does nothing. Every process enters the same blocks in the same
    order, in its main thread.

    Raises:
      RuntimeError: another process failed; or this is not the main thread.
    """
    state = distributed.global_state
    client: Any = state.client
    if client is None or (state.num_processes or 1) < 2:
        yield
        return
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("fail_together() interrupts the main thread: enter it there")
    watch = _Watch(client, f"jaxgds/failed/{next(_blocks)}", grace)
    try:
        try:
            watch.start()
            yield
        finally:
            watch.finish()
    except BaseException as e:
        if watch.failed():  # then this error is but what came of it, such as a broken collective
            raise RuntimeError(watch.reason) from e
        watch.tell(f"process {state.process_id} failed: {type(e).__name__}: {e}")
        raise


class _Watch(threading.Thread):
    """Looks whether another process has failed, and interrupts the main thread if so."""

    def __init__(self, client: Any, key: str, grace: float):
        super().__init__(daemon=True)
        self._client, self._key, self._grace = client, key, grace
        self._finished = threading.Event()
        self.reason: str | None = None

    def run(self) -> None:
        while not self._finished.wait(0.5):
            if self.failed():
                # A real signal, unlike interrupt_main(), ends a sleep or a system call, too.
                signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                return

    def failed(self) -> bool:
        """Whether another process has told why it failed; if so, this one has little time left."""
        if self.reason is None:
            try:
                self.reason = self._client.key_value_try_get(self._key)
            except Exception as e:  # jaxlib's own type, and it says why in words only
                if "NOT_FOUND" in str(e):
                    return False
                self.reason = f"the coordinator does not answer any more: {e}"
            threading.Thread(target=self._end, daemon=True).start()
        return True

    def finish(self) -> None:
        """Waits for the thread: one that is within jaxlib when Python ends would crash it."""
        self._finished.set()
        self.join()

    def tell(self, reason: str) -> None:
        """Tells the other processes why this one failed, unless one was faster."""
        try:
            self._client.key_value_set(self._key, reason)
        except Exception as e:
            if "ALREADY_EXISTS" not in str(e):
                print(f"jaxgds: the other processes could not be told: {e}", file=sys.stderr)
        threading.Thread(target=self._end, daemon=True).start()

    def _end(self) -> None:
        threading.Event().wait(self._grace)
        if self.reason is not None:
            print(f"jaxgds: ended, because {self.reason}", file=sys.stderr, flush=True)
        os._exit(1)
