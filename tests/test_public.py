"""The names that scripts rely on, and that importing them has no side effect."""

import inspect
import pathlib
import subprocess
import sys

import pytest

import jaxgds
import jaxgds.orbax
import pallas_kernels as pk


def parameters(f) -> list[str]:
    return list(inspect.signature(f).parameters)


@pytest.mark.parametrize(
    "f, expected",
    [
        (jaxgds.load, ["path", "target"]),
        (jaxgds.last_report, []),
        (jaxgds.orbax.install, []),
        (jaxgds.orbax.uninstall, []),
        (jaxgds.orbax.installed, []),
        (jaxgds.orbax.handler, []),
        (pk.quantize, ["x", "bits", "seed"]),
        (pk.KVCache.create, ["fmt", "batch", "max_len", "kv_heads", "head_dim"]),
        (pk.KVCache.append, ["self", "k", "v"]),
        (pk.Quantized.dequantize, ["self"]),
        (pk.decode_attention, ["q", "cache", "scale", "implementation"]),
    ],
    ids=lambda f: getattr(f, "__qualname__", ""),
)
def test_signatures(f, expected):
    """These parameters in this order; whatever else there is has a default."""
    names = parameters(f)
    assert names[: len(expected)] == expected
    rest = list(inspect.signature(f).parameters.values())[len(expected) :]
    assert all(p.default is not p.empty or p.kind is p.VAR_KEYWORD for p in rest)


def test_defaults():
    fmt = pk.KVFormat()
    assert (fmt.key_bits, fmt.value_bits, fmt.window, fmt.sinks) == (4, 4, 128, 4)
    assert fmt.key_offset is True and fmt.seed == 0
    assert inspect.signature(pk.quantize).parameters["bits"].default == 4
    attention = inspect.signature(pk.decode_attention).parameters
    assert attention["scale"].default is None and attention["implementation"].default is None


def test_the_report():
    report = jaxgds.TransferReport("host")
    names = ("path", "bytes_read", "seconds", "arrays", "fallbacks")
    assert set(names) <= set(report.to_dict())
    assert [getattr(report, name) for name in names] == ["host", 0, 0.0, 0, {}]


def test_errors():
    assert issubclass(jaxgds.CheckpointError, ValueError)
    assert issubclass(jaxgds.FallbackError, RuntimeError)


@pytest.mark.parametrize("module", [jaxgds, jaxgds.orbax, pk], ids=lambda m: m.__name__)
def test_everything_public_is_documented(module):
    assert module.__doc__
    for name, value in vars(module).items():
        ours = getattr(value, "__module__", "").startswith(("jaxgds", "pallas_kernels"))
        if ours and not name.startswith("_") and callable(value):
            assert inspect.getdoc(value), name


def test_importing_touches_no_device():
    """`jax.distributed.initialize` and the platform can still be set afterwards."""
    code = (
        "import jaxgds, jaxgds.orbax, jaxgds.cli, pallas_kernels\n"
        "from jax._src import xla_bridge\n"
        "assert not xla_bridge.backends_are_initialized()\n"
        "import orbax.checkpoint as ocp\n"
        "assert ocp.type_handlers.ArrayHandler.deserialize.__module__.startswith('orbax')\n"
    )
    root = pathlib.Path(__file__).parent.parent
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
