"""What a restore shows: its log lines, counters, marks in a profile, and line on a terminal."""

import gzip
import logging
import os
import pty
import subprocess
import sys
import termios

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxgds
import jaxgds.orbax
from jaxgds.verify import verify


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("progress") / "checkpoint"
    oracle.save(path, {"w": jnp.ones((64, 64)), "step": 3})
    return path


def test_one_log_line_a_restore_and_the_plan(checkpoint, caplog):
    caplog.set_level(logging.INFO, "jaxgds")
    jaxgds.load(checkpoint)
    (line,) = [r.getMessage() for r in caplog.records if r.name == "jaxgds"]
    assert line.startswith("restored 1 arrays, 0.000 GB in") and "by host, 0 left" in line
    caplog.clear()
    caplog.set_level(logging.DEBUG, "jaxgds")
    jaxgds.load(checkpoint)
    plan, line = [r.getMessage() for r in caplog.records if r.name == "jaxgds"]
    assert plan.startswith("plan: 1 reads (zstd)") and "1 shards on 1 devices" in plan


def test_counters_for_jax_monitoring(checkpoint):
    events: list[tuple[str, dict]] = []
    numbers: dict[str, float] = {}

    def count(event: str, **kwargs):
        events.append((event, kwargs))

    def seconds(event: str, duration_secs: float, **kwargs):
        numbers[event] = duration_secs

    def scalar(event: str, value: float, **kwargs):
        numbers[event] = value

    jax.monitoring.register_event_listener(count)
    jax.monitoring.register_scalar_listener(scalar)
    jax.monitoring.register_event_duration_secs_listener(seconds)
    try:
        jaxgds.load(checkpoint)
    finally:
        jax.monitoring.clear_event_listeners()
    report = jaxgds.last_report()
    assert report is not None
    assert ("/jaxgds/restore", {"path": "host"}) in events
    assert 0 < numbers["/jaxgds/restore/seconds"] <= report.seconds
    assert numbers["/jaxgds/restore/bytes_restored"] > 0


def test_the_stages_are_marked_in_a_profile(tmp_path):
    """Of chunks that are columns; "copy" is for GPUs, see test_pinned.py."""
    mesh = Mesh(np.array(jax.devices()), ("x",))
    columns = jax.device_put(jnp.ones((64, 64)), NamedSharding(mesh, PartitionSpec(None, "x")))
    path = oracle.save(tmp_path / "checkpoint", {"w": columns})
    whole = jax.ShapeDtypeStruct(
        (64, 64), columns.dtype, sharding=NamedSharding(mesh, PartitionSpec())
    )
    with jax.profiler.trace(tmp_path / "profile", create_perfetto_trace=True):
        jaxgds.load(path, {"w": whole})
        verify(path)
    (file,) = tmp_path.rglob("perfetto_trace.json.gz")
    text = gzip.decompress(file.read_bytes()).decode()
    for stage in ("index", "plan", "read", "scatter", "verify"):
        assert f"jaxgds {stage}" in text, stage


SLOW = """
import sys, time
from jaxgds.progress import shown
with shown(4_000_000) as arrived:
    for _ in range(4):
        arrived(500_000)
        time.sleep(0.4)
"""


@pytest.mark.parametrize("off", [False, True])
def test_a_line_on_a_terminal_only(off):
    env = {**os.environ, "JAXGDS_PROGRESS": "0" if off else "1"}
    run = [sys.executable, "-c", SLOW]
    assert subprocess.run(run, capture_output=True, env=env, check=True).stderr == b""
    main, terminal = pty.openpty()
    termios.tcsetwinsize(terminal, (24, 80))
    subprocess.run(run, stderr=terminal, env=env, check=True)
    os.close(terminal)
    shown = b""
    try:
        while data := os.read(main, 4096):
            shown += data
    except OSError:  # the other end is closed
        pass
    os.close(main)
    assert (b"restore" in shown and b"B/s" in shown and b"2.00M" in shown) != off
