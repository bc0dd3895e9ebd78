"""Hostile safetensors files: taken and refused as by the reference; indices that point outside."""

import json
import math
import os
import pathlib
import struct

import fuzzing
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import strategies as st
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load_file, save_file

import jaxgds
from jaxgds.safetensors import open_safetensors, read_header
from jaxgds.safetensors_header import DTYPES, PACKED_BITS


GOOD = '"dtype":"U8","shape":[4],"data_offsets":[0,4]'


def one(dtype='"U8"', shape="[4]", offsets="[0,4]") -> str:
    return f'{{"a":{{"dtype":{dtype},"shape":{shape},"data_offsets":{offsets}}}}}'


def also(more: str) -> str:
    return f'{{"a":{{{GOOD},{more}}}}}'


def two(shape: str, offsets="[4,4]", dtype="U8") -> str:
    second = f'"b":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}'
    return f'{{"a":{{{GOOD}}},{second}}}'


HEADERS = {
    "good": one(),
    # sizes and offsets
    "hole": two("[2]", "[6,8]"),
    "overlap": two("[2]", "[2,4]"),
    "same place": two("[4]", "[0,4]"),
    "out of order": f'{{"b":{{"dtype":"U8","shape":[2],"data_offsets":[4,6]}},"a":{{{GOOD}}}}}',
    "reversed": one(offsets="[4,0]"),
    "negative": one(offsets="[-4,0]"),
    "minus zero": one(offsets="[-0,4]"),
    "one offset": one(offsets="[4]"),
    "three offsets": one(offsets="[0,4,4]"),
    "beyond the file": one(shape="[1000]", offsets="[0,1000]"),
    "beyond 64 bits": one(shape="[18446744073709551620]", offsets="[0,18446744073709551620]"),
    "product beyond 64 bits": one(shape="[4294967296,4294967297]", offsets="[0,4294967296]"),
    "product that wraps to the size": one(shape="[4611686018427387905,4]"),
    "zero size": two("[0]"),
    "zero size, large": two("[18446744073709551615,0]"),
    "zero size beyond 64 bits": two("[9223372036854775808,2,0]"),
    "zero size, zero first": two("[0,18446744073709551615,18446744073709551615]"),
    "scalar": one(shape="[]", offsets="[0,1]"),
    "rank 100": one(shape=f"[4{',1' * 99}]"),
    "float in the shape": one(shape="[4.0]"),
    "bool in the shape": one(shape="[true,4]"),
    "string in the shape": one(shape='["4"]'),
    "shape is no list": one(shape="4"),
    "shape is an object": one(shape="{}"),
    # dtypes
    "wrong dtype size": one('"F32"'),
    "unknown dtype": one('"U9"'),
    "lower case dtype": one('"u8"'),
    "dtype is a number": one("8"),
    "dtype is a list": one('["U8"]'),
    "dtype as an enum of serde": one('{"U8":null}'),
    "dtype as an enum with content": one('{"U8":{}}'),
    "two dtypes": one('{"U8":null,"I8":null}'),
    "packed": one('"F4"', "[8]"),
    "packed, no whole bytes": one('"F4"', "[7]"),
    "packed in 6 bits": one('"F6_E2M3"', "[4]", "[0,3]"),
    # fields
    "missing field": '{"a":{"dtype":"U8","shape":[4]}}',
    "field more": also('"x":1'),
    "field more, nested": also('"x":[{"y":[null,true,"z"]}]'),
    "field twice": also('"dtype":"U8"'),
    "other field twice": also('"x":1,"x":2'),
    "fields as a list": '{"a":["U8",[4],[0,4]]}',
    "fields as a long list": '{"a":["U8",[4],[0,4],0]}',
    "tensor is null": '{"a":null}',
    "tensor is a number": '{"a":4}',
    # keys
    "key twice": f'{{"a":{{{GOOD}}},"a":{{{GOOD}}}}}',
    "key twice, the first wrong": f'{{"a":5,"a":{{{GOOD}}}}}',
    "key twice, the second elsewhere": two("[4]", "[4,8]").replace('"b"', '"a"'),
    "empty key": one().replace('"a"', '""'),
    "NUL in a key": one().replace('"a"', '"\\u0000"'),
    "control character in a key": one().replace('"a"', '"\x01"'),
    "surrogates in a key": one().replace('"a"', '"\\ud83d\\ude00"'),
    "half a pair in a key": one().replace('"a"', '"\\ud83d"'),
    "other half in a key": one().replace('"a"', '"\\ude00x"'),
    "half a pair elsewhere": also('"x":"\\ud83d"'),
    "not UTF-8": b'{"\xff":1}',
    "overlong UTF-8": b'{"\xc0\x80":1}',
    # metadata
    "metadata": f'{{"__metadata__":{{"k":"v"}},"a":{{{GOOD}}}}}',
    "metadata last": f'{{"a":{{{GOOD}}},"__metadata__":{{"k":"v"}}}}',
    "metadata null": f'{{"__metadata__":null,"a":{{{GOOD}}}}}',
    "metadata twice": f'{{"__metadata__":null,"__metadata__":null,"a":{{{GOOD}}}}}',
    "metadata with a number": f'{{"__metadata__":{{"k":1}},"a":{{{GOOD}}}}}',
    "metadata with a key twice": f'{{"__metadata__":{{"k":"v","k":"w"}},"a":{{{GOOD}}}}}',
    "metadata is a list": f'{{"__metadata__":[],"a":{{{GOOD}}}}}',
    "metadata is a tensor": f'{{"__metadata__":{{{GOOD}}}}}',
    # JSON
    "nothing": "",
    "empty": "{}",
    "list": "[]",
    "string": '"a"',
    "cut": one()[:-1],
    "trailing comma": one()[:-1] + ",}",
    "space around": " \t\r\n" + one() + " \t\r\n",
    "form feed": "\f" + one(),
    "byte order mark": "\ufeff" + one(),
    "NUL at the end": one() + "\0",
    "two objects": one() + "{}",
    "comment": "/**/" + one(),
    "NaN": also('"x":NaN'),
    "infinity": also('"x":-Infinity'),
    "large number": also('"x":1e308'),
    "number out of range": also('"x":1e309'),
    "long number": also(f'"x":{10**300}'),
    "longer number": also(f'"x":{"9" * 5000}'),
    "small number": also('"x":1e-999999'),
    "leading zero": also('"x":01'),
    "depth 127": also(f'"x":{"[" * 125}{"]" * 125}'),
    "depth 128": also(f'"x":{"[" * 126}{"]" * 126}'),
    "depth 128 of objects": also(f'"x":{'{"y":' * 126}1{"}" * 126}'),
    "depth 100000": also(f'"x":{"[" * 100000}{"]" * 100000}'),
    "depth without end": "[" * 100000,
    **{f"dtype {name}": one(f'"{name}"', "[0]", "[0,0]") for name in (*DTYPES, *PACKED_BITS)},
}


def whole_file(header: str | bytes, body: int) -> bytes:
    text = header if isinstance(header, bytes) else header.encode()
    return struct.pack("<Q", len(text)) + text + bytes(body)


def reference(file) -> dict[str, tuple[str, list[int]]] | None:
    """Name -> (dtype, shape) as the reference implementation reads a header; None if it refuses."""
    try:
        with safe_open(file, "np") as f:
            slices = {name: f.get_slice(name) for name in f.keys()}  # noqa: SIM118
            return {name: (s.get_dtype(), s.get_shape()) for name, s in slices.items()}
    except (SafetensorError, OSError, ValueError):
        return None


def ours(file) -> dict[str, tuple[str, list[int]]] | None:
    names = {dtype: name for name, dtype in DTYPES.items()}
    try:
        found = read_header(str(file)).items()
    except jaxgds.CheckpointError as e:
        assert str(file) in str(e)
        return None
    return {
        name: (names[a.layout.dtype], list(a.layout.shape))
        if not isinstance(a, tuple)
        else (a.dtype, list(a.shape))
        for name, a in found
    }


@pytest.mark.parametrize("case", HEADERS)
def test_headers_are_taken_and_refused_as_by_the_reference(tmp_path, case):
    file = tmp_path / "x.safetensors"
    for body in (0, 3, 4, 6, 8):
        file.write_bytes(whole_file(HEADERS[case], body))
        assert ours(file) == reference(file), body


def test_the_corpus_has_both_kinds(tmp_path):
    file = tmp_path / "x.safetensors"
    taken = 0
    for header in HEADERS.values():
        file.write_bytes(whole_file(header, 4))
        taken += reference(file) is not None
    assert 20 < taken < len(HEADERS) - 40


LENGTHS = [0, 1, 7, 10**6, 100_000_000, 100_000_001, 2**31, 2**32, 2**63, 2**64 - 8, 2**64 - 1]


@pytest.mark.parametrize("length", LENGTHS)
def test_header_lengths_that_lie(tmp_path, length):
    """Also in a file that is long enough: it is sparse, and what is refused is not read."""
    file = tmp_path / "x.safetensors"
    for size in (0, 200_000_000):
        file.write_bytes(struct.pack("<Q", length) + one().encode() + bytes(4))
        os.truncate(file, max(size, file.stat().st_size))
        assert reference(file) is None and ours(file) is None


TOKENS = [
    *(b'"', b"{", b"}", b"[", b"]", b",", b":", b"0", b"-", b"1e9", b"null", b"\\u0000", b"\xff"),
    *(b'"a"', b'"b"', b'"dtype"', b'"shape"', b'"data_offsets"', b'"__metadata__"', b'"F32"'),
    *(b'"U8"', b"[0,4]", b"[4,8]", b"[]", b"{}", b"18446744073709551615", b" ", b"4", b"8"),
]


SHAPES = ["[]", "[4]", "[2,2]", "[1,4,1]", "[0]", "[0,9999999999999]", "[8]", "[16]", "[3]"]
MORE = [*[""] * 30, ',"x":[1.5,{"y":null}]', ',"x":"\\ud83d"', ',"shape":[4]', ',"x":1e400']


def composed() -> st.SearchStrategy[tuple[bytes, int]]:
    """Headers that are nearly right, or quite, and how many bytes of data follow."""
    tensor = st.tuples(
        st.sampled_from(["a", "b", "c", "d", "e", "", "\\u00e9"]),
        st.sampled_from([*DTYPES, *PACKED_BITS]),
        st.sampled_from(SHAPES),
        st.sampled_from([*[0] * 30, 1, -1]),
        st.sampled_from(MORE),
    )

    def compose(tensors, shuffle) -> tuple[bytes, int]:
        end, entries = 0, []
        for name, dtype, shape, off, more in tensors:
            bits = PACKED_BITS.get(dtype) or DTYPES[dtype].itemsize * 8
            start, end = end, end + off + math.prod(json.loads(shape)) * bits // 8
            fields = f'"dtype":"{dtype}","shape":{shape},"data_offsets":[{start},{end}]{more}'
            entries.append(f'"{name}":{{{fields}}}')
        if shuffle:
            entries.reverse()
        return f"{{{','.join(entries)}}}".encode(), max(end, 0)

    return st.builds(compose, st.lists(tensor, max_size=4), st.booleans())


def test_damaged_headers_are_taken_and_refused_as_by_the_reference(tmp_path):
    inputs = fuzzing.corpus("safetensors")
    file = tmp_path / "x.safetensors"
    seen = [0, 0]

    def check(example: tuple[bytes, int]) -> None:
        file.write_bytes(whole_file(*example))
        expected = reference(file)
        assert ours(file) == expected
        seen[expected is not None] += 1

    damaged = st.tuples(fuzzing.mutated(inputs, TOKENS), st.sampled_from([4, 8]))
    fuzzing.fuzz(damaged | composed(), check, examples=1500)
    assert min(seen) > 100


def test_a_tensor_that_cannot_be_read_does_not_stand_in_the_way_of_others(tmp_path):
    file = tmp_path / "x.safetensors"
    text = two("[8]", "[4,8]", "F4")
    file.write_bytes(struct.pack("<Q", len(text)) + text.encode() + bytes(range(8)))
    got = jaxgds.load(file, rename=lambda name: name if name == "a" else None)
    assert got["a"].tolist() == [0, 1, 2, 3]
    with pytest.raises(NotImplementedError, match=r"x\.safetensors.*'b'.*F4"):
        jaxgds.load(file)


@pytest.mark.parametrize("shape", ["[18446744073709551615,0]", f"[0{',1' * 99}]", "[0,9999999999]"])
def test_shapes_beyond_what_arrays_can_have(tmp_path, shape):
    file = tmp_path / "x.safetensors"
    file.write_bytes(whole_file(two(shape), 4))
    assert reference(file)
    try:
        jaxgds.load(file)
    except (ValueError, NotImplementedError) as e:
        assert "x.safetensors" in str(e) and "'b'" in str(e)


# Files outside of the directory


@pytest.fixture
def outside(tmp_path) -> pathlib.Path:
    file = tmp_path / "outside.safetensors"
    save_file({"a": np.arange(4, dtype=np.int8)}, file)
    return file


def indexed(folder: pathlib.Path, file: str) -> pathlib.Path:
    folder.mkdir(parents=True, exist_ok=True)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    return index


POINTING_OUT = [
    "../outside.safetensors",
    "./x/../../outside.safetensors",
    "{absolute}",
    "..",
    ".",
    "",
]


@pytest.mark.parametrize("file", POINTING_OUT)
def test_an_index_points_outside(tmp_path, outside, file):
    index = indexed(tmp_path / "model", file.replace("{absolute}", str(outside)))
    for path in (index, index.parent):
        with pytest.raises(jaxgds.CheckpointError, match=r"index\.json.*outside"):
            open_safetensors(str(path))


@pytest.mark.parametrize("file", ["\0", "\ud800", "x" * 5000, "nothing.safetensors", "sub"])
def test_an_index_points_at_no_file(tmp_path, file):
    index = indexed(tmp_path / "model", file)
    (index.parent / "sub").mkdir()
    with pytest.raises(jaxgds.CheckpointError, match="model"):
        open_safetensors(str(index))


LINKS = [(link, index) for link in ("relative", "absolute", "chain") for index in (True, False)]


@pytest.mark.parametrize(("link", "with_index"), [*LINKS, ("folder", True)])
def test_a_link_leads_outside(tmp_path, outside, link, with_index):
    folder = tmp_path / "model"
    folder.mkdir()
    name = "a.safetensors"
    if link == "folder":
        (folder / "sub").symlink_to(tmp_path)
        name = "sub/outside.safetensors"
    elif link == "chain":
        (folder / "b").symlink_to(outside)
        (folder / name).symlink_to("b")
    else:
        (folder / name).symlink_to(outside if link == "absolute" else "../outside.safetensors")
    if with_index:
        indexed(folder, name)
    with pytest.raises(jaxgds.CheckpointError, match="symbolic link to .*outside"):
        open_safetensors(str(folder))


def test_links_that_stay_inside_and_links_that_the_caller_names(tmp_path, outside):
    folder = tmp_path / "model"
    indexed(folder, "sub/../linked.safetensors")
    outside.rename(folder / "real")
    (folder / "linked.safetensors").symlink_to("real")
    (tmp_path / "other name").symlink_to(folder)
    (tmp_path / "a.safetensors").symlink_to(folder / "real")
    for path in (folder, tmp_path / "other name", tmp_path / "a.safetensors"):
        assert jaxgds.load(path)["a"].tolist() == [0, 1, 2, 3]


def test_two_names_of_one_file_in_an_index(tmp_path):
    save_file({n: np.ones(2, np.float32) for n in "ab"}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    names = {"a": "x.safetensors", "b": "./x.safetensors"}
    index.write_text(json.dumps({"weight_map": names}))
    assert sorted(jaxgds.load(index)) == ["a", "b"]


@pytest.mark.parametrize("linked_cache", [False, True])
def test_the_cache_of_hugging_face(tmp_path, linked_cache):
    """Its snapshots are links to blobs of the same repository, and those alone are followed."""
    cache = tmp_path / "real" / "hub"
    repository = cache / "models--org--name"
    snapshot = repository / "snapshots" / "0123abcd"
    for folder in (snapshot, repository / "blobs", cache / "models--org--other" / "blobs"):
        folder.mkdir(parents=True)
    tensors = {"a": np.arange(6, dtype=np.float32)}
    save_file(tensors, repository / "blobs" / "f00d")
    save_file(tensors, cache / "models--org--other" / "blobs" / "beef")
    index = {"weight_map": {"a": "model-00001-of-00001.safetensors"}}
    (repository / "blobs" / "cafe").write_text(json.dumps(index))
    (snapshot / "model.safetensors.index.json").symlink_to("../../blobs/cafe")
    shard = snapshot / "model-00001-of-00001.safetensors"
    shard.symlink_to("../../blobs/f00d")
    path = snapshot
    if linked_cache:
        (tmp_path / "link").symlink_to(cache)
        path = tmp_path / "link" / snapshot.relative_to(cache)
    want = load_file(shard)["a"]
    for name in (path, path / "model.safetensors.index.json", path / shard.name):
        assert jnp.array_equal(jaxgds.load(name)["a"], want)
    shard.unlink()
    shard.symlink_to("../../../models--org--other/blobs/beef")
    with pytest.raises(jaxgds.CheckpointError, match="symbolic link to .*models--org--other"):
        jaxgds.load(path)


def test_a_pipe_is_no_checkpoint(tmp_path):
    """Nobody writes to it: who opened it to read would wait forever."""
    file = tmp_path / "x.safetensors"
    os.mkfifo(file)
    for path in (file, tmp_path):
        with pytest.raises(jaxgds.CheckpointError, match=r"x\.safetensors.*regular file"):
            open_safetensors(str(path))
