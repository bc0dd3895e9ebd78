"""pytest plugin: Orbax's own tests, of a checkout of its repository, with jaxgds installed.

    cd orbax/checkpoint
    export JAX_PLATFORMS=cpu XLA_FLAGS=--xla_force_host_platform_device_count=8
    PYTHONPATH=$PWD:.../tests/jaxgds python -m pytest --import-mode=importlib -W ignore \
        -p with_jaxgds orbax/checkpoint/single_host_test.py

Orbax's runner calls jax.distributed.initialize first; so does this, as PROCESS of PROCESSES
(0 of 1) that meet at PORT. What passes with JAXGDS=0, by stock Orbax, passes without it.
"""

import os
import tempfile

import jax
import pytest

import jaxgds.orbax


# They replace private parts of Orbax, and look at what these were called with.
PRIVATE = {
    "test_memory_limiting": "counts requests to the limit of bytes in flight",
    "test_concurrent_gb_restore": "counts requests to the limit of bytes in flight",
    "test_local_serialization": "replaces the function that finds a device's part of an array",
}


def pytest_configure(config: pytest.Config) -> None:
    # The tests want an empty folder, and leave it full.
    os.environ["TEST_TMPDIR"] = tempfile.mkdtemp()
    address = f"localhost:{os.environ.get('PORT', '29753')}"
    processes = int(os.environ.get("PROCESSES", "1"))
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(address, processes, int(os.environ.get("PROCESS", "0")))
    if os.environ.get("JAXGDS") != "0":
        jaxgds.orbax.install()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        for name, why in PRIVATE.items():
            if item.name.startswith(name):
                item.add_marker(pytest.mark.xfail(reason=why))
