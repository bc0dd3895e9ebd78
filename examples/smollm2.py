"""SmolLM2 from a llama.cpp GGUF file: configuration, weights and tokenizer."""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import gguf
import ml_dtypes
import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from examples import download, llama
from examples.llama import Config


LAYER_NAMES = {
    "attn_norm": "attn_norm.scale",
    "attn_q": "q.kernel",
    "attn_k": "k.kernel",
    "attn_v": "v.kernel",
    "attn_output": "o.kernel",
    "ffn_norm": "mlp_norm.scale",
    "ffn_gate": "gate.kernel",
    "ffn_up": "up.kernel",
    "ffn_down": "down.kernel",
}
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"


START = ()  # tokens that every text begins with


def fetch(folder: Path) -> Path:
    """The model's GGUF file."""
    return download.fetch(download.MODEL, folder)


def read_model(reader: gguf.GGUFReader) -> llama.Llama:
    """The model with its weights, on the first device."""
    config = read_config(reader)
    return llama.filled(config, read_weights(reader, config))


def read_config(reader: gguf.GGUFReader) -> Config:
    heads = field(reader, "llama.attention.head_count")
    dim = field(reader, "llama.embedding_length")
    return Config(
        vocab=field(reader, "llama.vocab_size"),
        dim=dim,
        mlp_dim=field(reader, "llama.feed_forward_length"),
        layers=field(reader, "llama.block_count"),
        heads=heads,
        kv_heads=field(reader, "llama.attention.head_count_kv"),
        head_dim=dim // heads,
        rope_theta=field(reader, "llama.rope.freq_base"),
        norm_eps=field(reader, "llama.attention.layer_norm_rms_epsilon"),
    )


def read_weights(
    reader: gguf.GGUFReader, config: Config
) -> Iterator[tuple[tuple[str | int, ...], np.ndarray]]:
    """Each weight of `llama.Llama` with its path: matrices as bfloat16, norms as float32."""

    def rows(name: str, x: np.ndarray) -> np.ndarray:
        return half_split_rows(x, config.head_dim) if name in ("attn_q", "attn_k") else x

    return weights(reader, "Llama", LAYER_NAMES, rows)


def weights(
    reader: gguf.GGUFReader,
    model: str,
    layer_names: Mapping[str, str],
    change: Callable[[str, np.ndarray], np.ndarray] = lambda name, x: x,
) -> Iterator[tuple[tuple[str | int, ...], np.ndarray]]:
    """As `read_weights`, of any model with tied embeddings.

    layer_names: what a layer's tensors are called in the file and in the model; change: what is
    done to one (its name, [out, in] in float32) before it is transposed.
    """
    for tensor in reader.tensors:
        x = gguf.quants.dequantize(tensor.data, tensor.tensor_type)  # [out, in], float32
        match tensor.name.removesuffix(".weight").split("."):
            case ["token_embd"]:
                yield ("embed", "embedding"), x.astype(ml_dtypes.bfloat16)
            case ["output_norm"]:
                yield ("norm", "scale"), x
            case ["blk", layer, name] if name in layer_names:
                x = change(name, x)
                if x.ndim == 2:
                    x = np.ascontiguousarray(x.T).astype(ml_dtypes.bfloat16)
                yield ("blocks", int(layer), *layer_names[name].split(".")), x
            case _:
                raise ValueError(f"{tensor.name=} is no weight of a {model} with tied embeddings")


def half_split_rows(x: np.ndarray, head_dim: int) -> np.ndarray:
    """Undo llama.cpp's order of query and key rows.

    GGUF keeps the two rows that RoPE rotates together side by side (2i, 2i + 1); `llama.rope`
    expects them half a head apart (i, i + head_dim/2).
    """
    return x.reshape(-1, head_dim // 2, 2, x.shape[1]).swapaxes(1, 2).reshape(x.shape)


def read_tokenizer(reader: gguf.GGUFReader) -> Tokenizer:
    """Byte-level BPE, each digit a token of its own."""
    if (pre := field(reader, "tokenizer.ggml.pre")) != "smollm":
        raise ValueError(f"{pre=}: only the 'smollm' pre-tokenizer is implemented")
    tokens = field(reader, "tokenizer.ggml.tokens")
    kinds = field(reader, "tokenizer.ggml.token_type")
    merges = [tuple(pair.split(" ")) for pair in field(reader, "tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    control = [t for t, kind in zip(tokens, kinds, strict=True) if kind == gguf.TokenType.CONTROL]
    tokenizer.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in control])
    return tokenizer


def chat(question: str, system: str = SYSTEM) -> str:
    """The model's ChatML template up to where its answer begins; the answer ends at `END`."""
    return (
        f"<|im_start|>system\n{system}<|im_end|>\n"
        f"<|im_start|>user\n{question}<|im_end|>\n<|im_start|>assistant\n"
    )


END = "<|im_end|>"


def open_gguf(path: Path) -> gguf.GGUFReader:
    return gguf.GGUFReader(path)


def field(reader: gguf.GGUFReader, name: str):
    if (found := reader.get_field(name)) is None:
        raise ValueError(f"the GGUF file has no field {name!r}")
    return found.contents()
