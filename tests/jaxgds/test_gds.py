"""What the gds engine claims, and the evidence for it, without a GPU."""

import importlib.machinery
import sys
import types
from pathlib import Path

import pytest

from jaxgds.engines import gds, gds_proof
from jaxgds.engines.cufile import CuFileError
from jaxgds.engines.cufile_config import Settings, parse, settings
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
    fake_kvikio(monkeypatch)
    pinned = types.SimpleNamespace(note="", read=lambda *_: None)
    monkeypatch.setattr(gds, "PinnedEngine", lambda: pinned)
    monkeypatch.setattr(gds, "start_counting", lambda: None)
    monkeypatch.setattr(gds, "ordinal_of", lambda _: 0)
    return gds.GdsEngine([0], proof=False, strict=strict)


def fake_kvikio(monkeypatch) -> None:
    kvikio = types.ModuleType("kvikio")
    kvikio.__spec__ = importlib.machinery.ModuleSpec("kvikio", None)
    monkeypatch.setitem(sys.modules, "kvikio", kvikio)


def shipped(name: str) -> str:
    return (Path(__file__).parents[2] / "configs" / "cufile" / name).read_text()


def io(threads: str, parallel: str = "false") -> str:
    return f'{{"execution": {{"max_io_threads": {threads}, "parallel_io": {parallel}}}}}'


def size(kb: str) -> str:
    return f'{{"properties": {{"max_direct_io_size_kb": {kb}}}}}'


P2P = Settings(peer_to_peer=True)


@pytest.mark.parametrize(
    "text, expected",
    [
        (shipped("lustre.json"), Settings(16 << 20, 8, False)),
        (shipped("nvme.json"), Settings(16 << 20, 8, True)),
        ("{}", Settings()),
        ("null", Settings()),
        ('{"properties": null, "execution": {"max_io_threads": null}}', Settings()),
        (size("64"), Settings(request_bytes=64 << 10)),
        (size("16384"), Settings(request_bytes=16 << 20)),
        (io("12"), Settings(threads=12)),
        (io("128"), Settings(threads=128)),
        (io("0"), Settings()),
        (io("12", "true"), Settings()),  # they are cuFile's then
        ('{"execution": {"max_io_threads": 12}}', Settings()),  # as by default
        ("// a\n/* b\n*/ " + size("128 /* c */ // d\n"), Settings(request_bytes=128 << 10)),
        ('{"logging": {"dir": "//a/* b"}, "properties": {"use_pci_p2pdma": true}} // "', P2P),
        (r'{"a": "\"//", "properties": {"use_pci_p2pdma": true}}', P2P),
    ],
)
def test_what_a_configuration_sets(text, expected):
    assert parse(text, "cufile.json") == expected


KB = "a multiple of 64 from 64 to 16384: correct it, or take it out for the default, 16384"


@pytest.mark.parametrize(
    "text, says",
    [
        *(
            (size(n), f"properties.max_direct_io_size_kb is {n}, where cuFile takes {KB}")
            for n in ("0", "100", "16448", "128.0", '"128"', "true", "-64")
        ),
        (io("129"), "execution.max_io_threads is 129, where cuFile takes a number from 0 to 128"),
        (io("-1", "true"), "execution.max_io_threads is -1, where"),
        (io('"8"'), 'execution.max_io_threads is "8", where'),
        (io("8", "0"), "execution.parallel_io is 0, where cuFile takes true or false"),
        ('{"properties": {"use_pci_p2pdma": 1}}', "properties.use_pci_p2pdma is 1, where"),
        ('{"properties": []}', "properties is [], where cuFile takes an object"),
        ("[]", "the file is [], where cuFile takes an object"),
        ("", "no JSON, and cuFile does not start with it: Expecting value: line 1"),
        ("/*\n*/ {,}", "line 2 column 5"),
        (size("128,"), "no JSON"),
    ],
)
def test_what_cufile_does_not_take(text, says, monkeypatch, tmp_path):
    """It is named, and a restore that is not forced to go through cuFile goes without it."""
    file = tmp_path / "cufile.json"
    file.write_text(text)
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(file))
    with pytest.raises(ValueError) as raised:
        fake_engine(monkeypatch, strict=False)
    assert says in str(raised.value) and str(raised.value).startswith(f"{file}: ")
    assert gds_proof.missing.__wrapped__() == str(raised.value)


def test_the_configuration_in_force(monkeypatch, tmp_path):
    file = tmp_path / "cufile.json"
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(file))
    assert settings() == Settings(), "of a file that is missing"
    file.write_text(io("3"))
    assert settings() == Settings(threads=3)
    monkeypatch.setenv("CUFILE_USE_PCIP2PDMA", "1")
    assert settings() == Settings(threads=3, peer_to_peer=True)
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path))
    with pytest.raises(ValueError, match="Is a directory"):
        settings()


@pytest.mark.parametrize("threads, reads, expected", [(3, 9, 3), (3, 2, 2)])
def test_as_many_threads_as_configured_but_not_more_than_reads(
    monkeypatch, threads, reads, expected
):
    started = []
    monkeypatch.setattr(gds, "run_threads", started.extend)
    gds._run({0: [LARGE] * reads}, Settings(threads=threads), [], lambda _: None)
    assert len(started) == expected


def test_reads_into_arrays_are_cut_as_configured():
    nbytes, size, asked = 1 << 20, 384 << 10, []
    piece = Piece(0, (nbytes,), 0, (1,), 0, (1,))
    read = Read("w", Extent("file", 0, nbytes), "raw", (Segment(nbytes, (piece,)),))
    file = types.SimpleNamespace(nbytes=nbytes, read=lambda *what: asked.append(what))
    buffer = types.SimpleNamespace(pointer=1 << 40)
    gds._copy(read, read.source, size, file, [buffer], None)  # type: ignore
    assert asked == [(at, min(size, nbytes - at), (1 << 40) + at) for at in range(0, nbytes, size)]
