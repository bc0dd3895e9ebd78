"""Steps of examples/llama_tp.py: new tokens into the caches, and the token after them.

`step` is one program, for which XLA compiles every layer anew. `step_by_layers` does the same with
one program for all layers: a process that has just started answers with that after seconds.
"""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int

import pallas_kernels as pk
from examples.llama_layers import Embedding, Norm, everywhere
from examples.llama_tp import Llama, run_embedding, run_head, run_layer


@jax.jit
def draw(head: Embedding, norm: Norm, x, counts, temperature, seeds) -> Int[Array, " batch"]:
    logits = run_head(head, norm, x, counts)
    key = jax.random.fold_in(jax.random.key(seeds[0]), seeds[1])
    drawn = jax.random.categorical(key, logits / jnp.maximum(temperature, 1e-6))
    best = jnp.where(temperature > 0, drawn, logits.argmax(-1)).astype(jnp.int32)
    return everywhere(best, head.mesh)


class Programs(NamedTuple):
    """The three of a step by layers, as they are, lowered or compiled; or their arguments."""

    embedding: Any = run_embedding
    layer: Any = run_layer
    draw: Any = draw


AS_THEY_ARE = Programs()


def step_by_layers(
    model: Llama,
    caches: list[pk.KVCache],
    tokens: Int[Array | np.ndarray, "batch new"],
    counts: Int[Array | np.ndarray, " batch"],
    temperature: Float[Array | np.generic, ""],
    seeds: Int[Array | np.ndarray, " 2"],
    programs: Programs = AS_THEY_ARE,
) -> tuple[Int[Array, " batch"], list[pk.KVCache]]:
    """Reads the first `counts` of each sequence's new tokens, and draws the token after them.

    Several tokens are a chunk of the prompts, one is a step of decoding. Temperature 0 takes the
    most probable token; else the two seeds (of all draws, of this one) decide. Donates the caches.
    """
    x, caches = model.read(tokens, caches, counts, programs.embedding, programs.layer)
    head, norm = model.head, model.model.norm
    return programs.draw(head, norm, x, counts, temperature, seeds), caches


step = jax.jit(step_by_layers, donate_argnames="caches", static_argnames="programs")


def arguments(
    model: Llama, caches: Sequence[pk.KVCache], tokens, counts, temperature, seeds
) -> Programs:
    """What the programs take in such a step, a shape where the step makes it."""
    everything = NamedSharding(model.mesh, PartitionSpec())
    shape = (*tokens.shape, model.config.dim)
    x = jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=everything)
    # Not the arrays: a step donates them.
    cache = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), caches[0]
    )
    return Programs(
        (model.model.embed_tokens, tokens),
        (model.model.layers[0], x, cache, counts),
        (model.head, model.model.norm, x, counts, temperature, seeds),
    )


def lowered(arguments: Programs) -> Programs:
    pairs = zip(AS_THEY_ARE, arguments, strict=True)
    return Programs(*(program.lower(*given) for program, given in pairs))


def compiled(programs: Programs) -> Programs:
    with ThreadPoolExecutor(len(programs)) as pool:
        return Programs(*pool.map(lambda program: program.compile(), programs))
