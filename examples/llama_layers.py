"""What a Llama's layers are made of, tensor parallel, in Flax NNX.

A weight is bf16, or FP8 with a float32 scale per output, as `jaxgds prepare --quantize fp8` makes
it. Modules are made with shapes in place of weights, which come from a checkpoint only: to trace
initial values that nobody computes takes several times as long.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from examples.llama_config import Config, rope
from examples.sharded_cache import attend


class Linear(nnx.Module):
    def __init__(self, outputs: int, inputs: int, fp8: bool = False):
        self.weight = _shape((outputs, inputs), jnp.float8_e4m3fn if fp8 else jnp.bfloat16)
        if fp8:
            self.weight_scale = _shape((outputs, 1), jnp.float32)

    def __call__(self, x: Float[Array, "*n inputs"]) -> Float[Array, "*n outputs"]:
        """In float32, as is the sum over devices where the inputs are split."""
        w = self.weight[...].astype(x.dtype)
        y = jnp.einsum("...i,oi->...o", x, w, preferred_element_type=jnp.float32)
        return y * self.weight_scale[..., 0] if hasattr(self, "weight_scale") else y


class Embedding(Linear):
    """Split by vocabulary, so that it can be the head, too."""

    def __init__(self, c: Config, mesh: Mesh):
        super().__init__(c.vocab, c.dim)
        self.mesh = mesh

    def lookup(self, tokens: Int[Array, "batch new"]) -> Float[Array, "batch new dim"]:
        """Each device looks up those of its rows; left to itself XLA would gather the table."""

        def of_own_rows(table, tokens):
            row = tokens - jax.lax.axis_index("tp") * len(table)
            mine = (0 <= row) & (row < len(table))
            return jax.lax.psum(jnp.where(mine[..., None], table[row], 0), "tp")

        specs = (P("tp"), P())
        lookup = jax.shard_map(of_own_rows, mesh=self.mesh, in_specs=specs, out_specs=P())
        return lookup(self.weight[...], tokens)


class Norm(nnx.Module):
    def __init__(self, dim: int, eps: float):
        self.weight, self.eps = _shape((dim,), jnp.float32), eps

    def __call__(self, x: Float[Array, "*n dim"]) -> Float[Array, "*n dim"]:
        x = x.astype(jnp.float32)
        x *= jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + self.eps)
        return (x * self.weight[...]).astype(jnp.bfloat16)


class Attention(nnx.Module):
    def __init__(self, c: Config, mesh: Mesh):
        self.config, self.mesh = c, mesh
        self.q_proj = Linear(c.heads * c.head_dim, c.dim, c.fp8)
        self.k_proj = Linear(c.kv_heads * c.head_dim, c.dim, c.fp8)
        self.v_proj = Linear(c.kv_heads * c.head_dim, c.dim, c.fp8)
        self.o_proj = Linear(c.dim, c.heads * c.head_dim, c.fp8)

    def __call__(self, x: Array, cache: pk.KVCache, counts: Array) -> tuple[Array, pk.KVCache]:
        positions = cache.lengths[:, None] + jnp.arange(x.shape[1], dtype=jnp.int32)
        q, k, v = (
            y(x).reshape(*x.shape[:2], -1, self.config.head_dim).astype(jnp.bfloat16)
            for y in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rope(q, positions, self.config), rope(k, positions, self.config)
        out, cache = attend(q, k, v, cache, counts, self.mesh)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache


class MLP(nnx.Module):
    def __init__(self, c: Config):
        self.gate_proj = Linear(c.mlp_dim, c.dim, c.fp8)
        self.up_proj = Linear(c.mlp_dim, c.dim, c.fp8)
        self.down_proj = Linear(c.dim, c.mlp_dim, c.fp8)

    def __call__(self, x: Array) -> Array:
        y = jax.nn.silu(self.gate_proj(x)) * self.up_proj(x)
        return self.down_proj(y.astype(x.dtype))


class Layer(nnx.Module):
    def __init__(self, c: Config, mesh: Mesh):
        self.input_layernorm = Norm(c.dim, c.norm_eps)
        self.self_attn = Attention(c, mesh)
        self.post_attention_layernorm = Norm(c.dim, c.norm_eps)
        self.mlp = MLP(c)

    def __call__(self, x: Array, cache: pk.KVCache, counts: Array) -> tuple[Array, pk.KVCache]:
        y, cache = self.self_attn(self.input_layernorm(x), cache, counts)
        x = (x + y).astype(x.dtype)
        x = (x + self.mlp(self.post_attention_layernorm(x))).astype(x.dtype)
        return everywhere(x, self.self_attn.mesh), cache


def _shape(shape: tuple[int, ...], dtype) -> nnx.Param[Any]:
    return nnx.Param(jax.ShapeDtypeStruct(shape, dtype))


def everywhere[T](x: T, mesh: Mesh) -> T:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P()))
