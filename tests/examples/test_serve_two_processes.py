"""serve_llama.py as two processes that Slurm would have started, four devices each."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import small_llama
from jax.sharding import Mesh

import pallas_kernels as pk
from examples import serve_llama
from examples.generate import generate
from jaxgds.prepare import prepare
from jaxgds.rules import read_mesh


TOKENS = "5,6,7,8,9"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two")
    small_llama.write(folder / "source", num_hidden_layers=1)
    prepare(folder / "source", folder / "prepared", mesh=read_mesh("tp=8"))
    return folder / "prepared"


def start(process: int, port: int, *command: object) -> subprocess.Popen:
    """With the environment that JAX's detection of Slurm looks at."""
    env = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "JAX_COORDINATOR_PORT": str(port),
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "127.0.0.1",
        "SLURM_NTASKS": "2",
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
    }
    return subprocess.Popen(
        [sys.executable, *map(str, command)],
        cwd=Path(__file__).parents[2],
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: list[subprocess.Popen]) -> list[str]:
    try:
        return [p.communicate(timeout=90)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def serve(port: int, paths: list[Path], *options: object) -> list[subprocess.Popen]:
    common = ["--tokens", TOKENS, "--new-tokens", 4, "--distributed", *options]
    return [
        start(i, port, "-m", "examples.serve_llama", path, *common) for i, path in enumerate(paths)
    ]


def test_two_processes_answer_like_one(prepared, tmp_path):
    out = tmp_path / "out.json"
    two = serve(free_port(), [prepared] * 2, "--json", out)
    outputs = finish(two)
    assert [p.returncode for p in two] == [0, 0], outputs
    assert "tokens/s" in outputs[0] and "->" not in outputs[1]
    model = serve_llama.load(prepared, Mesh(np.array(jax.devices("cpu")[:1]), ("tp",)))
    expected = generate(model, [list(map(int, TOKENS.split(",")))], pk.KVFormat(), 4)
    assert json.loads(out.read_text())["answers"] == expected


READ = """
import sys, pathlib, jax, numpy as np
import jaxgds
from examples.serve_llama import load
jax.distributed.initialize()
from jax.sharding import Mesh
with jaxgds.fail_together():
    model = load(pathlib.Path(sys.argv[1]), Mesh(np.array(jax.devices()), ("tp",)))
report = jaxgds.last_report()
mine = sum(
    sum({str(s.index): 2 * s.data.size for s in x.addressable_shards}.values())  # stored as bf16
    for x in jax.tree.leaves(model)
)
assert not report.fallbacks and report.bytes_read == mine, (report, mine)
sys.stdout.write(f"[read {mine} of {sum(2 * x.size for x in jax.tree.leaves(model))}]\\n")
"""


def test_each_process_reads_its_shards_only(prepared):
    port = free_port()
    outputs = finish([start(i, port, "-c", READ, prepared) for i in range(2)])
    for output in outputs:
        found = re.search(r"\[read (\d+) of (\d+)\]", output)
        assert found, output
        read, whole = map(int, found.groups())
        assert 0.5 * whole <= read < 0.51 * whole, output


def test_a_process_that_fails_makes_the_other_fail_with_its_reason(prepared, tmp_path):
    damaged = tmp_path / "damaged"
    shutil.copytree(prepared, damaged)
    for file in damaged.glob("d/rank00004-*"):
        os.truncate(file, 4096)
    processes = serve(free_port(), [prepared, damaged])
    outputs = finish(processes)
    assert [p.returncode == 0 for p in processes] == [False, False], outputs
    assert "CheckpointError" in outputs[1] and "rank00004" in outputs[1]
    assert (
        "process 1 failed: SystemExit: CheckpointError" in outputs[0] and "rank00004" in outputs[0]
    )


WAITS = """
import sys, time, jax
import jaxgds
jax.distributed.initialize(heartbeat_timeout_seconds=10)
sys.stdout.write("ready\\n")
sys.stdout.flush()
with jaxgds.fail_together():
    time.sleep(100)
"""


@pytest.mark.parametrize("killed", [0, 1])
def test_a_process_that_is_killed_ends_the_other(killed):
    """Within a minute, and it says so: JAX notices that nothing comes from it any more."""
    port = free_port()
    processes = [start(i, port, "-c", WAITS) for i in range(2)]
    for process in processes:
        assert process.stdout is not None and "ready\n" in iter(process.stdout.readline, "")
    processes[killed].kill()
    since = time.monotonic()
    output = finish(processes)[1 - killed]
    assert time.monotonic() - since < 60
    assert processes[1 - killed].returncode not in (0, None)
    assert "unhealthy" in output or "coordinat" in output, output
