"""Hostile Orbax checkpoints: refused with a CheckpointError, before memory is spent."""

import json
import os
import pathlib
import shutil
import subprocess
import sys

import hostile
import numpy as np
import pytest
import tensorstore as ts
from hostile import NODE_MAGIC, change, framed, honest, inner, leaf, write_tree

import jaxgds
from jaxgds.crc import crc32c
from jaxgds.index import Extent, open_index


def refused(path: pathlib.Path, match: str = "") -> None:
    with pytest.raises(jaxgds.CheckpointError, match=match) as e:
        open_index(path).array("w")
    assert str(path) in str(e.value)


def tensorstore_reads(path: pathlib.Path) -> dict[bytes, bytes]:
    store = ts.KvStore.open({"driver": "ocdbt", "base": f"file://{path}/"}).result()
    return {key: store.read(key).result().value for key in store.list().result()}


# Trees


LEADING_OUT = [
    "../secret",
    "d/../../secret",
    "/etc/hostname",
    "..",
    "d/..",
    "d/./x",
    "d//x",
    "a\0b",
]


@pytest.mark.parametrize("file", LEADING_OUT)
@pytest.mark.parametrize("what", ["value", "node"])
def test_a_reference_out_of_the_checkpoint(tmp_path, file, what):
    """The file is there, and would do."""
    path = tmp_path / "item"
    entries = [(b"w/.zarray", b"{}"), (b"w/0", Extent(file, 0, 5000))]
    if what == "value":
        write_tree(path, [leaf(entries)], 0)
    else:
        node = leaf([(b"w/.zarray", b"{}")])
        (tmp_path / "secret").write_bytes(node)
        write_tree(path, [inner(1, [(b"w/.zarray", Extent(file, 0, len(node)))])], 1)
    (tmp_path / "secret").touch()
    refused(path, "no file of the checkpoint")


@pytest.mark.parametrize("offset, nbytes", [(0, 10**6), (10**6, 1), (10**18, 10**18)])
def test_a_value_past_the_end_of_its_file(tmp_path, offset, nbytes):
    honest(tmp_path / "item", zstd=False)
    file = next(
        v.file for v in hostile.values_of(tmp_path / "item").values() if isinstance(v, Extent)
    )
    change(tmp_path / "item", {"w/0": Extent(file, offset, nbytes)})
    with pytest.raises(jaxgds.CheckpointError, match="'w'.*is not in the [0-9]+ bytes") as e:
        jaxgds.load(tmp_path / "item")
    assert os.path.basename(file) in str(e.value)


@pytest.mark.parametrize("offset, nbytes", [(2**62, 2**62), (2**63, 1), (2**64 - 1, 2**64 - 1)])
def test_a_range_that_no_file_has(tmp_path, offset, nbytes):
    write_tree(tmp_path, [leaf([(b"w/0", Extent("d/tree", offset, nbytes))])], 0)
    refused(tmp_path, "no range of a file|no array 'w'|is not in")


@pytest.mark.parametrize("offset, nbytes", [(0, 10**6), (10**6, 18), (2**62, 2**61), (0, 0)])
def test_a_node_past_the_end_of_its_file(tmp_path, offset, nbytes):
    write_tree(tmp_path, [inner(1, [(b"w", Extent("d/tree", offset, nbytes))])], 1)
    refused(tmp_path, "truncated|too few")


def test_a_node_below_itself(tmp_path):
    """Whatever height it says it has, it cannot be the one of its own child."""
    size = len(inner(1, [(b"w", Extent("d/tree", 0, 100))]))
    write_tree(tmp_path, [inner(1, [(b"w", Extent("d/tree", 0, size))])], 1)
    assert len((tmp_path / "d" / "tree").read_bytes()) == size
    refused(tmp_path, "twice|height")


@pytest.mark.parametrize("said", [0, 1, 3, 255])
def test_heights_that_do_not_fit(tmp_path, said):
    below = leaf([(b"w/.zarray", b"{}")])
    above = inner(2, [(b"w", Extent("d/tree", 0, len(below)))])
    write_tree(tmp_path, [below, above], said)
    refused(tmp_path, "height")


def test_a_tree_of_255_levels(tmp_path):
    """It is a valid one, and of 255 small nodes."""
    nodes, at = [leaf([(b"w/.zarray", b"{}"), (b"w/0", b"value")])], 0
    for height in range(1, 256):
        below = Extent("d/tree", at, len(nodes[-1]))
        at += len(nodes[-1])
        nodes.append(inner(height, [(b"w/.zarray", below)]))
    write_tree(tmp_path, nodes, 255)
    found = open_index(tmp_path)._values
    assert {k.encode(): v for k, v in found.items()} == tensorstore_reads(tmp_path)


def test_a_tree_that_doubles_at_each_level(tmp_path):
    """60 nodes and 2^59 ways through them."""
    nodes, at = [leaf([(b"a", b"value")])], 0
    for height in range(1, 60):
        below = Extent("d/tree", at, len(nodes[-1]))
        at += len(nodes[-1])
        nodes.append(inner(height, [(b"a", below), (b"b", below)]))
    write_tree(tmp_path, nodes, 59)
    refused(tmp_path, "twice")


@pytest.mark.parametrize("keys", [(b"b", b"a"), (b"a", b"a")])
def test_keys_out_of_order(tmp_path, keys):
    write_tree(tmp_path, [leaf([(key, b"value") for key in keys])], 0)
    refused(tmp_path, "out of order")
    with pytest.raises(ValueError, match="key order"):
        tensorstore_reads(tmp_path)


def test_keys_out_of_order_over_nodes(tmp_path):
    first, second = leaf([(b"a", b"1"), (b"x", b"2")]), leaf([(b"m", b"3")])
    places = Extent("d/tree", 0, len(first)), Extent("d/tree", len(first), len(second))
    root = inner(1, [(b"a", places[0]), (b"m", places[1])])
    write_tree(tmp_path, [first, second, root], 1)
    refused(tmp_path, "out of order")


def test_a_key_below_what_the_parent_says(tmp_path):
    node = leaf([(b"a", b"1")])
    write_tree(tmp_path, [node, inner(1, [(b"b", Extent("d/tree", 0, len(node)))])], 1)
    refused(tmp_path, "parent")


def body_of(node: bytes) -> bytes:
    return node[14:-4]


def test_no_length_in_a_node_is_believed(tmp_path):
    """Every byte of a node's body replaced, with a checksum that holds: an error, or a tree."""
    entries = [(b"w/.zarray", b"{}"), *((b"w/%d" % i, Extent("d/x", i, 9)) for i in range(4))]
    body = body_of(leaf(entries))
    root = inner(1, [(b"w/.zarray", Extent("d/tree", 0, 18 + len(body)))])
    outcomes = set()
    for at in range(len(body)):
        for byte in (0, 1, 0x7F, 0x80, 0xFF):
            changed = framed(NODE_MAGIC, body[:at] + bytes([byte]) + body[at + 1 :])
            write_tree(tmp_path, [changed, root], 1)
            try:
                outcomes.add(len(open_index(tmp_path)._values))
            except jaxgds.CheckpointError:
                outcomes.add("refused")
    assert outcomes >= {"refused", 5}


@pytest.mark.parametrize("nbytes", [0, 1, 100, 4095, 4096, 4097, 10000, 2**16, 2**17 - 3])
def test_crc32c(nbytes):
    """The value of the standard's example, and both ways to compute it."""
    assert crc32c(b"123456789") == 0xE3069283
    data = np.random.default_rng(nbytes).bytes(nbytes)
    bits = 0xFFFFFFFF
    for byte in data:
        bits ^= byte
        for _ in range(8):
            bits = (bits >> 1) ^ (0x82F63B78 if bits & 1 else 0)
    assert crc32c(data) == bits ^ 0xFFFFFFFF


# zarr metadata


FORMATS = [(ocdbt, zarr3) for ocdbt in (True, False) for zarr3 in (False, True)]


def resized(shape=None, chunks=None):
    """Changes `.zarray`, or the outer chunks of `zarr.json`."""

    def edit(meta: dict) -> None:
        meta["shape"] = shape or meta["shape"]
        if chunks and "chunks" in meta:
            meta["chunks"] = chunks
        elif chunks:
            meta["chunk_grid"]["configuration"]["chunk_shape"] = chunks
            for codec in meta["codecs"]:
                if codec["name"] == "sharding_indexed":
                    codec["configuration"]["chunk_shape"] = chunks

    return edit


ABSURD = {
    "shape of an exabyte": resized([1 << 58]),
    "shape that no array has": resized([1 << 70]),
    "shape beyond memory": resized([1 << 33]),
    "shape of a few more": resized([9000]),
    "chunk of an exabyte": resized(chunks=[1 << 58]),
    "chunk beyond memory": resized([1 << 33], [1 << 33]),
    "chunk that is too large": resized(chunks=[1 << 30]),
    "chunks without number": resized(chunks=[1]),
    "chunks and shape without number": resized([1 << 58], [1]),
}


@pytest.mark.parametrize("zstd", [True, False], ids=["zstd", "raw"])
@pytest.mark.parametrize("fmt", FORMATS, ids=lambda f: f"{'ocdbt' if f[0] else 'files'}{2 + f[1]}")
@pytest.mark.parametrize("case", ABSURD)
def test_absurd_shapes_and_chunks(saved, tmp_path, fmt, zstd, case):
    path = saved(fmt, zstd)
    change(path, {f"w/{'zarr.json' if fmt[1] else '.zarray'}": ABSURD[case]})
    with pytest.raises(jaxgds.CheckpointError, match="'w'"):
        jaxgds.load(path)


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    made: dict = {}

    def get(fmt, zstd) -> pathlib.Path:
        if (fmt, zstd) not in made:
            made[fmt, zstd] = tmp_path_factory.mktemp("honest") / "item"
            honest(made[fmt, zstd], ocdbt=fmt[0], zarr3=fmt[1], zstd=zstd)
        return made[fmt, zstd]

    return get


@pytest.fixture
def saved(saved_once, tmp_path):
    """A function that gives a copy of an honest checkpoint."""

    def copy(fmt, zstd) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(saved_once(fmt, zstd), tmp_path / "item"))

    return copy


def test_a_frame_that_expands_beyond_its_chunk(saved):
    """Which shape says 16000 bytes; the frame has a gigabyte."""
    path = saved((False, False), True)
    (path / "w" / "0").write_bytes(hostile.zeros(1 << 30))
    with pytest.raises(jaxgds.CheckpointError, match="'w'.*more bytes than it has"):
        jaxgds.load(path)


def test_a_shard_with_more_chunks_than_bytes(saved):
    path = saved((False, True), False)

    def edit(meta: dict) -> None:
        sharding: dict = {"chunk_shape": [1]}
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        sharding["index_codecs"] = [little, {"name": "crc32c"}]
        sharding["codecs"] = [little]
        meta["codecs"] = [{"name": "sharding_indexed", "configuration": sharding}]
        meta["chunk_grid"]["configuration"]["chunk_shape"] = [1 << 50]

    change(path, {"w/zarr.json": edit})
    with pytest.raises(jaxgds.CheckpointError, match="'w'.*no shard of"):
        jaxgds.load(path)


# The files beside the arrays


SHARDINGS = [
    *("[]", "5", "null", '{"w":', "[" * 10000, '{"%": "a"}', "\xff"),
    *({"dw==": x} for x in ("{}", "[]", "null", "[" * 100000, 5, ["a"])),
]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("content", SHARDINGS, ids=lambda c: str(c)[:20])
def test_a_damaged_sharding_file(saved, content):
    path = saved((True, False), True)
    text = content if isinstance(content, str) else json.dumps(content)
    (path / "_sharding").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match="_sharding"):
        jaxgds.load(path)


@pytest.mark.parametrize("file", ["_METADATA", "array_metadatas/process_0"])
@pytest.mark.parametrize("text", ["", "[]", "5", "{}", "[" * 100000, '{"array_metadatas": [5]}'])
def test_damaged_metadata_of_orbax(saved, file, text):
    path = saved((True, False), True)
    (path / file).write_text(text)
    with pytest.raises(jaxgds.CheckpointError, match=file):
        jaxgds.load(path)


@pytest.mark.parametrize("file", ["_METADATA", "_sharding", "array_metadatas/process_0"])
@pytest.mark.parametrize("how", ["pipe", "device"])
def test_a_small_file_that_never_ends(saved, file, how):
    """Neither waited for nor read into memory."""
    path = saved((True, False), True)
    (path / file).unlink()
    if how == "pipe":
        os.mkfifo(path / file)
    else:
        (path / file).symlink_to("/dev/zero")
    with pytest.raises(jaxgds.CheckpointError, match=f"{file} is not a regular file"):
        jaxgds.load(path)


# Memory


MEMORY = """
import os, resource, sys
os.environ["JAX_PLATFORMS"] = "cpu"
import jax, jaxgds
jaxgds.load(sys.argv[1])
with open("/proc/self/statm") as f:
    now = int(f.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (now + (1 << 30), now + (1 << 30)))
for path in sys.argv[2:]:
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        jaxgds.load(path)
        print("restored", path)
    except jaxgds.CheckpointError as e:
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        if grown > 400 << 10:
            print(f"{path}: {grown >> 10} MiB for: {e}")
"""


def test_memory_stays_in_proportion(tmp_path):
    """A fresh process refuses one bomb after the other and hardly grows."""
    good, *bombs = (tmp_path / name for name in ("good", *BOMBS))
    honest(good)
    for path, make in zip(bombs, BOMBS.values(), strict=True):
        shutil.copytree(good, path)
        make(path)
        size = sum(f.stat().st_blocks * 512 for f in path.rglob("*"))
        assert size < 20 << 20, path
    environment = {**os.environ, "XLA_FLAGS": ""}
    command = [sys.executable, "-c", MEMORY, good, *bombs]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=120)
    assert (done.returncode, done.stdout) == (0, ""), done.stdout + done.stderr


def frame_of_zeros(height: int):
    def make(path: pathlib.Path) -> None:
        body = hostile.zeros(6 << 30)
        write_tree(path, [hostile.compressed_frame(NODE_MAGIC, body)], height)

    return make


def manifest_of_zeros(path: pathlib.Path) -> None:
    body = hostile.zeros(6 << 30)
    manifest = hostile.compressed_frame(hostile.MANIFEST_MAGIC, body)
    (path / "manifest.ocdbt").write_bytes(manifest)


def long_keys(path: pathlib.Path) -> None:
    """A million keys of 64 KB, each of which adds one byte to the one before."""
    varint, count = hostile.ocdbt._varint, 1 << 20
    prefixes = b"".join(varint(min(i, 65000)) for i in range(1, count))
    body = [b"\0\0", varint(count), prefixes, b"\1" * count, bytes(range(256)) * (count // 256)]
    body += [b"\0" * count, b"\0" * count]
    write_tree(path, [framed(NODE_MAGIC, b"".join(body), compress=True)], 0)


def many_frames(path: pathlib.Path) -> None:
    """Each node is within bounds, all together are not."""
    count, nbytes = 100, 1 << 20
    nodes, places, at = [], [], 0
    for i in range(5):
        keys = [b"%d-%02d" % (i, j) for j in range(count)]
        body = [b"\0\0", bytes([count]), bytes(count - 1), b"\4" * count, *keys]
        body += [hostile.ocdbt._varint(nbytes) * count, bytes(count), bytes(count * nbytes)]
        nodes.append(framed(NODE_MAGIC, b"".join(body), compress=True))
        places.append((keys[0], Extent("d/tree", at, len(nodes[-1]))))
        at += len(nodes[-1])
    write_tree(path, [*nodes, inner(1, places)], 1)


def long_sparse_file(path: pathlib.Path) -> None:
    """The node is as long as its reference says, a terabyte."""
    write_tree(path, [inner(1, [(b"w", Extent("d/tree", 0, 1 << 40))])], 1)
    os.truncate(path / "d" / "tree", 1 << 41)


def long_metadata(path: pathlib.Path) -> None:
    change(path, {"w/.zarray": Extent("d/sparse", 0, 1 << 40)})
    (path / "d" / "sparse").touch()
    os.truncate(path / "d" / "sparse", 1 << 40)


def zarray(shape, chunks=None):
    return lambda path: change(path, {"w/.zarray": resized(shape, chunks)})


BOMBS = {
    "node-of-zeros": frame_of_zeros(0),
    "manifest-of-zeros": manifest_of_zeros,
    "long-keys": long_keys,
    "many-frames": many_frames,
    "long-node": long_sparse_file,
    "long-metadata": long_metadata,
    "shape": zarray([1 << 40]),
    "chunk": zarray([1 << 40], [1 << 40]),
    "grid": zarray([1 << 40], [1]),
    "grid-of-a-small-array": zarray([4000], [1]),
}
