"""The rotation: random signs, then a Hadamard transform (Sylvester order), orthonormal.

Signs come first, so that a constant or strongly off-centre vector spreads over all coordinates.
"""

import math
from functools import cache

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from pallas_kernels.format import check_head_dim, check_seed


@cache
def signs(head_dim: int, seed: int) -> np.ndarray:
    """Signs of the coordinates, float32 [head_dim]: bit j of Philox's raw stream set means -1.

    The raw stream of a NumPy bit generator is fixed, so a cache means the same everywhere.
    """
    check_head_dim(head_dim)
    check_seed(seed)
    words = np.random.Philox(key=seed).random_raw(head_dim // 64)
    bits = words[:, None] >> np.arange(64, dtype=np.uint64) & np.uint64(1)
    return (1 - 2 * bits.reshape(-1).astype(np.float32)).astype(np.float32)


def rotate(x: Float[Array, "*batch head_dim"], seed: int) -> Float[Array, "*batch head_dim"]:
    """Hadamard(signs * x), float32. Raises ValueError for a head_dim that is not supported."""
    return _hadamard(x.astype(jnp.float32) * _signs_like(x, seed))


def unrotate(y: Float[Array, "*batch head_dim"], seed: int) -> Float[Array, "*batch head_dim"]:
    """The inverse of `rotate`, float32."""
    return _hadamard(y.astype(jnp.float32)) * _signs_like(y, seed)


def _signs_like(x: Array, seed: int) -> Array:
    return jnp.broadcast_to(signs(x.shape[-1], seed), x.shape)


def _hadamard(x: Array) -> Array:
    # Butterflies, not a matmul: sums in one fixed order, so that equal vectors give equal codes
    # whatever batch they come in.
    *batch, d = x.shape
    half = 1
    while half < d:
        pairs = x.reshape(*batch, d // (2 * half), 2, half)
        a, b = pairs[..., 0, :], pairs[..., 1, :]
        x = jnp.stack([a + b, a - b], axis=-2)
        half *= 2
    return x.reshape(*batch, d) * np.float32(1 / math.sqrt(d))
