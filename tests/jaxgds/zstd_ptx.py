"""Compiles jaxgds/engines/zstd.cu to the PTX that is shipped beside it: `make ptx`.

By NVRTC of CUDA 12.0, for GPUs from Ampere on: so every driver takes it that JAX runs with, and
what it is compiled with need not be installed with jaxgds.
"""

import ctypes
import importlib.util
import pathlib


ARCHITECTURE = "compute_80"
ENGINES = pathlib.Path(__file__).parents[2] / "jaxgds" / "engines"


def compiled() -> bytes:
    """The PTX of zstd.cu."""
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = (ENGINES / "zstd.cu").read_bytes()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"zstd.cu", 0, None, None)
    assert not status, status
    options = [f"--gpu-architecture={ARCHITECTURE}".encode(), b"--std=c++17"]
    status = nvrtc.nvrtcCompileProgram(program, len(options), (ctypes.c_char_p * 2)(*options))
    if status:
        nvrtc.nvrtcGetProgramLogSize(program, ctypes.byref(size))
        log = ctypes.create_string_buffer(size.value)
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(log.value.decode())
    nvrtc.nvrtcGetPTXSize(program, ctypes.byref(size))
    ptx = ctypes.create_string_buffer(size.value)
    nvrtc.nvrtcGetPTX(program, ptx)
    nvrtc.nvrtcDestroyProgram(ctypes.byref(program))
    return ptx.value


def _nvrtc() -> ctypes.CDLL:
    found = importlib.util.find_spec("nvidia.cuda_nvrtc")
    assert found is not None and found.submodule_search_locations
    folder = pathlib.Path(found.submodule_search_locations[0]) / "lib"
    # It opens this one by its name.
    ctypes.CDLL(str(folder / "libnvrtc-builtins.so.12.0"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


if __name__ == "__main__":
    (ENGINES / "zstd.ptx").write_bytes(compiled())
