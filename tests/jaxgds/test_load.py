"""jaxgds.load: what it takes for a checkpoint, what it takes for a target, what it says if not."""

import json
import os
import pathlib
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgds
from jaxgds.errors import CheckpointError


def mesh(*shape: int) -> Mesh:
    devices = np.array(jax.devices()[: int(np.prod(shape))])
    return Mesh(devices.reshape(shape), ("x", "y")[: len(shape)])


def put(array, *spec):
    return jax.device_put(array, NamedSharding(mesh(4, 2), P(*spec)))


def state() -> dict:
    rng = np.random.default_rng(0)
    return {
        "w": put(rng.normal(size=(16, 8)).astype(np.float32), "x", "y"),
        "layers": [{"b": put(np.arange(8.0, dtype=np.float32) + i)} for i in range(3)],
    }


@pytest.fixture(scope="module")
def tree():
    return state()


@pytest.fixture(scope="module")
def folders(tmp_path_factory, tree) -> dict[str, pathlib.Path]:
    """The same tree as everything that `load` takes for an Orbax checkpoint."""
    root = tmp_path_factory.mktemp("load")
    oracle.save(root / "item", tree)
    oracle.save(root / "files", tree, (False, True, False))
    with ocp.CheckpointManager(root / "manager") as manager:
        manager.save(7, args=ocp.args.StandardSave(tree))
    with ocp.CheckpointManager(root / "named", item_names=("params", "config")) as manager:
        config = ocp.args.JsonSave({"a": 1})
        manager.save(7, args=ocp.args.Composite(params=ocp.args.StandardSave(tree), config=config))
    oracle.save_v1(root / "v1", tree)
    return {
        "item": root / "item",
        "files": root / "files",
        "manager step": root / "manager" / "7",
        "manager item": root / "manager" / "7" / "default",
        "named step": root / "named" / "7",
        "v1": root / "v1",
        "v1 item": root / "v1" / "state",
    }


KINDS = ["item", "files", "manager step", "manager item", "named step", "v1", "v1 item"]


def abstract(tree, on: Mesh, *spec):
    sharding = NamedSharding(on, P(*spec))
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


@pytest.mark.parametrize("kind", KINDS)
def test_without_a_target(folders, tree, kind):
    """Nested dicts and lists, with the shardings of the save."""
    oracle.assert_same(jaxgds.load(folders[kind], strict=True), tree)
    assert oracle.last_report().arrays == 4


@pytest.mark.parametrize("kind", KINDS)
def test_with_a_target(folders, tree, kind):
    got = jaxgds.load(str(folders[kind]), abstract(tree, mesh(2), "x"), strict=True)
    expected = jax.tree.map(lambda x: jax.device_put(x, NamedSharding(mesh(2), P("x"))), tree)
    oracle.assert_same(got, expected)
    assert oracle.last_report().path == "host"


def test_a_relative_path(folders, tree, monkeypatch):
    monkeypatch.chdir(folders["item"].parent)
    oracle.assert_same(jaxgds.load("item"), tree)


def test_casts(folders, tree):
    target = jax.tree.map(lambda x: x.update(dtype=jnp.bfloat16), abstract(tree, mesh(2)))
    got = jaxgds.load(folders["item"], target, strict=True)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        assert a.dtype == jnp.bfloat16 and a.sharding == NamedSharding(mesh(2), P())
        assert oracle.raw(a) == np.asarray(b).astype(jnp.bfloat16).tobytes()


class Model(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])
        self.norm = nnx.BatchNorm(16, rngs=rngs)

    def __call__(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = layer(x)
        return self.norm(x, use_running_average=True)


def test_an_abstract_nnx_state(tmp_path):
    model = Model(nnx.Rngs(0))
    graph, weights = nnx.split(model)
    with ocp.StandardCheckpointer() as c:
        c.save(tmp_path / "item", weights)
    sharding = NamedSharding(mesh(4), P())
    empty = nnx.state(nnx.eval_shape(lambda: Model(nnx.Rngs(1))))
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), empty
    )
    got = jaxgds.load(tmp_path / "item", target, strict=True)
    with ocp.StandardCheckpointer() as c:
        oracle.assert_same(got, c.restore(tmp_path / "item", target))
    x = jnp.ones((2, 8))
    np.testing.assert_array_equal(
        np.asarray(nnx.merge(graph, got)(jax.device_put(x, sharding))), np.asarray(model(x))
    )


@pytest.mark.filterwarnings("ignore:Sharding info not provided")  # by Orbax, of a wrong shape
def test_without_a_sharding_it_is_that_of_the_save(tmp_path, tree):
    """As by a StandardCheckpointer; what was saved from numpy stays so."""
    keys = put(jax.random.split(jax.random.key(0), 8), "x")
    tree = {**tree, "keys": keys, "key": jax.random.key(1), "model": nnx.state(Model(nnx.Rngs(0)))}
    tree["numpy"] = np.arange(3.0)
    with ocp.StandardCheckpointer() as c:
        c.save(tmp_path / "item", tree)
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)
    got = jaxgds.load(tmp_path / "item", target, strict=True)
    with ocp.StandardCheckpointer() as c:
        oracle.assert_same(got, c.restore(tmp_path / "item", target))
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(16, 8\)"):
        jaxgds.load(tmp_path / "item", {**target, "w": jax.ShapeDtypeStruct((8, 8), np.float32)})


def test_lists_tuples_and_nested_containers(tmp_path):
    w = put(np.arange(8, dtype=np.int32))
    tree = {"list": [w, [w + 1, {"deep": (w + 2, w + 3)}]], "tuple": (w + 4,), "empty": {}}
    oracle.save(tmp_path / "item", tree)
    got = jaxgds.load(tmp_path / "item", abstract(tree, mesh(2), "x"))
    assert jax.tree.structure(got) == jax.tree.structure(tree)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(tree), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_a_target_that_lacks_or_adds_a_leaf(folders, tree):
    target = abstract(tree, mesh(2))
    for wrong, name in (
        ({**target, "new": target["w"]}, "new"),
        ({"w": target["w"]}, "layers"),
        ({**target, "layers": target["layers"][:2]}, "layers"),
    ):
        with pytest.raises(ValueError, match=name):
            jaxgds.load(folders["item"], wrong)


def test_a_target_of_the_wrong_shape(folders, tree):
    target = abstract(tree, mesh(2))
    wrong = jax.ShapeDtypeStruct((8, 8), np.float32, sharding=target["w"].sharding)
    with pytest.raises(ValueError, match=r"\(8, 8\).*\(16, 8\)"):
        jaxgds.load(folders["item"], {**target, "w": wrong})


def test_a_sharding_that_does_not_divide(folders, tree):
    with pytest.raises(ValueError, match="divi"):
        jaxgds.load(folders["item"], abstract(tree, Mesh(np.array(jax.devices()[:3]), "x"), "x"))


def test_what_is_not_a_checkpoint(tmp_path, folders):
    (tmp_path / "empty").mkdir()
    (tmp_path / "text").write_text("not a checkpoint")
    for path, why in {"missing": "no such", "empty": "no _METADATA", "text": "a file"}.items():
        with pytest.raises(CheckpointError, match=f"{tmp_path / path}: .*{why}"):
            jaxgds.load(tmp_path / path)
    (tmp_path / "cut off" / "ocdbt.process_0").mkdir(parents=True)
    with pytest.raises(CheckpointError, match="not completed"):
        jaxgds.load(tmp_path / "cut off")
    for step in ("7", "10"):
        shutil.copytree(folders["manager step"], tmp_path / "steps" / step)
    with pytest.raises(CheckpointError, match=r"CheckpointManager.*\['7', '10'\], name one"):
        jaxgds.load(tmp_path / "steps")


def test_two_items(tmp_path, tree):
    with ocp.CheckpointManager(tmp_path, item_names=("params", "ema")) as manager:
        both = ocp.args.Composite(
            params=ocp.args.StandardSave(tree), ema=ocp.args.StandardSave(tree)
        )
        manager.save(0, args=both)
    with pytest.raises(CheckpointError, match="2 of them.*'ema', 'params'.*name one"):
        jaxgds.load(tmp_path / "0")
    oracle.assert_same(jaxgds.load(tmp_path / "0" / "ema"), tree)


@pytest.mark.parametrize("damage", ["manifest", "data", "metadata", "metadata text"])
def test_a_damaged_checkpoint(tmp_path, tree, damage):
    path = pathlib.Path(oracle.save(tmp_path / "item", tree))
    if damage == "manifest":
        os.truncate(path / "manifest.ocdbt", 10)
    elif damage == "data":
        for file in path.glob("d/*"):
            os.truncate(file, 30)
    elif damage == "metadata":
        (path / "_METADATA").write_text(json.dumps({}))
    else:
        (path / "_METADATA").write_text("{")
    with pytest.raises(CheckpointError, match=str(path)):
        jaxgds.load(path, abstract(tree, mesh(2)))


def test_nothing_is_added_to_the_report_of_another_restore(tmp_path):
    """Orbax restores strings without jaxgds."""
    for name, tree in {"arrays": {"a": np.arange(9)}, "text": {"s": "only"}}.items():
        with ocp.PyTreeCheckpointer() as checkpointer:
            checkpointer.save(tmp_path / name, tree)
    jaxgds.load(tmp_path / "arrays")
    before = jaxgds.last_report()
    assert jaxgds.load(tmp_path / "text") == {"s": "only"}
    assert jaxgds.last_report() is before
