"""Answers of a Llama on a mesh to a batch of prompts of any lengths."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

import pallas_kernels as pk
from examples import executables
from examples.llama_step import (
    AS_THEY_ARE,
    Programs,
    arguments,
    compiled,
    lowered,
    step,
    step_by_layers,
)
from examples.llama_tp import Llama
from examples.sharded_cache import make_caches


class Ready(NamedTuple):
    """All that `generate` needs for prompts but the weights."""

    caches: list[pk.KVCache]
    reading: Programs
    decoding: Callable[[], Programs]  # waits until they are compiled


def generate(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    fmt: pk.KVFormat,
    new_tokens: int,
    chunk: int = 256,
    temperature: float = 0.0,
    seed: int = 0,
    ends: frozenset[int] = frozenset(),
    ready: Ready | None = None,
) -> list[list[int]]:
    """Continues prompts of any lengths as one batch; an answer stops before a token in `ends`.

    ready: from `prepared`, for the same arguments. Without it decoding is `step`.
    """
    lengths = np.array([len(prompt) for prompt in prompts], np.int32)
    if not lengths.size or not lengths.all():
        raise ValueError("every prompt needs at least one token")
    longest = int(lengths.max())
    chunk = min(chunk, longest)
    padded = np.zeros((len(prompts), -(-longest // chunk) * chunk), np.int32)
    for row, prompt in zip(padded, prompts, strict=True):
        row[: len(prompt)] = prompt
    caches = ready.caches if ready else new_caches(model, prompts, fmt, new_tokens)
    read = partial(step_by_layers, programs=ready.reading if ready else AS_THEY_ARE)
    decode: Callable[..., Any] = step
    warmth, token = np.float32(temperature), np.zeros(len(prompts), np.int32)
    for start in range(0, longest, chunk):
        counts = np.clip(lengths - start, 0, chunk)
        part, seeds = padded[:, start : start + chunk], np.array([seed, 0], np.int32)
        drawn, caches = read(model, caches, part, counts, warmth, seeds)
        token = np.where(counts > 0, drawn, token)
    answers: list[list[int]] = [[] for _ in prompts]
    going = np.ones(len(prompts), bool)
    for i in range(1, new_tokens + 1):
        going &= ~np.isin(token, list(ends))
        for answer, last, goes in zip(answers, token.tolist(), going, strict=True):
            answer.extend([last] if goes else [])
        if i == new_tokens or not going.any():
            break
        if ready and i == 1:
            decode = partial(step_by_layers, programs=ready.decoding())
        counts, seeds = going.astype(np.int32), np.array([seed, i], np.int32)
        drawn, caches = decode(model, caches, token[:, None], counts, warmth, seeds)
        token = np.asarray(drawn)
    return answers


def prepared(
    model: Llama,
    prompts: Sequence[Sequence[int]],
    fmt: pk.KVFormat,
    new_tokens: int,
    chunk: int,
    file: Path | None = None,
) -> Ready:
    """Caches and compiled programs for prompts: with the model's shapes, before its weights.

    file: keeps the programs for the next process.
    """
    caches = new_caches(model, prompts, fmt, new_tokens)
    batch, longest = len(prompts), max(map(len, prompts))
    rest = (np.zeros(batch, np.int32), np.float32(0), np.zeros(2, np.int32))
    reading, decoding = (
        arguments(model, caches, np.zeros((batch, new), np.int32), *rest)
        for new in (min(chunk, longest), 1)
    )
    pairs, mesh = (*reading, *decoding), model.mesh
    if file and (kept := executables.load(file, pairs, mesh)):
        return Ready(caches, Programs(*kept[:3]), lambda: Programs(*kept[3:]))
    read = compiled(lowered(reading))

    def rest_compiled() -> Programs:
        decode = compiled(lowered(decoding))
        if file:
            executables.save(file, (*read, *decode), pairs, mesh)
        return decode

    pool = ThreadPoolExecutor(1)  # beside the first prompt
    later = pool.submit(rest_compiled)
    pool.shutdown(wait=False)
    return Ready(caches, read, later.result)


def new_caches(model: Llama, prompts, fmt: pk.KVFormat, new_tokens: int) -> list[pk.KVCache]:
    c, longest = model.config, max(map(len, prompts)) + new_tokens
    shape = (len(prompts), longest, c.kv_heads, c.head_dim)
    return make_caches(c.layers, model.mesh, fmt, *shape)
