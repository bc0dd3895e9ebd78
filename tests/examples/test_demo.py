"""The demo's steps that need no download, on a tiny model."""

import base64
import dataclasses
import hashlib
import json
import zipfile

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
import scipy.special
from flax import nnx

import jaxgds.orbax
import pallas_kernels as pk
from examples import demo, download, llama, perplexity, restore


def write_wheel(folder, member: str, content: bytes) -> None:
    """A wheel of version 1.0 that holds one file and says so correctly."""
    meta = "demo_data-1.0.dist-info"
    files = {
        member: content,
        f"{meta}/METADATA": b"Metadata-Version: 2.1\nName: demo-data\nVersion: 1.0\n"
        b"Requires-Dist: does-not-exist-anywhere\n",
        f"{meta}/WHEEL": b"Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = [
        f"{name},sha256={base64.urlsafe_b64encode(hashlib.sha256(x).digest()).decode()},{len(x)}"
        for name, x in files.items()
    ]
    with zipfile.ZipFile(folder / "demo_data-1.0-py3-none-any.whl", "w") as wheel:
        for name, x in files.items():
            wheel.writestr(name, x)
        wheel.writestr(f"{meta}/RECORD", "\n".join([*record, f"{meta}/RECORD,,"]))


@pytest.fixture
def only_local_wheels(tmp_path, monkeypatch):
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    return wheels


def test_fetch_takes_a_file_out_of_a_wheel(tmp_path, only_local_wheels):
    write_wheel(only_local_wheels, "demo_data/text.txt", b"some prose")
    good = hashlib.sha256(b"some prose").hexdigest()
    file = download.WheelFile("demo-data", "1.0", "demo_data/text.txt", good)
    path = download.fetch(file, tmp_path / "out")
    assert path.read_bytes() == b"some prose"
    assert list(path.parent.iterdir()) == [path]

    (only_local_wheels / "demo_data-1.0-py3-none-any.whl").unlink()
    assert download.fetch(file, tmp_path / "out") == path  # without pip
    path.write_bytes(b"damaged")
    with pytest.raises(SystemExit, match="demo-data==1.0"):
        download.fetch(file, tmp_path / "out")


def test_fetch_refuses_other_content(tmp_path, only_local_wheels):
    write_wheel(only_local_wheels, "demo_data/text.txt", b"something else")
    file = download.WheelFile("demo-data", "1.0", "demo_data/text.txt", "0" * 64)
    with pytest.raises(SystemExit, match="0000"):
        download.fetch(file, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize("loader", demo.LOADERS)
def test_restore_in_a_fresh_process_is_bit_identical(tmp_path, config, model, loader, monkeypatch):
    monkeypatch.delenv("XLA_FLAGS")
    state = nnx.state(model)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
    result = demo.restore_once(tmp_path, "zstd", loader)
    leaves = jax.tree.leaves(state)
    assert result["sha256"] == restore.hashes(state)
    assert len(result["sha256"]) == len(leaves)
    assert result["weight_bytes"] == sum(x.nbytes for x in leaves)
    if loader == "jaxgds":
        assert result["report"]["arrays"] == len(leaves) and not result["report"]["fallbacks"]


def test_prepared_checkpoints_restore_alike_in_fresh_processes(
    tmp_path, config, model, monkeypatch
):
    state = nnx.state(model)
    (tmp_path / "config.json").write_text(json.dumps(dataclasses.asdict(config)))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "checkpoint", state)
    demo.make(tmp_path)
    monkeypatch.delenv("XLA_FLAGS")
    raw = demo.restore_once(tmp_path, "raw", "jaxgds")
    assert raw["sha256"] == restore.hashes(state)
    quantised = {by: demo.restore_once(tmp_path, "fp8", by) for by in demo.LOADERS}
    assert quantised["orbax"]["sha256"] == quantised["jaxgds"]["sha256"]
    assert quantised["jaxgds"]["weight_bytes"] < raw["weight_bytes"]
    assert not quantised["jaxgds"]["report"]["fallbacks"]
    with jaxgds.orbax.installed():
        again = nnx.state(demo.load(tmp_path, "fp8"))
    assert jax.tree.structure(again) == jax.tree.structure(state)
    for (path, x), y in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(again), strict=True):
        x, y = (np.asarray(a, np.float32) for a in (x, y))
        kernel = path[-2] == jax.tree_util.DictKey("kernel")
        bound = np.abs(x).max(0) / 448 + np.abs(x) / 14 if kernel else 0  # e4m3, then bf16
        assert (np.abs(x - y) <= bound).all(), path


def test_hashes_are_of_the_bytes():
    x = np.arange(6, dtype=np.float32).reshape(2, 3).T  # not contiguous
    state = nnx.State({"a": {"b": nnx.Param(jax.numpy.asarray(x))}})
    assert restore.hashes(state) == {"a.b.value": hashlib.sha256(x.tobytes()).hexdigest()}


def test_losses_equal_scipy():
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 2, 5, 17))
    targets = rng.integers(0, 17, (2, 5))
    p, q = scipy.special.softmax(a, -1), scipy.special.softmax(b, -1)
    nll = -np.log(np.take_along_axis(q, targets[..., None], -1)).sum()
    got = perplexity.losses(*(jax.numpy.asarray(x, "float32") for x in (a, b)), targets)
    np.testing.assert_allclose(got, [nll, scipy.special.rel_entr(p, q).sum()], rtol=1e-5)


def test_compare_scores_every_token_once(model, config):
    """As one forward pass scores them, whatever the chunk."""
    tokens = np.random.default_rng(2).integers(0, config.vocab, (2, 48))
    logits, _ = model(tokens, llama.make_caches(config, "bf16", 2, 48))
    log_p = scipy.special.log_softmax(np.asarray(logits, np.float64)[:, :-1], -1)
    expected = np.exp(-np.take_along_axis(log_p, tokens[:, 1:, None], -1).mean())
    caches: dict[str, llama.Format] = {
        "bf16": "bf16",
        "exact": pk.KVFormat(window=64),
        "k2v2": pk.KVFormat(key_bits=2, value_bits=2, window=0, sinks=0, page_size=16),
    }
    quality = perplexity.compare(model, tokens, caches, chunk=16)
    assert quality["bf16"].perplexity == pytest.approx(expected, rel=2e-3)
    assert quality["bf16"].kl == 0
    assert quality["exact"].kl < 1e-3
    assert quality["k2v2"].kl > 0.01
    uneven = perplexity.compare(model, tokens, {"bf16": "bf16"}, chunk=20)
    assert uneven["bf16"].perplexity == pytest.approx(expected, rel=2e-3)
