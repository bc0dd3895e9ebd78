"""Plans against published parameter counts, and against bytes that devices really hold."""

import json
import math
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.flax import save_file

import jaxgds
import pallas_kernels as pk
from jaxgds import capacity, models, published
from jaxgds.capacity import GPUS, Setup
from jaxgds.cli import main
from jaxgds.prepare import prepare
from jaxgds.rules import read_mesh


H200 = Setup(GPUS["H200"], read_mesh("tp=8"))
SMALL = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 512,
}


# As the model cards on Hugging Face say ("Model size" of the safetensors files).
@pytest.mark.parametrize(
    ("model", "count"),
    [
        ("llama-3.1-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        ("smollm2-135m", 134_515_008),
        ("qwen3-32b", 32_762_123_264),
        ("mixtral-8x7b", 46_702_792_704),
    ],
)
def test_shipped_models_have_the_published_number_of_parameters(model, count):
    assert model in models.shipped()
    shapes = models.parameters(models.read_config(model))
    assert sum(math.prod(shape) for shape in shapes.values()) == count


def sizes(model_type, dim, mlp, layers, heads, kv_heads, head_dim, vocab, **others):
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")
    names += ("num_key_value_heads", "head_dim", "vocab_size")
    values = (dim, mlp, layers, heads, kv_heads, head_dim, vocab)
    return {"model_type": model_type, **dict(zip(names, values, strict=True)), **others}


EXPERTS = {"num_experts": 128, "moe_intermediate_size": 768, "tie_word_embeddings": False}


# As on their model cards: Gemma 2B, Gemma 2 2B, Gemma 3 270M, Qwen3-30B-A3B.
@pytest.mark.parametrize(
    ("config", "count"),
    [
        (sizes("gemma", 2048, 16384, 18, 8, 1, 256, 256_000), 2_506_172_416),
        (sizes("gemma2", 2304, 9216, 26, 8, 4, 256, 256_000), 2_614_341_888),
        (sizes("gemma3_text", 640, 2048, 18, 4, 1, 256, 262_144), 268_098_176),
        (sizes("qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151_936, **EXPERTS), 30_532_122_624),
    ],
    ids=lambda x: x["model_type"] if isinstance(x, dict) else "",
)
def test_every_family_with_rules_can_be_planned(config, count):
    shapes = models.parameters(config)
    assert sum(math.prod(shape) for shape in shapes.values()) == count
    found = capacity.plan(config, Setup(GPUS["H100"], read_mesh("tp=4"), "fp8"))
    assert found["model"]["parameters"] == count


def test_layers_without_experts_are_refused():
    config = sizes("qwen3_moe", 2048, 6144, 48, 32, 4, 128, 151_936, **EXPERTS)
    for change in ({"mlp_only_layers": [3]}, {"decoder_sparse_step": 2}):
        with pytest.raises(ValueError, match="some layers have no experts"):
            models.parameters(config | change)


@pytest.mark.parametrize("kv", ["bf16", "fp8", "K4V4", "K4V3", "K2V8"])
@pytest.mark.parametrize(("batch", "length"), [(1, 100), (3, 777), (2, 4096)])
def test_cache_bytes_are_those_of_the_cache(kv, batch, length):
    kv = capacity.read_kv(kv)
    got = capacity.kv_nbytes(kv, batch, length, 2, 128)
    if isinstance(kv, pk.KVFormat):
        assert got == pk.KVCache.create(kv, batch, length, 2, 128).nbytes
    else:
        assert got == 2 * batch * length * 2 * 128 * (2 if kv == "bf16" else 1) + 4 * batch


@given(
    st.sampled_from(["bf16", "fp8", "K4V4", "K3V2"]),
    st.integers(1, 9),
    st.floats(0, 1e9),
    st.integers(1, 80),
)
def test_longest_context_is_the_largest_that_fits(kv, batch, free, layers):
    kv = capacity.read_kv(kv)
    n = capacity.longest(kv, batch, free, layers, 2, 64)
    fits = [layers * capacity.kv_nbytes(kv, batch, m, 2, 64) <= free for m in (n, n + 1)]
    assert fits == [n > 0 or fits[0], False]


@pytest.mark.parametrize("weights", ["bf16", "fp8"])
@pytest.mark.parametrize("mesh", ["tp=8", "dp=2,tp=4"])
def test_plan_is_what_eight_devices_allocate(tmp_path, weights, mesh):
    """Weights from a prepared checkpoint, and the caches for the context that is promised."""
    axes = read_mesh(mesh)
    source, made = tmp_path / "source", tmp_path / "prepared"
    source.mkdir()
    (source / "config.json").write_text(json.dumps(SMALL))
    rng = np.random.default_rng(0)
    shapes = models.parameters(SMALL)
    values = {n: jnp.asarray(rng.normal(size=s), jnp.bfloat16) for n, s in shapes.items()}
    save_file(values, source / "model.safetensors")
    prepare(source, made, mesh=axes, method="fp8" if weights == "fp8" else None)

    devices = np.array(jax.devices("cpu")[:8]).reshape(tuple(axes.axes.values()))
    jax_mesh = Mesh(devices, tuple(axes.axes))
    setup = Setup(capacity.read_gpu("0.02"), axes, weights, activation_bytes=1e6)
    target = {}
    for array in capacity.weights(SMALL, setup):
        spec = PartitionSpec(*(entry or None for entry in array.spec))
        leaf = jax.ShapeDtypeStruct(
            array.shape, array.dtype, sharding=NamedSharding(jax_mesh, spec)
        )
        folder = target
        for key, _ in array.keys[:-1]:
            folder = folder.setdefault(key, {})
        folder[array.keys[-1][0]] = leaf
    tree = jaxgds.load(made, target, strict=True)
    assert jax.tree.structure(tree) == jax.tree.structure(target)

    sequences = 2 * axes.axes.get("dp", 1)
    kv = pk.KVFormat(4, 3)
    found = capacity.plan(SMALL, setup, [kv], [sequences])
    context = found["kv"][0]["context"][sequences]
    caches = [pk.KVCache.create(kv, sequences, context, 8, 64) for _ in range(2)]

    def place(x):  # pages and sequences over "dp", heads over "tp"
        dp = "dp" if "dp" in axes.axes else None
        return NamedSharding(jax_mesh, PartitionSpec(dp, *(["tp"] if x.ndim >= 3 else [])))

    caches = jax.tree.map(lambda x: jax.device_put(x, place(x)), caches)
    for device in jax_mesh.devices.flat:
        held = [
            sum(s.data.nbytes for x in jax.tree.leaves(t) for s in x.addressable_shards
                if s.device == device)
            for t in (tree, caches)
        ]  # fmt: skip
        assert held[0] == pytest.approx(found["hbm"]["weights"], rel=0.01)
        assert held[1] == pytest.approx(found["hbm"]["kv_cache"], rel=0.01)
        assert sum(held) + setup.activation_bytes <= setup.gpu.hbm_bytes


def test_the_capacity_of_405b_is_what_a_hand_gets():
    config = models.read_config("llama-3.1-405b")
    setup = Setup(GPUS["H200"], read_mesh("tp=8"), "fp8")
    found = capacity.plan(config, setup, ["bf16", pk.KVFormat(4, 4)], [1])
    assert found["hbm"]["weights"] == pytest.approx(405.85e9 / 8, rel=0.02)
    assert found["kv"][0]["token_nbytes"] == 126 * 2 * 128 * 2 == 64512
    assert found["kv"][0]["tokens"] == pytest.approx(1.31e6, rel=0.01)
    assert found["kv"][1]["ratio"] == pytest.approx(256 / 66)


def test_load_limits():
    """70 GB over 8 GPUs: each byte from storage once a host, norms to every GPU."""
    arrays = capacity.weights(models.read_config("llama-3.1-70b"), H200)
    got = capacity.load_seconds(arrays, H200)
    nbytes = 70_553_706_496 * 2
    assert got["storage"] == pytest.approx(nbytes / (94 * 2**30), rel=1e-3)
    assert got["network"] == pytest.approx(nbytes / 150e9, rel=1e-3)
    assert got["pcie"] == pytest.approx(nbytes / 8 / 55e9, rel=1e-3)
    two = Setup(GPUS["H200"], read_mesh("dp=2,tp=8"))
    arrays = capacity.weights(models.read_config("llama-3.1-70b"), two)
    both = capacity.load_seconds(arrays, two)  # the second host reads all of it, too
    assert both["storage"] == pytest.approx(2 * got["storage"])
    assert both["network"] == pytest.approx(got["network"])


@given(st.integers(0, 23))
def test_parts_of_a_rank_are_those_of_an_array_of_devices(rank):
    mesh = read_mesh("a=2,b=3,c=4")
    spec = (("c", "a"), (), ("b",))
    devices = np.arange(24).reshape(2, 3, 4)
    a, b, c = (int(x[0]) for x in np.where(devices == rank))
    assert capacity.part(mesh, spec, rank) == (c * 2 + a, 0, b)


@pytest.mark.parametrize(
    ("change", "mesh", "match"),
    [
        ({}, "tp=3", "does not divide"),
        ({"model_type": "mamba"}, "tp=1", "mamba"),
        ({"hidden_size": None}, "tp=1", "hidden_size"),
        ({"vocab_size": 40_000_000}, "tp=1", "more GPUs"),
        ({"num_key_value_heads": 6, "num_attention_heads": 12}, "tp=4", "6 KV heads"),
    ],
)
def test_plan_names_what_does_not_fit(change, mesh, match):
    with pytest.raises(ValueError, match=match):
        capacity.plan({**SMALL, **change}, Setup(capacity.read_gpu("20"), read_mesh(mesh)))


def test_command(tmp_path, capsys):
    out = tmp_path / "plan.json"
    command = ["plan", "llama-3.1-70b", "--gpu", "h200", "--mesh", "tp=8", "--weights", "fp8"]
    assert main([*command, "--sequences", "4", "--json", str(out)]) == 0
    text = capsys.readouterr().out
    assert "70.55 billion" in text and "4 seq." in text and "storage sets the pace" in text
    assert "MEM_FRACTION has to be above 0.96" in text  # 136 of 141 GB
    assert json.loads(out.read_text())["hbm"]["total"] == 141e9
    for wrong in (["plan"], ["plan", "no-such-model"], [*command, "--kv", "K9"]):
        assert main(wrong) == 2
    assert "llama-3.1-8b" in capsys.readouterr().err


def test_a_model_is_a_directory_or_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = models.read_config("llama-3.1-8b")
    assert models.read_config("Llama-3.1-8B") == shipped
    own = tmp_path / "llama-3.1-8b"
    own.mkdir()
    assert models.read_config("llama-3.1-8b") == shipped  # there is no config.json yet
    (own / "config.json").write_text(json.dumps(SMALL))
    assert models.read_config("llama-3.1-8b") == SMALL
    with pytest.raises(ValueError, match="no config.json"):
        models.read_config(str(tmp_path))


def test_formats_in_small_letters():
    assert capacity.read_kv("k4v3") == pk.KVFormat(4, 3) == capacity.read_kv("K4V3")


def test_published_tables_side_by_side(tmp_path):
    out = tmp_path / "table.json"
    command = [sys.executable, "-m", "jaxgds", "plan", "--table", "--json", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for figure in (
        "64,512 bytes",
        "1.31 million tokens",
        "82K",
        "94 GiB/s",
        "32-bit norm",
        "3.88x",
    ):
        assert figure in done.stdout, figure
    found = json.loads(out.read_text())
    for load in found["loads"]:
        assert load["weight_bytes"] == pytest.approx(load["published"]["gigabytes"] * 1e9, rel=0.02)
        assert max(load["limits"].values()) < load["published"]["seconds"]
    assert found == json.loads(json.dumps(published.compare()))
