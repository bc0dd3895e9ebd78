"""A tiny GGUF file, written with the gguf package, read back as weights and tokenizer."""

import gguf
import jax
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from jax.sharding import Mesh
from tokenizers.pre_tokenizers import ByteLevel

from examples import llama, smollm2


MERGES = ["t h", "th e", "Ġ the", "1 2"]
CONTROL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
TOKENS = CONTROL + sorted(ByteLevel.alphabet()) + [m.replace(" ", "") for m in MERGES]


def llama_cpp_order(x: np.ndarray, heads: int) -> np.ndarray:
    """How llama.cpp's converter reorders the rows of query and key weights."""
    return x.reshape(heads, 2, x.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(x.shape)


def write_gguf(path, config: llama.Config, weights: dict[str, np.ndarray], pre="smollm"):
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(config.layers)
    writer.add_embedding_length(config.dim)
    writer.add_feed_forward_length(config.mlp_dim)
    writer.add_head_count(config.heads)
    writer.add_head_count_kv(config.kv_heads)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_vocab_size(config.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(TOKENS)
    kinds = [gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3)
    writer.add_token_types(kinds)
    writer.add_token_merges(MERGES)
    for name, x in weights.items():
        writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def small() -> llama.Config:
    """Five heads of 4 in 20 dimensions: no two of the sizes are equal."""
    return llama.Config(
        vocab=len(TOKENS), dim=20, mlp_dim=12, layers=2, heads=5, kv_heads=1, head_dim=4
    )


@pytest.fixture(scope="module")
def reader(tmp_path_factory, small):
    rng = np.random.default_rng(0)
    c = small
    draw = lambda *shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    weights = {"token_embd.weight": draw(c.vocab, c.dim), "output_norm.weight": draw(c.dim)}
    for i in range(c.layers):
        weights |= {
            f"blk.{i}.attn_norm.weight": draw(c.dim),
            f"blk.{i}.attn_q.weight": draw(c.heads * c.head_dim, c.dim),
            f"blk.{i}.attn_k.weight": draw(c.kv_heads * c.head_dim, c.dim),
            f"blk.{i}.attn_v.weight": draw(c.kv_heads * c.head_dim, c.dim),
            f"blk.{i}.attn_output.weight": draw(c.dim, c.heads * c.head_dim),
            f"blk.{i}.ffn_norm.weight": draw(c.dim),
            f"blk.{i}.ffn_gate.weight": draw(c.mlp_dim, c.dim),
            f"blk.{i}.ffn_up.weight": draw(c.mlp_dim, c.dim),
            f"blk.{i}.ffn_down.weight": draw(c.dim, c.mlp_dim),
        }
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write_gguf(path, c, weights)
    return smollm2.open_gguf(path), weights


def test_config(reader, small):
    found = smollm2.read_config(reader[0])
    assert found.rope_theta == small.rope_theta
    assert found.norm_eps == pytest.approx(small.norm_eps)
    sizes = ["vocab", "dim", "mlp_dim", "layers", "heads", "kv_heads", "head_dim"]
    assert [getattr(found, s) for s in sizes] == [getattr(small, s) for s in sizes]


def test_weights_fill_the_model(reader, small):
    """Same paths, shapes and dtypes as the model's, and the file's values."""
    found = dict(smollm2.read_weights(reader[0], small))
    _, target = llama.abstract_model(small, Mesh(jax.devices()[:1], ("model",)))
    expected = {path: param.get_value() for path, param in nnx.to_flat_state(target)}
    assert {p: (x.shape, x.dtype) for p, x in found.items()} == {
        p: (x.shape, x.dtype) for p, x in expected.items()
    }
    down = reader[1]["blk.1.ffn_down.weight"].T.astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(found["blocks", 1, "down", "kernel"], down)
    key = found["blocks", 0, "k", "kernel"].T
    stored = reader[1]["blk.0.attn_k.weight"].astype(ml_dtypes.bfloat16)
    np.testing.assert_array_equal(llama_cpp_order(key, small.kv_heads), stored)


def test_model_is_read_whole(reader, small):
    model = smollm2.read_model(reader[0])
    found = {path: np.asarray(x.get_value()) for path, x in nnx.to_flat_state(nnx.state(model))}
    expected = dict(smollm2.read_weights(reader[0], small))
    assert found.keys() == expected.keys()
    for path, x in expected.items():
        np.testing.assert_array_equal(found[path], x)


@pytest.mark.parametrize(("heads", "head_dim"), [(1, 4), (3, 8), (9, 64)])
def test_half_split_rows_undoes_llama_cpp_order(heads, head_dim):
    x = np.arange(heads * head_dim * 3).reshape(heads * head_dim, 3)
    np.testing.assert_array_equal(smollm2.half_split_rows(llama_cpp_order(x, heads), head_dim), x)


@given(st.text().filter(lambda text: not any(c in text for c in CONTROL)))
def test_tokenizer_round_trip(reader, text):
    tokenizer = smollm2.read_tokenizer(reader[0])
    assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_tokenizer_splits_digits_and_keeps_control_tokens(reader):
    tokenizer = smollm2.read_tokenizer(reader[0])
    assert tokenizer.encode("a the12").tokens == ["a", "Ġthe", "1", "2"]
    tokens = tokenizer.encode(smollm2.chat("the", system="1")).tokens
    assert tokens[:1] == ["<|im_start|>"] and tokens.count("<|im_end|>") == 2
    assert "".join(tokens).endswith("<|im_start|>assistantĊ")


def test_other_models_are_refused(tmp_path, small):
    path = tmp_path / "other.gguf"
    write_gguf(path, small, {"blk.0.attn_q.bias": np.zeros(4, np.float32)}, pre="qwen2")
    reader = smollm2.open_gguf(path)
    with pytest.raises(ValueError, match="qwen2"):
        smollm2.read_tokenizer(reader)
    with pytest.raises(ValueError, match=r"blk\.0\.attn_q\.bias"):
        dict(smollm2.read_weights(reader, small))
    with pytest.raises(ValueError, match=r"no.field"):
        smollm2.field(reader, "no.field")
