"""Gemma 3 against a float64 forward pass in numpy, and from a tiny GGUF file."""

import gguf
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from scipy.special import softmax

import pallas_kernels as pk
from examples import gemma3, llama


LENGTH = 40
BYTES = [f"<0x{i:02X}>" for i in range(256)]
NORMAL = ["the", "▁the", "th", "he", "▁t", "ab", "▁", "t", "h", "e", "a", "b"]
TOKENS = ["<pad>", "<eos>", "<bos>", "<unk>", "\n\n", *BYTES, *NORMAL]


@pytest.fixture(scope="module")
def small() -> gemma3.Config:
    """Six layers: the last is global."""
    return gemma3.Config(
        vocab=len(TOKENS),
        dim=48,
        mlp_dim=80,
        layers=6,
        heads=2,
        kv_heads=1,
        head_dim=64,
        rope_theta=1e6,
        norm_eps=1e-6,
        sliding_window=12,
    )


def tensors(c: gemma3.Config) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)

    def draw(*shape):
        return rng.normal(0, shape[-1] ** -0.5, shape).astype(np.float32)

    def norm(size):
        return (1 + 0.3 * rng.normal(size=size)).astype(np.float32)

    found = {"token_embd.weight": draw(c.vocab, c.dim), "output_norm.weight": norm(c.dim)}
    for i in range(c.layers):
        layer = {
            "attn_norm": norm(c.dim),
            "attn_q": draw(c.heads * c.head_dim, c.dim),
            "attn_k": draw(c.kv_heads * c.head_dim, c.dim),
            "attn_v": draw(c.kv_heads * c.head_dim, c.dim),
            "attn_q_norm": 3 * norm(c.head_dim),
            "attn_k_norm": norm(c.head_dim),
            "attn_output": draw(c.dim, c.heads * c.head_dim),
            "post_attention_norm": norm(c.dim),
            "ffn_norm": norm(c.dim),
            "ffn_gate": draw(c.mlp_dim, c.dim),
            "ffn_up": draw(c.mlp_dim, c.dim),
            "ffn_down": draw(c.dim, c.mlp_dim),
            "post_ffw_norm": norm(c.dim),
        }
        found |= {f"blk.{i}.{name}.weight": x for name, x in layer.items()}
    return found


def write_gguf(path, c: gemma3.Config, weights: dict[str, np.ndarray], tokenizer="llama"):
    writer = gguf.GGUFWriter(path, "gemma3")
    writer.add_block_count(c.layers)
    writer.add_embedding_length(c.dim)
    writer.add_feed_forward_length(c.mlp_dim)
    writer.add_head_count(c.heads)
    writer.add_head_count_kv(c.kv_heads)
    writer.add_key_length(c.head_dim)
    writer.add_rope_freq_base(c.rope_theta)
    writer.add_layer_norm_rms_eps(c.norm_eps)
    writer.add_sliding_window(c.sliding_window)
    writer.add_tokenizer_model(tokenizer)
    writer.add_token_list(TOKENS)
    first = len(TOKENS) - len(NORMAL)
    writer.add_token_scores([0.0] * first + [-float(i) for i in range(len(NORMAL))])
    kinds = [gguf.TokenType.CONTROL] * 4 + [gguf.TokenType.USER_DEFINED]
    kinds += [gguf.TokenType.BYTE] * 256 + [gguf.TokenType.NORMAL] * len(NORMAL)
    writer.add_token_types(kinds)
    for name, x in weights.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def reader(tmp_path_factory, small):
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, small, tensors(small))
    return gemma3.open_gguf(path)


def numpy_logits(c: gemma3.Config, weights: dict[str, np.ndarray], tokens) -> np.ndarray:
    """From the file's tensors, with RoPE as a multiplication of complex numbers."""

    def matrix(name):
        return weights[f"{name}.weight"].astype(ml_dtypes.bfloat16).astype(np.float64)

    def norm(x, name):
        rms = np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_eps)
        return x / rms * weights[f"{name}.weight"].astype(np.float64)

    half = c.head_dim // 2
    x = matrix("token_embd")[tokens] * np.sqrt(c.dim)
    for i in range(c.layers):
        layer = f"blk.{i}."
        theta = 1e6 if i == 5 else 1e4
        turn = np.exp(1j * np.outer(np.arange(len(x)), theta ** (-np.arange(half) / half)))

        def heads(y, name, layer=layer, turn=turn):
            y = norm(y.reshape(len(y), -1, c.head_dim), layer + name)
            z = (y[..., :half] + 1j * y[..., half:]) * turn[:, None]
            return np.concatenate([z.real, z.imag], -1)

        h = norm(x, layer + "attn_norm")
        q = heads(h @ matrix(layer + "attn_q").T, "attn_q_norm")
        k = heads(h @ matrix(layer + "attn_k").T, "attn_k_norm")
        scores = np.einsum("qhd,kd->hqk", q, k[:, 0]) / np.sqrt(c.head_dim)
        seen = np.tri(len(x), dtype=bool)
        if i != 5:  # a local layer: the newest tokens only
            seen &= ~np.tri(len(x), k=-c.sliding_window, dtype=bool)
        scores = np.where(seen, scores, -np.inf)
        out = np.einsum("hqk,kd->qhd", softmax(scores, -1), h @ matrix(layer + "attn_v").T)
        out = out.reshape(len(x), -1) @ matrix(layer + "attn_output").T
        x = x + norm(out, layer + "post_attention_norm")
        h = norm(x, layer + "ffn_norm")
        gate = h @ matrix(layer + "ffn_gate").T
        gate = gate / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (gate + 0.044715 * gate**3)))
        h = (gate * (h @ matrix(layer + "ffn_up").T)) @ matrix(layer + "ffn_down").T
        x = x + norm(h, layer + "post_ffw_norm")
    return norm(x, "output_norm") @ matrix("token_embd").T


@pytest.mark.parametrize(
    ("fmt", "tolerance"),
    [("bf16", 0.05), (pk.KVFormat(8, 8, window=0, page_size=16), 0.08)],
    ids=["bf16", "k8v8"],
)
def test_logits_equal_a_forward_pass_without_cache(reader, small, fmt, tolerance):
    model = gemma3.read_model(reader)
    tokens = np.random.default_rng(1).integers(0, small.vocab, LENGTH)
    expected = numpy_logits(small, tensors(small), tokens)
    caches, logits = llama.make_caches(model.config, fmt, 1, LENGTH), []
    for part in (tokens[:20], tokens[20:]):
        new, caches = model(jnp.asarray(part[None], jnp.int32), caches)
        logits.append(new[0])
    error = np.concatenate(logits) - expected
    assert np.sqrt((error**2).mean()) < tolerance * expected.std()


def test_config_and_weights_are_the_file_s(reader, small):
    found = gemma3.read_config(reader)
    assert found == small or np.isclose(found.norm_eps, small.norm_eps)
    params = dict(nnx.to_flat_state(nnx.state(gemma3.read_model(reader))))
    expected = dict(gemma3.read_weights(reader))
    assert params.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(np.asarray(params[path].get_value()), x)


def test_tokenizer_joins_by_score(reader):
    tokenizer = gemma3.read_tokenizer(reader)
    assert tokenizer.encode("the the").tokens == ["the", "▁the"]
    assert tokenizer.encode("tha\n\nab").tokens == ["th", "a", "\n\n", "ab"]
    assert tokenizer.encode("é").tokens == ["<0xC3>", "<0xA9>"]


@given(st.text().filter(lambda text: "▁" not in text and "<" not in text))
def test_tokenizer_round_trip(reader, text):
    tokenizer = gemma3.read_tokenizer(reader)
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_other_models_are_refused(tmp_path, small):
    path = tmp_path / "other.gguf"
    write_gguf(path, small, {"blk.0.attn_q.bias": np.zeros(4, np.float32)}, tokenizer="gpt2")
    reader = gemma3.open_gguf(path)
    with pytest.raises(ValueError, match="gpt2"):
        gemma3.read_tokenizer(reader)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.bias"):
        list(gemma3.read_weights(reader))
