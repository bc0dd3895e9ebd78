"""`jaxgds bench coldstart` on a tiny model, as a user runs it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgds.bench import coldstart


TINY = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 96,
    "rms_norm_eps": 1e-5,
}
ROOT = Path(__file__).parents[2]


def test_every_case_reaches_the_same_token(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(TINY))
    out, picture = tmp_path / "out.json", tmp_path / "out.png"
    done = subprocess.run(
        [sys.executable, "-m", "jaxgds", "bench", "coldstart", "--model", str(tmp_path)]
        + [
            "--layers",
            "1",
            "--weights",
            "fp8",
            "--prompt",
            "6",
            "--devices",
            "2",
            "--dir",
            str(tmp_path / "bench"),
        ]
        + ["--json", str(out), "--plot", str(picture)],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(out.read_text())
    assert found["layers"] == 1 and found["weights"] == "fp8" and found["devices"] == 2
    assert [row["name"] for row in found["results"]] == list(coldstart.CASES)
    assert len({row["token"] for row in found["results"]}) == 1
    for row in found["results"]:
        s = row["seconds"]
        overlaps = "load_and_compile" in s
        parts = sum(s[p] for p in s if not (overlaps and p in ("load", "compile")))
        assert parts == pytest.approx(row["total"])
        assert overlaps == row["name"].startswith("jaxgds")
        if overlaps:
            assert max(s["load"], s["compile"]) <= s["load_and_compile"]
        assert sum(row["compile_seconds"].values()) <= s["compile"] + 1e-6
    assert "max(load, compile), in all" in done.stdout and "load + prefill, in all" in done.stdout
    assert picture.stat().st_size > 1000


def test_failures_are_rows(tmp_path):
    path = tmp_path / "checkpoint"
    coldstart.make(path, TINY, "bf16")
    for file in path.glob("d/rank*"):
        file.unlink()
    found = coldstart._measure("jaxgds", path, "", 1, 4, ROOT)
    assert "rank00000" in found["error"]
    text = coldstart.table(
        {"layers": 1, "devices": 1, "cores": 1, "weights": "bf16", "prompt": 4}
        | {"results": [{"name": "jaxgds, cache cold", **found}]}
    )
    assert "jaxgds, cache cold: " in text and "rank00000" in text


def test_other_models_are_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match="model_type='qwen3'"):
        coldstart.run(tmp_path / "bench", {**TINY, "model_type": "qwen3"})
    assert not list(tmp_path.iterdir())
