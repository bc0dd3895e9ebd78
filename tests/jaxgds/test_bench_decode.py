"""jaxgds bench decode, on a machine without a GPU: what it measures and what it says."""

import json
from dataclasses import replace

import jax
import pytest

from jaxgds.bench import decode
from jaxgds.cli import main


pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="sizes for a machine without a GPU"
)


def test_formats_are_measured_and_written(tmp_path, capsys):
    file = tmp_path / "decode.json"
    options = ["--seq", "256", "--formats", "K4V4,K8V3", "--repeat", "1", "--json", str(file)]
    assert main(["bench", "decode", *options]) == 0
    printed = capsys.readouterr()
    found = json.loads(file.read_text())
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == ["ideal FP8", "bf16 xla", "K4V4", "K8V3"]
    assert all(row["us"] > 0 and row["seq"] == 256 for row in rows.values())
    assert rows["K4V4"]["implementation"] == "xla" and found["copy_rate"] > 0
    assert "no GPU here" in printed.err and all(name in printed.out for name in rows)


def test_bytes_are_those_of_the_arrays_that_are_read():
    sizes = decode.Sizes(seqs=(512,), batches=(2,), head_dim=64, kv_heads=2, nbytes=1, repeat=1)
    (ideal, bf16, packed) = decode.run(sizes, ("K4V4",), report=lambda text: None)["results"]
    assert bf16["bytes"] == 2 * ideal["bytes"] == 2 * 2 * (2 * 512 * 2 * 64)
    pages, bf16_tokens = (512 - 132) // 64 * 64, 192 + 4
    per_head = pages * (64 + 4) + bf16_tokens * 64 * 4 + 64 * 4  # and the key offset
    assert packed["bytes"] == 2 * 2 * per_head + 4 * 2 * (1 + pages // 64)


def test_copies_and_sizes_share_pages_and_are_checked(monkeypatch):
    """Of three caches of 256 tokens and one of 512, the first and the last sequence."""
    nbytes = 2 * 2 * 2 * 2 * 256 * 64  # less than three packed caches, that are mostly bf16, take
    sizes = decode.Sizes((256, 512), (1, 3), head_dim=64, kv_heads=2, nbytes=nbytes, repeat=1)

    def run(sizes):
        rows = decode.run(sizes, ("K4V3",), report=lambda text: None)["results"]
        return [row for row in rows if row["name"] == "K4V3"]

    good = run(sizes)
    assert [(x["batch"], x["seq"]) for x in good] == [(1, 256), (1, 512), (3, 256), (3, 512)]
    assert all(0 < row["error_to_xla"] < 3e-3 for row in good)
    by_xla = decode._by_xla
    monkeypatch.setattr(decode, "_by_xla", lambda *x: by_xla(*x).at[1, 0].multiply(-1))
    (wrong,) = run(replace(sizes, seqs=(256,), batches=(3,)))
    assert "wrong: the result differs" in wrong["error"]


def test_pages_that_do_not_fit_are_an_error_of_their_sizes_alone(monkeypatch):
    real = decode.random_pages

    def pages(fmt, count, *rest):
        if count > 6:
            raise RuntimeError("RESOURCE_EXHAUSTED")
        return real(fmt, count, *rest)

    monkeypatch.setattr(decode, "random_pages", pages)
    sizes = decode.Sizes((256, 1024), (1,), head_dim=64, kv_heads=2, nbytes=1, repeat=1)
    rows = decode.run(sizes, ("K4V4",), report=lambda text: None)["results"]
    small, large = (row for row in rows if row["name"] == "K4V4")
    assert small["us"] > 0 and "out of memory" in large["error"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "K4"], "'K4' is not a format"),
        (["--formats", "K5V4"], "key_bits=5"),
        (["--batch", "0"], r"batches=(0,) is not positive"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    assert main(["bench", "decode", *options]) == 2
    assert message in capsys.readouterr().err
