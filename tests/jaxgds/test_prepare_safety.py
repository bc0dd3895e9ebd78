"""What can go wrong while a checkpoint is prepared, and what `--check` finds afterwards."""

import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import oracle
import prepare_models as models
import pytest
from safetensors.numpy import save_file

import jaxgds
from jaxgds import cli, sources
from jaxgds.check import check
from jaxgds.errors import CheckpointError
from jaxgds.index import open_index
from jaxgds.prepare import prepare
from jaxgds.rules import Mesh, Rule, Rules


TP2 = Mesh({"tp": 2})
WHOLE = Rules("whole", (Rule(("*",), ()),))  # no parameter is split


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return models.save_safetensors(tmp_path_factory.mktemp("safety") / "hf", models.llama())


@pytest.fixture
def prepared(source, tmp_path):
    prepare(source, tmp_path / "out", mesh=TP2, method="fp8")
    return tmp_path / "out"


def test_same_input_same_bytes(source, prepared, tmp_path):
    prepare(source, tmp_path / "again", mesh=TP2, method="fp8")
    assert models.digest(tmp_path / "again") == models.digest(prepared)


KILLED = """
import os, signal, sys
from jaxgds.prepare import prepare
from jaxgds.rules import Mesh

calls = 0

def counted(call):
    def wrapped(*args):
        global calls
        calls += 1
        if calls == int(sys.argv[3]):
            os.kill(os.getpid(), signal.SIGKILL)
        return call(*args)
    return wrapped

os.pwrite, os.fsync, os.rename = map(counted, (os.pwrite, os.fsync, os.rename))
prepare(sys.argv[1], sys.argv[2], mesh=Mesh({"tp": 2}), method="fp8")
print(calls)
"""


def run(script: str, *args: object) -> subprocess.CompletedProcess[str]:
    # No device is there, and none is asked for.
    environment = os.environ | {"JAX_PLATFORMS": "tpu"}
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, env=environment, capture_output=True, text=True)


def test_a_killed_run_leaves_nothing_that_looks_complete(source, prepared, tmp_path):
    expected = models.digest(prepared)
    whole = run(KILLED, source, tmp_path / "whole", 0)
    assert whole.returncode == 0, whole.stderr
    calls = int(whole.stdout)
    out = tmp_path / "killed"
    for at in (1, calls // 2, calls):  # the last call is one of those that sync the directory
        shutil.rmtree(out, ignore_errors=True)
        assert run(KILLED, source, out, at).returncode == -signal.SIGKILL
        if at < calls:
            assert not out.exists()
            assert (tmp_path / ".killed.partial").exists()
            with pytest.raises(CheckpointError):
                jaxgds.load(out)
            prepare(source, out, mesh=TP2, method="fp8")
        assert models.digest(out) == expected
        assert not (tmp_path / ".killed.partial").exists()


def test_a_failed_run_leaves_nothing(tmp_path):
    weights = models.llama()
    weights["model.layers.1.mlp.up_proj.weight"][3, 5] = np.inf
    source = models.save_safetensors(tmp_path / "hf", weights)
    with pytest.raises(ValueError, match=r"up_proj.weight' cannot be quantised.*not finite"):
        prepare(source, tmp_path / "out", mesh=TP2, method="fp8")
    assert [f.name for f in tmp_path.iterdir()] == ["hf"]


def test_a_truncated_source_is_noticed_and_nothing_is_left(tmp_path):
    oracle.save(tmp_path / "src", {"w": jnp.ones((64, 64))}, (False, False, False))
    file = tmp_path / "src" / "w" / "0.0"
    os.truncate(file, 1000)
    with pytest.raises(CheckpointError, match="'w'"):
        prepare(tmp_path / "src", tmp_path / "out", mesh=TP2, rules=WHOLE)
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_an_existing_destination_is_left_alone(source, prepared):
    before = models.digest(prepared)
    with pytest.raises(FileExistsError, match="remove it"):
        prepare(source, prepared, mesh=TP2)
    assert models.digest(prepared) == before


WAITS = """
import sys
from jaxgds.output import temporary

with temporary(sys.argv[1]) as folder:
    print(folder, flush=True)
    input()
"""


def test_two_runs_do_not_write_the_same(source, tmp_path):
    command = [sys.executable, "-c", WAITS, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdin and other.stdout
        other.stdout.readline()
        with pytest.raises(FileExistsError, match="another process is writing it"):
            prepare(source, tmp_path / "out", mesh=TP2)
        other.stdin.write(b"\n")


def test_asks_for_free_space_first(tmp_path):
    shape = (1 << 20, 1 << 21)  # 4 TiB
    source = models.sparse_safetensors(tmp_path / "large.safetensors", {"w": shape})
    with pytest.raises(OSError, match=r"4398.\d\d GB are needed and .* GB are free"):
        prepare(source, tmp_path / "out", mesh=TP2, rules=WHOLE)
    assert [f.name for f in tmp_path.iterdir()] == ["large.safetensors"]


GROWTH = r"""
import re, sys
from jaxgds.prepare import prepare
from jaxgds.rules import Mesh, Rule, Rules

def peak():
    with open("/proc/self/status") as f:
        return int(re.search(r"VmHWM:\s*(\d+) kB", f.read()).group(1)) << 10

import gguf, orbax.checkpoint, tensorstore  # what is imported only when it is needed
before = peak()
spec = {"rows": (("tp",),), "columns": ((), ("tp",))}[sys.argv[4]]
rules = Rules("test", (Rule(("*",), spec, eval(sys.argv[5])),))
prepare(sys.argv[1], sys.argv[2], mesh=Mesh({"tp": 8}), rules=rules, method=eval(sys.argv[3]))
print(peak() - before)
"""


@pytest.mark.parametrize(
    ("kind", "method", "spec", "contract"),
    [
        ("safetensors", None, "rows", None),
        ("safetensors", "fp8", "columns", 1),
        ("orbax-zstd", None, "columns", None),
        ("orbax-zstd", "fp8", "rows", 0),
        ("gguf", "fp8", "rows", 1),
    ],
)
def test_memory_is_bounded(kind, method, spec, contract, large, tmp_path):
    """A tensor of 320 MB grows the process by less, whatever is done to it and on many cores."""
    done = run(GROWTH, large[kind], tmp_path / "out", repr(method), spec, repr(contract))
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 320e6  # 220 to 270 MB of FP8 where eight parts of a block are at work


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    folder, shape = tmp_path_factory.mktemp("large"), (160_000, 1000)
    source = models.sparse_safetensors(folder / "m.safetensors", {"w": shape})
    zstd = oracle.save(folder / "zstd", {"w": np.zeros(shape, ml_dtypes.bfloat16)})
    return {"safetensors": source, "orbax-zstd": zstd, "gguf": large_gguf(folder / "m.gguf")}


def large_gguf(file: Path) -> Path:
    """A tensor that takes 170 MB in the file, and 320 MB in bf16."""
    writer = gguf.GGUFWriter(file, "llama")
    writer.add_embedding_length(1024)
    writer.add_head_count(8)
    blocks = np.zeros((156_256, 1024 // 32 * 34), np.uint8)
    writer.add_tensor("token_embd.weight", blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


REFUSED = {
    "no elements": ({"w": np.zeros((0, 3))}, "no elements"),
    "below a tensor": ({"a.b": np.zeros(3), "a": np.zeros(2)}, "'a.b' would lie below it"),
    "names of scales": (
        {"w": np.zeros((2, 2), np.float32), "w_scale": np.zeros(2, np.float32)},
        "would have the name 'w_scale'",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_tensors(case, tmp_path):
    tensors, why = REFUSED[case]
    save_file(tensors, tmp_path / "m.safetensors")
    rules = Rules("test", (Rule(("w",), (), 1), Rule(("*",), ())))
    with pytest.raises(ValueError, match=why):
        prepare(tmp_path / "m.safetensors", tmp_path / "out", mesh=TP2, rules=rules, method="fp8")


def test_refuses_what_are_no_weights(tmp_path):
    oracle.save(tmp_path / "keys", {"k": jax.random.key(0), "w": jnp.ones(3)})
    with pytest.raises(ValueError, match=r"\['k'\] are PRNG keys"):
        sources.open_model(tmp_path / "keys")
    oracle.save(tmp_path / "text", {"t": "text", "w": jnp.ones(3)})
    with pytest.raises(ValueError, match="'t' is a string"):
        sources.open_model(tmp_path / "text")
    with pytest.raises(CheckpointError, match="no such file"):
        sources.open_model(tmp_path / "nothing")


def test_check_finds_no_problems(prepared, source, tmp_path):
    found = check(prepared)
    assert found["problems"] == []
    assert found["arrays"] == 21 + 14
    assert found["bytes"] == sum(
        len(v) for k, v in oracle.stored_values(prepared, True).items() if "zarray" not in k
    )
    shutil.copytree(source, tmp_path / "moved")
    assert check(prepared, tmp_path / "moved")["problems"] == []


def test_check_finds_each_damaged_chunk(prepared):
    for file in sorted((prepared / "d").glob("rank*")):
        content = bytearray(file.read_bytes())
        for at in (17, len(content) // 2):
            before = bytes(content)
            content[at] ^= 4
            file.write_bytes(content)
            problems = check(prepared)["problems"]
            assert any("fails its checksum" in p and str(file) in p for p in problems), (file, at)
            content[:] = before
        file.write_bytes(content)
    assert check(prepared)["problems"] == []


def test_check_finds_a_truncated_file(prepared):
    file = prepared / "d" / "rank00001-00000"
    os.truncate(file, 5000)
    problems = check(prepared)["problems"]
    assert any("truncated" in p and str(file) in p for p in problems)


def test_check_finds_damage_in_every_small_file(prepared):
    files = [f for f in prepared.rglob("*") if f.is_file() and f.name != "jaxgds.json"]
    small = [f for f in files if not f.name.startswith("rank")]
    assert {"_METADATA", "_sharding", "config.json", "btree"} < {f.name for f in small}
    for file in small:
        content = file.read_bytes()
        for damaged in (content[:-1], content[:-9] + b"?" + content[-8:]):
            file.write_bytes(damaged)
            try:
                (problem, *_) = check(prepared)["problems"]
            except CheckpointError as e:  # without it there is nothing to look at
                assert file.name in ("manifest.ocdbt", "btree"), e
            else:
                assert str(file) in problem and "fails its checksum" in problem
        file.unlink()
        if file.name == "config.json":
            assert "cannot be read" in check(prepared)["problems"][0]
        file.write_bytes(content)
    assert check(prepared)["problems"] == []


@pytest.mark.parametrize("method", [None, "fp8"])
def test_check_finds_that_the_source_has_changed(method, source, tmp_path):
    prepare(source, tmp_path / "out", mesh=TP2, method=method)
    for name in ("model.norm.weight", "model.layers.0.mlp.down_proj.weight"):
        weights = models.llama()
        weights[name].view(np.uint16).reshape(-1)[-1] ^= 0x40
        shutil.rmtree(tmp_path / "changed", ignore_errors=True)
        models.save_safetensors(tmp_path / "changed", weights)
        (problem,) = check(tmp_path / "out", tmp_path / "changed")["problems"]
        assert name in problem and "is not what the source has" in problem


def test_check_finds_other_names_and_shapes(prepared, tmp_path):
    weights = models.llama()
    weights["model.extra.weight"] = weights.pop("model.norm.weight")
    weights["lm_head.weight"] = weights["lm_head.weight"].reshape(models.DIM, models.VOCAB)
    models.save_safetensors(tmp_path / "other", weights)
    problems = "; ".join(check(prepared, tmp_path / "other")["problems"])
    assert "model.extra.weight" in problems and "model.norm.weight" in problems
    assert "lm_head.weight: its shape is (128, 64), in the source (64, 128)" in problems


def test_check_without_a_source_or_a_description(prepared, tmp_path):
    file = prepared / "jaxgds.json"
    description = json.loads(file.read_text())
    description["source"]["path"] = str(tmp_path / "gone")
    file.write_text(json.dumps(description))
    with pytest.raises(CheckpointError, match=r"gone is gone.*--check SRC DST"):
        check(prepared)
    for damaged in ("{", '{"arrays": 3}', '{"arrays": {"w": {}}}'):
        file.write_text(damaged)
        with pytest.raises(CheckpointError, match="damaged"):
            check(prepared)
    file.unlink()
    with pytest.raises(CheckpointError, match="not a prepared checkpoint"):
        check(prepared)


def test_command(source, tmp_path, capfd):
    out, result = str(tmp_path / "out"), str(tmp_path / "out.json")
    command = ["prepare", str(source), out, "--mesh", "dp=2,tp=2", "--quantize", "fp8"]
    assert cli.main([*command, "--json", result]) == 0
    shown = capfd.readouterr()
    assert "14 of them quantised" in shown.out and shown.err == ""  # no bar: not a terminal
    assert json.loads(Path(result).read_text())["aligned_share"] > 0.5
    assert cli.main(["prepare", "--check", out]) == 0
    assert "no problems found" in capfd.readouterr().out
    os.truncate(tmp_path / "out/d/rank00001-00000", 100)
    assert cli.main(["prepare", "--check", out]) == 1
    assert "WRONG" in capfd.readouterr().out
    for wrong in ([str(source)], [str(source), out], [str(source), f"{out}2", "--mesh", "x"]):
        assert cli.main(["prepare", *wrong]) == 2
        assert capfd.readouterr().err.startswith("jaxgds prepare: ")


def test_command_with_rules_and_a_dtype(source, tmp_path, capsys):
    rules, out = tmp_path / "own.toml", tmp_path / "out"
    rules.write_text('[[rule]]\nnames = ["*.down_proj.weight"]\nspec = ["x"]\n')
    command = ["prepare", str(source), str(out), "--mesh", "x=4", "--rules", str(rules)]
    assert cli.main([*command, "--dtype", "float32"]) == 2
    assert "own.toml: no rule is for the parameter" in capsys.readouterr().err
    assert not out.exists()
    with rules.open("a") as f:
        f.write('[[rule]]\nnames = ["*"]\nspec = []\n')
    assert cli.main([*command, "--dtype", "float32"]) == 0
    weights, index = models.llama(), open_index(out)
    for name in index.names():
        layout = index.array(name).layout
        assert layout.dtype == np.float32
        split = layout.shape[0] // layout.chunk[0]
        assert split == (4 if name.endswith("down_proj.weight") else 1), name
    tree = jaxgds.load(out)
    got = tree["model"]["layers"]["1"]["mlp"]["down_proj"]["weight"]
    expected = weights["model.layers.1.mlp.down_proj.weight"].astype(np.float32)
    np.testing.assert_array_equal(got, expected)


def test_shows_its_progress_on_a_terminal(large, tmp_path):
    terminal, stderr = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 100))
    shown: list[bytes] = []

    def drain() -> None:
        try:
            while part := os.read(terminal, 4096):
                shown.append(part)
        except OSError:  # the other end is closed
            pass

    reader = threading.Thread(target=drain)
    reader.start()
    source, out = str(large["safetensors"]), str(tmp_path / "out")
    command = [sys.executable, "-m", "jaxgds", "prepare", source, out]
    subprocess.run(command, stderr=stderr, stdout=subprocess.DEVNULL, check=True)
    os.close(stderr)
    reader.join()
    os.close(terminal)
    text = b"".join(shown).decode()
    assert re.search(r"prepare: +[1-9]\d*%.*<\d\d:\d\d, [\d.]+[MG]B/s\]", text), text
