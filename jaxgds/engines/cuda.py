"""The few calls of the CUDA driver that the GPU engines make, through ctypes.

Nothing needs to be installed besides the driver. Streams and events belong to the
context that is current when they are made: `use` first.

`call` releases Python's interpreter lock. `submit` keeps it: with many threads it takes
a hundred times longer to get it back than to put work into a stream.
"""

import contextlib
import ctypes
import functools
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from ctypes import POINTER, c_char_p, c_int, c_size_t, c_uint, c_uint64, c_void_p

from jaxgds.engines.strided import Box


_HOST, _DEVICE = 1, 2  # CUmemorytype
_NON_BLOCKING = 1  # a stream that does not wait for the legacy default stream
_NOT_READY = 600
_DISABLE_TIMING = 2
_MAJOR, _MINOR = 75, 76  # CUdevice_attribute: of the compute capability
_NAP = 100e-6  # seconds between two looks at an event: each look takes the interpreter lock


class CudaError(RuntimeError):
    """A call of the CUDA driver failed; names the call and the driver's reason."""


class Copy3D(ctypes.Structure):
    """CUDA_MEMCPY3D of cuda.h."""

    _fields_ = [
        *[(name, c_size_t) for name in ("src_x", "src_y", "src_z", "src_lod")],
        ("src_kind", c_int),
        ("src_host", c_void_p),
        ("src_device", c_uint64),
        ("src_array", c_void_p),
        ("src_reserved", c_void_p),
        *[(name, c_size_t) for name in ("src_pitch", "src_height")],
        *[(name, c_size_t) for name in ("dst_x", "dst_y", "dst_z", "dst_lod")],
        ("dst_kind", c_int),
        ("dst_host", c_void_p),
        ("dst_device", c_uint64),
        ("dst_array", c_void_p),
        ("dst_reserved", c_void_p),
        *[(name, c_size_t) for name in ("dst_pitch", "dst_height", "width", "height", "depth")],
    ]


_SIGNATURES = {
    "cuInit": [c_uint],
    "cuGetErrorName": [c_int, POINTER(c_char_p)],
    "cuGetErrorString": [c_int, POINTER(c_char_p)],
    "cuDeviceGet": [POINTER(c_int), c_int],
    "cuDeviceGetCount": [POINTER(c_int)],
    "cuDeviceGetAttribute": [POINTER(c_int), c_int, c_int],
    "cuDeviceGetUuid_v2": [c_char_p, c_int],
    "cuDeviceGetPCIBusId": [c_char_p, c_int, c_int],
    "cuDevicePrimaryCtxRetain": [POINTER(c_void_p), c_int],
    "cuCtxSetCurrent": [c_void_p],
    "cuCtxPushCurrent_v2": [c_void_p],
    "cuCtxPopCurrent_v2": [POINTER(c_void_p)],
    "cuMemHostRegister_v2": [c_void_p, c_size_t, c_uint],
    "cuMemHostUnregister": [c_void_p],
    "cuMemAlloc_v2": [POINTER(c_uint64), c_size_t],
    "cuMemFree_v2": [c_uint64],
    "cuStreamCreate": [POINTER(c_void_p), c_uint],
    "cuStreamSynchronize": [c_void_p],
    "cuStreamDestroy_v2": [c_void_p],
    "cuStreamWaitEvent": [c_void_p, c_void_p, c_uint],
    "cuEventCreate": [POINTER(c_void_p), c_uint],
    "cuEventRecord": [c_void_p, c_void_p],
    "cuEventQuery": [c_void_p],
    "cuEventDestroy_v2": [c_void_p],
    "cuMemcpyHtoDAsync_v2": [c_uint64, c_void_p, c_size_t, c_void_p],
    "cuMemcpyDtoDAsync_v2": [c_uint64, c_uint64, c_size_t, c_void_p],
    "cuMemcpy3DAsync_v2": [POINTER(Copy3D), c_void_p],
    "cuModuleLoadData": [POINTER(c_void_p), c_char_p],
    "cuModuleGetFunction": [POINTER(c_void_p), c_void_p, c_char_p],
    "cuLaunchKernel": [c_void_p, *[c_uint] * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)],
}


@functools.cache
def driver() -> ctypes.CDLL:
    """The loaded and initialised driver library.

    Raises:
      NotImplementedError: there is no NVIDIA driver here.
    """
    try:
        lib = ctypes.CDLL("libcuda.so.1")
    except OSError as e:
        raise NotImplementedError(f"no NVIDIA driver: {e}") from e
    for name, arguments in _SIGNATURES.items():
        getattr(lib, name).argtypes = arguments
    status = lib.cuInit(0)
    if status:
        raise NotImplementedError(f"cuInit failed: {_reason(lib, status)}")
    return lib


def call(name: str, *arguments: object) -> None:
    """Calls the driver's function `name`; CudaError if it does not return success."""
    status = getattr(driver(), name)(*arguments)
    if status:
        raise CudaError(f"{name}: {_reason(driver(), status)}")


def submit(name: str, *arguments: object) -> None:
    """As `call`, for what only queues work and returns at once."""
    status = _queueing()[name](*arguments)
    if status:
        raise CudaError(f"{name}: {_reason(driver(), status)}")


def wait(event: int) -> None:
    """Returns when what was queued before `event` is done.

    Looks at it again and again: to be woken takes an interrupt and half the time of a slot's copy.
    """
    while not done(event):
        time.sleep(_NAP)


def done(event: int) -> bool:
    """Whether what was queued before `event` is done."""
    status = _queueing()["cuEventQuery"](event)
    if status not in (0, _NOT_READY):
        raise CudaError(f"cuEventQuery: {_reason(driver(), status)}")
    return not status


@functools.cache
def _queueing() -> dict[str, Callable[..., int]]:
    driver()
    lib = ctypes.PyDLL("libcuda.so.1")  # functions of a PyDLL keep the interpreter lock
    names = (
        "cuCtxSetCurrent",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyDtoDAsync_v2",
        "cuMemcpy3DAsync_v2",
        "cuEventRecord",
        "cuEventQuery",
        "cuStreamWaitEvent",
        "cuLaunchKernel",
    )
    for name in names:
        getattr(lib, name).argtypes = _SIGNATURES[name]
    return {name: getattr(lib, name) for name in names}


def _reason(lib: ctypes.CDLL, status: int) -> str:
    name, text = c_char_p(), c_char_p()
    lib.cuGetErrorName(status, ctypes.byref(name))
    lib.cuGetErrorString(status, ctypes.byref(text))
    return f"{(name.value or b'?').decode()} ({(text.value or b'?').decode()})"


@functools.cache
def context(ordinal: int) -> int:
    """The primary context of GPU `ordinal`: the one JAX uses. Kept for the process's life."""
    device, found = c_int(), c_void_p()
    driver()
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDevicePrimaryCtxRetain", ctypes.byref(found), device)
    assert found.value
    return found.value


def count() -> int:
    """The number of GPUs."""
    found = c_int()
    driver()
    call("cuDeviceGetCount", ctypes.byref(found))
    return found.value


def uuid(ordinal: int) -> bytes:
    """The 16 bytes that tell GPU `ordinal` from all others."""
    device, found = c_int(), ctypes.create_string_buffer(16)
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDeviceGetUuid_v2", found, device)
    return found.raw


def compute_capability(ordinal: int) -> tuple[int, int]:
    """Of GPU `ordinal`: (9, 0) for Hopper."""
    device, major, minor = c_int(), c_int(), c_int()
    call("cuDeviceGet", ctypes.byref(device), ordinal)
    call("cuDeviceGetAttribute", ctypes.byref(major), _MAJOR, device)
    call("cuDeviceGetAttribute", ctypes.byref(minor), _MINOR, device)
    return major.value, minor.value


def use(ordinal: int) -> None:
    """Makes GPU `ordinal` current for the calling thread."""
    submit("cuCtxSetCurrent", context(ordinal))


@contextlib.contextmanager
def current(ordinal: int) -> Iterator[None]:
    """GPU `ordinal` is current within, for whichever thread this is."""
    call("cuCtxPushCurrent_v2", context(ordinal))
    try:
        yield
    finally:
        call("cuCtxPopCurrent_v2", ctypes.byref(c_void_p()))


def when_dropped(owner: object, free: Callable[..., None], *arguments: object) -> weakref.finalize:
    """Has `free` called with `arguments` once: by the caller, or when nobody holds `owner`.

    As when a read that hung has ended at last. Not at the end of the process, which frees all.
    """

    def quietly() -> None:
        with contextlib.suppress(CudaError):
            free(*arguments)

    finalizer = weakref.finalize(owner, quietly)
    finalizer.atexit = False
    return finalizer


def allocate(nbytes: int) -> int:
    """Device memory of the current GPU, outside XLA's pool."""
    pointer = c_uint64()
    call("cuMemAlloc_v2", ctypes.byref(pointer), nbytes)
    return pointer.value


def free(pointer: int) -> None:
    call("cuMemFree_v2", pointer)


def stream() -> int:
    made = c_void_p()
    call("cuStreamCreate", ctypes.byref(made), _NON_BLOCKING)
    assert made.value
    return made.value


def event() -> int:
    made = c_void_p()
    call("cuEventCreate", ctypes.byref(made), _DISABLE_TIMING)
    assert made.value
    return made.value


def copy_box(box: Box, src: int, dst: int, stream: int, *, on_device: bool) -> None:
    """Queues the copy of a box of bytes into device memory.

    Args:
      src, dst: the addresses that the box's offsets count from.
      on_device: `src` is memory of the same GPU; otherwise pinned host memory.
    """
    depth, height, width = box.shape
    src, dst = src + box.src, dst + box.dst
    if depth == height == 1:
        name = "cuMemcpyDtoDAsync_v2" if on_device else "cuMemcpyHtoDAsync_v2"
        submit(name, dst, src, width, stream)
        return
    copy = Copy3D(
        src_kind=_DEVICE if on_device else _HOST,
        src_host=None if on_device else src,
        src_device=src if on_device else 0,
        src_pitch=box.src_strides[1],
        src_height=box.src_strides[0] // box.src_strides[1],
        dst_kind=_DEVICE,
        dst_device=dst,
        dst_pitch=box.dst_strides[1],
        dst_height=box.dst_strides[0] // box.dst_strides[1],
        width=width,
        height=height,
        depth=depth,
    )
    submit("cuMemcpy3DAsync_v2", ctypes.byref(copy), stream)


def copy_rows_to_host(
    src: int, src_pitch: int, dst: int, width: int, rows: int, stream: int
) -> None:
    """Queues the copy of `rows` times `width` bytes of device memory to pinned memory, in a row."""
    copy = Copy3D(
        src_kind=_DEVICE,
        src_device=src,
        src_pitch=src_pitch,
        src_height=rows,
        dst_kind=_HOST,
        dst_host=dst,
        dst_pitch=width,
        dst_height=rows,
        width=width,
        height=rows,
        depth=1,
    )
    submit("cuMemcpy3DAsync_v2", ctypes.byref(copy), stream)


def functions(image: bytes, names: Sequence[str]) -> list[int]:
    """The kernels of those names of a module, in the current context, for the process's life.

    image: a cubin; or PTX, which the driver compiles (and keeps compiled), ended by a zero byte.
    """
    module, found = c_void_p(), []
    call("cuModuleLoadData", ctypes.byref(module), image)
    for name in names:
        function = c_void_p()
        call("cuModuleGetFunction", ctypes.byref(function), module, name.encode())
        assert function.value
        found.append(function.value)
    return found


def launch(
    function: int, grid: tuple[int, int], threads: int, stream: int, *arguments: int
) -> None:
    """Queues a kernel whose parameters are pointers."""
    values = (c_uint64 * len(arguments))(*arguments)
    at = ctypes.addressof(values)
    pointers = (c_void_p * len(arguments))(*(at + 8 * i for i in range(len(arguments))))
    submit("cuLaunchKernel", function, *grid, 1, threads, 1, 1, 0, stream, pointers, None)
