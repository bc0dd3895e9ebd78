"""Restores from files that do not answer; prints what came of each step, a line of JSON each.

For LD_PRELOAD=faulty.so. Arguments: a checkpoint whose file data never answers, another one with
the same arrays, the part of the path that tells the first one's data files. It ends while threads
hang in reads: that must not keep the process.
"""

import ctypes
import faulthandler
import gc
import json
import math
import os
import sys
import threading
import time
import traceback

import jax
import numpy as np
import stand_in
from faulty_process import fault, shim
from jax.sharding import SingleDeviceSharding

import jaxgds
import jaxgds.restore
from jaxgds.engines import cuda


CYCLES = 3
HANGS = 60  # seconds for a step, after which it says where it hangs
SHAPE = (1, 1024, 4096)  # the chunks of rows are in files 0.0.0, 0.1.0, ..


def values() -> np.ndarray:
    return np.arange(math.prod(SHAPE), dtype=np.float32).reshape(SHAPE)


def restore(path: str) -> tuple[str, str]:
    """(what came of it, the error's text or how it was read)."""
    sharding = SingleDeviceSharding(jax.devices()[0])
    target = {"w": jax.ShapeDtypeStruct(SHAPE, np.float32, sharding=sharding)}
    try:
        same = np.array_equal(np.asarray(jaxgds.load(path, target, strict=True)["w"]), values())
    except Exception as e:
        traceback.clear_frames(e.__traceback__)
        return type(e).__name__, str(e)
    report = jaxgds.last_report()
    assert report is not None
    return "same" if same else "DIFFERENT", f"{report.path} {report.note}"


def hanging() -> list[threading.Thread]:
    return [t for t in threading.enumerate() if t.name == "jaxgds"]


def step(name: str, path: str) -> None:
    faulthandler.dump_traceback_later(HANGS, exit=True)
    start, before = time.monotonic(), len(hanging())
    outcome, text = restore(path)
    found = {"outcome": outcome, "text": text, "seconds": time.monotonic() - start}
    found |= {"faults": shim.faults(), "left": len(hanging()) - before}
    print(json.dumps({name: found}), flush=True)


def answered() -> None:
    """The disk answers, and the threads end."""
    faulthandler.dump_traceback_later(HANGS, exit=True)
    fault("none")
    for thread in hanging():
        thread.join()


def held() -> dict[str, int]:
    gc.collect()
    found = {
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "arrays": len(jax.live_arrays()),
    }
    if jax.devices()[0].platform == "gpu":
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        cuda.use(0)
        cuda.driver().cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        found["device bytes"] = total.value - free.value
    return found


def main() -> None:
    if stand_in.LIBRARY:
        stand_in.driver()
        jaxgds.restore.engine_for = stand_in.engine
    stalls, other, part = sys.argv[1:]
    step("first", stalls)
    for cycle in range(CYCLES):
        fault("stall", part)
        step(f"stalls-{cycle}", stalls)
        step(f"other-{cycle}", other)
        answered()
        step(f"answers-{cycle}", stalls)
        print(json.dumps({f"held-{cycle}": held()}), flush=True)
    fault("stall", part)
    step("stalls-last", stalls)
    print(json.dumps({"end": {}}), flush=True)


if __name__ == "__main__":
    main()
