"""A Llama in Flax NNX whose attention runs over a bf16, FP8 or TurboQuant key-value cache.

model = nnx.merge(graph, restored_state)
caches = make_caches(model.config, pk.KVFormat(key_bits=4, value_bits=4), batch, max_len)
for tokens in generate(model, prompts, caches, new_tokens=80): ...
"""

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels as pk


@dataclasses.dataclass(frozen=True)
class Config:
    vocab: int
    dim: int
    mlp_dim: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    rope_theta: float = 10_000.0
    norm_eps: float = 1e-5


@partial(jax.tree_util.register_dataclass, data_fields=["k", "v", "lengths"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class DenseCache:
    """Keys and values [batch, max_len, kv_heads, head_dim], bf16 or cast to FP8 without scales."""

    k: Array
    v: Array
    lengths: Int[Array, " batch"]

    @staticmethod
    def create(dtype, batch: int, max_len: int, kv_heads: int, head_dim: int) -> "DenseCache":
        empty = partial(jnp.zeros, (batch, max_len, kv_heads, head_dim), dtype)
        return DenseCache(empty(), empty(), jnp.zeros(batch, jnp.int32))

    def append(self, k: Array, v: Array) -> "DenseCache":
        rows = jnp.arange(len(k))[:, None]
        slots = self.lengths[:, None] + jnp.arange(k.shape[1])
        limit = float(jnp.finfo(self.k.dtype).max)  # FP8 saturates: e4m3fn has no infinity
        k, v = (
            old.at[rows, slots].set(jnp.clip(new, -limit, limit).astype(old.dtype), mode="drop")
            for old, new in ((self.k, k), (self.v, v))
        )
        return DenseCache(k, v, self.lengths + slots.shape[1])

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.k.shape[-2] * self.k.shape[-1] * self.k.dtype.itemsize


type Cache = DenseCache | pk.KVCache
type Format = pk.KVFormat | Literal["bf16", "fp8"]


def attend(
    q: Float[Array, "batch new heads d"],
    k: Float[Array, "batch new kv_heads d"],
    v: Float[Array, "batch new kv_heads d"],
    cache: Cache,
    window: int | None = None,
) -> tuple[Float[Array, "batch new heads d"], Cache]:
    """Causal attention of new tokens over the cache and themselves; returns the longer cache.

    window: each token attends only to so many of the newest, itself included.
    """
    if isinstance(cache, pk.KVCache):
        return pk.attend(q, k, v, cache, sliding_window=window)
    cache = cache.append(k, v)
    last = cache.lengths[:, None] - q.shape[1] + jnp.arange(q.shape[1])
    ago = last[:, None, :, None] - jnp.arange(cache.k.shape[1])
    mask = (ago >= 0) & (ago < (window or ago.shape[-1]))
    k, v = cache.k.astype(q.dtype), cache.v.astype(q.dtype)
    return jax.nn.dot_product_attention(q, k, v, mask=mask), cache


def rope(x: Float[Array, "batch new heads d"], positions: Int[Array, "batch new"], theta: float):
    """Rotate the pairs (i, i + d/2) of each head by position * theta^(-2i/d)."""
    half = x.shape[-1] // 2
    angles = positions[..., None, None] * theta ** (-jnp.arange(half) / half)
    a, b = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1).astype(x.dtype)


Embed = partial(nnx.Embed, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
Linear = partial(nnx.Linear, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16)
RMSNorm = partial(nnx.RMSNorm, dtype=jnp.bfloat16)  # weights and statistics in float32


class Block(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.config = c
        self.attn_norm = RMSNorm(c.dim, epsilon=c.norm_eps, rngs=rngs)
        self.q = Linear(c.dim, c.heads * c.head_dim, rngs=rngs)
        self.k = Linear(c.dim, c.kv_heads * c.head_dim, rngs=rngs)
        self.v = Linear(c.dim, c.kv_heads * c.head_dim, rngs=rngs)
        self.o = Linear(c.heads * c.head_dim, c.dim, rngs=rngs)
        self.mlp_norm = RMSNorm(c.dim, epsilon=c.norm_eps, rngs=rngs)
        self.gate = Linear(c.dim, c.mlp_dim, rngs=rngs)
        self.up = Linear(c.dim, c.mlp_dim, rngs=rngs)
        self.down = Linear(c.mlp_dim, c.dim, rngs=rngs)

    def __call__(self, x: Array, cache: Cache):
        heads = lambda y: y.reshape(*y.shape[:2], -1, self.config.head_dim)  # noqa: E731
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1])
        h = self.attn_norm(x)
        q = rope(heads(self.q(h)), positions, self.config.rope_theta)
        k = rope(heads(self.k(h)), positions, self.config.rope_theta)
        out, cache = attend(q, k, heads(self.v(h)), cache)
        x = x + self.o(out.reshape(*x.shape[:2], -1))
        h = self.mlp_norm(x)
        return x + self.down(nnx.silu(self.gate(h)) * self.up(h)), cache


class Llama(nnx.Module):
    def __init__(self, c: Config, rngs: nnx.Rngs):
        self.config = c
        self.embed = Embed(c.vocab, c.dim, rngs=rngs)
        self.blocks = nnx.List([Block(c, rngs) for _ in range(c.layers)])
        self.norm = RMSNorm(c.dim, epsilon=c.norm_eps, rngs=rngs)

    def __call__(
        self, tokens: Int[Array, "batch new"], caches: list[Cache], last_only: bool = False
    ) -> tuple[Float[Array, "batch new vocab"], list[Cache]]:
        """Logits (float32) of new tokens that follow what the caches hold, and the new caches.

        The old caches are donated. Each layer is a jitted call, compiled once for all layers;
        `jax.jit` around the whole works too: fewer calls, a longer compilation.
        """
        x, new = self.embedded(tokens), []
        for block, cache in zip(self.blocks, caches, strict=True):
            x, cache = run_block(block, x, cache)
            new.append(cache)
        return run_head(self, x[:, -1:] if last_only else x), new

    def embedded(self, tokens: Int[Array, "batch new"]) -> Float[Array, "batch new dim"]:
        return self.embed(tokens)


@partial(jax.jit, donate_argnames="cache")
def run_block(block: Block, x: Array, cache: Cache):
    return block(x, cache)


@jax.jit
def run_head(model: Llama, x: Array):
    table = model.embed.embedding[...]  # tied to the output
    return jnp.einsum("btd,vd->btv", model.norm(x), table, preferred_element_type=jnp.float32)


def generate(
    model: Llama, prompts: list[list[int]], caches: list[Cache], new_tokens: int
) -> Iterator[list[int | None]]:
    """Greedy continuations of a batch of prompts, one token of each at a time.

    Prompts may differ in length: the shortest's length is read at once; then longer ones are
    read on, token by token, while shorter ones answer already (None: not yet answering).
    """
    common = min(map(len, prompts))
    tokens = jnp.asarray([prompt[:common] for prompt in prompts], jnp.int32)
    for i in range(common, max(map(len, prompts)) + new_tokens):
        logits, caches = model(tokens, caches, last_only=True)
        best = logits[:, 0].argmax(-1).tolist()
        yield [None if i < len(p) else t for p, t in zip(prompts, best, strict=True)]
        known = [p[i] if i < len(p) else t for p, t in zip(prompts, best, strict=True)]
        tokens = jnp.asarray(known, jnp.int32)[:, None]


def make_caches(config: Config, fmt: Format, batch: int, max_len: int) -> list[Cache]:
    """One empty cache per layer: dense, or packed if `fmt` is a KVFormat."""
    shape = (batch, max_len, config.kv_heads, config.head_dim)
    if isinstance(fmt, pk.KVFormat):
        return [pk.KVCache.create(fmt, *shape) for _ in range(config.layers)]
    dtype = {"bf16": jnp.bfloat16, "fp8": jnp.float8_e4m3fn}[fmt]
    return [DenseCache.create(dtype, *shape) for _ in range(config.layers)]


def abstract_model(
    config: Config, mesh: Mesh, model: Callable[..., Llama] = Llama
) -> tuple[nnx.GraphDef, nnx.State]:
    """The model without weights: its structure, and a restore target that says where they go.

    Every matrix is split along its last dimension over the mesh's one axis if that divides it.
    """
    graph, state = nnx.split(nnx.eval_shape(lambda: model(config, nnx.Rngs(0))))

    def place(x):
        split = x.ndim == 2 and x.shape[1] % mesh.size == 0
        spec = PartitionSpec(None, mesh.axis_names[0]) if split else PartitionSpec()
        return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, spec))

    return graph, jax.tree.map(place, state)


def filled(
    config: Config,
    weights: Iterable[tuple[tuple[str | int, ...], np.ndarray]],
    model: Callable[..., Llama] = Llama,
) -> Llama:
    """The model with these weights, each with its path, on the first device."""
    graph, target = abstract_model(config, Mesh(jax.devices()[:1], ("model",)), model)
    params: dict[Any, Any] = dict(nnx.to_flat_state(target))
    for path, x in weights:
        params[path] = params[path].replace(jax.device_put(x, jax.devices()[0]))
    return nnx.merge(graph, nnx.from_flat_state(params))
