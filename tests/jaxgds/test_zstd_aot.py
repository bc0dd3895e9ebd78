"""What is shipped beside zstd.cu is compiled of it, and runs well on GPUs that are not here."""

import importlib.util
import re

import pytest
import zstandard
import zstd_ptx


pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not importlib.util.find_spec("nvidia"),
        reason="needs the compilers that the extra aot brings (make test-aot)",
    ),
]


@pytest.fixture(scope="module")
def ptx():
    return (zstd_ptx.ENGINES / "zstd.ptx").read_bytes()


def test_the_ptx_is_that_of_the_source(ptx):
    assert ptx == zstd_ptx.compiled(), "run: make ptx"


@pytest.mark.parametrize("architecture", zstd_ptx.ARCHITECTURES)
def test_the_machine_code_is_that_of_the_ptx(ptx, architecture):
    """Without spilling a register."""
    code, said = zstd_ptx.assembled(ptx, architecture)
    shipped = zstd_ptx.machine_code(architecture).read_bytes()
    assert zstandard.decompress(shipped) == code, "run: make ptx"
    kernels = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", said)
    assert len(kernels) == ptx.count(b".entry")
    assert set(kernels) == {("0", "0")}, said
