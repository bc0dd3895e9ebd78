"""jaxgds bench prefill, on a machine without a GPU: what it measures and what it says."""

import json

import jax
import pytest

from jaxgds.bench import prefill
from jaxgds.cli import main


pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="sizes for a machine without a GPU"
)


def test_formats_are_measured_and_written(tmp_path, capsys):
    file = tmp_path / "prefill.json"
    assert main(["bench", "prefill", "--formats", "K4V4", "--json", str(file)]) == 0
    printed = capsys.readouterr()
    found = json.loads(file.read_text())
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == ["bf16 xla", "K4V4"]
    assert all(row["us"] > 0 and row["seq"] == 256 for row in rows.values())
    assert rows["K4V4"]["implementation"] == "xla"
    assert "no GPU here" in printed.err and all(name in printed.out for name in rows)


def test_operations_are_those_of_the_pairs_that_attend():
    sizes = prefill.Sizes(seqs=(4,), batches=(3,), chunk=2, head_dim=64, group=2, kv_heads=5)
    pairs = 1 + 2 + 3 + 4
    assert prefill.flops(sizes, 3, 4) == 3 * 2 * 5 * pairs * 2 * (2 * 64)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "K4"], "'K4' is not a format"),
        (["--seq", "0"], "seqs=(0,) is not positive"),
        (["--seq", "100"], "seq=100 is not a multiple of chunk=128"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    assert main(["bench", "prefill", *options]) == 2
    assert message in capsys.readouterr().err
