"""GGUF files, as the gguf package writes them, against its own dequantisation."""

import json
from pathlib import Path

import gguf
import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import prepare_models as models
import pytest

from jaxgds import sources
from jaxgds.check import check
from jaxgds.prepare import prepare
from jaxgds.rules import Mesh


Q8_0, Q4_1 = gguf.GGMLQuantizationType.Q8_0, gguf.GGMLQuantizationType.Q4_1
HEAD_DIM = 16
NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
}


def gguf_name(name: str) -> str:
    match name.removesuffix(".weight").split(".", 3):
        case ["model", "layers", layer, part]:
            return f"blk.{layer}.{NAMES[part]}.weight"
    return f"{NAMES[name.removesuffix('.weight')]}.weight"


def write(path: Path, arch: str, tensors: dict[str, np.ndarray], kind=None) -> None:
    """A GGUF file; matrices quantised as `kind`, where its blocks fit."""
    writer = gguf.GGUFWriter(path, arch)
    writer.add_embedding_length(models.DIM)
    writer.add_block_count(2)
    writer.add_feed_forward_length(models.MLP)
    writer.add_head_count(models.DIM // HEAD_DIM)
    writer.add_head_count_kv(models.KV // HEAD_DIM)
    writer.add_rope_freq_base(5e5)
    writer.add_layer_norm_rms_eps(1e-5)
    for name, x in tensors.items():
        if kind is not None and x.ndim == 2:
            writer.add_tensor(name, gguf.quants.quantize(x, kind), raw_dtype=kind)
        else:
            writer.add_tensor(name, x)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def permuted(x: np.ndarray) -> np.ndarray:
    """The order of rows that llama.cpp's converter makes of Hugging Face's."""
    heads = x.shape[0] // HEAD_DIM
    return x.reshape(heads, 2, HEAD_DIM // 2, -1).swapaxes(1, 2).reshape(x.shape)


def restored(path) -> dict[str, jax.Array]:
    with ocp.StandardCheckpointer() as checkpointer:
        tree = checkpointer.restore(path)
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {".".join(ocp.tree.str_keypath(p)): leaf for p, leaf in leaves}


@pytest.mark.filterwarnings("ignore:Sharding info not provided")
@pytest.mark.parametrize("kind", [None, Q8_0, Q4_1], ids=["f32", "q8_0", "q4_1"])
@pytest.mark.parametrize("arch", ["llama", "qwen3", "gemma"])
def test_weights_are_those_before_llama_cpp_converted_them(arch, kind, tmp_path):
    weights = models.llama(dtype=np.float32)
    converted, expected = {}, {}
    for name, x in weights.items():
        converted[gguf_name(name)] = expected[name] = x
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            converted[gguf_name(name)] = permuted(x)
        if arch == "gemma" and x.ndim == 1:
            converted[gguf_name(name)] = shifted = x + np.float32(1)
            expected[name] = shifted - np.float32(1)
        if kind is not None and x.ndim == 2:  # a row is quantised by itself, wherever it lies
            rounded = gguf.quants.dequantize(gguf.quants.quantize(x, kind), kind)
            expected[name] = rounded.astype(ml_dtypes.bfloat16)
    write(tmp_path / "m.gguf", arch, converted, kind)
    prepare(tmp_path / "m.gguf", tmp_path / "out", mesh=Mesh({"tp": 2}))
    assert check(tmp_path / "out")["problems"] == []
    found = restored(tmp_path / "out")
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        assert found[name].dtype == x.dtype, name
        assert np.array_equal(np.asarray(found[name]), x), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == arch
    assert (config["hidden_size"], config["vocab_size"]) == (models.DIM, models.VOCAB)
    assert (config["head_dim"], config["num_key_value_heads"]) == (HEAD_DIM, 2)
    assert config["rope_theta"] == 5e5
    assert config["tie_word_embeddings"] is False


def test_says_what_it_leaves_out_and_what_it_does_not_know(tmp_path):
    embed = {"token_embd.weight": np.ones((4, 64), np.float32)}
    write(tmp_path / "a.gguf", "llama", embed | {"rope_freqs.weight": np.ones(8, np.float32)})
    assert "rope_scaling" in sources.open_model(tmp_path / "a.gguf").left_out["rope_freqs.weight"]
    write(tmp_path / "b.gguf", "llama", embed | {"blk.0.ffn_gate_exps.weight": np.ones((2, 64))})
    with pytest.raises(NotImplementedError, match="blk.0.ffn_gate_exps.weight"):
        sources.open_model(tmp_path / "b.gguf")
    write(tmp_path / "c.gguf", "mamba", {"token_embd.weight": np.ones((4, 64), np.float32)})
    with pytest.raises(NotImplementedError, match="architecture 'mamba'"):
        sources.open_model(tmp_path / "c.gguf")
    (tmp_path / "d.gguf").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(ValueError, match="d.gguf"):
        sources.open_model(tmp_path / "d.gguf")
