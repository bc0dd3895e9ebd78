"""The PTX that is shipped is that of zstd.cu, and compiles for GPUs that are not here."""

import importlib.util
import pathlib
import re
import subprocess

import pytest
import zstd_ptx


NVIDIA = importlib.util.find_spec("nvidia")
pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not NVIDIA, reason="needs the compilers that the extra aot brings (make test-aot)"
    ),
]
PTX = zstd_ptx.ENGINES / "zstd.ptx"


def test_it_is_that_of_the_source():
    assert PTX.read_bytes() == zstd_ptx.compiled(), "run: make ptx"


@pytest.mark.parametrize("architecture", ["sm_80", "sm_90", "sm_100", "sm_120"])
def test_compiles(tmp_path, architecture):
    """Without spilling a register."""
    assert NVIDIA is not None and NVIDIA.submodule_search_locations is not None
    folders = map(pathlib.Path, NVIDIA.submodule_search_locations)
    (ptxas,) = [path for folder in folders for path in folder.glob("*/bin/ptxas")]
    command = [ptxas, "-v", f"-arch={architecture}", PTX, "-o", tmp_path / "cubin"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    kernels = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", done.stderr)
    assert len(kernels) == PTX.read_text().count(".entry")
    assert set(kernels) == {("0", "0")}, done.stderr
