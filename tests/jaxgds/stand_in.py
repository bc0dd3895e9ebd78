"""CPU devices as GPUs: restores onto them go through the pinned engine and driver.c.

A pytest plugin, for a process of its own whose JAXGDS_STAND_IN_DRIVER names the compiled driver.c:
other code must not find a CUDA driver that is none.
"""

import ctypes
import functools
import os
import pathlib
import shutil
import subprocess

import pytest


LIBRARY = os.environ.get("JAXGDS_STAND_IN_DRIVER")
KERNELS = os.environ.get("JAXGDS_STAND_IN_KERNELS")
CORES = 8  # that lanes are made for, whatever this machine has
HERE = pathlib.Path(__file__).parent


def environment(compiler: str, folder: pathlib.Path) -> dict[str, str]:
    """Builds the driver, and what makes reads fail; the environment of a process that uses them.

    Where there is a C++ compiler, the driver has kernels too.
    """
    driver, faulty = folder / "libcuda.so.1", folder / "faulty.so"
    command = [compiler, "-shared", "-fPIC", "-O1"]
    subprocess.run(
        [*command, "-Wl,-soname,libcuda.so.1", "-o", driver, HERE / "driver.c"], check=True
    )
    subprocess.run([*command, "-o", faulty, HERE / "faulty.c", "-ldl"], check=True)
    kernels = folder / "kernels.so"
    if plus := shutil.which("c++") or shutil.which("g++"):
        source = HERE / "zstd_emulated.cpp"
        subprocess.run([plus, *command[1:], "-std=c++17", "-o", kernels, source], check=True)
    return {
        "JAXGDS_STAND_IN_DRIVER": str(driver),
        "JAXGDS_STAND_IN_KERNELS": str(kernels) if plus else "",
        "JAX_PLATFORMS": "cpu",
        "LD_PRELOAD": str(faulty),
        "XLA_FLAGS": "--xla_force_host_platform_device_count=8",
    }


@functools.cache
def driver() -> ctypes.CDLL:
    """The stand-in, which whoever opens libcuda.so.1 gets from now on."""
    assert LIBRARY is not None
    library = ctypes.CDLL(LIBRARY, mode=ctypes.RTLD_GLOBAL)
    library.stand_in_violation.restype = ctypes.c_char_p
    if KERNELS:
        library.stand_in_kernels(ctypes.CDLL(KERNELS).run)
    return library


def engine(*_: object, **__: object):
    """Takes the place of `engine_for`."""
    from jaxgds.engines import PinnedEngine

    return PinnedEngine()


def held() -> dict[str, int]:
    """What the driver gave out and did not get back, and what is queued."""
    names = ("streams", "events", "pinned", "allocated", "queued")
    return {name: getattr(driver(), f"stand_in_{name}")() for name in names}


def violation() -> str:
    """The first use that CUDA forbids, since this was last asked."""
    return driver().stand_in_violation().decode()


def fail(call: str, after: int = 0, times: int = 1 << 30) -> None:
    """The calls of a function but the next `after` fail, `times` of them; "" ends that."""
    driver().stand_in_fail(call.encode(), after, times)


@pytest.fixture(autouse=True)
def on_a_stand_in(monkeypatch):
    """CPU devices are GPUs; nothing that CUDA forbids is done, nothing is left queued."""
    from jaxgds import restore

    driver()
    monkeypatch.setattr(restore, "engine_for", engine)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(CORES)))
    yield
    fail("")
    queued = held()["queued"]
    driver().stand_in_forget()
    assert violation() == "" and queued == 0
