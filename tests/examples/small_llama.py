"""A random small Llama as Hugging Face stores one, and its forward pass in numpy, in float64."""

import json
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from jaxgds import models


CONFIG = {
    "model_type": "llama",
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "vocab_size": 320,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "rope_scaling": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
        "rope_type": "llama3",
    },
}


def write(folder: Path, **changes) -> dict[str, np.ndarray]:
    """Saves config.json and model.safetensors; returns the weights."""
    config = {**CONFIG, **changes}
    rng, weights = np.random.default_rng(0), {}
    for name, shape in models.parameters(config).items():
        x = rng.normal(size=shape)
        x = 1 + 0.2 * x if len(shape) == 1 else 2 * x / np.sqrt(shape[1])
        weights[name] = x.astype(ml_dtypes.bfloat16)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    save_file(weights, folder / "model.safetensors")
    return weights


def logits(weights: dict[str, np.ndarray], tokens: list[int], **changes) -> np.ndarray:
    """[tokens, vocab] of one sequence, with RoPE as a multiplication of complex numbers."""
    c = {**CONFIG, **changes}
    d, heads, kv_heads = c["head_dim"], c["num_attention_heads"], c["num_key_value_heads"]
    w = {name: np.asarray(x, np.float64) for name, x in weights.items()}

    def norm(x, name):
        return x / np.sqrt((x**2).mean(-1, keepdims=True) + c["rms_norm_eps"]) * w[name]

    turn = np.exp(1j * np.outer(np.arange(len(tokens)), frequencies(c)))[:, None]

    def rotate(x):
        z = (x[..., : d // 2] + 1j * x[..., d // 2 :]) * turn
        return np.concatenate([z.real, z.imag], -1)

    x = w["model.embed_tokens.weight"][tokens]
    for i in range(c["num_hidden_layers"]):
        at = f"model.layers.{i}"
        h = norm(x, f"{at}.input_layernorm.weight")
        q, k, v = (
            (h @ w[f"{at}.self_attn.{p}_proj.weight"].T).reshape(len(x), -1, d) for p in "qkv"
        )
        q, k, mixed = rotate(q), rotate(k), []
        for head in range(heads):
            shared = head // (heads // kv_heads)
            scores = q[:, head] @ k[:, shared].T / np.sqrt(d)
            scores[np.triu_indices(len(x), 1)] = -np.inf
            p = np.exp(scores - scores.max(-1, keepdims=True))
            mixed.append(p / p.sum(-1, keepdims=True) @ v[:, shared])
        x = x + np.concatenate(mixed, -1) @ w[f"{at}.self_attn.o_proj.weight"].T
        h = norm(x, f"{at}.post_attention_layernorm.weight")
        gate, up = (h @ w[f"{at}.mlp.{p}_proj.weight"].T for p in ("gate", "up"))
        x = x + (gate / (1 + np.exp(-gate)) * up) @ w[f"{at}.mlp.down_proj.weight"].T
    return norm(x, "model.norm.weight") @ w.get("lm_head.weight", w["model.embed_tokens.weight"]).T


def frequencies(c: dict) -> np.ndarray:
    """RoPE's angles per token, with Llama 3.1's scaling as its authors wrote it, case by case."""
    plain = c["rope_theta"] ** (-np.arange(c["head_dim"] // 2) / (c["head_dim"] // 2))
    if not (scaling := c.get("rope_scaling")):
        return plain
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    length, found = scaling["original_max_position_embeddings"], []
    for f in plain:
        wavelength = 2 * np.pi / f
        if wavelength < length / high:
            found.append(f)
        elif wavelength > length / low:
            found.append(f / scaling["factor"])
        else:
            smooth = (length / wavelength - low) / (high - low)
            found.append((1 - smooth) * f / scaling["factor"] + smooth * f)
    return np.array(found)
