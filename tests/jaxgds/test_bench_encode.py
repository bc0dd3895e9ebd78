"""jaxgds bench encode, on a machine without a GPU: what it measures and what it says."""

import json
from dataclasses import replace

import jax
import jax.numpy as jnp
import pytest

import pallas_kernels as pk
from jaxgds.bench import encode, sweep
from jaxgds.bench.decode import full_cache
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
    k, v = (sweep.noise(i, (1, 100, 2, 64), "float32") for i in range(2))
    cache = pk.KVCache.create(pk.KVFormat(window=0), 1, 100, 2, 64).append(k, v)
    assert encode.difference(cache, cache) == 0
    wrong = replace(cache, k_planes=tuple(~x for x in cache.k_planes))
    assert encode.difference(wrong, cache) == 0.5
    for name in ("recent_v", "k_scale"):
        wrong = replace(cache, **{name: -getattr(cache, name)})
        with pytest.raises(ArithmeticError, match=name):
            encode.difference(wrong, cache)


def test_an_append_to_one_cache_over_and_over_leaves_the_same():
    """What the timed appends leave, in one of several caches, is what one append gives."""
    fmt = pk.KVFormat(3, 4)
    for tokens in (1, 200):
        sizes = encode.Sizes((tokens,), (1,), head_dim=64, kv_heads=2, nbytes=1 << 20, repeat=2)
        left = []
        encode._append(sizes, 1, tokens, fmt, "xla", False, left)
        k, v = (sweep.noise(1000 + j, (1, tokens, 2, 64), "bfloat16") for j in range(2))
        before = pk.KVCache.create(fmt, 1, tokens, 2, 64)
        if tokens == 1:
            before = replace(full_cache(0, fmt, 1, 261, 2, 64), lengths=jnp.full(1, 260))
        assert encode.difference(before.append(k, v), left[0]) == 0


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
