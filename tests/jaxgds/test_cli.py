"""The commands, run as a user runs them."""

import json
import subprocess
import sys

import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxgds.bench.checkpoints import FORMATS
from jaxgds.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "checkpoint"
    tree = {"w": jnp.ones((512, 256), jnp.bfloat16), "step": jnp.int32(7)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


def test_inspect(checkpoint, tmp_path, capsys):
    assert main(["inspect", str(checkpoint), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert {a["name"]: a["shape"] for a in found["arrays"]} == {"w": [512, 256], "step": []}
    assert found["total"]["nbytes"] == 512 * 256 * 2 + 4
    assert found["total"]["direct_nbytes"] == 512 * 256 * 2  # the scalar is inline
    text = capsys.readouterr().out
    assert "512x256" in text and "bfloat16" in text and "2 arrays" in text


def test_inspect_names_what_is_wrong(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_doctor(checkpoint, capsys):
    assert main(["doctor", str(checkpoint), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"]["kind"] != "unknown"
    assert found["devices"] and found["machine"]["cores"] >= 1
    assert any("path" in line for line in found["verdict"])
    assert main(["doctor", str(checkpoint / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


def test_bench_restore_measures_every_format(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "jaxgds", "bench", "restore", "--dir", str(tmp_path / "bench")]
        + ["--size", "0.1", "--repeat", "2", "--json", str(tmp_path / "out.json")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {r["format"] for r in found["results"]} == set(FORMATS)
    assert {"jaxgds", "orbax"} <= {r["loader"] for r in found["results"]}
    for row in found["results"]:
        assert row["nbytes"] == 8192 * 8192 * 2 and len(row["seconds"]) == 2, row
    assert "GB/s" in done.stdout


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in ("inspect", "doctor", "bench"))
