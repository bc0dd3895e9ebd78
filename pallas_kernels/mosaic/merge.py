"""Merges the parts of decode attention: one thread block, a warpgroup, per (sequence, KV head)."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic.exact import LOWEST, TILE
from pallas_kernels.mosaic.tiles import (
    along_columns,
    full,
    load_columns,
    load_tile,
    matmul,
    rotation_matrix,
    smem,
    store_transposed,
    store_two_parts,
)


_AT_ONCE = 8  # parts on their way from memory at a time


def merge_parts(
    parts: Float[Array, "batch kv_heads splits+1 head_dim rows"],
    lse: Float[Array, "batch kv_heads splits+2 rows"],
    cache: KVCache,
    dtype,
    interpret: bool = False,
    add_offset: bool | None = None,
    matmul=matmul,
) -> tuple[Float[Array, "batch kv_heads rows head_dim"], ...]:
    """Attention over all parts, as the sum of its own: one of 16 bits, or two for float32.

    parts, lse: of `decode_hopper.attention_parts`. The pages' parts are rotated back, once.
    add_offset: whether lse ends with what the key offset adds; default as the format says.
    """
    batch, heads, _, d, rows = parts.shape
    one = jnp.dtype(dtype).itemsize == 2
    dtypes = (dtype,) if one else (jnp.bfloat16, jnp.bfloat16)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            add_offset=cache.fmt.key_offset if add_offset is None else add_offset,
            max_len=cache.max_len,
            interpret=interpret,
            matmul=matmul,
        ),
        out_type=tuple(jax.ShapeDtypeStruct((batch, heads, rows, d), x) for x in dtypes),
        scratch_types=(
            tuple(smem((TILE, d), jnp.bfloat16) for _ in range(0, d, TILE)),
            tuple(smem((rows, d), jnp.bfloat16) for _ in range(2)),
            tuple(smem((rows, d), x) for x in dtypes),
            plgpu.Barrier(num_arrivals=d // TILE),
        ),
        grid=(batch, heads),
        grid_names=("batch", "head"),
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    back = np.round(math.sqrt(d) * rotation_matrix(d, cache.fmt.seed))
    return kernel(cache.lengths, jnp.asarray(back, jnp.bfloat16), parts, lse)


def _kernel(lengths, back, parts, lse, *refs, add_offset, max_len, interpret, matmul):
    *outputs, back_s, packed_s, out_s, ready = refs
    batch, head = (lax.axis_index(name) for name in ("batch", "head"))
    splits, d, rows = parts.shape[2] - 1, *parts.shape[3:]
    for i, tile in enumerate(back_s):
        plgpu.copy_gmem_to_smem(back.at[i * TILE : (i + 1) * TILE], tile, ready)

    def load_lse(i):
        return load_columns(lse.at[batch, head, i], interpret)

    def add(splits, state):
        acc, total, shift = state
        loaded = [(load_lse(i), load_tile(parts.at[batch, head, i], interpret)) for i in splits]
        raised = functools.reduce(jnp.maximum, [x for x, _ in loaded], shift)
        down = jnp.exp2(shift - raised)
        acc, total = acc * along_columns(down, d), total * down
        for x, part in loaded:
            weight = jnp.exp2(x - raised)
            acc += part * along_columns(weight, d)
            total += weight
        return acc, total, raised

    columns = plgpu.Layout.WGMMA.reduce(0)
    state = full((d, rows), 0.0), full((rows,), 0.0, columns), full((rows,), LOWEST, columns)
    # A few at a time, whose loads then overlap.
    rounds, rest = divmod(splits, _AT_ONCE)
    state = lax.fori_loop(
        0, rounds, lambda i, x: add([i * _AT_ONCE + j for j in range(_AT_ONCE)], x), state
    )
    if rest:
        state = add(range(splits - rest, splits), state)
    acc, total, shift = state
    if add_offset:
        shift += load_lse(splits + 1)
    exact = load_lse(splits)
    largest = jnp.maximum(shift, exact)
    packed_weight, weight = jnp.exp2(shift - largest), jnp.exp2(exact - largest)
    acc, total = acc * along_columns(packed_weight, d), total * packed_weight
    # Zeros where there are no tokens at all, NaN for a sequence that overflowed.
    norm = jnp.where(lengths[batch] > max_len, jnp.float32(np.nan), jnp.float32(1))
    norm = norm / jnp.maximum(total + weight, 1e-30)
    store_two_parts(packed_s, acc * along_columns(norm * d**-0.5, d), interpret)
    plgpu.commit_smem()
    plgpu.barrier_wait(ready)
    for i, tile in enumerate(back_s):
        here = pl.ds(i * TILE, TILE)
        x = load_tile(parts.at[batch, head, splits, here], interpret)
        x = x * along_columns(weight * norm, TILE)
        for part in packed_s:
            x = matmul(tile, part, interpret, x)
        place = [ref.at[:, here] for ref in out_s]
        if len(place) == 1:
            store_transposed(place[0], x, interpret)
        else:
            store_two_parts(place, x, interpret)
    plgpu.commit_smem()
    for ref, output in zip(out_s, outputs, strict=True):
        plgpu.copy_smem_to_gmem(ref, output.at[batch, head])
    plgpu.wait_smem_to_gmem(0)
