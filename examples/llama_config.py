"""What a config.json says of a Llama, and its rotary positions."""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    dim: int
    mlp_dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float
    rope_scaling: tuple[float, float, float, int] | None  # factor, low, high, original length
    norm_eps: float
    tied: bool
    fp8: bool

    @staticmethod
    def of(c: dict[str, Any], fp8: bool = False) -> "Config":
        """From a config.json of the Llama family. Raises ValueError for any other."""
        needed = ("model_type", "vocab_size", "hidden_size", "intermediate_size", "rms_norm_eps")
        if absent := [name for name in needed if name not in c]:
            raise ValueError(f"config.json lacks {absent}: it is none of Hugging Face's")
        scaling, kind = None, (c.get("rope_scaling") or {}).get("rope_type")
        if kind == "llama3":
            names = ("factor", "low_freq_factor", "high_freq_factor")
            length = c["rope_scaling"]["original_max_position_embeddings"]
            scaling = (*(c["rope_scaling"][name] for name in names), length)
        if c["model_type"] != "llama" or kind not in (None, "default", "llama3"):
            raise ValueError(
                f"config.json: model_type={c['model_type']!r}, rope_type={kind!r}: only Llama is "
                "known here, with RoPE as in Llama 1 to 3"
            )
        heads = c["num_attention_heads"]
        head_dim = c.get("head_dim") or c["hidden_size"] // heads
        return Config(
            c["vocab_size"], c["hidden_size"], c["intermediate_size"], c["num_hidden_layers"],
            heads, c.get("num_key_value_heads") or heads, head_dim, c.get("rope_theta", 1e4),
            scaling, c["rms_norm_eps"], c.get("tie_word_embeddings", False), fp8,
        )  # fmt: skip


def rope(x: Float[Array, "batch new heads d"], positions: Int[Array, "batch new"], c: Config):
    """Rotate the pairs (i, i + d/2) of each head; Llama 3.1 slows the slow ones down further."""
    half = x.shape[-1] // 2
    turn = c.rope_theta ** (-jnp.arange(half, dtype=jnp.float32) / half)
    if c.rope_scaling is not None:
        factor, low, high, length = c.rope_scaling
        keep = jnp.clip((length * turn / (2 * math.pi) - low) / (high - low), 0, 1)
        turn *= keep + (1 - keep) / factor
    angles = positions[..., None, None].astype(jnp.float32) * turn
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)
