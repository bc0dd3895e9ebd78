"""Shapes of a model's parameters, from its config.json alone: no weights, no framework.

Names and shapes are those of Hugging Face's safetensors files: matrices are [out, in]. Counted
against the parameter counts that the models' authors publish (tests/jaxgds/test_capacity.py).
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


# In a wheel the configs lie within the package, in a checkout beside it.
_SHIPPED = [Path(__file__).with_name("configs"), Path(__file__).parents[1] / "configs"]
_GEMMA = ("gemma", "gemma2", "gemma3_text")
FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", *_GEMMA, "mixtral")

type Shapes = dict[str, tuple[int, ...]]


def shipped() -> list[str]:
    """Names of the models that ship in configs/models/."""
    return sorted(path.stem for folder in _SHIPPED for path in folder.glob("models/*.json"))


def read_config(model: str) -> dict[str, Any]:
    """A model's config.json: a file or its directory, else that of a shipped model by its name.

    Raises:
      OSError: the file cannot be read.
      ValueError: no such model, or not a config.json.
    """
    path = Path(model)
    if path.is_dir() and (path / "config.json").exists():
        path = path / "config.json"
    elif not path.is_file() and model.lower() in shipped():
        path = next(p for f in _SHIPPED if (p := f / "models" / f"{model.lower()}.json").is_file())
    elif path.is_dir():
        raise ValueError(f"{model}: no config.json in this directory")
    elif not path.exists():
        raise ValueError(
            f"{model!r} is neither a file, nor a directory with a config.json, nor one of "
            f"{', '.join(shipped())}"
        )
    try:
        config = json.loads(path.read_text())
    except ValueError as e:
        raise ValueError(f"{path}: not JSON: {e}") from e
    if not isinstance(config, dict) or "model_type" not in config:
        raise ValueError(f"{path}: not a model's config.json: it has no model_type")
    return config


def kv_shape(config: Mapping[str, Any]) -> tuple[int, int, int]:
    """(layers, KV heads, head_dim) of a model's key-value cache."""
    heads = _number(config, "num_attention_heads")
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or _number(config, "hidden_size") // heads
    return _number(config, "num_hidden_layers"), kv_heads, head_dim


def parameters(config: Mapping[str, Any]) -> Shapes:
    """Name -> shape of every parameter.

    Raises:
      ValueError: a family that is not known here, or a config that lacks a size.
    """
    family = config.get("model_type")
    if family not in FAMILIES:
        raise ValueError(f"the parameters of model_type={family!r} are not known, only {FAMILIES}")
    if config.get("mlp_bias"):
        raise ValueError("config.json: mlp_bias: models with it are not known here")
    layers, kv_heads, head_dim = kv_shape(config)
    dim, vocab = _number(config, "hidden_size"), _number(config, "vocab_size")
    heads = _number(config, "num_attention_heads")
    rows = {"q": heads * head_dim, "k": kv_heads * head_dim, "v": kv_heads * head_dim}
    layer: Shapes = {f"self_attn.{p}_proj.weight": (n, dim) for p, n in rows.items()}
    layer["self_attn.o_proj.weight"] = (dim, heads * head_dim)
    if family == "qwen2" or config.get("attention_bias"):
        layer |= {f"self_attn.{p}_proj.bias": (n,) for p, n in rows.items()}
    if family != "qwen2" and config.get("attention_bias"):
        layer["self_attn.o_proj.bias"] = (dim,)
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        layer |= {f"self_attn.{p}_norm.weight": (head_dim,) for p in "qk"}
    layer |= _mlp(config, dim)
    norms = ("input", "post_attention")
    if family in ("gemma2", "gemma3_text"):
        norms += ("pre_feedforward", "post_feedforward")
    layer |= {f"{p}_layernorm.weight": (dim,) for p in norms}
    found: Shapes = {"model.embed_tokens.weight": (vocab, dim)}
    for i in range(layers):
        found |= {f"model.layers.{i}.{name}": shape for name, shape in layer.items()}
    found["model.norm.weight"] = (dim,)
    if not config.get("tie_word_embeddings", family in _GEMMA):
        found["lm_head.weight"] = (vocab, dim)
    return found


def _mlp(config: Mapping[str, Any], dim: int) -> Shapes:
    family = config["model_type"]
    if family == "qwen3_moe":
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise ValueError("config.json: some layers have no experts: not known here")
        hidden, experts = _number(config, "moe_intermediate_size"), _number(config, "num_experts")
        part, up, down = "mlp", ("gate_proj", "up_proj"), "down_proj"
    elif family == "mixtral":
        hidden, experts = (
            _number(config, name) for name in ("intermediate_size", "num_local_experts")
        )
        part, up, down = "block_sparse_moe", ("w1", "w3"), "w2"
    else:
        hidden = _number(config, "intermediate_size")
        found = {f"mlp.{p}_proj.weight": (hidden, dim) for p in ("gate", "up")}
        return found | {"mlp.down_proj.weight": (dim, hidden)}
    found: Shapes = {f"{part}.gate.weight": (experts, dim)}
    for i in range(experts):
        found |= {f"{part}.experts.{i}.{name}.weight": (hidden, dim) for name in up}
        found[f"{part}.experts.{i}.{down}.weight"] = (dim, hidden)
    return found


def _number(config: Mapping[str, Any], name: str) -> int:
    value = config.get(name)
    if not isinstance(value, int) or value < 1:
        raise ValueError(f"config.json: {name}={value!r}, expected a positive integer")
    return value
