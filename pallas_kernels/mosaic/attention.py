"""decode_attention: the kernel, and the merge of its parts."""

import math

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import decode_hopper
from pallas_kernels.mosaic.config import Config
from pallas_kernels.mosaic.merge import merge_parts


_LOG2_E = math.log2(math.e)


def decode_attention(
    q: Float[Array, "batch q_heads head_dim"],
    cache: KVCache,
    scale: float | None = None,
    config: Config | None = None,
    interpret: bool = False,
) -> Float[Array, "batch q_heads head_dim"]:
    """Attention of each sequence's newest token over the whole cache, on a Hopper GPU.

    As `pallas_kernels.decode_attention`; interpret: run on the CPU, for tests. Raises
    NotImplementedError for a page_size other than 64 and for more than 16 query heads a KV head.
    """
    fmt, config = cache.fmt, config or Config()
    batch, q_heads, d = q.shape
    heads = cache.recent_k.shape[1]
    group = q_heads // heads
    if fmt.page_size != decode_hopper.TILE:
        raise NotImplementedError(f'{fmt.page_size=}: the kernel takes pages of 64; use "xla"')
    if group > 16:
        raise NotImplementedError(f'{q_heads=} is over 16 times kv_heads={heads}; use "xla"')
    factor = float(_LOG2_E * (d**-0.5 if scale is None else scale))
    parts, lse = decode_hopper.attention_parts(_queries(q, heads), cache, factor, config, interpret)
    high, *low = merge_parts(parts, lse, cache, q.dtype, interpret)
    out = high.astype(q.dtype)
    for x in low:
        out += x.astype(q.dtype)
    return out[:, :, :group].reshape(q.shape)


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


def require_hopper(x: Array) -> None:
    """Raises NotImplementedError unless `x` is, or if it is traced will be, on a Hopper GPU."""
    if isinstance(x, Tracer):
        default = jax.config.jax_default_device
        devices = jax.devices(default) if isinstance(default, str) else [default]
        device = devices[0] or jax.local_devices()[0]
    else:
        device = min(x.devices(), key=lambda device: device.id)
    capability = getattr(device, "compute_capability", None)
    if device.platform != "gpu" or capability != "9.0":
        raise NotImplementedError(
            f"the kernel is for Hopper GPUs (compute capability 9.0), not for "
            f'{device.device_kind} ({device.platform}, {capability}); use implementation="xla"'
        )
