"""What is set for the whole Python process while restores run, and undone after the last one."""

import gc
import sys
import threading
from collections.abc import Callable


SWITCH = 1e-4  # seconds that a thread may keep the interpreter while readers wait for it
_NEVER = (1 << 31) - 1


class WhileRestoring:
    """A context that several threads may be in: the first one in changes, the last one out undoes.

    Args:
      change: returns what undoes it.
    """

    def __init__(self, change: Callable[[], Callable[[], None]]):
        self._lock, self._users, self._change = threading.Lock(), 0, change

    def __enter__(self) -> None:
        with self._lock:
            if not self._users:
                self._undo = self._change()
            self._users += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                self._undo()


def _switch_sooner() -> Callable[[], None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(min(before, SWITCH))
    return lambda: sys.setswitchinterval(before + 5e-7)  # Python rounds down to microseconds


def _keep_to_the_young() -> Callable[[], None]:
    before = gc.get_threshold()
    gc.set_threshold(*before[:2], _NEVER)

    def undo() -> None:
        if gc.get_threshold()[2] == _NEVER:  # nobody has set it since
            gc.set_threshold(*gc.get_threshold()[:2], before[2])

    return undo


# Other Python threads give the interpreter back sooner. After each system call a reader needs it
# for microseconds; a thread that traces or compiles would let each of them wait for Python's
# default of 5 ms, and the restore take five times as long.
quick_switches = WhileRestoring(_switch_sooner)

# The garbage collector looks at new objects only. A restore makes so many that a look at all
# objects of the process would be due, which stops every thread for 0.1 s and more where JAX, Flax
# and Orbax are imported.
no_full_collections = WhileRestoring(_keep_to_the_young)
