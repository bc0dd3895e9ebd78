"""Ahead-of-time compilation of the kernels, down to machine code, without a GPU."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest


HERE = Path(__file__).parent
TARGETS = HERE.parents[2] / "configs" / "targets"
SHARED_MEMORY = 227 * 1024
TENSOR_MEMORY = 512  # columns
ARCHITECTURES = {"h100": "sm_90a", "b200": "sm_100a"}
COPY = "UTMALDG"  # from memory through TMA
TENSOR_CORES = {"h100": "HGMMA", "b200": "UTCQMMA"}


@dataclass(frozen=True)
class Case:
    """registers: the most a thread may take. launches: of a whole call, XLA's own included; None:
    they do not matter.

    instructions: that its kernels must have. columns: the most of tensor memory.
    """

    target: str
    kernel: str  # a function of compile_for.py, and its parameters
    parameters: dict[str, int | None]
    registers: int
    launches: int | None
    instructions: tuple[str, ...]
    columns: int = TENSOR_MEMORY

    def __str__(self) -> str:
        return "-".join(map(str, [self.target, self.kernel, *self.parameters.values()]))


def decode(
    target, key_bits, value_bits, head_dim, group, page_size=64, sliding_window=None, **most
):
    parameters = dict(key_bits=key_bits, value_bits=value_bits, head_dim=head_dim, group=group)
    parameters |= dict(page_size=page_size, sliding_window=sliding_window)
    # Queries that do not fill rows of eight cost a fusion before and one after.
    launches = 4 if group % 8 else 2
    instructions = (COPY, TENSOR_CORES[target])
    return Case(target, "decode", parameters, launches=launches, instructions=instructions, **most)


def prefill(target, key_bits, value_bits, head_dim, group, page_size, sliding_window=None):
    parameters = dict(key_bits=key_bits, value_bits=value_bits, head_dim=head_dim, group=group)
    parameters |= dict(page_size=page_size, sliding_window=sliding_window)
    # Three warpgroups, which then share the registers out anew (Blackwell has two for head_dim
    # 256). What prepares keys and values is XLA's, as many launches as it makes of it.
    instructions = (COPY, "HGMMA" if target == "h100" else "UTCHMMA", "USETMAXREG")
    registers = 255 if head_dim == 256 else 168  # 255: the append between the chunks, as in encode
    if target == "b200" and head_dim == 256:
        instructions = instructions[:2]
    return Case(target, "prefill", parameters, registers, None, instructions)


def encode(target, key_bits, value_bits, head_dim, page_size, new):
    parameters = dict(key_bits=key_bits, value_bits=value_bits, head_dim=head_dim)
    parameters |= dict(page_size=page_size, new=new)
    # With 168 registers three blocks of 128 threads run at once.
    registers = 255 if head_dim == 256 else 168
    # The sum of the lengths, and for more than one token a slice of the ring: nothing else is
    # copied of a cache that is given away.
    launches = 2 if new == 1 else 3
    return Case(target, "encode", parameters, registers, launches, ("HMMA",))


CASES = [
    # 128, 168 and 255 registers let four, three and two blocks run at once, which the choice of
    # splits counts on.
    decode("h100", 4, 4, 128, 8, registers=128),
    decode("h100", 3, 3, 128, 8, registers=168),
    decode("h100", 2, 8, 64, 4, registers=128),
    decode("h100", 8, 3, 64, 16, registers=128),
    decode("h100", 4, 4, 256, 8, registers=255),
    decode("h100", 4, 4, 128, 8, sliding_window=4096, registers=168),
    decode("h100", 3, 3, 64, 8, 16, registers=128),
    decode("h100", 3, 4, 128, 8, 128, registers=168),
    decode("h100", 8, 8, 256, 16, 128, sliding_window=4096, registers=255),  # two stages fit
    prefill("h100", 4, 4, 128, 8, 64),
    prefill("h100", 3, 8, 64, 1, 16),
    prefill("h100", 4, 2, 128, 3, 128, sliding_window=512),
    prefill("h100", 4, 4, 256, 4, 64),
    # 168 registers and 128 columns of tensor memory let three blocks run at once, 255 and 256 two.
    decode("b200", 4, 4, 128, 8, registers=168, columns=128),
    decode("b200", 3, 3, 128, 8, registers=168, columns=128),
    decode("b200", 2, 8, 64, 4, registers=168, columns=128),
    decode("b200", 8, 3, 64, 16, 16, registers=255, columns=256),
    decode("b200", 4, 4, 256, 8, registers=255, columns=256),
    decode("b200", 4, 3, 128, 8, sliding_window=4096, registers=168, columns=128),
    prefill("b200", 4, 4, 128, 8, 64),
    prefill("b200", 8, 8, 64, 16, 128, sliding_window=512),
    prefill("b200", 3, 2, 256, 2, 16),
    encode("h100", 4, 4, 128, 64, 1),
    encode("h100", 4, 4, 128, 64, 32768),
    encode("h100", 3, 2, 256, 16, 32768),
    encode("h100", 8, 3, 64, 128, 32768),
    encode("b200", 4, 4, 128, 64, 32768),
    encode("b200", 3, 2, 256, 16, 32768),
]


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
def folder(tmp_path_factory):
    """Where a target's cases leave their dumps. All are compiled, the targets at the same time."""

    def start(target: str) -> tuple[Path, subprocess.Popen]:
        out = tmp_path_factory.mktemp(target)
        path = os.pathsep.join([*binaries(), os.environ["PATH"]])
        cases = [{"kernel": case.kernel, **case.parameters} for case in of_target(target)]
        command = [sys.executable, HERE / "compile_for.py", TARGETS / f"{target}.textproto", out]
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PATH": path}
        return out, subprocess.Popen([*command, json.dumps(cases)], env=environment)

    started = {target: start(target) for target in ARCHITECTURES}

    def folder(target: str) -> Path:
        out, process = started[target]
        assert process.wait() == 0
        return out

    yield folder
    for _, process in started.values():
        process.kill()
        process.wait()


def of_target(target: str) -> list[Case]:
    return [case for case in CASES if case.target == target]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_compiles_to(folder, case):
    out = folder(case.target) / str(of_target(case.target).index(case))

    def dumps(suffix):
        return [path.read_text() for path in out.glob(f"*.{suffix}")]

    reports = dumps("ptxas")
    assert reports  # of every kernel that no case before has
    stored = [int(x) for report in reports for x in re.findall(r"(\d+) bytes spill stores", report)]
    assert len(stored) >= len(reports) and max(stored) == 0
    registers = [int(re.findall(r"Used (\d+) registers", report)[0]) for report in reports]
    assert max(registers) <= case.registers
    assert all(f".target {ARCHITECTURES[case.target]}" in ptx for ptx in dumps("ptx"))
    assert dumps("ptx") and len(dumps("resources.txt")) >= len(reports)
    for resources in dumps("resources.txt"):
        assert int(re.findall(r"smem_scratch_bytes=(\d+)", resources)[0]) <= SHARED_MEMORY
        assert int(re.findall(r"tmem_scratch_cols=(\d+)", resources)[0]) <= case.columns
    code = "".join(dumps("sass_ctrl"))
    assert "LDL" not in code  # loads of what was spilled
    assert [name for name in case.instructions if name not in code] == []
    assert (out / "copies").read_text() == "0"
    assert case.launches is None or (out / "launches").read_text() == str(case.launches)
