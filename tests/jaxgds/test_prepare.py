"""Prepared checkpoints against stock Orbax, which restores them, and against their sources."""

import copy
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import orbax.checkpoint as ocp
import prepare_models as models
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgds
import jaxgds.orbax
from jaxgds import prepare as prepare_module
from jaxgds.check import check
from jaxgds.index import Extent, open_index
from jaxgds.inspect import inspect
from jaxgds.prepare import prepare
from jaxgds.rules import Mesh, Rules, read_mesh, read_rules


pytestmark = pytest.mark.filterwarnings("ignore:Sharding info not provided")

KERNELS = """
[[rule]]
names = ["*.kernel"]
spec = ["", "tp"]
contract = 0
[[rule]]
names = ["*"]
spec = []
"""


@pytest.fixture(scope="module")
def weights():
    return models.llama()


@pytest.fixture(scope="module")
def source(weights, tmp_path_factory):
    return models.save_safetensors(tmp_path_factory.mktemp("prepare") / "hf", weights)


@pytest.fixture
def kernels(tmp_path) -> Rules:
    file = tmp_path / "kernels.toml"
    file.write_text(KERNELS)
    return read_rules(file)


def flat(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(ocp.tree.str_keypath(path)): leaf for path, leaf in leaves}


def restore_v0(path, target=None):
    with ocp.StandardCheckpointer() as checkpointer:
        return checkpointer.restore(path, target)


def restore_installed(path, target=None):
    with jaxgds.orbax.installed(strict=True):
        return restore_v0(path, target)


LOADERS = {
    "orbax-v0": restore_v0,
    "orbax-v1": ocp.v1.load,
    "jaxgds": lambda *args: jaxgds.load(*args, strict=True),
    "jaxgds-orbax": restore_installed,
}


def nested(weights: dict[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for name, x in weights.items():
        *folders, last = name.split(".")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[last] = x
    return tree


@pytest.mark.parametrize("mesh", ["tp=1", "tp=8", "dp=2,tp=4", "tp=2,dp=2"])
def test_restores_bit_for_bit(source, weights, mesh, tmp_path):
    done = prepare(source, tmp_path / "out", mesh=read_mesh(mesh))
    assert (done["arrays"], done["quantised"]) == (len(weights), 0)
    restored: dict[str, Any] = {}
    for name, restore in LOADERS.items():
        restored = flat(restore(tmp_path / "out"))
        assert restored.keys() == weights.keys(), name
        for key, x in weights.items():
            assert restored[key].dtype == x.dtype, (name, key)
            assert oracle.raw(restored[key]) == x.tobytes(), (name, key)
    down = restored["model.layers.1.mlp.down_proj.weight"].sharding
    assert down.spec == P(None, "tp")
    assert dict(down.mesh.shape) == read_mesh(mesh).axes
    assert oracle.last_report().path == "host"


@pytest.mark.parametrize("loader", LOADERS)
def test_restores_onto_another_mesh(source, weights, loader, tmp_path):
    prepare(source, tmp_path / "out", mesh=Mesh({"tp": 8}), method="fp8")
    stored = flat(restore_v0(tmp_path / "out"))
    mesh = jax.make_mesh((2, 3), ("x", "y"), devices=jax.devices()[:6])

    def place(x):
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, P("x")))

    target = {name: place(x) for name, x in stored.items()}
    restored = flat(LOADERS[loader](tmp_path / "out", nested(target)))
    for name, x in stored.items():
        assert restored[name].sharding == target[name].sharding, name
        assert oracle.raw(restored[name]) == oracle.raw(x), name


def test_fp8_is_the_weight_rounded_by_xla(source, weights, tmp_path):
    prepare(source, tmp_path / "out", mesh=Mesh({"tp": 8}), method="fp8")
    restored = flat(restore_v0(tmp_path / "out"))
    quantised = {name for name in weights if name.endswith("_proj.weight")}
    assert len(quantised) == 14
    assert restored.keys() == weights.keys() | {f"{name}_scale" for name in quantised}
    for name, x in weights.items():
        if name not in quantised:
            assert oracle.raw(restored[name]) == x.tobytes(), name
            continue
        x = x.astype(np.float32)
        scale = np.abs(x).max(1, keepdims=True) / np.float32(448)
        assert np.array_equal(restored[f"{name}_scale"], scale), name
        expected = jnp.asarray(x / scale).astype(jnp.float8_e4m3fn)
        assert oracle.raw(restored[name]) == oracle.raw(expected), name
        error = np.abs(np.asarray(restored[name], np.float32) * scale - x)
        assert (error <= np.maximum(np.abs(x) / 16, scale / 512) * 1.0001).all(), name
    spec = {name: restored[name].sharding.spec for name in restored}
    layer = "model.layers.0."
    assert spec[f"{layer}self_attn.q_proj.weight_scale"] == P("tp")
    assert spec[f"{layer}self_attn.o_proj.weight"] == P(None, "tp")
    assert spec[f"{layer}self_attn.o_proj.weight_scale"] == P()


def test_files_are_those_that_stock_orbax_writes(source, tmp_path):
    prepare(source, tmp_path / "ours", mesh=Mesh({"dp": 2, "tp": 4}), method="fp8")
    tree = restore_v0(tmp_path / "ours")
    # A copy, as a fresh one would lack the store of array metadata. A chunk is to be a shard.
    whole = copy.copy(ocp.type_handlers.get_type_handler(jax.Array))
    vars(whole)["_use_replica_parallel"] = False
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, whole))
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=registry)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(tmp_path / "stock", ocp.args.PyTreeSave(tree))

    def files(name: str) -> list[Any]:
        return [json.loads((tmp_path / d / name).read_text()) for d in ("ours", "stock")]

    ours, stock = files("_METADATA")
    assert ours == stock
    assert list(ours["tree_metadata"]) == list(stock["tree_metadata"])
    ours, stock = ({k: json.loads(v) for k, v in f.items()} for f in files("_sharding"))
    assert ours == stock
    ours, stock = files("array_metadatas/process_0")
    assert ours == stock
    ours, stock = files("_CHECKPOINT_METADATA")
    assert ours.keys() == stock.keys()
    values = [oracle.stored_values(tmp_path / d, ocdbt=True) for d in ("ours", "stock")]
    assert values[0] == values[1]


def test_layout_is_for_direct_io(source, tmp_path):
    """Aligned chunks, each in a file of the lowest rank that holds it, files cut where asked."""
    mesh, limit = Mesh({"dp": 2, "tp": 2}), 8192
    prepare(source, tmp_path / "out", mesh=mesh, file_bytes=limit)
    total = inspect(str(tmp_path / "out"))["total"]
    assert total["direct_nbytes"] / total["stored_nbytes"] > 0.95
    index = open_index(tmp_path / "out")
    ends: dict[str, int] = {}
    tree = flat(restore_v0(tmp_path / "out"))
    for name in index.names():
        array = index.array(name)
        owners = {
            tuple(s.start or 0 for s in shard.index): shard.device.id
            for shard in reversed(tree[name].addressable_shards)
        }
        for at, place in array.chunks():
            if not isinstance(place, Extent):
                assert len(place) <= 1024
                continue
            assert place.offset % 4096 == 0
            corner = tuple(i * c for i, c in zip(at, array.layout.chunk, strict=True))
            rank, _, _ = Path(place.file).name.partition("-")
            assert rank == f"rank{owners[corner]:05d}", (name, at)
            ends[place.file] = max(ends.get(place.file, 0), place.offset + place.nbytes)
    for file, end in ends.items():
        assert Path(file).stat().st_size == -(-end // 4096) * 4096
        assert end <= max(limit, 16384)  # a chunk that is larger has a file of its own
    assert {Path(f).name for f in ends} | {"btree"} == {
        f.name for f in (tmp_path / "out" / "d").iterdir()
    }
    assert len(ends) > mesh.size


def test_dtype_casts_floats_only(tmp_path, kernels):
    tree = {
        "a": np.array([1, 1e-3, 3.1415927], np.float32),
        "b": np.arange(3, dtype=np.int32),
        "c": np.array([1, 2], ml_dtypes.float8_e5m2),
    }
    oracle.save(tmp_path / "src", tree)
    mesh = Mesh({"tp": 1})
    prepare(tmp_path / "src", tmp_path / "out", mesh=mesh, rules=kernels, dtype="bfloat16")
    restored = restore_v0(tmp_path / "out")
    assert oracle.raw(restored["a"]) == oracle.raw(jnp.asarray(tree["a"]).astype(jnp.bfloat16))
    assert oracle.raw(restored["b"]) == oracle.raw(tree["b"])
    assert oracle.raw(restored["c"]) == oracle.raw(tree["c"])


SAVES = {
    "v0-zstd": lambda path, tree: oracle.save(path, tree),
    "v0-chunked": lambda path, tree: oracle.save(path, tree, chunk_bytes=700),
    "v0-files-zarr3": lambda path, tree: oracle.save(path, tree, (False, True, True)),
    "v1": oracle.save_v1,
    "v1-raw": lambda path, tree: oracle.save_v1(path, tree, compress=False),
}


@pytest.mark.parametrize("block", [256, 1 << 20])
@pytest.mark.parametrize("save", SAVES)
def test_orbax_sources(save, block, kernels, tmp_path, monkeypatch):
    """Any encoding and chunks; blocks smaller than a row, a chunk, or larger than all."""
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", block)
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    rng = np.random.default_rng(0)

    def put(x, *spec):
        return jax.device_put(x, NamedSharding(mesh, P(*spec)))

    tree = {
        "kernel": put(rng.normal(size=(40, 48)).astype(np.float32), "x", "y"),
        "layers": [{"kernel": put(rng.normal(size=(3, 8, 16)).astype(np.float32), None, "x")}],
        "norm": put(rng.normal(size=33).astype(np.float32)),
        "step": put(np.int32(7)),
        "empty": {},
    }
    SAVES[save](tmp_path / "src", tree)
    done = prepare(tmp_path / "src", tmp_path / "out", mesh=Mesh({"tp": 8}), rules=kernels)
    assert done["quantised"] == 0
    assert check(tmp_path / "out")["problems"] == []
    restored = restore_v0(tmp_path / "out")
    assert jax.tree.structure(restored) == jax.tree.structure(tree)
    for name, x in flat(tree).items():
        assert oracle.raw(flat(restored)[name]) == oracle.raw(x), name


@pytest.mark.parametrize("block", [1000, 1 << 20])
def test_fp8_of_an_nnx_state(block, kernels, tmp_path, monkeypatch):
    """Kernels [in, out]: channels span blocks, so scales need a reading of their own."""
    monkeypatch.setattr(prepare_module, "BLOCK_BYTES", block)

    class Model(nnx.Module):
        def __init__(self):
            self.blocks = nnx.List([nnx.Linear(48, 64, rngs=nnx.Rngs(i)) for i in range(2)])

    state = nnx.state(Model())
    oracle.save(tmp_path / "src", state)
    prepare(tmp_path / "src", tmp_path / "out", mesh=Mesh({"tp": 8}), rules=kernels, method="fp8")
    assert check(tmp_path / "out")["problems"] == []
    restored = flat(restore_v0(tmp_path / "out"))
    for i in range(2):
        kernel = np.asarray(state["blocks"][i]["kernel"][...])
        scale = np.abs(kernel).max(0, keepdims=True) / np.float32(448)
        assert np.array_equal(restored[f"blocks.{i}.kernel_scale.value"], scale)
        expected = jnp.asarray(kernel / scale).astype(jnp.float8_e4m3fn)
        assert oracle.raw(restored[f"blocks.{i}.kernel.value"]) == oracle.raw(expected)
        assert restored[f"blocks.{i}.bias.value"].shape == (64,)


def test_config_and_tokenizer_come_along(source, tmp_path):
    prepare(source, tmp_path / "out", mesh=Mesh({"tp": 1}))
    prepare(tmp_path / "out", tmp_path / "again", mesh=Mesh({"tp": 2}), method="fp8")
    for name in ("config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (source / name).read_bytes()


def test_what_is_quantised_already_is_sharded_anew(source, tmp_path):
    prepare(source, tmp_path / "one", mesh=Mesh({"tp": 1}), method="fp8")
    prepare(source, tmp_path / "eight", mesh=Mesh({"tp": 8}), method="fp8")
    again = {"mesh": Mesh({"tp": 8}), "method": "fp8", "dtype": "bfloat16"}  # scales stay float32
    done = prepare(tmp_path / "one", tmp_path / "again", **again)
    assert done["quantised"] == 0
    assert check(tmp_path / "again")["problems"] == []
    restored = [flat(restore_v0(tmp_path / name)) for name in ("again", "eight")]
    for name, x in restored[1].items():
        assert restored[0][name].sharding == x.sharding, name
        assert oracle.raw(restored[0][name]) == oracle.raw(x), name
