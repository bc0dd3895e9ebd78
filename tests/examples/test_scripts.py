"""restore_orbax.py and load_huggingface.py, run as a user runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
import small_llama
from jax.sharding import Mesh
from safetensors.numpy import load_file, save_file

from examples import load_huggingface


def run(module: str, *args: object) -> str:
    done = subprocess.run(
        [sys.executable, "-m", f"examples.{module}", *map(str, args)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_training_goes_on_as_if_it_had_not_stopped(tmp_path):
    whole = run("restore_orbax", tmp_path / "whole", "--steps", 6, "--every", 3)
    loss = re.search(r"step 6: loss (\S+)", whole)
    assert loss and "restored" not in whole
    run("restore_orbax", tmp_path / "parts", "--steps", 3, "--every", 3)
    stock = run("restore_orbax", tmp_path / "parts", "--steps", 6, "--every", 10, "--stock")
    assert "step 3: stock Orbax" in stock and loss[0] in stock
    ours = run("restore_orbax", tmp_path / "parts", "--steps", 6, "--every", 10)
    again = run("restore_orbax", tmp_path / "whole", "--steps", 4)
    assert "step 6: done before" in again
    assert "step 3: restored" in ours and "0 left to Orbax" in ours and loss[0] in ours


def test_safetensors_onto_a_mesh(tmp_path):
    weights = small_llama.write(tmp_path / "model")
    text = run("load_huggingface", tmp_path / "model", "--devices", 8)
    assert "0 left to Orbax" in text
    held = [int(n.replace(",", "")) for n in re.findall(r"holds (\S+) bytes", text)]
    matrices = sum(x.nbytes for x in weights.values() if x.ndim == 2)
    norms = sum(x.size for x in weights.values() if x.ndim == 1) * 4  # float32 in the model
    assert held == [matrices // 8 + norms] * 8


@pytest.mark.parametrize("name", ["serve_llama", "restore_orbax", "load_huggingface"])
def test_scripts_stay_short(name):
    assert (
        len((Path(load_huggingface.__file__).parent / f"{name}.py").read_text().splitlines()) < 150
    )


@pytest.mark.parametrize(("path", "devices"), [("nowhere", "1"), (".", "0"), (".", "99")])
def test_wrong_options_take_one_line(path, devices, tmp_path, monkeypatch):
    small_llama.write(tmp_path)
    monkeypatch.setattr(sys, "argv", ["", str(tmp_path / path), "--devices", devices])
    with pytest.raises(SystemExit, match="nowhere" if path == "nowhere" else "devices="):
        load_huggingface.main()


def test_names_with_a_prefix(tmp_path):
    """As in files of models of which the Llama is a part."""
    made = small_llama.write(tmp_path)
    file = tmp_path / "model.safetensors"
    other = {"vision.weight": np.zeros((3, 5), np.float32)}
    save_file({f"language_model.{n}": x for n, x in load_file(file).items()} | other, file)
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("tp",))
    model = load_huggingface.load(tmp_path, mesh, "language_model.")
    up = model.model.layers[1].mlp.up_proj.weight[...]
    np.testing.assert_array_equal(up, made["model.layers.1.mlp.up_proj.weight"])
    assert up.sharding.shard_shape(up.shape) == (96, 128)
