"""A tensor-parallel Llama in Flax NNX, its parameters named as in Hugging Face's checkpoints.

The shardings are those of configs/rules, and XLA splits the matrix products by them.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from examples.llama_config import Config
from examples.llama_layers import Embedding, Layer, Norm
from jaxgds.rules import shipped
from jaxgds.shardings import with_shardings


# The parts of the model as programs. Within another one each is traced once, not once a layer.
@jax.jit
def run_embedding(table: Embedding, tokens: Array):
    return table.lookup(tokens)


@partial(jax.jit, donate_argnames="cache")
def run_layer(layer: Layer, x: Array, cache: pk.KVCache, counts: Array):
    return layer(x, cache, counts)


@jax.jit
def run_head(head: Embedding, norm: Norm, x: Array, counts: Array):
    x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)[:, 0]
    return head(norm(x))


class Decoder(nnx.Module):
    def __init__(self, c: Config, mesh: Mesh):
        self.embed_tokens = Embedding(c, mesh)
        self.layers = nnx.List([Layer(c, mesh) for _ in range(c.layers)])
        self.norm = Norm(c.dim, c.norm_eps)


class Llama(nnx.Module):
    """With shapes in place of weights, until `nnx.merge` gives it those of a checkpoint."""

    def __init__(self, c: Config, mesh: Mesh):
        self.config, self.mesh = c, mesh
        self.model = Decoder(c, mesh)
        if not c.tied:
            self.lm_head = Embedding(c, mesh)

    @property
    def head(self) -> Embedding:
        return self.model.embed_tokens if self.config.tied else self.lm_head

    def __call__(
        self,
        tokens: Int[Array, "batch new"],
        caches: list[pk.KVCache],
        counts: Int[Array, " batch"],
    ) -> tuple[Float[Array, "batch vocab"], list[pk.KVCache]]:
        """Logits after each sequence's last valid token, of `counts` new ones, and the caches."""
        x, longer = self.read(tokens, caches, counts)
        return run_head(self.head, self.model.norm, x, counts), longer

    def read(
        self,
        tokens,
        caches: list[pk.KVCache],
        counts,
        embedding: Callable[..., Array] = run_embedding,
        layer: Callable[..., tuple[Array, pk.KVCache]] = run_layer,
    ) -> tuple[Float[Array, "batch new dim"], list[pk.KVCache]]:
        """What the last layer gives for all new tokens, and the caches. Donates the old ones.

        embedding, layer: these programs, or what they were compiled to.
        """
        x, longer = embedding(self.model.embed_tokens, tokens), []
        for one, cache in zip(self.model.layers, caches, strict=True):
            x, cache = layer(one, x, cache, counts)
            longer.append(cache)
        return x, longer


def make_mesh(devices: int | None = None) -> Mesh:
    """One axis, "tp", of so many devices; None: of all. Raises ValueError if there are fewer."""
    found = np.array(jax.devices())
    if devices is not None and not 1 <= devices <= found.size:
        raise ValueError(f"{devices=}: JAX sees {found.size} here")
    return Mesh(found[:devices], ("tp",))


def abstract_model(c: Config, mesh: Mesh) -> tuple[nnx.GraphDef, nnx.State]:
    """The model's structure, and a restore target that says where its weights go."""
    graph, state = nnx.split(Llama(c, mesh))
    return graph, with_shardings(state, mesh, shipped({"model_type": "llama"}))
