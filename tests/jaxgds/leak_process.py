"""Restores again and again, some of them damaged; prints what the process holds before and after.

On a GPU by one engine and then the other. Arguments: how many restores; then checkpoints, those
whose names begin with "bad" are damaged.
"""

import gc
import importlib.util
import json
import os
import sys
import threading
import time
import warnings

import jax
import orbax.checkpoint as ocp

import jaxgds
import jaxgds.orbax


DEVICE = jax.devices()[0]
ENGINES = ["pinned"] + ["gds"] * (importlib.util.find_spec("kvikio") is not None)


def restore(path: str, number: int) -> None:
    if number % 3 == 0 and not path.endswith("safetensors"):
        with jaxgds.orbax.installed():
            ocp.PyTreeCheckpointer().restore(path)
    else:
        jaxgds.load(path)


def resident() -> int:
    with open("/proc/self/statm") as f:
        return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def held() -> dict[str, int]:
    gc.collect()
    time.sleep(1.5)  # the C library ends its threads for reads when they are idle for a second
    return {
        "files": len(os.listdir("/proc/self/fd")),
        "python threads": threading.active_count(),
        "threads": len(os.listdir("/proc/self/task")),
        "arrays": len(jax.live_arrays()),
        "device bytes": (DEVICE.memory_stats() or {}).get("bytes_in_use", 0),
        "bytes": resident(),
    }


def main() -> None:
    warnings.simplefilter("ignore")
    count, paths = int(sys.argv[1]), sys.argv[2:]
    outcomes = {"restored": 0, "refused": 0}

    def run(number: int) -> None:
        path = paths[number % len(paths)]
        if DEVICE.platform == "gpu":
            os.environ["JAXGDS_ENGINE"] = ENGINES[number // len(paths) % len(ENGINES)]
        try:
            restore(path, number)
            outcomes["restored"] += 1
        except jaxgds.CheckpointError:
            assert "bad" in path
            outcomes["refused"] += 1

    for number in range(6 * len(paths)):  # pools, caches and programs are made
        run(number)
    before = held()
    for number in range(count):
        run(number)
    print(json.dumps({"before": before, "after": held(), **outcomes}))


if __name__ == "__main__":
    main()
