"""jaxgds bench encode, on a machine without a GPU: what it measures and what it says."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from jaxgds.bench import encode
from jaxgds.cli import main


pytestmark = pytest.mark.skipif(
    jax.default_backend() == "gpu", reason="sizes for a machine without a GPU"
)


def test_formats_are_measured_and_written(tmp_path, capsys):
    file = tmp_path / "encode.json"
    options = ["--tokens", "1,200", "--formats", "K4V4", "--repeat", "1", "--json", str(file)]
    assert main(["bench", "encode", *options]) == 0
    printed = capsys.readouterr()
    found = json.loads(file.read_text())
    assert [row["tokens"] for row in found["results"]] == [1, 200] and found["copy_rate"] > 0
    for row in found["results"]:
        assert row["us"] > 0 and (row["name"], row["implementation"]) == ("K4V4", "xla")
    assert "no GPU here" in printed.err and "K4V4" in printed.out


def test_bytes_are_those_of_tokens_pages_and_ring():
    sizes = encode.Sizes((1, 640), (2,), head_dim=64, kv_heads=2, dtype="float32", nbytes=1)
    one, many = encode.run(replace(sizes, repeat=1), ("K4V3",), report=lambda text: None)["results"]
    vectors = 2 * 2 * 2  # batch, K and V, heads
    assert one["bytes"] == vectors * 64 * (4 + 2)
    packed = (640 - 132) // 64 * 64
    assert packed == int(pk.KVFormat().packed(jnp.int32(640)))
    written = packed * 2 * 2 * (64 * 7 // 8 + 4) + 196 * vectors * 64 * 2
    assert many["bytes"] == 640 * vectors * 64 * 4 + written


def test_a_wrong_implementation_is_found():
    """Codes, scales and the ring are compared with xla's."""
    sizes = encode.Sizes((100,), (1,), head_dim=64, kv_heads=2)
    fmt = pk.KVFormat(window=0)

    def difference(spoil):
        append = lambda cache, k, v: spoil(cache.append(k, v))  # noqa: E731
        return encode.difference(sizes, 1, 0, 100, fmt, append)

    assert difference(lambda cache: cache) == 0
    codes = difference(lambda cache: replace(cache, k_planes=tuple(~x for x in cache.k_planes)))
    assert codes == 0.5
    for name in ("recent_v", "k_scale"):
        with pytest.raises(ArithmeticError, match=name):
            difference(lambda cache, name=name: replace(cache, **{name: -getattr(cache, name)}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--formats", "K4"], "'K4' is not a format"),
        (["--formats", "K5V4"], "key_bits=5"),
        (["--tokens", "0"], r"tokens=(0,) is not positive"),
    ],
)
def test_wrong_options_are_named(options, message, capsys):
    assert main(["bench", "encode", *options]) == 2
    assert message in capsys.readouterr().err
