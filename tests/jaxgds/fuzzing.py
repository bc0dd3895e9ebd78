"""Random damage to known inputs. JAXGDS_FUZZ_SECONDS=600 makes each fuzz test run that long."""

import os
import pathlib
import random
import resource
import signal
import time
from collections.abc import Callable, Sequence

from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st


CORPUS = pathlib.Path(__file__).parent / "corpus"
HANGS = 60  # seconds that one input may take
GROWS = 400 << 10  # KiB that all inputs may add to the peak of memory


def corpus(name: str) -> list[bytes]:
    """The contents of the files in one folder of the corpus."""
    return [file.read_bytes() for file in sorted((CORPUS / name).iterdir())]


def mutated(inputs: Sequence[bytes], tokens: Sequence[bytes]) -> st.SearchStrategy[bytes]:
    """One of `inputs` after a few edits, which also bring in `tokens`."""
    number = st.integers(0, 2**16 - 1)
    edit = st.tuples(st.sampled_from("xidcst"), number, number, st.sampled_from(tokens))
    return st.builds(_edited, st.sampled_from(inputs), st.lists(edit, min_size=1, max_size=5))


def _edited(data: bytes, edits: Sequence[tuple[str, int, int, bytes]]) -> bytes:
    for kind, where, amount, token in edits:
        at = where % (len(data) + 1)
        some = 1 + amount % 16
        if kind == "x":  # another byte
            data = data[:at] + bytes([amount % 256]) + data[at + 1 :]
        elif kind == "i":  # a token in between
            data = data[:at] + token + data[at:]
        elif kind == "s":  # a token in the place of what was there
            data = data[:at] + token + data[at + len(token) :]
        elif kind == "d":
            data = data[:at] + data[at + some :]
        elif kind == "c":  # a part twice
            data = data[: at + some] + data[at:]
        else:
            data = data[:at]
    return data


def _hangs(*_: object) -> None:
    raise AssertionError(f"an input took more than {HANGS} seconds")


def fuzz(strategy: st.SearchStrategy, check: Callable[..., None], examples: int) -> int:
    """Runs `check` on examples, always the same ones, or new ones for JAXGDS_FUZZ_SECONDS."""
    count = 0
    signal.signal(signal.SIGALRM, _hangs)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    def counted(example) -> None:
        nonlocal count
        count += 1
        signal.alarm(HANGS)
        try:
            check(example)
        finally:
            signal.alarm(0)

    def run(most: int, **more) -> Callable[[], None]:
        quiet = settings(
            max_examples=most,
            deadline=None,
            database=None,
            suppress_health_check=list(HealthCheck),  # type: ignore  its metaclass
            **more,
        )
        return quiet(given(strategy)(counted))

    seconds = float(os.environ.get("JAXGDS_FUZZ_SECONDS", "0"))
    if not seconds:
        run(examples, derandomize=True)()
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        seed(random.getrandbits(64))(run(2000))()
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(f"{count} examples, {grown >> 10} MiB more at the peak")
    assert grown < GROWS
    return count
