"""Restores under faults that the preloaded faulty.so makes; prints what came of each as JSON.

Arguments: the checkpoints, as NAME=PATH=PART OF THE DATA FILES' PATHS; and a directory to write in.
"""

import asyncio
import ctypes
import json
import os
import signal
import sys
import threading
import traceback
from unittest import mock

import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src import asyncio_utils

import jaxgds
import jaxgds.orbax
from jaxgds import prepare, rules


_rng = np.random.default_rng(0)
TREE = {
    "w": _rng.integers(0, 256, (300, 300)).astype(np.float32),
    "b": _rng.integers(0, 256, 3000, np.uint8),
}
KINDS = ["none", "EIO", "short", "EINTR", "end", "stall", "EACCES", "ENOSPC"]
shim = ctypes.CDLL(None)


def fault(kind: str, part: str = "\1") -> None:
    shim.fault(KINDS.index(kind), part.encode())


def restore(name: str, path: str):
    if name.startswith("api"):
        # As versions of Orbax before 0.12.8 run it.
        older = mock.patch.object(asyncio_utils, "_run_sync_via_new_loop", asyncio.run, create=True)
        with older, jaxgds.orbax.installed():
            return ocp.PyTreeCheckpointer().restore(path)
    return jaxgds.load(path)


def same(tree) -> bool:
    return tree.keys() == TREE.keys() and all(
        np.asarray(tree[name]).tobytes() == want.tobytes() for name, want in TREE.items()
    )


def attempt(name: str, path: str) -> dict:
    before = {t for t in threading.enumerate() if t.name.startswith("jaxgds")}
    try:
        outcome = "same" if same(restore(name, path)) else "DIFFERENT"
        error = ""
    except BaseException as e:
        outcome, error = type(e).__name__, str(e)
        traceback.clear_frames(e.__traceback__)
    left = {t for t in threading.enumerate() if t.name.startswith("jaxgds")} - before
    return {"outcome": outcome, "error": error, "faults": shim.faults(), "left": len(left)}


def interrupt_when_stalled(done: threading.Event) -> None:
    while not done.wait(0.01):
        if shim.faults():
            os.kill(os.getpid(), signal.SIGINT)
            return


def main() -> None:
    *checkpoints, folder = sys.argv[1:]
    found: dict[str, dict] = {}
    for name, path, part in (c.split("=") for c in checkpoints):
        for kind in KINDS[:5] + ["EACCES"]:
            fault(kind, part)
            found[f"{name}-{kind}"] = attempt(name, path)
        fault("stall", part)
        found[f"{name}-stall"] = attempt(name, path)
        fault("none")
        found[f"{name}-after-stall"] = attempt(name, path)
        fault("stall", part)
        os.environ["JAXGDS_READ_TIMEOUT"] = "0"
        done = threading.Event()
        waiter = threading.Thread(target=interrupt_when_stalled, args=(done,))
        waiter.start()
        found[f"{name}-interrupt"] = attempt(name, path)
        done.set()
        waiter.join()
        fault("none")
        found[f"{name}-after-interrupt"] = attempt(name, path)
        os.environ["JAXGDS_READ_TIMEOUT"] = "0.3"
    found["prepare"] = full_disk(checkpoints[0].split("=")[1], folder)
    for thread in threading.enumerate():
        if thread.name.startswith("jaxgds"):
            thread.join(10)
    found["threads"] = {"left": [t.name for t in threading.enumerate()]}
    print(json.dumps(found))


def full_disk(source: str, folder: str) -> dict:
    """`prepare` onto a disk that fills up, and once more when there is room."""
    destination = os.path.join(folder, "prepared")
    all_rules = os.path.join(folder, "rules.toml")
    with open(all_rules, "w") as f:
        f.write('[[rule]]\nnames = ["*"]\nspec = []\n')
    result = {}
    for kind in ("ENOSPC", "none"):
        fault(kind, folder)
        try:
            mesh = rules.read_mesh("tp=1")
            prepare.prepare(source, destination, mesh=mesh, rules=rules.read_rules(all_rules))
            result[kind] = "done"
        except OSError as e:
            result[kind] = f"{type(e).__name__} {e.errno}"
        finally:
            fault("none")
        result[f"{kind} left"] = sorted(os.listdir(folder))
    return result


if __name__ == "__main__":
    main()
