"""Threads that fail, hang and are interrupted: what the caller sees, and what is left behind."""

import gc
import sys
import threading
from typing import Never

import pytest

from jaxgds.interpreter import no_full_collections
from jaxgds.workers import check_stop, read_timeout, reading, run_threads, watched


@pytest.fixture(autouse=True)
def soon(monkeypatch):
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", "0.2")


class Disk:
    """A read that hangs until it is told to answer."""

    def __init__(self):
        self.answers, self.reads = threading.Event(), 0

    def read(self, file: str = "file", array: str = "w") -> None:
        with reading(file, array):
            self.reads += 1
            self.answers.wait(60)


@pytest.fixture
def disk():
    made = Disk()
    yield made
    made.answers.set()


def alive() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "jaxgds"]


def ended() -> bool:
    for thread in alive():
        thread.join(10)
    return not alive()


def test_a_failure_stops_the_others_and_is_raised():
    went_on = threading.Event()

    def fails(stop) -> None:
        raise KeyError("first")

    def loops(stop) -> None:
        while True:
            with reading("file"):
                pass
            if went_on.is_set():
                raise AssertionError

    with pytest.raises(KeyError, match="first"):
        run_threads([loops, fails, loops])
    went_on.set()
    assert not alive()


def test_all_hang(disk):
    left = []
    with pytest.raises(TimeoutError, match="file.*'w'.*no progress for 0.2 s.*READ_TIMEOUT"):
        run_threads([lambda stop: disk.read()] * 3, left_behind=lambda: left.append(len(alive())))
    assert left == [3] and disk.reads == 3
    disk.answers.set()
    assert ended()


def test_one_hangs_while_others_go_on(disk):
    """They are stopped, at their next read or wherever they look."""
    seen = []

    def reads(stop) -> None:
        try:
            while True:
                with reading("another"):
                    pass
        finally:
            seen.append("reads")

    def looks(stop) -> None:
        try:
            while True:
                check_stop()
        finally:
            seen.append("looks")

    with pytest.raises(TimeoutError, match="file"):
        run_threads([reads, lambda stop: disk.read(), looks])
    assert sorted(seen) == ["looks", "reads"] and len(alive()) == 1


def test_slow_is_not_hanging(disk):
    """Each of many reads takes less than the limit, all together take longer."""

    def slow(stop) -> None:
        for _ in range(6):
            with reading("file"):
                threading.Event().wait(0.05)

    run_threads([slow, slow])
    assert not alive()


@pytest.mark.parametrize("limit", ["0", "60"])
def test_an_interrupt_does_not_wait_for_who_hangs(disk, monkeypatch, limit):
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", limit)
    left = []

    def interrupt() -> Never:
        while not disk.reads:
            pass
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run_threads([lambda stop: disk.read()], interrupt, lambda: left.append(len(alive())))
    assert left == [1]


def test_an_error_meanwhile_is_raised_when_all_have_stopped():
    def loops(stop) -> None:
        while True:
            check_stop()

    def fails() -> Never:
        raise ValueError("the plan")

    with pytest.raises(ValueError, match="the plan"):
        run_threads([loops], fails)
    assert not alive()


def test_watched(disk):
    assert watched(lambda: 5) == 5
    with pytest.raises(ZeroDivisionError):
        watched(lambda: 1 // 0)
    with pytest.raises(TimeoutError, match="index.*metadata"):
        watched(lambda: disk.read("index", ""))


@pytest.mark.parametrize("text, seconds", [("", 300), ("0", 0), ("2.5", 2.5), ("1e6", 1e6)])
def test_the_limit(monkeypatch, text, seconds):
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", text)
    assert read_timeout() == seconds


@pytest.mark.parametrize("text", ["-1", "nan", "inf", "soon", "1e9"])
def test_no_limit(monkeypatch, text):
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", text)
    with pytest.raises(ValueError, match="JAXGDS_READ_TIMEOUT.*expected seconds"):
        read_timeout()


@pytest.mark.parametrize(("own", "during"), [(0.003001, 0.0001), (0.00005, 0.00005)])
def test_threads_give_the_interpreter_back_quickly_while_readers_run(own, during):
    before = sys.getswitchinterval()
    seen = []

    def look(stop: threading.Event) -> None:
        seen.append(sys.getswitchinterval())

    def fails(stop: threading.Event) -> None:
        run_threads([look])  # a restore within a restore
        look(stop)
        raise KeyError("first")

    sys.setswitchinterval(own)
    own = sys.getswitchinterval()  # rounded
    try:
        with pytest.raises(KeyError):
            run_threads([fails])
        assert seen == pytest.approx([during, during], abs=2e-6)
        assert sys.getswitchinterval() == own
    finally:
        sys.setswitchinterval(before)


@pytest.mark.parametrize("set_meanwhile", [False, True])
def test_no_full_collection_while_a_restore_runs(set_meanwhile):
    before = gc.get_threshold()
    full = []

    def count(phase, info):
        full.extend([phase] if info["generation"] == 2 else [])

    gc.callbacks.append(count)
    gc.set_threshold(10, 1, 1)
    try:
        kept = []
        while not full:
            kept.append([])
        made = len(kept)
        with no_full_collections, no_full_collections:
            full.clear()
            kept += [[] for _ in range(2 * made)]
            assert not full
            if set_meanwhile:
                gc.set_threshold(10, 1, 2)
        assert gc.get_threshold() == (10, 1, 1 + set_meanwhile)
    finally:
        gc.callbacks.remove(count)
        gc.set_threshold(*before)
