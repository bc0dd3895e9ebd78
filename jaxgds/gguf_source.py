"""Tensors out of a llama.cpp GGUF file, dequantised, under their Hugging Face names.

llama.cpp's converter renames tensors, and changes two kinds of them: in Llama, the rows of queries
and keys that RoPE rotates together lie side by side; in Gemma, the norms' weights have 1 added.
Both are undone here. Needs the package gguf.
"""

import json
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import ml_dtypes
import numpy as np

from jaxgds.errors import CheckpointError
from jaxgds.index import Extent
from jaxgds.scatter import Box
from jaxgds.sources import Model, Tensor, read_range, tree_keys


_LAYER = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "attn_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_GEMMA2_LAYER = _LAYER | {  # it has norms after each part, too
    "post_attention_norm": "post_attention_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "post_ffw_norm": "post_feedforward_layernorm",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYERS = {
    "llama": _LAYER,
    "qwen2": _LAYER,
    "qwen3": _LAYER,
    "gemma": _LAYER,
    "gemma2": _GEMMA2_LAYER,
    "gemma3": _GEMMA2_LAYER,
}
_LEFT_OUT = {
    "rope_freqs.weight": "factors of RoPE's frequencies, made from rope_scaling of the original "
    "config.json; the config.json made from this file lacks it"
}
_CONFIG = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
}


def open_gguf(path: str) -> Model:
    """Opens a GGUF file. Quantised tensors come as bfloat16, others in their own dtype.

    Raises:
      CheckpointError: not a GGUF file, or a damaged one.
      NotImplementedError: the package gguf is missing, or the model or a tensor is of a kind that
        is not known here.
    """
    try:
        import gguf
    except ImportError as e:
        raise NotImplementedError(f"{path}: reading it needs `pip install gguf`") from e
    try:
        reader = gguf.GGUFReader(path)
    except (OSError, ValueError, IndexError, KeyError) as e:
        raise CheckpointError(f"{path}: cannot be read as a GGUF file: {e}") from e

    def field(name: str) -> Any:
        found = reader.get_field(name)
        return None if found is None else found.contents()

    arch = field("general.architecture")
    if arch not in _LAYERS:
        raise NotImplementedError(f"{path}: architecture {arch!r}, only {', '.join(_LAYERS)}")
    config = {
        "model_type": "gemma3_text" if arch == "gemma3" else arch,
        **{hf: field(f"{arch}.{name}") for hf, name in _CONFIG.items()},
    }
    config = {name: value for name, value in config.items() if value is not None}
    config.setdefault("head_dim", config["hidden_size"] // config["num_attention_heads"])
    tensors, left_out = [], {}
    for t in reader.tensors:
        if t.name in _LEFT_OUT:
            left_out[t.name] = _LEFT_OUT[t.name]
            continue
        name = _hugging_face_name(t.name, arch, path)
        shape = tuple(int(n) for n in reversed(t.shape))
        rows = _rows(path, t, shape)
        if arch == "llama" and name.endswith(("q_proj.weight", "k_proj.weight")):
            rows = partial(_half_split, rows, config["head_dim"])
        if arch.startswith("gemma") and name.endswith("norm.weight"):
            rows = partial(_minus_one, rows)
        try:
            dtype = rows(0, 1).dtype
        except NotImplementedError as e:
            kind = t.tensor_type.name
            raise NotImplementedError(f"{path}: {t.name!r} has the type {kind}: {e}") from e
        tensors.append(Tensor(tree_keys(name), shape, dtype, partial(_read, rows)))
    names = {t.name: t for t in tensors}
    if "model.embed_tokens.weight" not in names:
        raise CheckpointError(f"{path}: it has no token_embd.weight")
    config["vocab_size"] = names["model.embed_tokens.weight"].shape[0]
    config["tie_word_embeddings"] = "lm_head.weight" not in names
    configs = {"config.json": json.dumps(config, indent=1).encode()}
    return Model("gguf", path, tuple(tensors), {}, config, configs, left_out)


def _hugging_face_name(name: str, arch: str, path: str) -> str:
    match name.split("."):
        case [top, "weight"] if top in _TOP:
            return f"{_TOP[top]}.weight"
        case ["blk", layer, part, kind] if part in _LAYERS[arch]:
            return f"model.layers.{layer}.{_LAYERS[arch][part]}.{kind}"
    raise NotImplementedError(f"{path}: the tensor {name!r} of a {arch} model is not known here")


type Rows = Callable[[int, int], np.ndarray]  # (start, stop) -> those rows of a tensor


def _rows(path: str, tensor: Any, shape: tuple[int, ...]) -> Rows:
    """Reads and dequantises rows, all but the last dimension taken together."""
    import gguf

    kind = tensor.tensor_type
    plain = {
        gguf.GGMLQuantizationType.F32: np.float32,
        gguf.GGMLQuantizationType.F16: np.float16,
        gguf.GGMLQuantizationType.BF16: ml_dtypes.bfloat16,
    }
    block, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    row = shape[-1] // block * block_bytes
    extent = Extent(path, int(tensor.data_offset), int(tensor.n_bytes))
    if math.prod(shape[:-1]) * row != extent.nbytes:
        raise CheckpointError(f"{path}: {tensor.name!r} has {extent.nbytes} bytes for {shape}")

    def read(start: int, stop: int) -> np.ndarray:
        data = read_range(extent, start * row, (stop - start) * row, f"tensor {tensor.name!r}")
        if kind in plain:
            return np.frombuffer(data, plain[kind]).reshape(-1, shape[-1])
        packed = np.frombuffer(data, np.uint8).reshape(-1, row)
        return gguf.quants.dequantize(packed, kind).astype(ml_dtypes.bfloat16)

    return read


def _half_split(rows: Rows, head_dim: int, start: int, stop: int) -> np.ndarray:
    """Rows 2i and 2i + 1 of each head go where RoPE of Hugging Face's Llama has them."""
    first, last = start // head_dim * head_dim, -(-stop // head_dim) * head_dim
    x = rows(first, last)
    split = x.reshape(-1, head_dim // 2, 2, x.shape[-1]).swapaxes(1, 2).reshape(x.shape)
    return split[start - first : stop - first]


def _minus_one(rows: Rows, start: int, stop: int) -> np.ndarray:
    x = rows(start, stop)
    return (x.astype(np.float32) - 1).astype(x.dtype)


def _read(rows: Rows, box: Box) -> np.ndarray:
    """A box that is whole along its last dimension but for vectors; at most two dimensions."""
    match box:
        case ((start, stop),):
            return rows(0, 1)[0, start:stop]
        case ((first, last), (start, stop)):
            return rows(first, last)[:, start:stop]
    raise NotImplementedError(f"a tensor of {len(box)} dimensions in a GGUF file")
