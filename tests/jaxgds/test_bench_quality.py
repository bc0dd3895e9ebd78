"""jaxgds bench quality: what it measures on a tiny random model, and what it says."""

import json
import math

import numpy as np
import pytest
from flax import nnx

import pallas_kernels as pk
from examples import llama
from jaxgds.bench import quality
from jaxgds.cli import main


TOKENS = np.random.default_rng(0).integers(0, 50, (2, 200), np.int32)


@pytest.fixture(scope="module")
def model():
    config = llama.Config(vocab=50, dim=32, mlp_dim=32, layers=1, heads=2, kv_heads=1, head_dim=64)
    model = llama.Llama(config, nnx.Rngs(0))
    model.blocks[0].q.kernel[...] *= 8  # attention far from uniform
    model.blocks[0].o.kernel[...] *= 8
    return model


def test_formats_are_measured_and_written(model, tmp_path, capsys, monkeypatch):
    """All but the download: `load` gives a tiny model."""
    monkeypatch.setattr(quality, "load", lambda *args: (model, TOKENS, "random"))
    file = tmp_path / "quality.json"
    options = ["--formats", "fp8,K2V2,K8V8", "--window", "16", "--json", str(file)]
    assert main(["bench", "quality", *options, "--chunk", "40"]) == 0
    found = json.loads(file.read_text())
    assert set(found) == {"machine", "shape", "head_dim", "results", "model", "text"}
    assert found["shape"] == {"windows": 2, "tokens": 200, "chunk": 40}
    rows = {row["name"]: row for row in found["results"]}
    assert list(rows) == ["bf16", "fp8", "K2V2", "K8V8"]
    assert [row["bits"] for row in rows.values()] == [16, 8, 2.25, 8.25]
    assert rows["bf16"]["delta"] == rows["bf16"]["kl"] == 0
    assert rows["K2V2"]["kl"] > 10 * rows["K8V8"]["kl"] > 0
    assert rows["K2V2"]["window"] == 16 and rows["K2V2"]["key_offset"] is True
    for row in rows.values():
        ratio = row["perplexity"] / rows["bf16"]["perplexity"]
        assert row["delta"] == pytest.approx(ratio - 1) and math.isfinite(row["kl"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in rows)


def test_cases_are_all_combinations_named_by_what_varies():
    settings = quality.Settings(windows=(0, 64), key_offset=(True, False))
    found = quality.cases(["K4V3", "fp8"], settings)
    assert list(found) == [
        "bf16",
        "K4V3, window 0, offset",
        "K4V3, window 0, no offset",
        "K4V3, window 64, offset",
        "K4V3, window 64, no offset",
        "fp8",
    ]
    fmt = pk.KVFormat(4, 3, window=64, sinks=4, key_offset=False)
    assert found["K4V3, window 64, no offset"] == fmt
    assert list(quality.cases(["K3V3"])) == ["bf16", "K3V3"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "K4"], "'K4' is not a format"),
        (["--formats", "K5V4"], "key_bits=5"),
        (["--window", "-1"], "window=-1 is negative"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    assert main(["bench", "quality", *options]) == 2
    assert message in capsys.readouterr().err


def test_chunk_must_fit(model):
    with pytest.raises(ValueError, match="chunk=201 is not in"):
        quality.run(model, TOKENS, quality.cases(["fp8"]), chunk=201)
