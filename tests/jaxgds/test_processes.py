"""What a process holds after many restores; Ctrl-C, fork, and restores from several threads."""

import json
import os
import pathlib
import random
import resource
import signal
import subprocess
import sys
import threading
import time

import jax.numpy as jnp
import numpy as np
import oracle
import prepare_models as models
import pytest
from safetensors.numpy import save_file

import jaxgds
from jaxgds.prepare import prepare
from jaxgds.rules import read_mesh, read_rules
from jaxgds.verify import verify


HERE = pathlib.Path(__file__).parent
RNG = np.random.default_rng(0)
TREE = {f"w{i}": RNG.integers(0, 256, (200, 100 + i)).astype(np.float32) for i in range(4)}


def test_more_files_than_a_process_may_have_open(tmp_path):
    """Of a large model without OCDBT it has thousands, and 1024 is a common limit."""
    tree = {f"w{i}": jnp.full(5, i) for i in range(120)}
    oracle.save(tmp_path / "item", tree, (False, False, False))
    (tmp_path / "st").mkdir()
    for name, x in tree.items():
        save_file({name: np.asarray(x)}, tmp_path / "st" / f"{name}.safetensors")
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = len(os.listdir("/proc/self/fd")) + 40
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, limits[1]))
    try:
        for kind in ("item", "st"):
            got = jaxgds.load(tmp_path / kind)
            assert all(np.array_equal(got[name], x) for name, x in tree.items())
        assert verify(tmp_path / "item")["problems"] == []
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """Of all formats, whole and damaged."""
    folder = tmp_path_factory.mktemp("processes")
    tree = {name: jnp.asarray(x) for name, x in TREE.items()}
    paths = []
    for fmt in oracle.FORMATS:
        paths.append(pathlib.Path(oracle.save(folder / oracle.format_id(fmt), tree, fmt)))
        paths.append(pathlib.Path(oracle.save(folder / f"bad-{oracle.format_id(fmt)}", tree, fmt)))
        data = max((f for f in paths[-1].rglob("*") if f.is_file()), key=lambda f: f.stat().st_size)
        os.truncate(data, data.stat().st_size // 3)
    for name in ("m.safetensors", "bad.safetensors"):
        save_file(TREE, folder / name)
        paths.append(folder / name)
    os.truncate(paths[-1], 5000)
    return paths


def python(*args, **more) -> subprocess.Popen:
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    command = [sys.executable, *map(str, args)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen(command, env=environment, **pipes, **more)


def test_nothing_is_left_after_many_restores(checkpoints):
    """JAXGDS_RESTORES=1000 makes it many more; on a machine with a GPU they are onto that."""
    count = int(os.environ.get("JAXGDS_RESTORES", "180"))
    process = python(HERE / "leak_process.py", count, *checkpoints)
    out, err = process.communicate(timeout=600)
    assert process.returncode == 0, err[-4000:]
    found = json.loads(out.splitlines()[-1])
    before, after = found["before"], found["after"]
    assert found["restored"] > count / 3 and found["refused"] > count / 3
    assert after["files"] == before["files"]
    assert after["arrays"] == before["arrays"]
    assert after["device bytes"] == before["device bytes"]
    assert after["python threads"] == before["python threads"]
    assert after["threads"] <= before["threads"]
    # 0.3 MB of weights each: a restore that keeps its arrays would take ten times as much.
    assert after["bytes"] - before["bytes"] < count * 30_000, (before, after)
    print(before, after)


INTERRUPTED = """
import os, sys, threading, time
import jax, jaxgds, numpy as np
path, times, abstract = sys.argv[1:]
whole = jaxgds.load(path)
target = None
if abstract == "True":  # without Orbax
    target = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), whole
    )
for _ in range(int(times)):
    print("ready", flush=True)
    try:
        while True:
            jaxgds.load(path, target)
    except KeyboardInterrupt:
        print("interrupted", flush=True)
again = jaxgds.load(path, target)
assert all(np.array_equal(again[name], x) for name, x in whole.items())
left = [t.name for t in threading.enumerate() if t.name.startswith("jaxgds")]
import gc
del again
gc.collect()
kept = len(jax.live_arrays()) - len(whole)
print("done", left, kept, flush=True)
"""


@pytest.mark.parametrize("abstract", [False, True])
@pytest.mark.parametrize("kind", ["zstd", "raw"])
def test_control_c(tmp_path, kind, abstract):
    """At moments of all sorts, also while one chunk of 64 MB is decoded.

    It takes less than a second, leaves no threads and no arrays, and the next restore works.
    """
    big = np.zeros((1 << 24,), np.float32)
    big[::1000] = np.arange(big[::1000].size)
    oracle.save(tmp_path / "c", {"w": jnp.asarray(big)}, (True, False, kind == "zstd"))
    times = 5
    process = python("-c", INTERRUPTED, tmp_path / "c", times, abstract)
    assert process.stdout is not None
    for number in range(times):
        assert process.stdout.readline() == "ready\n", process.communicate()[1][-3000:]
        time.sleep(0.01 * 2**number)
        sent = time.monotonic()
        process.send_signal(signal.SIGINT)
        line = process.stdout.readline()
        assert line == "interrupted\n", (line, process.communicate()[1][-3000:])
        assert time.monotonic() - sent < 1
    out, err = process.communicate(timeout=100)
    assert out == "done [] 0\n", err[-3000:]


def test_prepare_killed_at_random_moments(tmp_path):
    """The destination is absent, or complete; and the next run succeeds. JAXGDS_KILLS=50: so often.

    At chosen system calls: test_prepare_safety.py.
    """
    source, all_rules = tmp_path / "m.safetensors", tmp_path / "rules.toml"
    save_file(TREE, source)
    all_rules.write_text('[[rule]]\nnames = ["*"]\nspec = []\n')

    def started(destination: pathlib.Path) -> subprocess.Popen:
        process = python("-c", PREPARED, source, all_rules, destination)
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        return process

    whole = started(tmp_path / "whole")
    start = time.monotonic()
    assert whole.stdout is not None and whole.stdout.readline() == "done\n"
    lasts = time.monotonic() - start
    whole.communicate(timeout=100)
    draw, complete = random.Random(), 0
    for number in range(int(os.environ.get("JAXGDS_KILLS", "5"))):
        out = tmp_path / f"out{number}"
        process = started(out)
        time.sleep(draw.uniform(0, lasts))
        process.kill()
        process.communicate()
        complete += out.exists()
        if not out.exists():
            with pytest.raises(jaxgds.CheckpointError):
                jaxgds.load(out)
            prepare(source, out, mesh=read_mesh("tp=1"), rules=read_rules(all_rules))
        assert models.digest(out) == models.digest(tmp_path / "whole")
        assert not list(tmp_path.glob(".out*"))
    print(f"{complete} complete")


PREPARED = """
import sys
from jaxgds import prepare, rules
import orbax.checkpoint, tensorstore
all_rules = rules.read_rules(sys.argv[2])
print("ready", flush=True)
prepare.prepare(sys.argv[1], sys.argv[3], mesh=rules.read_mesh("tp=1"), rules=all_rules)
print("done", flush=True)
"""

FORKED = """
import os, sys
import jaxgds, jaxgds.orbax
path = sys.argv[1]
children = []
for _ in range(2):
    child = os.fork()
    if child == 0:
        tree = jaxgds.load(path)
        os._exit(0 if float(tree["w0"][0, 0]) == float(sys.argv[2]) else 3)
    children.append(child)
codes = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
tree = jaxgds.load(path)
print(codes, float(tree["w0"][0, 0]))
"""


def test_fork_after_import(checkpoints):
    """Before JAX is used: after that JAX itself forbids it."""
    process = python("-c", FORKED, checkpoints[0], TREE["w0"][0, 0])
    out, err = process.communicate(timeout=100)
    assert out == f"[0, 0] {TREE['w0'][0, 0]}\n", err[-3000:]


def test_several_threads_at_once(checkpoints):
    """Whole and damaged ones, each with its own outcome."""
    outcomes: dict[int, list[str]] = {}

    def work(number: int) -> None:
        outcomes[number] = []
        for path in checkpoints[number:] + checkpoints[:number]:
            try:
                tree = jaxgds.load(path)
                same = all(np.array_equal(tree[name], x) for name, x in TREE.items())
                outcomes[number].append("good" if same else "DIFFERENT")
            except jaxgds.CheckpointError:
                outcomes[number].append("bad")

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    want = ["bad" if "bad" in path.name else "good" for path in checkpoints]
    for number, found in outcomes.items():
        assert found == want[number:] + want[:number]
