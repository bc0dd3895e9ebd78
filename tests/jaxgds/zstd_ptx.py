"""Compiles jaxgds/engines/zstd.cu to what is shipped beside it: `make ptx`.

To PTX by NVRTC of CUDA 12.0, for GPUs from Ampere on, so that every driver takes it that JAX runs
with. And that, by ptxas of CUDA 12.8, to machine code for GPUs that there are, which a driver has
not to compile first. So what compiles them need not be installed with jaxgds.
"""

import ctypes
import importlib.util
import pathlib
import subprocess
import tempfile

import zstandard


ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
ENGINES = pathlib.Path(__file__).parents[2] / "jaxgds" / "engines"


def compiled() -> bytes:
    """The PTX of zstd.cu."""
    nvrtc = _nvrtc()
    program, size = ctypes.c_void_p(), ctypes.c_size_t()
    source = (ENGINES / "zstd.cu").read_bytes()
    status = nvrtc.nvrtcCreateProgram(ctypes.byref(program), source, b"zstd.cu", 0, None, None)
    assert not status, status
    options = [b"--gpu-architecture=compute_80", b"--std=c++17"]
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


def assembled(ptx: bytes, architecture: str) -> tuple[bytes, str]:
    """The machine code of PTX, and what ptxas says of its kernels."""
    ptxas = _folder("cuda_nvcc") / "bin" / "ptxas"
    with tempfile.TemporaryDirectory() as folder:
        source, cubin = pathlib.Path(folder, "zstd.ptx"), pathlib.Path(folder, "zstd.cubin")
        source.write_bytes(ptx)
        command = [ptxas, "-v", f"-arch={architecture}", source, "-o", cubin]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        return cubin.read_bytes(), done.stderr


def machine_code(architecture: str) -> pathlib.Path:
    """Where it is shipped, as a zstd frame."""
    return ENGINES / f"zstd_{architecture}.cubin.zst"


def _nvrtc() -> ctypes.CDLL:
    folder = _folder("cuda_nvrtc") / "lib"
    # It opens this one by its name.
    ctypes.CDLL(str(folder / "libnvrtc-builtins.so.12.0"), mode=ctypes.RTLD_GLOBAL)
    return ctypes.CDLL(str(folder / "libnvrtc.so.12"))


def _folder(package: str) -> pathlib.Path:
    found = importlib.util.find_spec(f"nvidia.{package}")
    assert found is not None and found.submodule_search_locations
    return pathlib.Path(found.submodule_search_locations[0])


if __name__ == "__main__":
    ptx = compiled()
    (ENGINES / "zstd.ptx").write_bytes(ptx)
    for architecture in ARCHITECTURES:
        code, _ = assembled(ptx, architecture)
        machine_code(architecture).write_bytes(zstandard.ZstdCompressor(level=19).compress(code))
