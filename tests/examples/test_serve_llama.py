"""The serving script on one and on eight devices, against a forward pass in numpy."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import ml_dtypes
import numpy as np
import pytest
import small_llama
from jax.sharding import Mesh

import pallas_kernels as pk
from examples import llama_step, serve_llama
from examples.generate import generate
from examples.llama_config import Config
from examples.sharded_cache import make_caches
from jaxgds.prepare import prepare
from jaxgds.rules import read_mesh


PROMPTS = [np.random.default_rng(i).integers(0, 320, n).tolist() for i, n in enumerate((21, 4, 9))]
EXACT = pk.KVFormat()  # the newest 128 tokens stay bf16: nothing is packed here


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("llama")


@pytest.fixture(scope="module")
def weights(folder) -> dict[str, dict[str, np.ndarray]]:
    """Of each checkpoint in `folder`: safetensors, prepared, and prepared in FP8."""
    made = small_llama.write(folder / "source")
    prepare(folder / "source", folder / "bf16", mesh=read_mesh("tp=8"))
    prepare(folder / "source", folder / "fp8", mesh=read_mesh("tp=8"), method="fp8")
    rounded = {}
    for name, x in made.items():
        x = rounded[name] = np.asarray(x, np.float32)
        if "_proj" in name:
            scale = np.abs(x).max(axis=1, keepdims=True) / np.float32(448)
            rounded[name] = (x / scale).astype(ml_dtypes.float8_e4m3fn).astype(np.float32) * scale
    return {"source": made, "bf16": made, "fp8": rounded}


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[:devices]), ("tp",))


@jax.jit
def call(model, tokens, caches, counts):
    return model(tokens, caches, counts)


def read(model, prompts, fmt, chunks):
    """Logits after the last token of prompts read in `chunks` of so many tokens at a time."""
    c, lengths = model.config, np.array([len(p) for p in prompts])
    caches = make_caches(c.layers, model.mesh, fmt, len(prompts), 256, c.kv_heads, c.head_dim)
    found, start = {}, 0
    for chunk in chunks:
        counts = np.clip(lengths - start, 0, chunk).astype(np.int32)
        rows = [(p[start : start + chunk] + [0] * chunk)[:chunk] for p in prompts]
        new, caches = call(model, np.array(rows, np.int32), caches, counts)
        found |= {i: np.asarray(new[i]) for i in range(len(prompts)) if counts[i]}
        start += chunk
    assert all((cache.lengths == lengths).all() for cache in caches)
    return np.stack([found[i] for i in range(len(prompts))])


def error(got, expected) -> float:
    return float(np.sqrt(((got - expected) ** 2).mean()) / expected.std())


@pytest.mark.parametrize(("name", "devices"), [("source", 8), ("bf16", 1), ("bf16", 8), ("fp8", 8)])
def test_logits_are_those_of_numpy(folder, weights, name, devices):
    expected = np.stack([small_llama.logits(weights[name], p)[-1] for p in PROMPTS])
    model = serve_llama.load(folder / name, mesh_of(devices))
    got = read(model, PROMPTS, EXACT, [7, 7, 7] if devices == 8 else [21])
    assert error(got, expected) < 0.03
    unscaled = np.stack(
        [small_llama.logits(weights[name], p, rope_scaling=None)[-1] for p in PROMPTS]
    )
    assert error(unscaled, expected) > 0.1  # so the check would see wrong angles


def test_packed_cache_is_close(folder, weights):
    prompt = np.random.default_rng(9).integers(0, 320, 120).tolist()
    expected = small_llama.logits(weights["bf16"], prompt)[-1:]
    model = serve_llama.load(folder / "bf16", mesh_of(8))
    fine, coarse = (
        error(read(model, [prompt], pk.KVFormat(bits, bits, window=0, page_size=16), [30] * 4),
              expected) for bits in (8, 2)
    )  # fmt: skip
    assert fine < 0.1 < coarse


@pytest.mark.gpu
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", ["bf16", "fp8"])
def test_gpus_give_what_host_devices_give(folder, weights, name, count):
    """Over a cache most of which is packed, in chunks, the last one a step of decoding."""
    gpus = [d for d in jax.devices() if d.platform == "gpu"]
    if len(gpus) < count:
        pytest.skip(f"{len(gpus)} GPUs")
    # Rounding moves a few numbers across levels. Other chunks make 0.14 of it, a wrong window 0.35.
    assert on(gpus[:count], folder / name) < 0.1


def test_one_host_device_gives_what_eight_give(folder, weights):
    assert on(jax.devices("cpu")[:1], folder / "fp8") < 0.05


def on(devices: list[jax.Device], path: Path) -> float:
    """How far the logits on these devices are off those on eight of the host."""
    prompt = np.random.default_rng(9).integers(0, 320, 200).tolist()
    fmt, chunks = pk.KVFormat(window=32), [64, 64, 71, 1]
    model = serve_llama.load(path, Mesh(np.array(devices), ("tp",)))
    expected = read(serve_llama.load(path, mesh_of(8)), [prompt], fmt, chunks)
    return error(read(model, [prompt], fmt, chunks), expected)


def test_weights_and_cache_are_split(folder, weights):
    model = serve_llama.load(folder / "fp8", mesh_of(8))
    layer = model.model.layers[1]
    for proj, shape in {
        layer.self_attn.q_proj: (128, 128),
        layer.self_attn.o_proj: (128, 128),
        layer.mlp.down_proj: (128, 24),
    }.items():
        assert proj.weight[...].sharding.shard_shape(proj.weight.shape) == shape
        assert proj.weight[...].dtype == ml_dtypes.float8_e4m3fn
    (cache,) = make_caches(1, model.mesh, EXACT, 2, 300, 8, 64)
    for x in jax.tree.leaves(cache):
        assert x.ndim < 3 or x.sharding.shard_shape(x.shape)[1] == 1
    with pytest.raises(ValueError, match="3 KV heads"):
        make_caches(1, model.mesh, EXACT, 1, 300, 3, 64)


def test_devices_exchange_activations_and_no_weights(folder, weights):
    model = serve_llama.load(folder / "bf16", mesh_of(8))
    caches = make_caches(2, model.mesh, EXACT, 1, 64, 8, 64)
    shapes = np.zeros((1, 1), np.int32), np.ones(1, np.int32), np.float32(0), np.zeros(2, np.int32)
    text = str(llama_step.step.lower(model, caches, *shapes).compile().as_text())
    found = re.findall(r"\w+\[([\d,]*)\]\S* (all-gather|all-reduce|all-to-all)", text)
    assert len(found) >= 5  # one for the embedding, two a layer
    for shape, _ in found:
        assert math.prod(map(int, filter(None, shape.split(",")))) <= 320, (shape, text)


def serve(path: Path, out: Path, *options: str) -> list[list[int]]:
    tokens = [item for p in PROMPTS for item in ("--tokens", ",".join(map(str, p)))]
    done = subprocess.run(
        [sys.executable, "-m", "examples.serve_llama", str(path), *tokens, "--chunk", "8"]
        + ["--json", str(out), *options],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert "tokens/s" in done.stdout and "0 left to Orbax" in done.stdout
    return json.loads(out.read_text())["answers"]


def test_script_answers_alike_on_one_and_on_eight_devices(folder, weights, tmp_path):
    out = tmp_path / "out.json"
    answers = serve(folder / "bf16", out, "--new-tokens", "6")
    assert answers == serve(folder / "source", out, "--new-tokens", "6", "--devices", "1")
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        assert len(answer) == 6
        scores = small_llama.logits(weights["bf16"], prompt + answer)
        for at, token in enumerate(answer, len(prompt) - 1):
            assert scores[at, token] > scores[at].max() - 0.05 * scores.std()


def test_executables_are_kept_for_the_next_process(folder, weights, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    out, file = tmp_path / "out.json", tmp_path / "executables"
    options = ["--new-tokens", "3", "--executables", str(file)]
    expected = serve(folder / "fp8", out, "--new-tokens", "3")
    assert serve(folder / "fp8", out, *options) == expected
    written = file.stat().st_mtime_ns
    assert serve(folder / "fp8", out, *options) == expected
    assert file.stat().st_mtime_ns == written
    serve(folder / "fp8", out, *options, "--bits", "8", "8")
    assert file.stat().st_mtime_ns > written  # those were for other caches


def test_sampling_ends_and_bad_prompts(folder, weights, monkeypatch):
    model = serve_llama.load(folder / "bf16", mesh_of(1))
    draw = lambda *a, **k: generate(model, PROMPTS, EXACT, 5, 8, *a, **k)  # noqa: E731
    greedy, drawn = draw(0.0), draw(1.0, seed=3)
    assert drawn == draw(1.0, seed=3) != draw(1.0, seed=4)
    assert draw(1e-4, seed=3) == greedy != drawn
    end = greedy[1][2]
    cut = [a[: a.index(end)] if end in a else a for a in greedy]
    assert draw(0.0, ends=frozenset([end])) == cut and len(cut[1]) < 5
    with pytest.raises(ValueError, match="at least one token"):
        generate(model, [[1], []], EXACT, 5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ([], "give a --prompt"),
        (["--tokens", "1,x"], "invalid numbers value"),
        (["--tokens", "1", "--new-tokens", "0"], "at least 1"),
        (["--tokens", "1", "--json", "nowhere/out.json"], "no directory nowhere"),
        (["--tokens", "1,320"], "none of the model's 320"),
        (["--tokens=-1"], "none of the model's 320"),
        (["--tokens", "1", "--bits", "5", "4"], "key_bits=5"),
        (["--tokens", "1", "--devices", "99"], "devices=99"),
        (["--tokens", "1", "--devices", "3"], "8 KV heads do not divide by the 3"),
        (["--prompt", "text"], "tokenizer.json is missing"),
    ],
)
def test_wrong_options_are_said_before_the_weights_are_read(
    folder, weights, options, said, monkeypatch, capsys
):
    monkeypatch.setattr(serve_llama.jaxgds, "load_and_compile", None)
    with pytest.raises(SystemExit) as ended:
        serve_llama.main([str(folder / "bf16"), *options])
    assert said in f"{ended.value} {capsys.readouterr().err}"


def test_distributed_without_a_cluster(monkeypatch, capsys):
    def initialize(**_):
        raise ValueError("coordinator_address should be defined.")

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    with pytest.raises(SystemExit):
        serve_llama.main(["nowhere", "--tokens", "1", "--distributed"])
    assert "coordinator_address" in capsys.readouterr().err


def test_wrong_paths_take_one_line(tmp_path):
    for name, content in {"none": None, "other": "{}"}.items():
        (tmp_path / name).mkdir()
        if content:
            (tmp_path / name / "config.json").write_text(content)
        with pytest.raises(SystemExit, match="config.json"):
            serve_llama.main([str(tmp_path / name), "--prompt", "text"])


@pytest.mark.parametrize(
    "change", [{"model_type": "qwen2"}, {"rope_scaling": {"rope_type": "yarn"}}]
)
def test_other_models_are_refused(change):
    with pytest.raises(ValueError, match="Llama"):
        Config.of({**small_llama.CONFIG, **change})
