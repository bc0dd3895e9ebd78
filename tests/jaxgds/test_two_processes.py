"""Two processes on one shared file system, each with four devices of an eight-device mesh."""

import os
import pathlib
import socket
import subprocess
import sys


def test_two_processes_restore_their_own_shards(tmp_path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = str(s.getsockname()[1])
    here = pathlib.Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent.parent), os.environ.get("PYTHONPATH", "")])
    processes = [
        subprocess.Popen(
            [sys.executable, here / "two_processes.py", str(i), port, str(tmp_path)],
            env={**os.environ, "PYTHONPATH": path},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for i in range(2)
    ]
    try:
        outputs = [p.communicate(timeout=120)[0] for p in processes]
    finally:
        for p in processes:
            p.kill()
            p.wait()
    for i, (p, output) in enumerate(zip(processes, outputs, strict=True)):
        assert p.returncode == 0, output[-8000:]
        assert f"process {i} ok" in output
