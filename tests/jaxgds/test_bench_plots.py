"""`jaxgds bench ... --plot`, on runs that were really made."""

import importlib
import json
from pathlib import Path

import pytest


RESULTS = Path(__file__).parents[2] / "configs" / "results"


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_every_kept_run_is_drawn(file, tmp_path):
    bench = importlib.import_module(f"jaxgds.bench.{file.stem.partition('-')[0]}")
    found = json.loads(file.read_text())
    picture = tmp_path / "plot.png"
    bench.plot(found, str(picture))
    assert picture.read_bytes().startswith(b"\x89PNG") and picture.stat().st_size > 5000
    assert bench.table(found)
