"""The example model against a float64 forward pass in numpy that has no cache."""

import itertools

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

import pallas_kernels as pk
from examples import llama


LENGTH = 40
TOKENS = np.random.default_rng(0).integers(0, 259, (2, LENGTH))


def numpy_logits(model: llama.Llama, tokens: np.ndarray) -> np.ndarray:
    """Logits [tokens, vocab] of one sequence, with RoPE as a multiplication of complex numbers."""
    c = model.config
    f64 = lambda x: np.asarray(x[...], np.float64)  # noqa: E731
    norm = lambda x, layer: (  # noqa: E731
        x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps) * f64(layer.scale)
    )
    turn = np.exp(
        1j * np.outer(np.arange(len(tokens)), c.rope_theta ** -np.linspace(0, 1, 33)[:-1])
    )

    def rotate(x):
        z = (x[..., :32] + 1j * x[..., 32:]) * turn[:, None]
        return np.concatenate([z.real, z.imag], -1)

    x = f64(model.embed.embedding)[tokens]
    for block in model.blocks:
        h = norm(x, block.attn_norm)
        q, k, v = ((h @ f64(w.kernel)).reshape(len(x), -1, 64) for w in (block.q, block.k, block.v))
        q, k = rotate(q), rotate(k)
        heads = []
        for i in range(c.heads):
            shared = i // (c.heads // c.kv_heads)
            scores = q[:, i] @ k[:, shared].T / np.sqrt(64)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            heads.append(p / p.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(heads, -1) @ f64(block.o.kernel)
        h = norm(x, block.mlp_norm)
        gate = h @ f64(block.gate.kernel)
        x = x + (gate / (1 + np.exp(-gate)) * (h @ f64(block.up.kernel))) @ f64(block.down.kernel)
    return norm(x, model.norm) @ f64(model.embed.embedding).T


def read(model: llama.Llama, tokens: np.ndarray, fmt: llama.Format, chunks: list[int]):
    """Logits of all tokens, read `chunks` tokens at a time, and the caches."""
    caches = llama.make_caches(model.config, fmt, len(tokens), 64)
    logits, start = [], 0
    for chunk in chunks:
        new, caches = model(jnp.asarray(tokens[:, start : start + chunk]), caches)
        logits.append(np.asarray(new))
        start += chunk
    assert start == tokens.shape[1]
    return np.concatenate(logits, 1), caches


def error(got: np.ndarray, expected: np.ndarray) -> float:
    """Root mean square error, relative to the expected values' spread."""
    return float(np.sqrt(((got - expected) ** 2).mean()) / expected.std())


@pytest.fixture(scope="module")
def expected(model) -> np.ndarray:
    return np.stack([numpy_logits(model, row) for row in TOKENS])


CHUNKS = [[LENGTH], [1] * LENGTH, [17, 1, 1, 16, 5]]


@pytest.mark.parametrize("chunks", CHUNKS, ids=["whole", "single", "mixed"])
@pytest.mark.parametrize(
    ("fmt", "tolerance"),
    [
        ("bf16", 0.03),
        (pk.KVFormat(window=64), 0.03),
        (pk.KVFormat(key_bits=8, value_bits=8, window=0, page_size=16), 0.08),
        ("fp8", 0.15),
    ],
    ids=["bf16", "window", "k8v8", "fp8"],
)
def test_logits_equal_a_forward_pass_without_cache(model, expected, fmt, tolerance, chunks):
    logits, caches = read(model, TOKENS, fmt, chunks)
    assert error(logits, expected) < tolerance
    assert logits.dtype == np.float32
    assert all((cache.lengths == LENGTH).all() for cache in caches)


def test_oracle_is_sensitive_to_position(model, expected):
    """Swapping two tokens moves later logits by far more than any tolerance above."""
    swapped = TOKENS[0].copy()
    swapped[[3, 9]] = swapped[[9, 3]]
    assert error(numpy_logits(model, swapped)[10:], expected[0, 10:]) > 0.5


def test_fp8_cache_holds_saturated_casts():
    k = jnp.asarray(np.random.default_rng(1).normal(0, 200, (1, 5, 2, 64)), jnp.bfloat16)
    cache = llama.DenseCache.create(jnp.float8_e4m3fn, 1, 8, 2, 64).append(k, -k)
    exact = np.asarray(k, np.float32)
    assert np.abs(exact).max() > 448
    for stored, sign in ((cache.k, 1), (cache.v, -1)):
        cast = np.clip(sign * exact, -448, 448).astype(ml_dtypes.float8_e4m3fn)
        np.testing.assert_array_equal(np.asarray(stored[:, :5]), cast)
    assert cache.bytes_per_token == 2 * 2 * 64


def test_generate_takes_the_most_probable_token_of_prompts_of_different_length(model):
    prompts = [TOKENS[0, :9].tolist(), TOKENS[1, :6].tolist()]
    caches = llama.make_caches(model.config, "bf16", 2, 32)
    steps = list(llama.generate(model, prompts, caches, new_tokens=5))
    assert [step[0] for step in steps[:4]] == [None, None, None, steps[3][0]]
    for prompt, answer in zip(prompts, zip(*steps, strict=True), strict=True):
        answer = [token for token in answer if token is not None]
        assert len(answer) == 5 + 9 - len(prompt)
        logits = numpy_logits(model, np.array(prompt + answer))
        for position, token in enumerate(answer, len(prompt) - 1):
            assert logits[position, token] > logits[position].max() - 0.05 * logits.std()


@pytest.mark.parametrize(("devices", "shards"), [(1, 1), (2, 2), (5, 1), (8, 8)])
def test_restore_target_splits_matrices_that_divide(config, devices, shards):
    mesh = Mesh(jax.devices("cpu")[:devices], ("model",))
    _, target = llama.abstract_model(config, mesh)
    params = dict(nnx.to_flat_state(target))
    kernel = params["blocks", 0, "q", "kernel"].get_value()
    scale = params["blocks", 0, "attn_norm", "scale"].get_value()
    assert kernel.shape == (48, 384) and kernel.dtype == jnp.bfloat16
    assert kernel.sharding.shard_shape(kernel.shape) == (48, 384 // shards)
    assert scale.dtype == jnp.float32 and scale.sharding.spec == PartitionSpec()


def test_caches_count_their_bytes(config):
    per_token = lambda fmt: llama.make_caches(config, fmt, 1, 256)[0].bytes_per_token  # noqa: E731
    assert per_token("bf16") == 2 * per_token("fp8") == 2 * 2 * 2 * 64
    for bits in itertools.product((4, 3), repeat=2):
        fmt = pk.KVFormat(key_bits=bits[0], value_bits=bits[1])
        assert per_token(fmt) == 2 * (sum(bits) * 64 // 8 + 2 * 2)
