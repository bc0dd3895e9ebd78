"""Damaged Orbax metadata with checksums that hold: refused, or read as TensorStore reads it."""

import copy
import json
from collections.abc import Iterator
from urllib.parse import unquote_to_bytes

import fuzzing
import hostile
import numpy as np
import tensorstore as ts
from hypothesis import strategies as st

from jaxgds import btree, zarr
from jaxgds.errors import CheckpointError
from jaxgds.index import Extent, open_index


LIMIT = 1 << 20
VARINTS = [
    b"\0",
    b"\1",
    b"\2",
    b"\x7f",
    b"\x80\1",
    b"\xff\xff\3",
    b"\xff" * 9 + b"\1",
    b"\xff" * 10,
]
WORDS = [*VARINTS, b"d/", b"../", b"/", b"w/0", b"\0" * 8]


def place(text: str) -> btree.Reference:
    _, base, rel, offset, length = text.split(":")
    whole = unquote_to_bytes(base) + unquote_to_bytes(rel)
    return btree.Reference(unquote_to_bytes(base), whole, int(offset), int(length))


def test_nodes(tmp_path):
    """Each node alone: TensorStore shows one with `ocdbt.dump`."""
    store = ts.KvStore.open(f"file://{tmp_path}/").result()
    seen = {"refused": 0, "read": 0}

    def check(body: bytes) -> None:
        encoded = hostile.framed(btree.NODE_MAGIC, body)
        try:
            node, expanded = btree.decode_node(encoded, b"", LIMIT)
        except btree.DamagedError:
            seen["refused"] += 1
            return
        seen["read"] += 1
        assert expanded <= LIMIT
        (tmp_path / "node").write_bytes(encoded)
        dumped = ts.ocdbt.dump(store, f"btreenode::node:0:{len(encoded)}").result()
        assert dumped["height"] == node.height
        if node.height:
            theirs = [
                btree.Child(e["key"], e.get("subtree_common_prefix", b""), place(e["location"]))
                for e in dumped["entries"]
            ]
            assert node.children == theirs
        else:
            assert node.values == [
                (e["key"], e["inline_value"])
                if "inline_value" in e
                else (e["key"], place(e["indirect_value"]))
                for e in dumped["entries"]
            ]

    fuzzing.fuzz(fuzzing.mutated(fuzzing.corpus("btree"), WORDS), check, examples=3000)
    assert min(seen.values()) > 100


def test_manifests(tmp_path):
    store = ts.KvStore.open(f"file://{tmp_path}/").result()
    seen = {"refused": 0, "read": 0}

    def check(body: bytes) -> None:
        encoded = hostile.framed(btree.MANIFEST_MAGIC, body)
        try:
            root = btree.decode_manifest(encoded, LIMIT)
        except btree.DamagedError:
            seen["refused"] += 1
            return
        seen["read"] += 1
        (tmp_path / "manifest.ocdbt").write_bytes(encoded)
        try:
            newest = ts.ocdbt.dump(store).result()["versions"][-1]
        except ValueError as e:  # it looks closer at the versions before, which nobody reads here
            assert any(word in str(e) for word in ("commit_time", "eneration", "entry_height"))
            return
        location = newest["root"].get("location")
        theirs = None if location is None else (newest["root_height"], place(location))
        assert root == theirs

    fuzzing.fuzz(fuzzing.mutated(fuzzing.corpus("manifest"), WORDS), check, examples=2000)
    assert min(seen.values()) > 100


def test_trees(tmp_path):
    """A whole database with one node changed: refused, or every key as TensorStore lists it."""
    nodes = [body for body in fuzzing.corpus("btree") if body[0] == 0]
    seen = {"refused": 0, "read": 0}

    def check(example: tuple[bytes, bytes]) -> None:
        body, first = example
        node = hostile.framed(btree.NODE_MAGIC, body)
        root = hostile.inner(1, [(first, Extent("d/tree", 0, len(node)))])
        hostile.write_tree(tmp_path, [node, root], 1)
        try:
            found = open_index(tmp_path)._values
        except CheckpointError as e:
            assert str(tmp_path) in str(e)
            seen["refused"] += 1
            return
        seen["read"] += 1
        store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{tmp_path}/"}).result()
        assert {key.encode() for key in found} == set(store.list().result())

    keys = st.sampled_from([b"", b"a", b"arr", b"arr.0", b"arr.25/0", b"b/.zarray", b"z"])
    fuzzing.fuzz(st.tuples(fuzzing.mutated(nodes, WORDS), keys), check, examples=500)
    assert min(seen.values()) > 20


JSON = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e9", b"null", b"true", b"{}", b"[]"),
    *(b"[10]", b"[10,10]", b"10", b"1000000000000000000000", b"NaN", b'"<f8"', b'"bool"', b'"v2"'),
    *(
        b'"zstd"',
        b'"crc32c"',
        b'"gzip"',
        b'"transpose"',
        b'"bytes"',
        b'"big"',
        b'"sharding_indexed"',
    ),
    *(
        b'"shape"',
        b'"chunk_shape"',
        b'"codecs"',
        b'"configuration"',
        b'"/"',
        b'"F"',
        b'"|u1"',
        b"0.0",
    ),
]


def test_zarr_metadata():
    seen = {"refused": 0, "read": 0}

    def check(meta: bytes) -> None:
        v3 = b'"data_type"' in meta
        try:
            layout = zarr.parse(None if v3 else meta, meta if v3 else None, "w")
        except (CheckpointError, NotImplementedError) as e:
            assert "'w'" in str(e)
            seen["refused"] += 1
            return
        seen["read"] += 1
        theirs = opened(what_counts(json.loads(meta), v3, layout.dtype), v3)
        assert layout.shape == theirs.shape
        assert layout.dtype == theirs.dtype.numpy_dtype
        assert layout.chunk == (theirs.chunk_layout.read_chunk.shape or ())
        assert layout.stored == (theirs.chunk_layout.write_chunk.shape or ())

    corpus = fuzzing.corpus("zarr")
    edit = st.tuples(st.sampled_from("=-+"), st.integers(0, 50), st.sampled_from(VALUES))
    edits = st.lists(edit, min_size=1, max_size=3)
    edited = st.builds(with_edits, st.sampled_from(corpus), edits)
    fuzzing.fuzz(edited | fuzzing.mutated(corpus, JSON), check, examples=3000)
    assert min(seen.values()) > 100


VALUES = [
    *(
        None,
        True,
        0,
        1,
        -1,
        2,
        3,
        10,
        2**31,
        2**63,
        1.0,
        10.0,
        float("nan"),
        "",
        ".",
        "/",
        "C",
        "F",
    ),
    *(
        [],
        {},
        [10],
        [10, 10],
        [5, 5],
        [1, 1],
        [0, 10],
        [10, 10, 10],
        [10.0, 10],
        ["10", 10],
        [[10]],
    ),
    *("<f4", "<f8", "|u1", "|b1", ">f4", "<c8", "bfloat16", "int4", "float8_e4m3fn", "|V4", "<U4"),
    *("float32", "float64", "uint8", "bool", "complex64", "int2", "uint4", "float4_e2m1fn", "r16"),
    *("regular", "v2", "default", "end", "start", "little", "big", "array", [["a", "<f4", [2]]]),
    *({"id": "zstd"}, {"id": "blosc"}, {"name": "crc32c"}, {"name": "gzip"}, {"name": "bytes"}),
    *([{"name": "bytes"}], [{"name": "bytes"}, {"name": "zstd", "configuration": {"level": 1}}]),
    [{"name": "bytes"}, {"name": "crc32c"}],
]


def with_edits(text: bytes, edits) -> bytes:
    """Members of all levels changed, left out, and added."""
    meta = json.loads(text)
    for kind, number, value in edits:
        places = list(members(meta))
        if places:
            holder, key = places[number % len(places)]
            value = copy.deepcopy(value)
            if kind == "-":
                del holder[key]
            elif kind == "+" and isinstance(holder, list):
                holder.insert(key, value)
            else:
                holder[f"more{number}" if kind == "+" else key] = value
    return json.dumps(meta).encode()


def members(meta) -> Iterator[tuple]:
    if isinstance(meta, dict | list):
        for key in list(meta) if isinstance(meta, dict) else range(len(meta)):
            yield meta, key
            yield from members(meta[key])


V2 = ("zarr_format", "shape", "chunks", "dtype", "compressor", "filters", "order")
V3 = ("zarr_format", "shape", "chunk_grid", "data_type", "codecs", "chunk_key_encoding")


def what_counts(meta: dict, v3: bool, dtype: np.dtype) -> bytes:
    """The members that say where bytes are; the others, such as the fill value, put right."""
    zero = {"b": False, "c": [0.0, 0.0]}.get(dtype.kind, 0)
    some = {key: meta[key] for key in (V3 if v3 else (*V2, "dimension_separator")) if key in meta}
    more = {"node_type": "array", "fill_value": zero} if v3 else {"fill_value": None}
    for holder, key in list(members(some)):  # the level is for who compresses
        if key == "level" and type(holder[key]) is int:
            holder[key] = 1
        if key == "name" and holder[key] == "zstd":
            holder.setdefault("configuration", {}).setdefault("level", 1)
    return json.dumps(some | more).encode()


def opened(meta: bytes, v3: bool) -> ts.TensorStore:
    context = ts.Context()
    store = ts.KvStore.open("memory://w/", context=context).result()
    store.write("zarr.json" if v3 else ".zarray", meta).result()
    spec = {"driver": "zarr3" if v3 else "zarr", "kvstore": "memory://w/"}
    return ts.open(spec, context=context, open=True).result()
