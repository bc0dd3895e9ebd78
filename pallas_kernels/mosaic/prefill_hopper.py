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

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import levels, prefill_block
from pallas_kernels.mosaic.prefill_block import Barriers, Keys, Options, Tiles, tile_tokens
from pallas_kernels.mosaic.prefill_consumer import QUERIES, Inputs, Work, consume, pieces
from pallas_kernels.mosaic.prefill_tiles import PART, produce_tiles
from pallas_kernels.mosaic.tiles import rotation_matrix, smem


_CONSUMERS = 2
# Registers of a consumer's thread and of a producer's, by head_dim: 512 in all of four warpgroups,
# 504 of three; a block that asks for more waits forever.
_REGISTERS = {64: (176, 80), 128: (200, 56), 256: (216, 72)}


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
    # Which token of a tile each of its columns is: dense and packed.
    order = np.arange(tile) // PART * PART + np.tile(levels.page_rows(fmt.value_bits), tile // PART)
    columns = np.stack([np.arange(tile), order]).astype(np.float32)
    # The rotation there, into the order in which keys are decoded, and back: times root, +-1.
    root = d**0.5
    rotation = rotation_matrix(d, fmt.seed)
    rotations = np.stack([rotation.T[levels.slots(fmt.key_bits, d)], rotation]) * root
    overflowed = (cache.lengths > cache.max_len)[:, None]
    out_scale = jnp.where(overflowed, jnp.nan, units[1] / root)
    bias = None
    if soft_cap is not None and fmt.key_offset:
        grouped = q.reshape(batch, new, heads, group, d).astype(jnp.float32)
        x = jnp.einsum("bnkgd,bkd->bkgn", grouped, cache.key_offset, precision="highest")
        bias = factor * x.reshape(batch, q_heads, new)
    options = Options(fmt, group, soft_cap, sliding_window, interpret)
    tiles, barriers = prefill_block.scratch(cache, _CONSUMERS * QUERIES, _CONSUMERS)
    kernel = plgpu.kernel(
        functools.partial(_kernel, options),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Tiles first, at addresses that take no register, of which head_dim 256 leaves none.
        scratch_types=(tiles, smem((_CONSUMERS, QUERIES, d), jnp.float16), barriers),
        grid=(batch, heads, pl.cdiv(group * (new // QUERIES), _CONSUMERS)),
        grid_names=("batch", "head", "block"),
        num_threads=_CONSUMERS + len(_producers(d, 0, 1)),
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, unsafe_no_auto_barriers=True, reduction_scratch_bytes=0
        ),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    return kernel(
        Inputs(
            keys.lengths,
            keys.base,
            count,
            cache.page_table,
            units[0] * np.float32(factor / root),
            out_scale,
            levels.tables_of_lanes(fmt),
            jnp.asarray(columns),
            jnp.asarray(np.round(rotations), jnp.float16),
            jnp.arange(new, dtype=jnp.float32),
            q,
            prefill_block.sources(keys, cache),
            bias,
        )
    )


def _kernel(options: Options, given: Inputs, out, tiles: Tiles, q_s, barriers: Barriers):
    fmt, group, interpret = options.fmt, options.group, options.interpret
    batch, head, block = (lax.axis_index(name) for name in ("batch", "head", "block"))
    warpgroup = lax.axis_index("warpgroup")
    tile, d = tiles.tiles[0].shape[1:]
    # Each consumer has 64 tokens of one query head; those after the others first, as they see more.
    last_work = group * (given.q.shape[1] // QUERIES) - 1 - _CONSUMERS * block

    def work_of(consumer):
        """Its first token, and which head of the group."""
        work = jnp.maximum(last_work - consumer, 0)
        return work // group * QUERIES, lax.rem(work, group)

    def bounds():
        """The tiles that this block attends to: from its first token's oldest to its last token.

        Those from `left` to `whole` all of its tokens see as a whole. Called where it is needed:
        what is known before the branches takes registers in all of them.
        """
        first_token, last_token = work_of(_CONSUMERS - 1)[0], work_of(0)[0] + QUERIES - 1
        lengths, base, dense = given.lengths, given.base, given.sources.k.shape[2] // tile
        packed = base[batch] // tile
        ahead = lengths[batch] - base[batch]  # dense tokens before the chunk
        start = left = jnp.int32(0)
        end = packed + jnp.minimum((ahead + last_token) // tile, dense - 1) + 1
        whole = packed + (ahead + first_token + 1) // tile
        if options.sliding_window is not None:
            oldest = lengths[batch] + first_token + 1 - options.sliding_window
            start = jnp.maximum(oldest - fmt.sinks, 0) // tile
            oldest = oldest + last_token - first_token
            left = jnp.minimum((jnp.maximum(oldest - fmt.sinks, 0) + tile - 1) // tile, end)
            whole = packed  # where the sinks may be
        whole = jnp.maximum(jnp.minimum(whole, end), left)
        return Work(batch, head, start, left, whole, end, packed)

    # Before and after the keys, the places of keys take what rotates queries and results.
    used, width = pieces(d, tile)
    words = levels.load_tables(given.tables, interpret)
    sides = prefill_block.sides(fmt, words, given.sources, tiles, barriers, (batch, head), used)

    def rotation(number, first_use):
        keys = sides[0]
        for piece in range(used):
            slot = keys.free(first_use + piece)
            source = given.rotations.at[number, piece * width : (piece + 1) * width]
            plgpu.copy_gmem_to_smem(source, keys.tiles.at[slot, :width], keys.ready.at[slot])

    def produce(made):
        work = bounds()
        start, packed, end = work.start, work.packed, work.end
        if made[0].kind == "keys":
            rotation(0, jnp.int32(-used))
        produce_tiles(fmt, given.table.at[batch], (start, packed, end), made, interpret)
        if made[0].kind == "keys":
            rotation(1, end - start)

    def consumers():
        if not interpret:
            plgpu.set_max_registers(_REGISTERS[d][0], action="increase")
        token, of_group = work_of(warpgroup)
        q_head = head * group + of_group
        consume(options, given, sides, bounds(), q_head, token, q_s.at[warpgroup], out)

    def producers():
        if not interpret:
            plgpu.set_max_registers(_REGISTERS[d][1], action="decrease")
        each = [functools.partial(produce, made) for made in _producers(d, *sides)]
        lax.switch(warpgroup - _CONSUMERS, each)

    # One or the other: what producers alone need is not to take registers of the consumers.
    lax.cond(warpgroup < _CONSUMERS, consumers, producers)


def _producers(head_dim: int, *sides):
    """What each producer makes: wide vectors leave the registers of one only."""
    return [sides] if head_dim == 256 else [(side,) for side in sides]
