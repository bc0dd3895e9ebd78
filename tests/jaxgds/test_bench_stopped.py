"""`jaxgds bench` that is cut off: what it has measured is kept and shown."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest

from jaxgds.bench import coldstart, decode, encode, prefill, restore
from jaxgds.cli import main


pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="sizes for a machine without a GPU"
)
ROOT = Path(__file__).parents[2]


def options(file) -> list[str]:
    small = ["--batch", "1,2", "--seq", "256", "--formats", "K4V4", "--repeat", "1"]
    return ["bench", "decode", *small, "--json", str(file)]


def names(found) -> list[tuple[str, int]]:
    return [(row["name"], row["batch"]) for row in found["results"]]


BASELINES = [("ideal FP8", 1), ("bf16 xla", 1), ("ideal FP8", 2), ("bf16 xla", 2)]


def test_a_killed_run_leaves_its_results_in_the_file(tmp_path):
    file = tmp_path / "out.json"
    endless = (
        "import sys, time; from jaxgds.bench import decode; from jaxgds.cli import main; "
        "decode._compressed = lambda *_: time.sleep(600); main(sys.argv[1:])"
    )
    with subprocess.Popen([sys.executable, "-c", endless, *options(file)], cwd=ROOT) as process:
        while not file.exists() or len(json.loads(file.read_text())["results"]) < 4:
            assert process.poll() is None
            time.sleep(0.05)
        process.kill()
    found = json.loads(file.read_text())
    assert found["complete"] is False and names(found) == BASELINES
    assert all(row["us"] > 0 for row in found["results"]) and decode.table(found)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_run_shows_and_writes_what_it_has(number, tmp_path, capsys, monkeypatch):
    """Whoever stops it may do so twice, as `timeout` does."""
    file = tmp_path / "out.json"
    real = decode._compressed

    def compressed(sizes, batch, *rest):
        if batch == 2:
            for _ in range(2 if number == signal.SIGTERM else 1):
                os.kill(os.getpid(), number)
        return real(sizes, batch, *rest)

    monkeypatch.setattr(decode, "_compressed", compressed)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(options(file)) == 130
    assert signal.getsignal(signal.SIGTERM) is handler
    printed = capsys.readouterr()
    found = json.loads(file.read_text())
    assert found["complete"] is False and os.listdir(tmp_path) == ["out.json"]
    assert names(found) == sorted([*BASELINES, ("K4V4", 1)], key=lambda row: row[1])
    for row in found["results"]:
        assert f"{row['us']:.1f}" in printed.out
    assert f"K4V4, batch 1, 256 tokens: {found['results'][2]['us']:.1f} us (" in printed.err
    assert printed.err.endswith("stopped\n")


@pytest.mark.parametrize("linked", [False, True])
def test_a_whole_run_is_not_marked_and_a_link_stays_one(linked, tmp_path):
    file, link = tmp_path / "out.json", tmp_path / "link.json"
    if linked:
        link.symlink_to(file)
    assert main(options(link if linked else file)) == 0
    found = json.loads(file.read_text())
    assert "complete" not in found and link.is_symlink() == linked
    assert names(found)[2::3] == [("K4V4", 1), ("K4V4", 2)]


def test_a_run_stopped_at_once_has_nothing_to_show(tmp_path, capsys, monkeypatch):
    def stopped(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(decode.timing, "copy_rate", stopped)
    assert main(options(tmp_path / "out.json")) == 130
    assert "before the first result" in capsys.readouterr().err and not os.listdir(tmp_path)


@pytest.mark.parametrize("bench", [decode, encode, prefill])
def test_every_case_is_kept_and_said(bench, monkeypatch):
    kept, said = [], []

    def measure(*_):
        if len(kept) == 1:
            raise RuntimeError  # without a message
        return {"us": 12.34, "wall_us": 15.0}

    for case in ("_bf16", "_compressed", "_append"):
        monkeypatch.setattr(bench, case, measure, raising=False)
    found = bench.run(
        bench.CPU, ("K4V4", "K3V3"), said.append, lambda x: kept.append(len(x["results"]))
    )
    assert kept == sorted(kept) and kept[-1] == len(found["results"])
    assert len(said) == 1 + len(kept)
    assert ": 12.3 us (0.0 s)" in said[1] and ": RuntimeError() (" in said[2]


def test_restore_keeps_and_says_every_case(tmp_path, monkeypatch):
    rows = iter([{"first_gbps": 1.234, "best_gbps": 2.345}, {"error": "no such file"}])
    monkeypatch.setattr(restore, "_measure", lambda *_: next(rows))
    monkeypatch.setattr(
        restore, "cases", lambda *_: [("jaxgds", "orbax-raw"), ("orbax", "orbax-raw")]
    )
    kept, said = [], []
    keep = lambda found: kept.append(len(found["results"]))  # noqa: E731
    restore.run(str(tmp_path), ("orbax-raw",), 1 << 25, report=said.append, keep=keep)
    assert kept == [1, 2]
    assert said[1:] == [
        "jaxgds on orbax-raw",
        "  1.23 GB/s first, 2.35 best",
        "orbax on orbax-raw",
        "  no such file",
    ]


@pytest.mark.parametrize("left, said", [(0.0, False), (0.25, True)])
def test_restore_says_what_is_not_cold(tmp_path, monkeypatch, left, said):
    """As on tmpfs, where nothing can be dropped: its rates are none of a cold start."""
    row = {"first_gbps": 1.2, "best_gbps": 1.2, "device_extra_bytes": None, "host_peak_bytes": 0}
    monkeypatch.setattr(restore, "_measure", lambda *_: dict(row))
    monkeypatch.setattr(restore, "cases", lambda *_: [("jaxgds", "orbax-raw")])
    monkeypatch.setattr(restore.ceilings, "drop_page_cache", lambda files: left)
    found = restore.run(str(tmp_path), ("orbax-raw",), 1 << 25, cold=True, report=lambda text: None)
    assert found["results"][0]["cached_before"] == left
    assert ("25.0% of its pages stayed" in restore.table(found)) == said


def test_coldstart_keeps_every_case(tmp_path, monkeypatch):
    monkeypatch.setattr(coldstart, "make", lambda *_: None)
    monkeypatch.setattr(coldstart, "_measure", lambda *_: {"token": 1, "total": 2.0})
    kept = []
    config = coldstart.models.read_config("llama-3.1-8b")
    found = coldstart.run(
        tmp_path, config, report=lambda text: None, keep=lambda x: kept.append(len(x["results"]))
    )
    assert kept == [1, 2, 3, 4, 5] and len(found["results"]) == 5
