"""Perplexity of a text under several key-value caches, read through the caches themselves."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int
from tqdm import tqdm

from examples import llama


@dataclasses.dataclass(frozen=True)
class Quality:
    perplexity: float
    kl: float  # mean KL(first cache || this cache) of the next-token distributions, in nats


def compare(
    model: llama.Llama,
    tokens: Int[np.ndarray, "windows window"],
    caches: dict[str, llama.Format],
    chunk: int,
) -> dict[str, Quality]:
    """Read every window `chunk` tokens at a time with each cache; the first is the reference.

    A chunk's queries see all earlier tokens as the cache keeps them. The windows form one batch,
    and the caches advance side by side, so that no logits need to be kept.
    """
    batch, window = tokens.shape
    state = {
        name: llama.make_caches(model.config, fmt, batch, window) for name, fmt in caches.items()
    }
    sums = {name: np.zeros(2) for name in caches}
    for start in tqdm(range(0, window, chunk), unit="chunk", leave=False, disable=None):
        new = jnp.asarray(tokens[:, start : start + chunk])
        targets = jnp.asarray(tokens[:, start + 1 : start + chunk + 1])
        reference = None
        for name in caches:
            scores, state[name] = model(new, state[name])
            scores = scores[:, : targets.shape[1]]  # the last token has no successor
            reference = scores if reference is None else reference
            sums[name] += np.asarray(losses(reference, scores, targets))
    scored = batch * (window - 1)
    return {n: Quality(float(np.exp(s[0] / scored)), s[1] / scored) for n, s in sums.items()}


@jax.jit
def losses(
    reference: Float[Array, "batch new vocab"],
    scores: Float[Array, "batch new vocab"],
    targets: Int[Array, "batch new"],
) -> Float[Array, " 2"]:
    """Sums over all tokens: -log p(target), and KL(softmax(reference) || softmax(scores))."""
    log_p, log_q = jax.nn.log_softmax(reference), jax.nn.log_softmax(scores)
    nll = -jnp.take_along_axis(log_q, targets[..., None], axis=-1).sum()
    return jnp.stack([nll, (jnp.exp(log_p) * (log_p - log_q)).sum()])
