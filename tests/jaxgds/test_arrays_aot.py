"""The programs that allocate on GPUs, compiled without one: they allocate, and do nothing else."""

import importlib.util
import re
from pathlib import Path

import jax.numpy as jnp
import pytest
from jax.experimental import topologies

from jaxgds.allocation import Program


TARGET = Path(__file__).parents[2] / "configs" / "targets" / "h100.textproto"
SPECS = [((64, 32), "bfloat16"), ((7,), "float32"), ((2, 1, 3), "float8_e4m3fn")]

pytestmark = [
    pytest.mark.aot,
    pytest.mark.skipif(
        not importlib.util.find_spec("jax_cuda13_plugin"),
        reason="needs the compilers that the extra aot brings (make test-aot)",
    ),
]


@pytest.mark.parametrize("gpus", [1, 2, 8])
@pytest.mark.parametrize("alike", [1, 16])
def test_allocation_takes_no_other_memory_and_no_kernel(gpus, alike):
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=TARGET.read_text(), topology=f"1x{gpus}x1"
    )
    specs = tuple((shape, jnp.dtype(name)) for shape, name in SPECS) * alike
    compiled = Program(specs, tuple(topology.devices)).compiled
    entry = str(compiled.as_text()).partition("\nENTRY ")[2]
    assert set(re.findall(r" ([\w-]+)\(", entry)) <= {"custom-call", "bitcast", "tuple"}
    assert entry.count('custom_call_target="AllocateBuffer"') == len(specs)
    memory = compiled.memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes == 0
