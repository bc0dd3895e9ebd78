"""`jaxgds.load` without Orbax: what goes that way, what does not, and that both are equal."""

import dataclasses
import gc
import subprocess
import sys
from collections import namedtuple
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from test_orbax import SETTINGS, PyTree

import jaxgds
from jaxgds.arrays_only import restore_arrays


Moments = namedtuple("Moments", "mu nu")


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Pair:
    first: Any
    second: Any


WHERE = NamedSharding(Mesh(np.array(jax.devices()[:4]), "x"), P("x"))
EVERYWHERE = NamedSharding(WHERE.mesh, P())


def array(start: int = 0, dtype: Any = np.float32) -> jax.Array:
    return jax.device_put((np.arange(8) + start).astype(dtype), WHERE)


def abstract(tree: Any, sharding=WHERE) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def without_orbax(path: str, target: Any) -> tuple[Any] | None:
    with open(f"{path}/_METADATA", "rb") as file:
        return restore_arrays(path, file.read(), target, strict=True)


def stock(path: str, target: Any) -> Any:
    return PyTree().restore(path, target)


class Model(nnx.Module):
    def __init__(self):
        rngs = nnx.Rngs(0)
        self.first = nnx.Linear(8, 16, rngs=rngs)
        self.layers = nnx.List([nnx.Linear(16, 16, rngs=rngs) for _ in range(2)])


TREES = {
    "dict": {"a": array(), "b": {"c": array(1)}},
    "lists and tuples": [array(), (array(1), [array(2)])],
    "one array": array(),
    "named tuple": {"opt": Moments(mu=array(), nu={"w": array(1)})},
    "dataclass": Pair(first=array(), second=[array(1)]),
    "numbers for keys": {0: array(), 10: {2: array(1)}},
    "dots and slashes in keys": {"a.b": array(), "c/d": array(1), "": array(2)},
    "nnx.State": nnx.state(Model()),
    "many dtypes": {
        name: array(dtype=name)
        for name in ("bfloat16", "float8_e4m3fn", "int4", "bool", "complex64", "int16")
    },
    "keys": {"key": jax.random.key(3), "keys": jax.random.split(jax.random.key(0), 8)},
}


@pytest.mark.parametrize("fmt", [oracle.FORMATS[0], oracle.FORMATS[-1]], ids=oracle.format_id)
@pytest.mark.parametrize("name", TREES)
def test_as_stock_orbax(tmp_path, name, fmt):
    path = oracle.save(tmp_path / "c", TREES[name], fmt)
    target = abstract(TREES[name], EVERYWHERE if name in ("keys", "nnx.State") else WHERE)
    restored = without_orbax(path, target)
    assert restored is not None
    oracle.assert_same(restored[0], stock(path, target))
    report = oracle.last_report()
    assert report.arrays == len(jax.tree.leaves(target)) and not report.fallbacks
    assert report.seconds >= report.index_seconds + report.plan_seconds + report.read_seconds


def test_casts_and_numpy_arrays(tmp_path):
    path = oracle.save(tmp_path / "c", {"numpy": np.arange(8.0, dtype=np.float32), "jax": array()})
    some = jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=WHERE)
    target = {"numpy": some, "jax": some}
    restored = without_orbax(path, target)
    assert restored is not None
    oracle.assert_same(restored[0], stock(path, target))


def plain() -> dict[str, Any]:
    return {"a": array(), "b": [array(1), array(2)]}


def leaf(shape: tuple[int, ...] = (8,), dtype: Any = np.float32, **more) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, **{"sharding": WHERE, **more})


@pytest.mark.parametrize(
    ("tree", "target", "refused"),
    [
        pytest.param(plain(), {"a": leaf()}, "b", id="a part"),
        pytest.param(plain(), {"a": leaf(), "b": [leaf()]}, "b", id="fewer in a list"),
        pytest.param(plain(), {**abstract(plain()), "c": leaf()}, "c", id="more"),
        pytest.param(plain(), {"a": leaf(), "b": {"0": leaf(), "1": leaf()}}, "b", id="no list"),
        pytest.param(plain(), {**abstract(plain()), "c": {}}, "c", id="an empty dict more"),
        pytest.param(plain(), {"a": leaf((4,)), "b": [leaf()] * 2}, "shape", id="another shape"),
        pytest.param(plain(), {"a": leaf(dtype=np.int32), "b": [leaf()] * 2}, None, id="a cast"),
        pytest.param(plain(), {"a": leaf(sharding=None), "b": [leaf()] * 2}, None, id="as saved"),
        pytest.param(plain(), plain(), None, id="arrays for a target"),
        pytest.param({"a": array(), "n": None}, {"a": leaf(), "n": None}, None, id="None"),
        pytest.param({"a": array(), "n": ()}, {"a": leaf(), "n": ()}, None, id="an empty tuple"),
        pytest.param({"a": array(), "n": 3}, {"a": leaf(), "n": 0}, None, id="a number"),
        pytest.param({"a": array(), "s": "text"}, {"a": leaf(), "s": ""}, None, id="a string"),
    ],
)
# Of a restore that failed, stock Orbax leaves coroutines to the garbage collector.
@pytest.mark.filterwarnings("ignore:coroutine 'Store._get_array_metadatas' was:RuntimeWarning")
def test_what_is_left_to_orbax(tmp_path, tree, target, refused):
    path = oracle.save(tmp_path / "c", tree)
    assert without_orbax(path, target) is None
    if refused:
        with pytest.raises(ValueError, match=refused):
            jaxgds.load(path, target)
        with pytest.raises(ValueError, match=refused):
            stock(path, target)
        gc.collect()  # here, and not in another test
    else:
        ours = jaxgds.load(path, target)
        assert jax.tree.structure(ours) == jax.tree.structure(target)
        for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(tree), strict=True):
            assert a == b if isinstance(b, str) else np.array_equal(a, b)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_caller(tmp_path, setting):
    tree = {"f32": array(), "inf": array(1) * np.inf, "int4": array(dtype="int4")}
    tree["key"] = jax.random.key(1)
    path, target = oracle.save(tmp_path / "c", tree), abstract(tree, EVERYWHERE)
    target["inf"] = target["inf"].update(dtype=jnp.bfloat16)
    with SETTINGS[setting]():
        restored, expected = without_orbax(path, target), stock(path, target)
    assert restored is not None
    oracle.assert_same(restored[0], expected)


@pytest.mark.parametrize("transformed", [jax.vmap, jax.grad, jax.jit])
def test_while_something_is_traced(tmp_path, transformed):
    tree = {"f32": array(), "key": jax.random.key(1)}
    path, target = oracle.save(tmp_path / "c", tree), abstract(tree, EVERYWHERE)
    restored = []

    def call(x):
        restored.append(without_orbax(path, target))
        return x.sum()

    transformed(call)(jnp.ones(3))
    oracle.assert_same(restored[0][0], stock(path, target))


def test_a_checkpoint_that_is_being_written(tmp_path):
    path = oracle.save(tmp_path / "c", plain())
    unfinished = tmp_path / "c.orbax-checkpoint-tmp-0"
    (tmp_path / "c").rename(unfinished)
    for refuses in (stock, jaxgds.load):
        with pytest.raises(ValueError, match="incomplete"):
            refuses(str(unfinished), abstract(plain()))
    unfinished.rename(path)
    oracle.assert_same(jaxgds.load(path, abstract(plain())), plain())


names = st.sampled_from(["a", "b", "a.b", "0", "1", "c/d"])
trees = st.recursive(
    st.integers(0, 9),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(names, inner, max_size=3),
        st.dictionaries(st.integers(0, 3), inner, max_size=3),
    ),
    max_leaves=6,
)


@settings(max_examples=40, deadline=None)
@given(saved=trees, other=trees, same=st.booleans())
def test_trees_fit_or_not_as_orbax_says(tmp_path_factory, saved, other, same):
    """Keys of several types, of one name, empty containers."""
    saved, target = (jax.tree.map(array, tree) for tree in (saved, saved if same else other))
    try:
        path = oracle.save(tmp_path_factory.mktemp("t") / "c", saved)
    except (ValueError, TypeError):  # what Orbax does not save
        return
    restored = without_orbax(path, abstract(target))
    if restored is not None:
        oracle.assert_same(restored[0], stock(path, abstract(target)))


def test_orbax_is_not_imported(tmp_path):
    path = oracle.save(tmp_path / "c", plain())
    script = """
import sys, jax, jaxgds
sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
leaf = jax.ShapeDtypeStruct((8,), "float32", sharding=sharding)
restored = jaxgds.load(sys.argv[1], {"a": leaf, "b": [leaf, leaf]})
print(restored["b"][1].sum(), "orbax" in sys.modules)
"""
    done = subprocess.run(
        [sys.executable, "-c", script, path], capture_output=True, text=True, check=True
    )
    assert done.stdout == "44.0 False\n"
