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
# key bits, value bits, head_dim, group -> most registers a thread: 128, 168 and 255 let four, three
# and two blocks run at once, which the choice of splits counts on
CASES = {
    (4, 4, 128, 8): 128,
    (3, 3, 128, 8): 168,
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
    def dumps(suffix):
        return [path.read_text() for path in (h100_dumps / str(i)).glob(f"*.{suffix}")]

    reports = dumps("ptxas")
    assert reports  # of the attention, and of the merge where it is not that of a case before
    assert all("0 bytes spill stores, 0 bytes spill loads" in report for report in reports)
    registers = [int(re.findall(r"Used (\d+) registers", report)[0]) for report in reports]
    assert max(registers) <= list(CASES.values())[i]
    assert all(".target sm_90a" in ptx for ptx in dumps("ptx"))
    for resources in dumps("resources.txt"):
        assert int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0]) <= SHARED_MEMORY
    for code in dumps("sass_ctrl"):
        assert "HGMMA" in code and "UTMALDG" in code and "LDL" not in code


def test_a_call_is_two_launches(h100_dumps):
    for i, (*_, group) in enumerate(CASES):
        padded = group % 8 > 0  # a fusion before and one after
        assert (h100_dumps / str(i) / "launches").read_text() == str(4 if padded else 2)
