"""decode_attention: the kernel, and the merge of its parts."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels import device
from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import blackwell, decode_blackwell, decode_hopper, tiles
from pallas_kernels.mosaic.config import Config
from pallas_kernels.mosaic.merge import merge_parts


type Architecture = Literal["hopper", "blackwell"]

_LOG2_E = math.log2(math.e)
# The kernel, the multiprocessors of a GPU (H100, B200), the matmul of what is small.
_KERNELS = {
    "hopper": (decode_hopper.attention_parts, 132, tiles.matmul),
    "blackwell": (decode_blackwell.attention_parts, 148, blackwell.matmul),
}


# Compiled as a whole, called from traced code or not.
@partial(
    jax.jit,
    static_argnames=("scale", "config", "interpret", "soft_cap", "sliding_window", "architecture"),
)
def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    config: Config | None = None,
    interpret: bool = False,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    architecture: Architecture = "hopper",
) -> Float[Array, "batch q_heads head_dim"]:
    """Attention of each sequence's newest token over the whole cache, on a GPU.

    As `pallas_kernels.decode_attention`; interpret: run on the CPU, for tests; architecture: of the
    GPU. Raises NotImplementedError for more than 16 query heads a KV head.
    """
    if reason := unsupported(q, cache):
        raise NotImplementedError(f'{reason}; use implementation="xla"')
    _, q_heads, d = q.shape
    heads = cache.recent_k.shape[1]
    group = q_heads // heads
    factor = float(_LOG2_E * (d**-0.5 if scale is None else scale))
    cap = None if soft_cap is None else _LOG2_E * soft_cap
    kernel, multiprocessors, matmul = _KERNELS[architecture]
    config = config or Config(blocks=4 * multiprocessors)
    parts, lse = kernel(_queries(q, heads), cache, factor, config, interpret, cap, sliding_window)
    add_offset = cache.fmt.key_offset and cap is None
    high, *low = merge_parts(parts, lse, cache, q.dtype, interpret, add_offset, matmul)
    out = high.astype(q.dtype)
    for x in low:
        out += x.astype(q.dtype)
    return out[:, :, :group].reshape(q.shape)


def unsupported(q: Array, cache: KVCache) -> str | None:
    """Why the kernel cannot attend to this cache with q [..., q_heads, head_dim]; None: it can."""
    heads = cache.recent_k.shape[1]
    if q.shape[-2] > 16 * heads:
        return f"{q.shape=} has over 16 query heads for each of kv_heads={heads}"
    return None


def _queries(q: Float[Array, "batch q_heads head_dim"], heads: int) -> tuple[Array, ...]:
    """bf16 [batch, kv_heads, rows, head_dim] whose sum is q, rows the group padded to 8s."""
    batch, q_heads, d = q.shape
    group = q_heads // heads
    q = q.reshape(batch, heads, group, d)
    q = jnp.pad(q, ((0, 0), (0, 0), (0, -group % 8), (0, 0)))
    if q.dtype == jnp.bfloat16:
        return (q,)
    q = q.astype(jnp.float32)
    high = jax.lax.reduce_precision(q, 8, 7)  # a conversion there and back may be dropped
    return high.astype(jnp.bfloat16), (q - high).astype(jnp.bfloat16)


def architecture(x: Array) -> Architecture:
    """Of the GPU that `x` is on, or if it is traced will be.

    Raises NotImplementedError unless that is a Hopper or Blackwell GPU of a data centre.
    """
    capability = device.compute_capability(x) or ""
    if capability == "9.0":
        return "hopper"
    if capability.startswith("10."):
        return "blackwell"
    kind = device.of(x)
    raise NotImplementedError(
        f"the kernels are for Hopper and Blackwell GPUs (compute capability 9.0 or 10.x), not for "
        f'{kind.device_kind} ({kind.platform}, {capability}); use implementation="xla"'
    )
