"""decode_attention: the kernel over the packed pages, merged with sinks and ring."""

import math
from functools import cache as memoize

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float

from pallas_kernels import rotation
from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import decode_hopper
from pallas_kernels.mosaic.config import Config


_LOG2_E = math.log2(math.e)
_LOWEST = -1e30


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
    rows = q.reshape(batch, heads, group, d)
    factor = np.float32(_LOG2_E * (d**-0.5 if scale is None else scale))
    scaled = rows.astype(jnp.float32) * factor
    exact_out, exact_lse = _exact(rows, cache, factor)

    rotated = _dot("bhgd,de->bhge", scaled, rotation_matrix(d, fmt.seed))
    parts, lse = decode_hopper.packed_attention(rotated, cache, config, interpret)
    parts, lse = parts[..., :group], lse[..., :group]
    lse += _dot("bhgd,bhd->bhg", scaled, cache.key_offset)[:, :, None]
    # A split without pages has -inf, a sequence without tokens nothing else.
    largest = jnp.maximum(jnp.maximum(lse.max(axis=2), exact_lse), _LOWEST)
    weights, exact_weight = jnp.exp2(lse - largest[:, :, None]), jnp.exp2(exact_lse - largest)
    packed = _dot("bhsdg,bhsg->bhgd", parts, weights)
    out = _dot("bhge,de->bhgd", packed, rotation_matrix(d, fmt.seed))
    out += exact_out * exact_weight[..., None]
    total = weights.sum(axis=2) + exact_weight
    out /= jnp.where(total == 0, 1.0, total)[..., None]
    overflowed = (cache.lengths > cache.max_len)[:, None, None]
    return jnp.where(overflowed, jnp.nan, out.reshape(q.shape)).astype(q.dtype)


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


def _exact(
    q: Float[Array, "batch kv_heads group head_dim"], cache: KVCache, factor: np.float32
) -> tuple[Float[Array, "batch kv_heads group head_dim"], Float[Array, "batch kv_heads group"]]:
    """Softmax over sinks and ring alone: its output, and base-2 logarithm of its sum."""
    k = jnp.concatenate([cache.sink_k, cache.recent_k], axis=2)
    v = jnp.concatenate([cache.sink_v, cache.recent_v], axis=2)
    slot = jnp.arange(cache.fmt.ring_slots, dtype=jnp.int32)[None]
    packed, lengths = cache.packed_lengths[:, None], cache.lengths[:, None]
    # The only token that a slot can hold: the first one, from the end of the packed on, in it.
    token = packed + (slot - packed) % cache.fmt.ring_slots
    sink = jnp.arange(cache.fmt.sinks, dtype=jnp.int32)[None]
    valid = jnp.concatenate([sink < lengths, token < lengths - cache.fmt.sinks], axis=1)
    dtype = jnp.promote_types(q.dtype, k.dtype)  # bf16 queries go to the tensor cores as they are
    scores = _dot("bhgd,bhtd->bhgt", q.astype(dtype), k.astype(dtype)) * factor
    scores = jnp.where(valid[:, None, None], scores, _LOWEST)
    largest = scores.max(axis=-1, keepdims=True)
    p = jnp.where(valid[:, None, None], jnp.exp2(scores - largest), 0.0)
    total = p.sum(axis=-1)
    values = jnp.where(valid[:, None, :, None], v, 0).astype(dtype)
    out = _dot("bhgt,bhtd->bhgd", p.astype(dtype), values)
    out /= jnp.where(total == 0, 1.0, total)[..., None]
    return out, largest[..., 0] + jnp.log2(total)


@memoize
def rotation_matrix(head_dim: int, seed: int) -> np.ndarray:
    """The matrix of `rotation.rotate`, float32: rotate(x) = x @ matrix, unrotate its transpose."""
    hadamard = np.ones((1, 1), np.float32)
    while len(hadamard) < head_dim:
        hadamard = np.block([[hadamard, hadamard], [hadamard, -hadamard]])
    signs = rotation.signs(head_dim, seed)[:, None]
    return (signs * hadamard / math.sqrt(head_dim)).astype(np.float32)


def _dot(spec: str, a: Array, b: Array | np.ndarray) -> Array:
    return jnp.einsum(
        spec, a, b, precision=jax.lax.Precision.HIGHEST, preferred_element_type=jnp.float32
    )
