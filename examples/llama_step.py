"""Steps of examples/llama_tp.py: new tokens into the caches, and the token after them.

`step` is one program: the fastest to run, and the slowest to compile, as XLA compiles every layer
anew. `step_by_layers` does the same with one program for all layers, so that a process that has
just started reads its first prompt with that.
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
from examples.sharded_cache import make_caches


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
    return Programs(
        (model.model.embed_tokens, tokens),
        (model.model.layers[0], x, caches[0], counts),
        (model.head, model.model.norm, x, counts, temperature, seeds),
    )


def lowered(arguments: Programs) -> Programs:
    pairs = zip(AS_THEY_ARE, arguments, strict=True)
    return Programs(*(program.lower(*given) for program, given in pairs))


def compiled(programs: Programs) -> Programs:
    with ThreadPoolExecutor(len(programs)) as pool:
        return Programs(*pool.map(lambda program: program.compile(), programs))


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    fmt: pk.KVFormat,
    new_tokens: int,
    chunk: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    ends: frozenset[int] = frozenset(),
    ready: tuple[list[pk.KVCache], Programs] | None = None,
) -> list[list[int]]:
    """Continues prompts of any lengths as one batch; an answer stops before a token in `ends`.

    ready: from `prepared`, for the same arguments.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or not lengths.all():
        raise ValueError("every prompt needs at least one token")
    longest = int(lengths.max())
    chunk = min(chunk, longest)
    padded = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    caches, programs = ready or (new_caches(model, prompts, fmt, new_tokens), AS_THEY_ARE)
    warmth, token = np.float32(temperature), np.zeros(len(prompts), np.int32)
    for start in range(0, longest, chunk):
        counts = np.clip(lengths - start, 0, chunk)
        part, seeds = padded[:, start : start + chunk], np.array([seed, 0], np.int32)
        drawn, caches = step_by_layers(model, caches, part, counts, warmth, seeds, programs)
        token = np.where(counts > 0, drawn, token)
    answers: list[list[int]] = [[] for _ in prompts]
    going = np.ones(len(prompts), bool)
    for i in range(1, new_tokens + 1):
        going &= ~np.isin(token, list(ends))
        for answer, last, goes in zip(answers, token.tolist(), going, strict=True):
            answer.extend([last] if goes else [])
        if i == new_tokens or not going.any():
            break
        counts, seeds = going.astype(np.int32), np.array([seed, i], np.int32)
        drawn, caches = step(model, caches, token[:, None], counts, warmth, seeds)
        token = np.asarray(drawn)
    return answers


def prepared(
    model: Llama, prompts: Sequence[Sequence[int]], fmt: pk.KVFormat, new_tokens: int, chunk: int
) -> tuple[list[pk.KVCache], Programs]:
    """Caches and compiled programs for prompts, which need only the model's shapes."""
    caches = new_caches(model, prompts, fmt, new_tokens)
    counts = np.array([len(prompt) for prompt in prompts], np.int32)
    tokens = np.zeros((len(prompts), min(chunk, int(counts.max()))), np.int32)
    rest = (counts, np.float32(0), np.zeros(2, np.int32))
    return caches, compiled(lowered(arguments(model, caches, tokens, *rest)))


def new_caches(model: Llama, prompts, fmt: pk.KVFormat, new_tokens: int) -> list[pk.KVCache]:
    c, longest = model.config, max(map(len, prompts)) + new_tokens
    shape = (len(prompts), longest, c.kv_heads, c.head_dim)
    return make_caches(c.layers, model.mesh, fmt, *shape)
