"""The commands, run as a user runs them."""

import json
import os
import signal
import subprocess
import sys
import time
from importlib.metadata import version

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest

from jaxgds import doctor, prepare
from jaxgds.bench.checkpoints import FORMATS, PREPARED
from jaxgds.cli import main


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("cli") / "checkpoint"
    tree = {"w": jnp.ones((512, 256), jnp.bfloat16), "step": jnp.int32(7)}
    with ocp.Checkpointer(ocp.PyTreeCheckpointHandler(use_compression=False)) as checkpointer:
        checkpointer.save(path, args=ocp.args.PyTreeSave(tree))
    return path


def test_inspect(checkpoint, tmp_path, capsys):
    assert main(["inspect", str(checkpoint), "--json", str(tmp_path / "out.json")]) == 0
    found = json.loads((tmp_path / "out.json").read_text())
    assert {a["name"]: a["shape"] for a in found["arrays"]} == {"w": [512, 256], "step": []}
    assert found["total"]["nbytes"] == 512 * 256 * 2 + 4
    assert found["total"]["direct_nbytes"] == 512 * 256 * 2  # the scalar is inline
    text = capsys.readouterr().out
    assert "512x256" in text and "bfloat16" in text and "2 arrays" in text


def test_inspect_names_what_is_wrong(tmp_path, capsys):
    assert main(["inspect", str(tmp_path)]) == 2
    assert str(tmp_path) in capsys.readouterr().err


def test_doctor(checkpoint, capsys):
    assert main(["doctor", str(checkpoint), "--json", "-"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["path"]["kind"] != "unknown"
    assert found["devices"] and found["machine"]["cores"] >= 1
    assert any("path" in line for line in found["verdict"])
    assert main(["doctor", str(checkpoint / "nowhere")]) == 2
    assert "nowhere" in capsys.readouterr().err


@pytest.mark.parametrize(
    "platform, engine, says",
    [
        ("cpu", "", "host path"),
        ("cpu", "host", "host path"),
        ("cpu", "pinned", "JAXGDS_ENGINE=pinned is no engine for JAX's devices"),
        ("gpu", "", "pinned path"),
        ("gpu", "pinned", "pinned path, as JAXGDS_ENGINE asks for"),
        ("gpu", "gds", "JAXGDS_ENGINE=gds needs kvikio, which is not installed"),
        ("gpu", "host", "JAXGDS_ENGINE=host is no engine for JAX's devices"),
        ("gpu", "warp", "JAXGDS_ENGINE=warp names no engine"),
    ],
)
def test_doctor_where_an_engine_is_forced(platform, engine, says, monkeypatch, capsys):
    device = {"platform": platform, "kind": "H100", "bytes_limit": None, "numa_node": None}
    monkeypatch.setattr(doctor, "_devices", lambda: [device])
    monkeypatch.setattr(doctor, "_installed", lambda _: False)
    monkeypatch.setattr(doctor.gds_proof, "missing", lambda: "kvikio is not installed")
    monkeypatch.setenv("JAXGDS_ENGINE", engine)
    assert main(["doctor"]) == 0
    assert says in capsys.readouterr().out


@pytest.mark.parametrize(
    "missing, engine, config, says",
    [
        ("no nvidia-fs", "gds", "{}", "gds-compat path, as JAXGDS_ENGINE asks for"),
        (None, "gds", "{}", "gds path, as JAXGDS_ENGINE asks for"),
        ("bad.json: bad", "gds", "[]", "Restores fail, as JAXGDS_ENGINE asks for gds: "),
        ("bad.json: bad", "", "[]", "pinned path"),
    ],
)
def test_doctor_where_kvikio_is_installed(
    missing, engine, config, says, monkeypatch, tmp_path, capsys
):
    device = {"platform": "gpu", "kind": "H100", "bytes_limit": None, "numa_node": None}
    monkeypatch.setattr(doctor, "_devices", lambda: [device])
    monkeypatch.setattr(doctor, "_installed", lambda _: True)
    monkeypatch.setattr(doctor, "version", lambda _: "26.10")
    monkeypatch.setattr(doctor.gds_proof, "missing", lambda: missing)
    monkeypatch.setenv("JAXGDS_ENGINE", engine)
    (tmp_path / "cufile.json").write_text(config)
    monkeypatch.setenv("CUFILE_ENV_PATH_JSON", str(tmp_path / "cufile.json"))
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert says in said
    assert (f"{tmp_path / 'cufile.json'}: the file is []" in said) == (config == "[]")


def test_doctor_where_jax_does_not_start(monkeypatch, capsys):
    """As with JAX_PLATFORMS=cuda and no plugin, where JAX says nothing at all."""

    def devices():
        raise AssertionError

    monkeypatch.setattr(jax, "local_devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    assert main(["doctor"]) == 0
    assert "JAX does not start" in (said := capsys.readouterr().out) and "=cuda" in said


def test_errors_name_the_file_and_no_number(tmp_path, capsys):
    assert main(["prepare", str(tmp_path), str(tmp_path)]) == 2
    assert main(["plan", "llama-3.1-8b", "--rules", str(tmp_path / "no")]) == 2
    first, second = capsys.readouterr().err.splitlines()
    assert first == f"jaxgds prepare: {tmp_path}: it is there already: remove it, or choose another"
    assert second == f"jaxgds plan: {tmp_path / 'no'}: No such file or directory"


@pytest.mark.parametrize(
    "option", [["--json", "no/x.json"], ["--json", "."], ["--plot", "no/x.png"], ["--plot", "x.y"]]
)
def test_what_cannot_be_written_is_said_before_the_work(option, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["bench", "restore", "--dir", "made", *option]) == 2
    error = capsys.readouterr().err
    assert error.startswith("jaxgds bench restore: ") and error.count("\n") == 1
    assert option[1].split("/")[0] in error and not os.listdir(tmp_path)


def test_a_plot_without_matplotlib(monkeypatch, tmp_path, capsys):
    for name in ("matplotlib", "matplotlib.backend_bases"):
        monkeypatch.setitem(sys.modules, name, None)
    assert main(["bench", "decode", "--plot", str(tmp_path / "x.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err


@pytest.mark.parametrize("command", [["--help"], ["plan", "llama-3.1-8b"], ["plan", "--table"]])
def test_a_reader_that_goes_away(command):
    """As `head` does, before the little that is to be written has left the buffer."""
    with subprocess.Popen(
        [sys.executable, "-m", "jaxgds", *command],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env={k: v for k, v in os.environ.items() if k != "PYTHONUNBUFFERED"},
    ) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_prepare_clears_up(number, checkpoint, tmp_path, monkeypatch, capsys):
    convert = prepare._convert

    def stopped(*args):
        convert(*args)
        assert os.listdir(tmp_path) == [".made.partial"]
        os.kill(os.getpid(), number)
        time.sleep(60)

    monkeypatch.setattr(prepare, "_convert", stopped)
    handler = signal.getsignal(signal.SIGTERM)
    assert main(["prepare", str(checkpoint), str(tmp_path / "made")]) == 130
    assert capsys.readouterr().err == "jaxgds prepare: stopped\n"
    assert os.listdir(tmp_path) == [] and signal.getsignal(signal.SIGTERM) is handler


def test_a_process_of_a_benchmark_fails(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "executable", "false")
    assert main(["bench", "restore", "--dir", str(tmp_path)]) == 1
    assert "a process of it failed with status 1" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--size", "0"), ("--size", "nan"), ("--repeat", "-1")])
def test_numbers_of_a_benchmark_are_positive(option, capsys):
    with pytest.raises(SystemExit):
        main(["bench", "restore", *option])
    assert f"invalid positive {'int' if option[0] == '--repeat' else 'float'} value" in (
        capsys.readouterr().err
    )


def test_version(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0 and capsys.readouterr().out == f"jaxgds {version('jaxgds')}\n"


BENCH_RESTORE = [sys.executable, "-m", "jaxgds", "bench", "restore", "--dir", "bench"]


@pytest.mark.parametrize(
    ("processes", "formats", "loaders"),
    [
        (1, FORMATS, {"jaxgds", "orbax", "jaxgds (safetensors)"}),
        (3, tuple(PREPARED), {"jaxgds (prepared)"}),
    ],
)
def test_bench_restore_measures_every_format(tmp_path, processes, formats, loaders):
    option = ["--formats", ",".join(formats), "--processes", str(processes)]
    done = subprocess.run(
        [*BENCH_RESTORE, "--size", "0.1", "--repeat", "2", "--json", "out.json", *option],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "out.json").read_text())
    assert {r["format"] for r in found["results"]} == set(formats)
    assert loaders <= {r["loader"] for r in found["results"]}
    for row in found["results"]:
        rows = 8000 if row["format"] == "orbax-many" else 8192
        assert row["nbytes"] == rows * 8192 * 2 and len(row["seconds"]) == 2, row
        assert len(row["first_seconds"]) == processes
        assert row["seconds"][0] == sorted(row["first_seconds"])[processes // 2]
    assert "GB/s" in done.stdout


def test_bench_restore_onto_devices_that_are_not_there(tmp_path):
    done = subprocess.run(
        [*BENCH_RESTORE, "--formats", "prepared-tp2"],
        cwd=tmp_path,
        env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2 and not os.listdir(tmp_path)
    assert "prepared-tp2 needs 2 devices, and there are 1\n" in done.stderr


def test_help_lists_the_commands(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert all(command in text for command in ("inspect", "doctor", "bench"))
