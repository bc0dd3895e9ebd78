"""The OCDBT writer against TensorStore, which reads what it wrote."""

import os
import tempfile
from pathlib import Path

import pytest
import tensorstore as ts
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgds import ocdbt
from jaxgds.index import Extent, open_index


KEYS = st.text(st.characters(codec="utf-8"), max_size=40) | st.builds(
    "model.layers.{}.{}".format, st.integers(0, 300), st.sampled_from("abc")
)
VALUES = st.binary(max_size=200) | st.binary(min_size=1025, max_size=3000)


def write(folder, values: dict[str, bytes], node_bytes: int) -> None:
    """A database with the long values in two files, each at a multiple of 512."""
    placed, files = {}, [bytearray(), bytearray()]
    for i, (key, value) in enumerate(values.items()):
        placed[key] = value
        if len(value) > ocdbt.MAX_INLINE:
            file = files[i % 2]
            file += bytes(-len(file) % 512)
            placed[key] = Extent(f"d/{i % 2}", len(file), len(value))
            file += value
    nodes, manifest = ocdbt.encode(placed, "d/nodes", node_bytes)
    os.makedirs(f"{folder}/d", exist_ok=True)
    contents = {"d/0": files[0], "d/1": files[1], "d/nodes": nodes, "manifest.ocdbt": manifest}
    for name, content in contents.items():
        Path(folder, name).write_bytes(content)


def read(folder) -> dict[str, bytes]:
    base = {"driver": "file", "path": f"{folder}/"}
    store = ts.KvStore.open({"driver": "ocdbt", "base": base}).result()
    return {key.decode(): store.read(key).result().value for key in store.list().result()}


def height(folder) -> int:
    dump = ts.ocdbt.dump(ts.KvStore.open(f"file://{folder}/").result()).result()
    return dump["versions"][-1]["root_height"]


@settings(deadline=None)
@given(st.dictionaries(KEYS, VALUES, min_size=1, max_size=60), st.sampled_from((64, 400, 1 << 20)))
def test_tensorstore_reads_every_value(values, node_bytes):
    with tempfile.TemporaryDirectory() as folder:
        write(folder, values, node_bytes)
        assert read(folder) == values
        assert set(open_index(folder)._values) == set(values)


@pytest.mark.parametrize(("node_bytes", "levels"), [(1 << 20, 0), (1 << 14, 1), (600, 3)])
def test_a_large_database_has_levels(tmp_path, node_bytes, levels):
    values = {f"model.layers.{i}.mlp.up_proj.weight/0.{i % 8}": bytes(i % 90) for i in range(2000)}
    write(tmp_path, values, node_bytes)
    assert height(tmp_path) == levels
    assert read(tmp_path) == values


def test_tensorstore_adds_to_a_database(tmp_path):
    values = {f"key{i}": os.urandom(i) for i in range(0, 3000, 100)}
    write(tmp_path, values, 200)
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
    store["key150"] = b"new"
    del store["key200"]
    del values["key200"]
    assert read(tmp_path) == values | {"key150": b"new"}


def test_a_damaged_node_is_noticed(tmp_path):
    write(tmp_path, {"a": b"1", "b": b"2"}, 1 << 20)
    nodes = bytearray(Path(tmp_path, "d/nodes").read_bytes())
    nodes[-6] ^= 1
    Path(tmp_path, "d/nodes").write_bytes(nodes)
    with pytest.raises(ValueError, match="CRC-32C"):
        read(tmp_path)


def test_refuses_what_the_format_cannot_hold():
    with pytest.raises(ValueError, match="at least one value"):
        ocdbt.encode({}, "d/nodes")
    with pytest.raises(ValueError, match="65535"):
        ocdbt.encode({"k" * 65536: b""}, "d/nodes")
