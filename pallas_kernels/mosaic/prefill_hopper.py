"""Prefill attention on Hopper: one thread block for 128 queries of a sequence and KV head.

Flash attention, all of it in rotated space, over tiles of 64 or 128 tokens: first the packed ones,
then the others, which `prefill` rotates. Four warpgroups share the work (three for head_dim 256,
which leaves no registers for a second producer):

    producers  codes (TMA) -> registers -> float16 K, or V, in shared memory; dense tiles: TMA only
    consumers  64 queries each, which they rotate: S = q K^T, online softmax, O += P V, where P
               never leaves the registers; at the end they rotate O back

The scales of the vectors are multiplied in by the producers, half an instruction an element. A
consumer's softmax of one tile runs while the tensor cores add the tile before to O, as in
FlashAttention-3 (arXiv:2407.08608, section 3.2); making the consumers take turns was slower.
"""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Float16, Int32

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import levels
from pallas_kernels.mosaic.exact import LOWEST, capped
from pallas_kernels.mosaic.prefill_tiles import both_sides, produce_tiles
from pallas_kernels.mosaic.tiles import (
    along_columns,
    along_rows,
    full,
    load_columns,
    load_rows,
    load_tile,
    matmul,
    rotation_matrix,
    smem,
    store_result,
    two_products,
    warp_any,
)
from pallas_kernels.packing import plane_bits


_PART = 64  # rows of a wgmma, tokens of a part of a tile
_CONSUMERS = 2
ROWS = _CONSUMERS * _PART  # queries of a block
# How far a score, to the base 2, may lie over the one that exponentials are taken relative to.
_SLACK = 8.0
_SHARED_MEMORY = 226 * 1024
# Registers of a consumer's thread and of a producer's, by head_dim; 504 or 512 in all.
_REGISTERS = {64: (176, 80), 128: (200, 56), 256: (216, 72)}


def tile_tokens(head_dim: int) -> int:
    """Tokens that are attended to at once."""
    return 64 if head_dim == 256 else 128


@dataclass(frozen=True)
class Keys:
    """What is attended to: the cache's packed tokens up to a multiple of a tile, then dense ones.

    Dense token j is the sequence's token j if j < sinks, else token base + j, where base is how
    many packed tokens come before. k_scale, v_scale: of the packed tokens, in the order in which
    `levels.page_rows` and `levels.slots` leave a part of a tile.
    """

    k: Float16[Array, "batch kv_heads dense head_dim"]
    v: Float16[Array, "batch kv_heads head_dim dense"]
    k_scale: Float16[Array, "batch kv_heads packed"]
    v_scale: Float16[Array, "batch kv_heads packed"]
    base: Int32[Array, " batch"]
    lengths: Int32[Array, " batch"]


def attention(
    q: Float[Array, "batch new q_heads head_dim"],
    keys: Keys,
    units: tuple[Float[Array, "batch kv_heads"], Float[Array, "batch kv_heads"]],
    cache: KVCache,
    count: Int32[Array, " batch"],
    factor: float,
    soft_cap: float | None = None,
    sliding_window: int | None = None,
    interpret: bool = False,
) -> Float[Array, "batch new q_heads head_dim"]:
    """Attention of new tokens, a multiple of 64, of which the first `count` exist.

    units: what 1 stands for in keys.k and in keys.v; factor: log2(e) times the scale of the scores;
    soft_cap: in units of factor * scores. Zeros for tokens that do not exist.
    """
    fmt = cache.fmt
    batch, new, q_heads, d = q.shape
    heads = cache.recent_k.shape[1]
    group = q_heads // heads
    tile = tile_tokens(d)
    planes = [x.reshape(*x.shape[:2], -1, 128) for x in (*cache.k_planes, *cache.v_planes)]
    pages = max(1, tile // fmt.page_size)
    parts = max(1, fmt.page_size // tile)  # tiles that a page is cut into
    counts = [len(plane_bits(bits)) for bits in (fmt.key_bits, fmt.value_bits)]
    key_planes = counts[0]
    lines = [x.shape[2] * pages for x in planes]
    lines = [n // parts if i < key_planes else n for i, n in enumerate(lines)]
    stages, code_stages = _stages(d, tile, 128 * sum(lines) + 4 * tile)
    # Which token of a tile each of its columns is: dense and packed.
    order = np.arange(tile) // _PART * _PART + np.tile(
        levels.page_rows(fmt.value_bits), tile // _PART
    )
    columns = np.stack([np.arange(tile), order]).astype(np.float32)
    tables = np.concatenate([levels.tables(fmt.key_bits), levels.tables(fmt.value_bits)])
    # The rotation there, into the order in which keys are decoded, and back: times root, +-1.
    root = d**0.5
    rotation = rotation_matrix(d, fmt.seed)
    rotations = np.stack([rotation.T[levels.slots(fmt.key_bits, d)], rotation]) * root
    overflowed = (cache.lengths > cache.max_len)[:, None]
    out_scale = jnp.where(overflowed, jnp.nan, units[1] / root)
    bias = []
    if soft_cap is not None and fmt.key_offset:
        grouped = q.reshape(batch, new, heads, group, d).astype(jnp.float32)
        x = jnp.einsum("bnkgd,bkd->bkgn", grouped, cache.key_offset, precision="highest")
        bias = [factor * x.reshape(batch, q_heads, new)]
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            fmt=fmt,
            group=group,
            bias=bool(bias),
            stages=stages,
            code_stages=code_stages,
            soft_cap=soft_cap,
            sliding_window=sliding_window,
            interpret=interpret,
        ),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=(
            smem((_CONSUMERS, _PART, d), jnp.float16),
            smem((stages, tile, d), jnp.float16),
            smem((stages, d, tile), jnp.float16),
            tuple(plgpu.SMEM((code_stages, n, 128), jnp.uint8) for n in lines),
            tuple(plgpu.SMEM((code_stages, tile), jnp.float16) for _ in range(2)),
            *(plgpu.Barrier(num_arrivals=pages * n + 1, num_barriers=code_stages) for n in counts),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=_CONSUMERS, num_barriers=stages),
        ),
        grid=(batch, heads, pl.cdiv(group * (new // _PART), _CONSUMERS)),
        grid_names=("batch", "head", "block"),
        num_threads=_CONSUMERS + len(_producers(d, 0, 1)),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return kernel(
        keys.lengths,
        keys.base,
        count,
        cache.page_table,
        units[0] * np.float32(factor / root),
        out_scale,
        jnp.asarray(tables),
        jnp.asarray(columns),
        jnp.asarray(np.round(rotations), jnp.float16),
        jnp.arange(new, dtype=jnp.float32),
        q,
        keys.k,
        keys.v,
        keys.k_scale,
        keys.v_scale,
        *planes,
        *bias,
    )


def _stages(d: int, tile: int, code_bytes: int) -> tuple[int, int]:
    """Tiles, and tiles of codes, that fit into shared memory."""
    for stages, code_stages in ((2, 2), (2, 1), (1, 1)):
        if 2 * ROWS * d + 4 * stages * tile * d + code_stages * code_bytes <= _SHARED_MEMORY:
            return stages, code_stages
    raise NotImplementedError(f'a tile of {code_bytes} bytes of codes does not fit; use "xla"')


def _kernel(
    lengths,
    base,
    count,
    table,
    q_scale,
    out_scale,
    tables,
    columns,
    rotations,
    place,
    q,
    k,
    v,
    k_scale,
    v_scale,
    *refs,
    fmt,
    group,
    bias,
    stages,
    code_stages,
    soft_cap,
    sliding_window,
    interpret,
):
    number = len(plane_bits(fmt.key_bits)) + len(plane_bits(fmt.value_bits))
    planes, refs = refs[:number], refs[number:]
    biases, (out, q_s, k_s, v_s, codes, scales, *barriers) = refs[:bias], refs[bias:]
    *codes_ready, k_ready, v_ready, k_read, v_read = barriers
    batch, head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    warpgroup = lax.axis_index("warpgroup")
    tile, d = k_s.shape[1:]
    # Each consumer has 64 tokens of one query head; those after the others first, as they see more.
    last_work = group * (q.shape[1] // _PART) - 1 - _CONSUMERS * block

    def work_of(consumer):
        """Its first token, and which head of the group."""
        work = jnp.maximum(last_work - consumer, 0)
        return work // group * _PART, lax.rem(work, group)

    first_token, last_token = work_of(_CONSUMERS - 1)[0], work_of(0)[0] + _PART - 1

    # The tiles that this block attends to: from its first token's oldest to its last token. Those
    # from `left` to `whole` all of its tokens see as a whole.
    packed = base[batch] // tile
    ahead = lengths[batch] - base[batch]  # dense tokens before the chunk
    start = left = jnp.int32(0)
    end = packed + jnp.minimum((ahead + last_token) // tile, k.shape[2] // tile - 1) + 1
    whole = packed + (ahead + first_token + 1) // tile
    if sliding_window is not None:
        oldest = lengths[batch] + first_token + 1 - sliding_window
        start = jnp.maximum(oldest - fmt.sinks, 0) // tile
        oldest = oldest + last_token - first_token
        left = jnp.minimum((jnp.maximum(oldest - fmt.sinks, 0) + tile - 1) // tile, end)
        whole = packed  # where the sinks may be
    whole = jnp.maximum(jnp.minimum(whole, end), left)
    # Before and after the keys, the places of keys take what rotates queries and results.
    pieces, width = max(1, d // tile), min(d, tile)

    sides = both_sides(
        fmt,
        tables,
        [plane.at[:, head] for plane in planes],
        codes,
        (k_scale.at[batch, head], v_scale.at[batch, head]),
        (k.at[batch, head], v.at[batch, head]),
        scales,
        codes_ready,
        (k_s, v_s),
        (k_ready, v_ready),
        (k_read, v_read),
        used=pieces,
    )

    def rotation(number, first_use):
        for piece in range(pieces):
            slot = sides[0].free(first_use + piece)
            source = rotations.at[number, piece * width : (piece + 1) * width]
            plgpu.copy_gmem_to_smem(source, k_s.at[slot, :width], k_ready.at[slot])

    def produce(made):
        if made[0].kind == "keys":
            rotation(0, jnp.int32(-pieces))
        produce_tiles(fmt, table.at[batch], (start, packed, end), made, interpret)
        if made[0].kind == "keys":
            rotation(1, end - start)

    def consume():
        token, of_group = work_of(warpgroup)
        here, q_head, q_here = pl.ds(token, _PART), head * group + of_group, q_s.at[warpgroup]
        bias = [load_rows(x.at[batch, q_head, here], interpret) for x in biases]
        place_here = load_rows(place.at[here], interpret)
        position = place_here + lengths[batch].astype(jnp.float32)

        def rotated(parts, use, store):
            """Hands `store` the columns of the sum of parts, rotated, a few at a time."""
            for piece in range(pieces):
                slot = lax.rem(use + piece, stages)
                plgpu.barrier_wait(k_ready.at[slot])
                x = None
                for part in parts:
                    x = matmul(part, k_s.at[slot, :width], interpret, x)
                plgpu.barrier_arrive(k_read.at[slot])
                store(slice(piece * width, (piece + 1) * width), x)

        x = load_tile(q.at[batch, here, q_head], interpret)
        unit = jnp.max(jnp.abs(x.astype(jnp.float32)), axis=1)
        unit = jnp.where(unit == 0, 1.0, unit)
        if not interpret:  # x is not to wait in float32
            x, unit = lax.optimization_barrier((x, unit))
        x = x.astype(jnp.float32) * along_rows(1 / unit, d)
        parts = [x.astype(jnp.float16)]
        if jnp.dtype(q.dtype).itemsize > 2:
            parts.append((x - parts[0].astype(jnp.float32)).astype(jnp.float16))

        def store_q(columns, x):
            q_here.at[:, columns][...] = x.astype(jnp.float16)

        rotated(parts, jnp.int32(0), store_q)
        plgpu.commit_smem()
        scale = unit * q_scale[batch, head]

        def visible(i):
            """Which tokens of tile i each query attends to, bool [queries, tokens]."""
            is_packed = (i < packed).astype(jnp.int32)
            token = load_columns(columns.at[is_packed], interpret)
            token += (i * tile + fmt.sinks * is_packed).astype(jnp.float32)
            if sliding_window is not None and fmt.sinks:
                after = token - base[batch].astype(jnp.float32)
                sink = (after < fmt.sinks) & (is_packed == 0)
                token = jnp.where(sink, after, token)
            tokens = along_columns(token, _PART)
            seen = tokens <= along_rows(position, tile)
            if sliding_window is not None:
                seen &= tokens > along_rows(position - sliding_window, tile)
            return seen

        def softmax(i, s, total, shift, masked):
            """p of tile i, total and shift with it, and what moves earlier results to that shift.

            By as much as `down`, a row, and not at all where `over` is 0.
            """
            plain = not masked and soft_cap is None
            if plain:  # scaled below, in the same instruction that subtracts the shift
                top = jnp.max(s, axis=1) * scale
            else:
                s = s * along_rows(scale, tile)
                if bias:
                    s = s + along_rows(bias[0], tile)
                if soft_cap is not None:
                    s = capped(s, soft_cap)
                if masked:
                    s = jnp.where(visible(i), s, full((_PART, tile), LOWEST))
                top = jnp.max(s, axis=1)

            def adapt(total, shift):
                raised = jnp.maximum(shift, top)
                down = jnp.exp2(shift - raised)
                return total * down, raised, down

            over = warp_any(top - shift, _SLACK, interpret)
            total, shift, down = lax.cond(
                over != 0, adapt, lambda *x: (*x, full((_PART,), 1.0, by_row)), total, shift
            )
            if plain:
                s = s * along_rows(scale, tile)
            p = jnp.exp2(s - along_rows(shift, tile))
            total = total + jnp.sum(p, axis=1)
            return p, total, shift, down, over

        def step(i, state, masked):
            acc, total, shift, p = state
            slot = lax.rem(i - start + pieces, stages)
            before = lax.rem(jnp.maximum(i - 1, start) - start, stages)
            plgpu.barrier_wait(k_ready.at[slot])

            def weigh(s):
                plgpu.barrier_arrive(k_read.at[slot])
                return softmax(i, s, total, shift, masked)

            def wait_for_values():
                @pl.when(i > start)
                def _():
                    plgpu.barrier_wait(v_ready.at[lax.rem(i - start, stages)])

            def values_read():
                @pl.when(i > start)
                def _():
                    plgpu.barrier_arrive(v_read.at[before])

            # The softmax of this tile goes on beside the product of the one before with V. (Waiting
            # for V between the two keeps ptxas from moving the softmax behind both products.)
            acc, p, total, shift, down, over = two_products(
                (q_here, k_s.at[slot]),
                (p, v_s.at[before], acc),
                weigh,
                wait_for_values,
                values_read,
                at_once=not masked and d < 256,  # the others have no register left
                interpret=interpret,
            )
            acc = lax.cond(over != 0, lambda x: x * along_rows(down, d), lambda x: x, acc)
            return acc, total, shift, p.astype(jnp.float16)

        by_row = plgpu.Layout.WGMMA.reduce(1)
        state = (
            full((_PART, d), 0.0),
            full((_PART,), 0.0, by_row),
            full((_PART,), LOWEST, by_row),
            full((_PART, tile), 0.0).astype(jnp.float16),  # times the first V, which is finite
        )
        plgpu.barrier_wait(v_ready.at[0])
        masked, unmasked = (functools.partial(step, masked=x) for x in (True, False))
        if not interpret:  # or ptxas keeps two of each, the known zeros and what they become
            state = lax.optimization_barrier(state)
        if sliding_window is not None:
            state = lax.fori_loop(start, left, masked, state)
        state = lax.fori_loop(left, whole, unmasked, state)
        state = lax.fori_loop(whole, end, masked, state)
        acc, total, _, p = state
        slot = lax.rem(end - 1 - start, stages)
        acc = matmul(p, v_s.at[slot], interpret, acc)
        plgpu.barrier_arrive(v_read.at[slot])
        exists = along_rows(place_here, width) < full(
            (_PART, width), count[batch].astype(jnp.float32)
        )

        def store_out(columns, x):
            x = x * out_scale[batch, head]
            x = jnp.where(exists, x, full((_PART, width), 0.0))
            to = out.at[batch, here, q_head, columns]
            store_result(to, x.astype(out.dtype), interpret)

        result = (acc * along_rows(1 / total, d)).astype(jnp.float16)
        rotated([result], end - start + pieces, store_out)

    @pl.when(warpgroup < _CONSUMERS)
    def _():
        if not interpret:
            plgpu.set_max_registers(_REGISTERS[d][0], action="increase")
        consume()

    for number, made in enumerate(_producers(d, *sides)):

        @pl.when(warpgroup == _CONSUMERS + number)
        def _(made=made):
            if not interpret:
                plgpu.set_max_registers(_REGISTERS[d][1], action="decrease")
            produce(made)


def _producers(head_dim: int, *sides):
    """What each producer makes: wide vectors leave the registers of one only."""
    return [sides] if head_dim == 256 else [(side,) for side in sides]
