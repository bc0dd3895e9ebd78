"""Ahead-of-time compilation of the decode kernel, down to machine code, without a GPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest


HERE = Path(__file__).parent
TARGETS = HERE.parents[2] / "configs" / "targets"
SHARED_MEMORY = 227 * 1024
# key bits, value bits, head_dim, group -> most registers a thread: 128 let four blocks run at
# once, as many as shared memory has room for at head_dim 128; 255 two
CASES = {
    (4, 4, 128, 8): 128,
    (3, 3, 128, 8): 128,
    (2, 8, 64, 4): 128,
    (8, 3, 64, 16): 128,
    (4, 4, 256, 8): 255,
}


def binaries() -> list[str]:
    """Where the CUDA wheels keep nvdisasm and ptxas."""
    nvidia = importlib.util.find_spec("nvidia")
    roots = list(nvidia.submodule_search_locations or []) if nvidia else []
    return sorted({str(path.parent) for root in roots for path in Path(root).rglob("nvdisasm")})


pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not (importlib.util.find_spec("jax_cuda13_plugin") and binaries()),
        reason="needs the compilers that the extra aot brings (make test-aot)",
    ),
]


@pytest.fixture(scope="module")
def h100_dumps(tmp_path_factory):
    out = tmp_path_factory.mktemp("h100")
    path = os.pathsep.join([*binaries(), os.environ["PATH"]])
    subprocess.run(
        [sys.executable, HERE / "compile_for.py", TARGETS / "h100.textproto", out]
        + [json.dumps(list(CASES))],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PATH": path},
        check=True,
    )
    return out


@pytest.mark.parametrize("i", range(len(CASES)), ids=[str(case) for case in CASES])
def test_decode_compiles_for_h100(h100_dumps, i):
    def dump(suffix):
        (path,) = (h100_dumps / str(i)).glob(f"*.{suffix}")
        return path.read_text()

    assert ".target sm_90a" in dump("ptx")
    report = dump("ptxas")
    assert "0 bytes spill stores, 0 bytes spill loads" in report
    registers = re.search(r"Used (\d+) registers", report)
    assert registers and int(registers[1]) <= list(CASES.values())[i]
    scratch = re.search(r"smem_scratch_bytes=(\d+)", dump("resources.txt"))
    assert scratch and int(scratch[1]) <= SHARED_MEMORY
    code = dump("sass_ctrl")
    assert "HGMMA" in code and "UTMALDG" in code and "LDL" not in code
