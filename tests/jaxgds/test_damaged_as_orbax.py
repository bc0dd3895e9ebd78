"""Checkpoints damaged as Orbax's own compatibility tests damage theirs: restored as by stock Orbax.

What stock Orbax restores comes back the same, what it refuses is refused.
"""

import json
import pathlib
import shutil
from typing import Any

import jax
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import jaxgds.orbax


pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided:UserWarning"),
    pytest.mark.filterwarnings("ignore:Use `load` instead:DeprecationWarning"),
    # Stock Orbax leaves an event loop open when it fails.
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


def tree():
    mesh = jax.make_mesh((4, 2), ("x", "y"))
    put = lambda a, *spec: jax.device_put(a, NamedSharding(mesh, P(*spec)))  # noqa: E731
    rng = np.random.default_rng(0)
    return {
        "a": put(rng.normal(size=(64, 64)).astype(np.float32), "x", "y"),
        "b": {"c": put(rng.normal(size=(1024,)).astype(np.float16))},
        "n": put(np.int32(3)),
    }


WAYS = {
    "v0": lambda path, target: ocp.StandardCheckpointer().restore(path, target),
    "v1": lambda path, target: ocp.v1.load(path, target),
}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "v0", tree())
    with ocp.v1.Context():
        ocp.v1.save(folder / "v1", tree())
    return folder


def outcome(way: str, path: pathlib.Path, target: Any) -> tuple[str, Any]:
    try:
        return "restored", WAYS[way](path, target)
    except Exception as e:
        return "refused", e


def assert_as_stock(way: str, path: pathlib.Path, target: Any) -> str:
    stock, theirs = outcome(way, path, target)
    with jaxgds.orbax.installed():
        ours, mine = outcome(way, path, target)
    assert ours == stock, (mine, theirs)
    if ours == "restored":
        oracle.assert_same(mine, theirs)
    return ours


def remove(path: pathlib.Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink()


NAMES = [
    *("_METADATA", "_sharding", "array_metadatas", "manifest.ocdbt", "d", "ocdbt.process_0"),
    *("ocdbt.process_0/d", "ocdbt.process_0/manifest.ocdbt", "array_metadatas/process_0"),
    *("_CHECKPOINT_METADATA", "commit_success.txt", "orbax.checkpoint", "nothing"),
]


@pytest.mark.parametrize("with_target", [True, False], ids=["target", "no target"])
@pytest.mark.parametrize("damage", ["removed", "empty", "halved"])
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("way", WAYS)
def test_a_part_is_lost(saved, tmp_path, way, name, damage, with_target):
    path = pathlib.Path(shutil.copytree(saved / way, tmp_path / "c"))
    parts = [p for p in path.rglob("*") if str(p).endswith(f"/{name}")]
    for part in parts:
        if damage == "removed":
            remove(part)
            continue
        for file in [part] if part.is_file() else [f for f in part.rglob("*") if f.is_file()]:
            data = file.read_bytes()
            file.write_bytes(data[: len(data) // 2 if damage == "halved" else 0])
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree()) if with_target else None
    found = assert_as_stock(way, path, target)
    if name == "nothing":
        assert found == "restored"
    if name in ("manifest.ocdbt", "d"):
        assert found == "refused"


FIELDS = ["item_handlers", "metrics", "init_timestamp_nsecs", "commit_timestamp_nsecs"]


@pytest.mark.parametrize("field", FIELDS)
@pytest.mark.parametrize("way", WAYS)
def test_a_field_of_the_metadata_is_lost(saved, tmp_path, way, field):
    path = pathlib.Path(shutil.copytree(saved / way, tmp_path / "c"))
    file = path / "_CHECKPOINT_METADATA"
    metadata = json.loads(file.read_text())
    metadata.pop(field, None)
    file.write_text(json.dumps(metadata))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree())
    assert assert_as_stock(way, path, target) == "restored"


@pytest.mark.parametrize("way", WAYS)
def test_a_byte_has_changed(saved, tmp_path, way):
    """In the manifest, the tree and the data: some are noticed, by both or by neither."""
    path = pathlib.Path(shutil.copytree(saved / way, tmp_path / "c"))
    target = jax.tree.map(ocp.utils.to_shape_dtype_struct, tree())
    files = [f for f in path.rglob("*") if f.name == "manifest.ocdbt" or f.parent.name == "d"]
    seen = set()
    for file in files:
        data = file.read_bytes()
        for at in range(3, len(data), max(1, len(data) // 4)):
            file.write_bytes(data[:at] + bytes([data[at] ^ 0x10]) + data[at + 1 :])
            seen.add(assert_as_stock(way, path, target))
        file.write_bytes(data)
    assert seen == {"restored", "refused"}
