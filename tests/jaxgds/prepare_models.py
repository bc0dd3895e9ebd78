"""Small models to prepare, and the processes that prepare them."""

import hashlib
import json
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file


DIM, MLP, VOCAB, KV = 64, 96, 128, 32


def llama(layers: int = 2, dtype: Any = ml_dtypes.bfloat16) -> dict[str, np.ndarray]:
    """Random weights of a Llama under their Hugging Face names."""
    rng = np.random.default_rng(0)
    shapes = {"model.embed_tokens": (VOCAB, DIM), "model.norm": (DIM,), "lm_head": (VOCAB, DIM)}
    for i in range(layers):
        shapes |= {
            f"model.layers.{i}.{name}": shape
            for name, shape in {
                "self_attn.q_proj": (DIM, DIM),
                "self_attn.k_proj": (KV, DIM),
                "self_attn.v_proj": (KV, DIM),
                "self_attn.o_proj": (DIM, DIM),
                "mlp.gate_proj": (MLP, DIM),
                "mlp.up_proj": (MLP, DIM),
                "mlp.down_proj": (DIM, MLP),
                "input_layernorm": (DIM,),
                "post_attention_layernorm": (DIM,),
            }.items()
        }
    return {f"{name}.weight": rng.normal(size=s).astype(dtype) for name, s in shapes.items()}


def save_safetensors(folder: Path, weights: dict[str, np.ndarray]) -> Path:
    """A Hugging Face directory: two safetensors files, their index, config.json and a tokenizer."""
    folder.mkdir()
    names = sorted(weights)
    files = {"model-1.safetensors": names[: len(names) // 2]}
    files["model-2.safetensors"] = names[len(names) // 2 :]
    for file, inside in files.items():
        save_file({name: weights[name] for name in inside}, folder / file)
    weight_map = {name: file for file, inside in files.items() for name in inside}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "hidden_size": DIM}))
    (folder / "tokenizer.json").write_text("{}")
    return folder


def sparse_safetensors(file: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """bf16 zeros that take no space on disk."""
    end, header = 0, {}
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    with open(file, "wb") as f:
        f.write(len(text).to_bytes(8, "little") + text)
        f.truncate(8 + len(text) + end)
    return file


def digest(folder: Path) -> dict[str, str]:
    """Relative path -> hash of every file below a directory."""
    return {
        str(file.relative_to(folder)): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }
