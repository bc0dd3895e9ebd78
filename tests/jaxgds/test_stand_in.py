"""Runs the tests of the pinned engine in a process where driver.c takes the CUDA driver's place."""

import os
import pathlib
import re
import shutil
import subprocess
import sys

import pytest
import stand_in


HERE = pathlib.Path(__file__).parent


def test_the_pinned_engine_without_a_gpu(tmp_path):
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the library in the CUDA driver's place")
    environment = {
        **os.environ,
        **stand_in.environment(compiler, tmp_path),
        "PYTHONPATH": os.pathsep.join([str(HERE), *filter(None, sys.path)]),
    }
    # Its own folder for files, or it would take away those of the tests that run it.
    options = ["-q", "-m", "gpu", "-p", "stand_in", "--basetemp", tmp_path / "inner"]
    options += ["-p", "no:cacheprovider"]
    modules = [HERE / f"test_{name}.py" for name in ("pinned", "gpu_engines", "device_zstd")]
    command = [sys.executable, "-m", "pytest", *options, *modules]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-12000:] + done.stderr[-4000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed and int(passed[1]) > 100, done.stdout[-4000:]
