"""safetensors, with the reference implementation as the oracle."""

import json
import struct
import subprocess
import sys

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.flax import load_file as load_flax
from safetensors.numpy import load_file, save_file

import jaxgds
from jaxgds.safetensors import DTYPES, open_safetensors


TENSORS = {
    "model.embed": np.arange(64 * 48, dtype=np.float32).reshape(64, 48).astype(ml_dtypes.bfloat16),
    "model.norm": np.linspace(-1, 1, 48, dtype=np.float32),
    "model.odd": np.arange(7 * 3, dtype=np.int8).reshape(7, 3),  # puts what follows off alignment
    "model.deep": np.arange(8 * 6 * 10, dtype=np.float16).reshape(8, 6, 10),
    "model.scalar": np.array(3.5, np.float32),
    "model.mask": np.arange(16) % 3 == 0,
}
SPECS = {
    "rows": {"model.embed": ("x", None), "model.deep": ("x", None, None)},
    "columns": {"model.embed": (None, "x"), "model.deep": (None, None, "y")},
    "both": {"model.embed": ("x", "y"), "model.deep": ("x", "y", None)},
    "replicated": {},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tensors")
    save_file(TENSORS, path / "model.safetensors", metadata={"format": "np"})
    return path


@pytest.fixture(scope="module")
def mesh():
    return Mesh(np.array(jax.devices()).reshape(4, 2), ("x", "y"))


def same_bytes(got, want) -> bool:
    got, want = np.asarray(got), np.asarray(want)
    return got.dtype == want.dtype and got.shape == want.shape and got.tobytes() == want.tobytes()


def test_without_target_it_is_what_safetensors_gives(folder):
    got = jaxgds.load(folder / "model.safetensors")
    want = load_flax(folder / "model.safetensors")
    assert got.keys() == want.keys()
    for name in want:
        assert same_bytes(got[name], want[name]), name
    report = jaxgds.last_report()
    assert report is not None and report.path == "host" and not report.fallbacks
    assert report.bytes_read == sum(t.nbytes for t in TENSORS.values())


@pytest.mark.parametrize("device", ["cpu", 5])
def test_without_a_sharding_it_is_on_the_default_device(folder, device):
    with jax.default_device(device if isinstance(device, str) else jax.devices()[device]):
        got = jaxgds.load(folder)
        some = jaxgds.load(folder, {"model.norm": jax.ShapeDtypeStruct((48,), jnp.float32)})
        want = load_flax(folder / "model.safetensors")
    for name, x in [*got.items(), *some.items()]:
        assert x.devices() == want[name].devices(), name


@pytest.mark.parametrize("case", SPECS)
def test_onto_a_mesh(folder, mesh, case):
    shardings = {
        name: NamedSharding(mesh, PartitionSpec(*SPECS[case].get(name, ()))) for name in TENSORS
    }
    target = {
        name: jax.ShapeDtypeStruct(t.shape, t.dtype, sharding=shardings[name])
        for name, t in TENSORS.items()
    }
    got = jaxgds.load(folder, target, strict=True)
    for name, want in load_file(folder / "model.safetensors").items():
        assert got[name].sharding == shardings[name]
        assert same_bytes(got[name], want), name
        for shard in got[name].addressable_shards:
            assert same_bytes(shard.data, want[shard.index])
    report = jaxgds.last_report()
    assert report is not None and report.bytes_read == sum(t.nbytes for t in TENSORS.values())


def test_every_dtype(tmp_path):
    rng = np.random.default_rng(0)
    tensors = {}
    for name, dtype in DTYPES.items():
        raw = rng.integers(0, 2 if name == "BOOL" else 256, 24 * dtype.itemsize, np.uint8)
        tensors[name] = raw.view(dtype).reshape(4, 6)
    tensors["F64"] = np.linspace(-2, 2, 24).reshape(4, 6)  # without x64 JAX makes float32 of it
    header, body = {}, b""
    for name, tensor in tensors.items():
        span = [len(body), len(body) + tensor.nbytes]
        header[name] = {"dtype": name, "shape": [4, 6], "data_offsets": span}
        body += tensor.tobytes()
    file = tmp_path / "all.safetensors"
    write(file, header, body)
    got = jaxgds.load(file)
    wide = {"F64", "I64", "U64"}
    report = jaxgds.last_report()
    assert report is not None and set(report.fallbacks) == wide
    for name, tensor in tensors.items():
        if name not in wide:
            assert same_bytes(got[name], tensor), name
    with jax.enable_x64(True):
        got = jaxgds.load(file, strict=True)
    for name, tensor in tensors.items():
        assert same_bytes(got[name], tensor), name


def test_casts_to_the_targets_dtype(folder, mesh):
    sharding = NamedSharding(mesh, PartitionSpec("x"))
    target = {"model.embed": jax.ShapeDtypeStruct((64, 48), jnp.float32, sharding=sharding)}
    got = jaxgds.load(folder, target)["model.embed"]
    assert got.sharding == sharding
    assert same_bytes(got, TENSORS["model.embed"].astype(np.float32))


def test_casts_on_devices_outside_of_the_mesh_of_the_caller(tmp_path, mesh):
    """In place, and from what goes through numpy."""
    save_file({"a": np.ones(8, np.float16), "b": np.ones(8)}, tmp_path / "m.safetensors")
    on = jax.sharding.SingleDeviceSharding(jax.devices()[7])
    target = {name: jax.ShapeDtypeStruct((8,), jnp.bfloat16, sharding=on) for name in "ab"}
    with jax.set_mesh(Mesh(mesh.devices[:2], ("x", "y"))):
        got = jaxgds.load(tmp_path, target)
    assert all(x.sharding == on and same_bytes(x, np.ones(8, jnp.bfloat16)) for x in got.values())
    report = jaxgds.last_report()
    assert report is not None and set(report.fallbacks) == {"b"}


def test_renamed_into_an_nnx_state(folder):
    class Model(nnx.Module):
        def __init__(self):
            self.embed = nnx.Param(jnp.zeros((64, 48), jnp.bfloat16))
            self.norm = nnx.Param(jnp.zeros(48))

    graph, target = nnx.split(nnx.eval_shape(Model))
    keep = ("model.embed", "model.norm")
    state = jaxgds.load(
        folder, target, rename=lambda n: n.removeprefix("model.") if n in keep else None
    )
    model = nnx.merge(graph, state)
    assert same_bytes(model.embed[...], TENSORS["model.embed"])
    assert same_bytes(model.norm[...], TENSORS["model.norm"])


def test_two_tensors_of_one_name(folder):
    with pytest.raises(ValueError, match="'model.embed' and 'model.norm' one name, 'x'"):
        jaxgds.load(folder, rename=lambda n: "x" if n in ("model.embed", "model.norm") else None)


def test_orbax_is_not_imported_for_safetensors(folder):
    code = "import sys, jaxgds; jaxgds.load(sys.argv[1]); print('orbax.checkpoint' in sys.modules)"
    run = [sys.executable, "-c", code, str(folder)]
    done = subprocess.run(run, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_index_json_and_directories(tmp_path):
    parts = [{"a": np.arange(6.0, dtype=np.float32)}, {"b": np.arange(3, dtype=np.int8)}]
    for i, part in enumerate(parts):
        save_file(part, tmp_path / f"part{i}.safetensors")
    assert sorted(jaxgds.load(tmp_path)) == ["a", "b"]
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"b": "part1.safetensors"}}))
    for path in (tmp_path, index):
        got = jaxgds.load(path)
        assert list(got) == ["b"] and same_bytes(got["b"], parts[1]["b"])


def test_hidden_files_are_left_alone(tmp_path):
    """A Mac that copies to other file systems leaves them beside the real ones."""
    (tmp_path / "._model.safetensors").write_bytes(b"\0\5\x16\7" * 20)
    (tmp_path / "._model.safetensors.index.json").write_bytes(b"\0\5\x16\7" * 20)
    with pytest.raises(jaxgds.CheckpointError, match="not an Orbax item directory"):
        jaxgds.load(tmp_path)
    save_file({"a": np.ones(4, np.float32)}, tmp_path / "model.safetensors")
    assert list(jaxgds.load(tmp_path)) == ["a"]


@pytest.mark.parametrize("file", ["../out.safetensors", "/out.safetensors", "a/../../out"])
def test_an_index_must_stay_inside(tmp_path, file):
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(jaxgds.CheckpointError, match="points outside"):
        jaxgds.load(index)


def write(file, header, body: bytes, length: int | None = None) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    file.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + body)


def tensor(dtype="U8", shape=(4,), offsets=(0, 4), **more):
    return {"dtype": dtype, "shape": list(shape), "data_offsets": list(offsets), **more}


DAMAGED = {
    "hole": ({"a": tensor(), "b": tensor(offsets=(5, 9))}, 9),
    "overlap": ({"a": tensor(), "b": tensor(offsets=(2, 6))}, 6),
    "beyond the file": ({"a": tensor()}, 3),
    "bytes left over": ({"a": tensor()}, 5),
    "wrong size": ({"a": tensor(shape=(5,))}, 4),
    "reversed": ({"a": tensor(offsets=(4, 0))}, 4),
    "negative": ({"a": tensor(shape=(-4,))}, 4),
    "missing field": ({"a": {"dtype": "U8", "shape": [4]}}, 4),
    "unknown dtype": ({"a": tensor(dtype="U9")}, 4),
    "not JSON": (b"{nonsense", 0),
    "not an object": (b"[1, 2]", 0),
    "not UTF-8": (b'{"\xff": 1}', 0),
    "metadata not strings": ({"__metadata__": {"a": 1}, "a": tensor()}, 4),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_headers_are_refused_as_by_the_reference(tmp_path, case):
    header, nbytes = DAMAGED[case]
    file = tmp_path / "bad.safetensors"
    write(file, header, bytes(nbytes))
    with pytest.raises(Exception, match="."):
        load_file(file)
    with pytest.raises(jaxgds.CheckpointError, match=r"bad\.safetensors"):
        open_safetensors(str(file))


@pytest.mark.parametrize("length", [0, 7, 10**6, 2**63])
def test_lying_header_lengths(tmp_path, length):
    file = tmp_path / "bad.safetensors"
    write(file, {"a": tensor()}, bytes(4), length)
    with pytest.raises(Exception, match="."):
        load_file(file)
    with pytest.raises(jaxgds.CheckpointError, match=r"bad\.safetensors"):
        jaxgds.load(file)


@pytest.mark.parametrize("keep", [0, 7, 8, 20, -1])
def test_truncated_files(tmp_path, keep):
    file = tmp_path / "cut.safetensors"
    save_file(TENSORS, file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(jaxgds.CheckpointError, match=r"cut\.safetensors"):
        jaxgds.load(file)


def test_a_target_that_does_not_fit(folder):
    with pytest.raises(ValueError, match=r"\['nothing'\].*model\.deep"):
        jaxgds.load(folder, {"nothing": jax.ShapeDtypeStruct((1,), jnp.int8)})
    with pytest.raises(ValueError, match=r"model\.norm.*\(48,\).*\(47,\)"):
        jaxgds.load(folder, {"model.norm": jax.ShapeDtypeStruct((47,), jnp.float32)})


def test_zero_size_tensors(tmp_path):
    save_file({"empty": np.zeros((0, 4), np.float32)}, tmp_path / "e.safetensors")
    got = jaxgds.load(tmp_path)["empty"]
    assert got.shape == (0, 4) and got.dtype == jnp.float32
