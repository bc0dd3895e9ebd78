"""`jaxgds verify` and `verify=True`: every flipped bit of a prepared checkpoint is found."""

import json
import os
import pathlib
import random
import shutil

import hostile
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
import zstandard
from safetensors.numpy import save_file

import jaxgds
from jaxgds import prepare, rules
from jaxgds.cli import main
from jaxgds.crc import crc32c
from jaxgds.verify import table, verify


RNG = np.random.default_rng(0)
TREE = {
    "w": RNG.normal(size=(64, 96)).astype(np.float32),
    "b": RNG.normal(size=(700,)).astype(np.float16),
    "small": np.arange(8, dtype=np.int32),
}


@pytest.fixture(scope="module")
def once(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    save_file(TREE, folder / "model.safetensors")
    (folder / "rules.toml").write_text(
        '[[rule]]\nnames = ["w"]\nspec = ["tp"]\n[[rule]]\nnames = ["*"]\nspec = []\n'
    )
    source, all_rules = folder / "model.safetensors", rules.read_rules(folder / "rules.toml")
    prepare.prepare(source, folder / "dst", mesh=rules.read_mesh("tp=4"), rules=all_rules)
    return folder / "dst"


@pytest.fixture
def prepared(once, tmp_path):
    return pathlib.Path(shutil.copytree(once, tmp_path / "dst"))


def test_a_whole_one(prepared):
    found = verify(prepared)
    assert found["problems"] == [] and found["unproven"] == 0
    assert (found["arrays"], found["chunks"]) == (3, 6)
    assert found["bytes"] == sum(x.nbytes for x in TREE.values())
    assert "no problems" in table(found)
    got = jaxgds.load(prepared, verify=True)
    assert all(np.asarray(got[name]).tobytes() == x.tobytes() for name, x in TREE.items())


def flip(file: pathlib.Path, at: int, bit: int) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 1 << bit
    file.write_bytes(data)


def test_every_flipped_bit_is_found(prepared):
    """In any file: random bits, always the same ones, and those at both ends.

    But jaxgds.json, where the checksums are: what else it says is not what arrays are made of.
    """
    draw = random.Random(0)
    files = sorted(f for f in prepared.rglob("*") if f.is_file() and f.name != "jaxgds.json")
    kinds = set()
    for file in files:
        size = file.stat().st_size
        for at in [0, size - 1, *(draw.randrange(size) for _ in range(6))]:
            bit = draw.randrange(8)
            flip(file, at, bit)
            try:
                problems = verify(prepared)["problems"]
            except jaxgds.CheckpointError as e:
                problems = [str(e)]
            # Behind the last chunk of a file it is padded; that belongs to no array.
            padding = file.parent.name == "d" and not problems
            assert problems or padding, (file, at, bit)
            if problems:
                kinds.add(file.name)
                text = "; ".join(problems)
                assert file.name in text or str(prepared) in text
            flip(file, at, bit)
    assert len(kinds) == len(files)
    assert verify(prepared)["problems"] == []


def data_file(path: pathlib.Path, name: str, chunk: int = 0):
    values = hostile.values_of(path)
    extent = values[f"{name}/{chunk}.0"]
    assert not isinstance(extent, bytes)
    return path / extent.file, extent.offset, extent.nbytes


def test_file_array_and_offset_are_named(prepared):
    file, offset, nbytes = data_file(prepared, "w", 2)
    flip(file, offset + nbytes - 1, 3)
    (problem,) = verify(prepared)["problems"]
    for part in (str(file), f"[{offset}, {offset + nbytes})", "array 'w'", "chunk 2.0", "checksum"):
        assert part in problem
    with pytest.raises(jaxgds.CheckpointError, match="'w'.*checksum"):
        jaxgds.load(prepared, verify=True)
    os.truncate(file, offset + 100)
    assert any("'w'" in p for p in verify(prepared)["problems"])


def test_checksums_that_are_not_there(prepared):
    file = prepared / "jaxgds.json"
    description = json.loads(file.read_text())
    del description["arrays"]["w"]["chunks"]["1.0"]
    description["arrays"]["b"]["chunks"]["7"] = "0" * 32
    description["arrays"]["more"] = {"chunks": {}}
    description["files"]["../outside"] = "0" * 32
    file.write_text(json.dumps(description))
    text = "; ".join(verify(prepared)["problems"])
    for part in ("'w'", "1.0 has no checksum", "'7'", "'more'", "'../outside' is no file"):
        assert part in text, part


@pytest.mark.parametrize("name", ["_METADATA", "d/btree", "jaxgds.json"])
def test_a_pipe_is_not_waited_for(prepared, name):
    (prepared / name).unlink()
    os.mkfifo(prepared / name)
    try:
        problems = verify(prepared)["problems"]
    except jaxgds.CheckpointError as e:
        problems = [str(e)]
    assert name in problems[0] and "not a regular file" in problems[0]


def test_names_that_no_file_has(prepared):
    file = prepared / "jaxgds.json"
    description = json.loads(file.read_text())
    description["files"] |= {"a\0b": "0" * 32, "\ud800": "0" * 32, "absent": "0" * 32}
    file.write_text(json.dumps(description))
    assert len(verify(prepared)["problems"]) == 3


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"checksum": "md5"}', "[" * 10000])
def test_a_damaged_description(prepared, text):
    (prepared / "jaxgds.json").write_text(text)
    with pytest.raises(jaxgds.CheckpointError, match=r"jaxgds\.json"):
        verify(prepared)


def test_the_command(prepared, capsys, tmp_path):
    assert main(["verify", str(prepared)]) == 0
    assert "no problems found" in capsys.readouterr().out
    file, offset, _ = data_file(prepared, "w")
    flip(file, offset, 0)
    assert main(["verify", str(prepared), "--json", str(tmp_path / "out.json")]) == 1
    assert "DAMAGED" in capsys.readouterr().out
    assert len(json.loads((tmp_path / "out.json").read_text())["problems"]) == 1
    assert main(["verify", str(tmp_path / "nothing")]) == 2


# Checkpoints of Orbax itself


@pytest.mark.parametrize("fmt", oracle.FORMATS, ids=oracle.format_id)
def test_without_checksums_that_is_said(tmp_path, fmt):
    oracle.save(tmp_path / "c", {name: jnp.asarray(x) for name, x in TREE.items()}, fmt)
    found = verify(tmp_path / "c")
    assert found["problems"] == [] and found["unproven"] > 0
    assert "have no checksum" in table(found)
    with pytest.raises(ValueError, match="no checksum to verify.*prepare"):
        jaxgds.load(tmp_path / "c", verify=True)


def test_safetensors_have_none(tmp_path):
    save_file(TREE, tmp_path / "m.safetensors")
    assert verify(tmp_path / "m.safetensors")["unproven"] == 3
    with pytest.raises(ValueError, match="no checksum"):
        jaxgds.load(tmp_path / "m.safetensors", verify=True)


@pytest.mark.parametrize("zarr3", [False, True])
def test_the_checksum_of_a_zstd_frame(tmp_path, zarr3):
    """Not written by Orbax, but by others: honoured by restores and by verify."""
    path = tmp_path / "c"
    want = hostile.honest(path, ocdbt=False, zarr3=zarr3)
    file = path / "w" / ("c/0" if zarr3 else "0")
    frame = zstandard.ZstdCompressor(write_checksum=True).compress(want.tobytes())
    if zarr3:  # without the sharding codec
        little = {"name": "bytes", "configuration": {"endian": "little"}}
        zstd = {"name": "zstd", "configuration": {"level": 1, "checksum": True}}
        hostile.change(path, {"w/zarr.json": lambda meta: meta.update(codecs=[little, zstd])})
    file.write_bytes(frame)
    assert verify(path)["unproven"] == 0
    assert np.asarray(jaxgds.load(path, verify=True)["w"]).tobytes() == want.tobytes()
    flip(file, len(frame) - 1, 0)  # of the checksum itself
    with pytest.raises(jaxgds.CheckpointError, match="'w'.*[cC]hecksum"):
        jaxgds.load(path)
    assert "'w'" in verify(path)["problems"][0]


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
def test_the_crc32c_codec_of_zarr3(tmp_path):
    """Left to Orbax, whose TensorStore checks it."""
    path = tmp_path / "c"
    want = hostile.honest(path, ocdbt=False, zarr3=True)
    little = {"name": "bytes", "configuration": {"endian": "little"}}
    codecs = [little, {"name": "crc32c"}]
    hostile.change(path, {"w/zarr.json": lambda meta: meta.update(codecs=codecs)})
    data = want.tobytes()
    file = path / "w" / "c" / "0"
    file.write_bytes(data + crc32c(data).to_bytes(4, "little"))
    assert np.asarray(jaxgds.load(path)["w"]).tobytes() == data
    flip(file, 5, 5)
    with pytest.raises(Exception, match="Encountered error while reading") as e:
        jaxgds.load(path)
    assert "Digest mismatch" in str(e.value.__cause__)
