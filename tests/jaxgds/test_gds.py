"""What the gds engine claims, and the evidence for it, without a GPU."""

import importlib.machinery
import sys
import types

import pytest

from jaxgds.engines import gds
from jaxgds.engines.cufile import CuFileError
from jaxgds.engines.gds_proof import Counted, since
from jaxgds.index import Extent
from jaxgds.plan import Read
from jaxgds.scatter import Piece, Segment


def own(p2p=0, nvfs=0, posix=0):
    return {"p2p": p2p, "nvfs": nvfs, "posix": posix}


@pytest.mark.parametrize(
    "before, after, expected",
    [
        (Counted(5, {}), Counted(9, {}), (4, 0)),
        (Counted(5, {}), Counted(5, {}), (0, 0)),
        (Counted(0, own(1, 2, 3)), Counted(0, own(2, 4, 6)), (3, 3)),
        (Counted(0, {}), Counted(0, own(1, 2, 3)), (3, 3)),
        (Counted(5, own()), Counted(9, own(posix=7)), (0, 7)),  # the driver's are another's
    ],
)
def test_what_was_read_in_between(before, after, expected):
    assert since(before, after) == expected


def read_of(nbytes: int) -> Read:
    piece = Piece(0, (1,), 0, (1,), 0, (1,))
    return Read("w", Extent("file", 0, nbytes), "raw", (Segment(nbytes, (piece,)),))


LARGE, SMALL = read_of(gds.MIN_READ), read_of(gds.MIN_READ - 1)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    "reads, counts, path, says",
    [
        ([LARGE], own(nvfs=1), "gds", ""),
        ([LARGE], own(p2p=1), "gds", ""),
        ([LARGE], own(posix=1), "gds-compat", "no direct read: it ran in its compatibility mode"),
        ([LARGE], own(), "gds-compat", "compatibility mode"),
        ([LARGE], own(p2p=3, posix=2), "mixed", "3 direct reads and 2 in its compatibility mode"),
        ([LARGE, SMALL], own(nvfs=1), "mixed", "small reads"),
        ([LARGE, SMALL], own(posix=1), "mixed", "no direct read"),
        ([SMALL], own(), "pinned", "small reads"),
        ([], own(), "pinned", ""),
        ([LARGE], CuFileError("refused"), "pinned", "cuFile failed"),
    ],
)
def test_the_claim_is_what_was_counted(monkeypatch, reads, counts, path, says, strict):
    """Whatever was counted before; strict allows what cuFile does, but not that it fails."""
    engine, now = fake_engine(monkeypatch, strict), {"own": own(5, 6, 7)}

    def run(*_):
        if isinstance(counts, Exception):
            raise counts
        now["own"] = {way: n + counts[way] for way, n in now["own"].items()}

    monkeypatch.setattr(gds, "counted", lambda: Counted(0, now["own"]))
    monkeypatch.setattr(gds, "_run", run)
    if strict and isinstance(counts, Exception):
        with pytest.raises(CuFileError, match="refused"):
            engine.read(lambda: reads, [None])  # type: ignore
        return
    engine.read(lambda: reads, [None])  # type: ignore
    assert engine.path == path
    assert says in engine.note and bool(engine.note) == bool(says)


def fake_engine(monkeypatch, strict: bool) -> gds.GdsEngine:
    """On a kvikio, a GPU and a pinned engine that do nothing."""
    kvikio = types.ModuleType("kvikio")
    kvikio.__spec__ = importlib.machinery.ModuleSpec("kvikio", None)
    monkeypatch.setitem(sys.modules, "kvikio", kvikio)
    pinned = types.SimpleNamespace(note="", read=lambda *_: None)
    monkeypatch.setattr(gds, "PinnedEngine", lambda: pinned)
    monkeypatch.setattr(gds, "start_counting", lambda: None)
    monkeypatch.setattr(gds, "ordinal_of", lambda _: 0)
    return gds.GdsEngine([0], proof=False, strict=strict)
