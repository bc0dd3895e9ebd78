"""Files that are damaged, change, or cannot be read; disks that fail, fill up, or do not answer."""

import json
import os
import pathlib
import re
import shutil
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import oracle
import orbax.checkpoint as ocp
import pytest
from faulty_process import TREE
from safetensors.numpy import save_file

import jaxgds
import jaxgds.orbax
from jaxgds import btree, restore
from jaxgds.index import Extent, open_index
from jaxgds.safetensors import open_safetensors


# Orbax looks for shardings where it is left to say what is wrong.
pytestmark = [
    pytest.mark.filterwarnings("ignore:Sharding info not provided"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
HERE = pathlib.Path(__file__).parent
KINDS = {
    **{oracle.format_id(fmt): fmt for fmt in oracle.FORMATS},
    "safetensors": None,
}


def save(path: pathlib.Path, kind: str) -> pathlib.Path:
    if KINDS[kind] is None:
        path.mkdir(parents=True)
        save_file(TREE, path / "model.safetensors")
    else:
        oracle.save(path, {name: jnp.asarray(x) for name, x in TREE.items()}, KINDS[kind])
    return path


def assert_restored(tree) -> None:
    for name, want in TREE.items():
        assert np.asarray(tree[name]).tobytes() == want.tobytes()


@pytest.fixture(scope="module")
def originals(tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    return {kind: save(folder / kind, kind) for kind in KINDS}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def path(originals, kind, tmp_path):
    return pathlib.Path(shutil.copytree(originals[kind], tmp_path / "c"))


def data_file(path: pathlib.Path, name: str = "w") -> Extent:
    """Where the first data of an array lies."""
    if (path / "model.safetensors").exists():
        array = open_safetensors(str(path)).array(name)
    else:
        array = open_index(path).array(name)
    source = next(source for _, source in array.chunks())
    assert isinstance(source, Extent)
    return source


def needed_files(path: pathlib.Path) -> list[pathlib.Path]:
    """What a restore cannot do without."""
    if (path / "model.safetensors").exists():
        return [path / "model.safetensors"]
    files = {path / "_METADATA", pathlib.Path(data_file(path).file)}
    index = open_index(path)
    if (path / "manifest.ocdbt").exists():
        manifest = (path / "manifest.ocdbt").read_bytes()
        root = btree.decode_manifest(manifest, 1 << 20)
        assert root is not None
        files |= {path / "manifest.ocdbt", path / root[1].path.decode()}
        return sorted(files)
    source = index._values["w/.zarray" if "w/.zarray" in index._values else "w/zarr.json"]
    assert isinstance(source, Extent)
    return sorted(files | {pathlib.Path(source.file)})


def refused(path: pathlib.Path, file: pathlib.Path | str) -> None:
    with pytest.raises((jaxgds.CheckpointError, ValueError, FileNotFoundError)) as e:
        jaxgds.load(path)
    text = str(e.value)
    assert str(file) in text or str(path) in text or "'w'" in text or "'b'" in text, text


def test_truncated_anywhere(path, kind):
    """At header, manifest, node and data, and where only the last byte is missing."""
    for file in needed_files(path):
        data, end = file.read_bytes(), file.stat().st_size
        if str(file) == data_file(path).file:  # behind the data may lie what nobody needs
            end = data_file(path).offset + data_file(path).nbytes
        for size in sorted({0, 1, 7, 8, 12, 20, end // 2, end - 1}):
            if size < end:
                file.write_bytes(data[:size])
                refused(path, file)
        file.write_bytes(data)
    assert_restored(jaxgds.load(path))


def test_the_end_of_the_data(path, kind):
    """A file cut within the bytes of one array, and before them."""
    source = data_file(path)
    for size in (source.offset, source.offset + 1, source.offset + source.nbytes - 1):
        with open(source.file, "rb") as f:
            data = f.read()
        os.truncate(source.file, size)
        with pytest.raises(jaxgds.CheckpointError) as e:
            jaxgds.load(path)
        assert source.file in str(e.value)
        with open(source.file, "wb") as f:
            f.write(data)


@pytest.mark.parametrize("how", ["missing", "directory", "dangling link", "pipe"])
def test_a_file_that_is_none(path, kind, how):
    for file in needed_files(path):
        data = file.read_bytes()
        file.unlink()
        if how == "directory":
            file.mkdir()
        elif how == "dangling link":
            file.symlink_to("nothing")
        elif how == "pipe":
            os.mkfifo(file)
        refused(path, file)
        shutil.rmtree(file) if file.is_dir() else file.unlink(missing_ok=True)
        file.write_bytes(data)
    assert_restored(jaxgds.load(path))


@pytest.mark.parametrize("change", ["truncated", "removed", "directory"])
def test_changed_between_index_and_read(path, kind, change, monkeypatch):
    """The file was whole when the plan was made."""
    source = data_file(path)
    make_plan = restore.make_plan

    def then_change(*args, **kwargs):
        plan = make_plan(*args, **kwargs)
        if change == "truncated":
            os.truncate(source.file, source.offset + source.nbytes // 2)
        else:
            os.unlink(source.file)
        if change == "directory":
            os.mkdir(source.file)
        return plan

    monkeypatch.setattr(restore, "make_plan", then_change)
    with pytest.raises(jaxgds.CheckpointError, match="array '") as e:
        jaxgds.load(path)
    assert source.file in str(e.value)


@pytest.mark.parametrize("kind", [k for k, fmt in KINDS.items() if fmt], indirect=True)
def test_through_orbax(path):
    """The same errors where Orbax's own API is used."""
    source = data_file(path)
    os.truncate(source.file, source.offset + source.nbytes // 2)
    for checkpointer in (ocp.PyTreeCheckpointer(), ocp.StandardCheckpointer()):
        with jaxgds.orbax.installed(), pytest.raises(jaxgds.CheckpointError) as e:
            checkpointer.restore(path)
        assert source.file in str(e.value)


# Faults of the disk, in a process of its own


@pytest.fixture(scope="module")
def outcomes(originals, tmp_path_factory):
    """What came of each restore in faulty_process.py."""
    folder = tmp_path_factory.mktemp("faulty")
    compiler = shutil.which("cc")
    if compiler is None:
        pytest.skip("no C compiler for the library that makes reads fail")
    shim = folder / "faulty.so"
    command = [compiler, "-shared", "-fPIC", "-O1", "-o", shim, HERE / "faulty.c", "-ldl"]
    subprocess.run(command, check=True)
    cases = []
    for kind in ("ocdbt-zarr2-raw", "ocdbt-zarr3-zstd", "files-zarr2-raw", "safetensors"):
        part = os.path.basename(data_file(originals[kind]).file)
        if kind == "files-zarr2-raw":
            part = "/w/"
        cases.append(f"{kind}={originals[kind]}={part}")
        if kind.startswith("ocdbt"):
            cases.append(f"api-{cases[-1]}")
    cases.append(f"metadata={originals['ocdbt-zarr3-zstd']}=/_METADATA")
    (folder / "out").mkdir()
    environment = {
        **os.environ,
        "LD_PRELOAD": str(shim),
        "JAXGDS_READ_TIMEOUT": "0.3",
        "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
    }
    command = [sys.executable, HERE / "faulty_process.py", *cases, folder / "out"]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=100)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


FAULTY = [
    *("ocdbt-zarr2-raw", "api-ocdbt-zarr2-raw", "ocdbt-zarr3-zstd", "api-ocdbt-zarr3-zstd"),
    *("files-zarr2-raw", "safetensors", "metadata"),
]
EXPECTED = {
    "none": ("same", ""),
    "short": ("same", ""),
    "EINTR": ("same", ""),
    "EIO": ("CheckpointError", "Input/output error"),
    "end": ("CheckpointError", "truncated|too short|shorter"),
    "EACCES": ("CheckpointError", "Permission denied"),
    "stall": ("TimeoutError", "no progress for 0.3 seconds.*JAXGDS_READ_TIMEOUT"),
    "after-stall": ("same", ""),
    "interrupt": ("KeyboardInterrupt", ""),
    "after-interrupt": ("same", ""),
}


@pytest.mark.parametrize("fault", EXPECTED)
@pytest.mark.parametrize("case", FAULTY)
def test_a_faulty_disk(outcomes, case, fault):
    found = outcomes[f"{case}-{fault}"]
    outcome, error = EXPECTED[fault]
    assert found["outcome"] == outcome, found
    assert re.search(error, found["error"]), found
    if fault in ("short", "EIO", "end", "EACCES", "stall", "interrupt"):
        assert found["faults"] > 0
    if outcome in ("CheckpointError", "TimeoutError"):
        assert re.search(r"array '[wb]'|metadata|_METADATA|\.safetensors: ", found["error"]), found
    if fault not in ("stall", "interrupt"):
        assert found["left"] == 0


def test_threads_that_hung_end_when_the_disk_answers(outcomes):
    assert not [name for name in outcomes["threads"]["left"] if name.startswith("jaxgds")]


def test_a_disk_that_fills_up_during_prepare(outcomes):
    """Nothing that looks complete is left, and the next run does not mind what is."""
    found = outcomes["prepare"]
    assert found["ENOSPC"] == "OSError 28"
    assert "prepared" not in found["ENOSPC left"]
    assert found["none"] == "done" and "prepared" in found["none left"]


def test_the_limit_is_a_number(path, monkeypatch):
    monkeypatch.setenv("JAXGDS_READ_TIMEOUT", "soon")
    with pytest.raises(ValueError, match="JAXGDS_READ_TIMEOUT='soon'"):
        jaxgds.load(path)
