"""append: new tokens into the pages, the ring and the sinks of a cache, in one launch, in place.

A thread block takes the keys, or the values, of one KV head and some tiles of 64 tokens; its
warpgroups take tiles in turn. Tiles start where the packed tokens end, so that the first ones
encode what the ring holds; a tile also writes those slots of the ring that it alone has read.
Blocks for which nothing completes end at once. `encode_rows` says what a warpgroup does.

It uses no unit that only one GPU generation has: the same kernel is for Hopper and Blackwell.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int32

from pallas_kernels.cache import KVCache
from pallas_kernels.mosaic import encode_rotate, encode_rows, lanes, lanes_numpy, levels
from pallas_kernels.mosaic.config import EncodeConfig
from pallas_kernels.mosaic.encode_rows import PAD
from pallas_kernels.mosaic.encode_threads import TILE, Arrays, Place, Sizes, Threads


_SCALAR = plgpu.Layout.WG_SPLAT(())
_DTYPES = ("bfloat16", "float16", "float32")


def append(
    cache: KVCache,
    k: Float[Array, "batch new kv_heads head_dim"],
    v: Float[Array, "batch new kv_heads head_dim"],
    count: Int32[Array, " batch"],
    config: EncodeConfig | None = None,
    interpret: bool = False,
) -> KVCache:
    """The cache with new tokens, of which the first `count` are valid.

    As `KVCache.append`, which checks the arguments. Where the cache is donated nothing of it is
    copied. interpret: run on the CPU, for tests.
    """
    fmt, config = cache.fmt, config or EncodeConfig()
    if k.dtype.name not in _DTYPES or k.dtype != v.dtype:
        k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
    batch, new, heads, d = k.shape
    sizes = Sizes(fmt, heads, d, new, k.dtype.name, cache.page_table.shape[1])
    # Of up to page_size - 1 tokens that waited for a page, and the new ones.
    pages = (new + fmt.page_size - 1) // fmt.page_size
    tiles = max(-(-pages * fmt.page_size // TILE), -(-fmt.ring_slots // TILE))
    # A vector of 256 takes over 128 registers. Interpreted warpgroups would overwrite each other's
    # results.
    warpgroups = 1 if interpret else min(config.warpgroups, 2 if d == 256 else 4)
    # Few tiles are spread: they are done when the longest block is.
    rounds = max(1, min(config.tiles, batch * heads * 2 * tiles // (config.blocks * warpgroups)))
    written = {
        "recent": (cache.recent_k, cache.recent_v),
        "sink": (cache.sink_k, cache.sink_v) if fmt.sinks else (),
        "planes": (cache.k_planes, cache.v_planes),
        "scale": (cache.k_scale, cache.v_scale),
        "key_offset": cache.key_offset,
    }
    refs = jax.tree.map(jax.new_ref, written)
    flat, tree = jax.tree.flatten(refs)
    kernel = plgpu.kernel(
        functools.partial(
            _kernel,
            sizes=sizes,
            tree=tree,
            rounds=rounds,
            warpgroups=warpgroups,
            interpret=interpret,
        ),
        out_type=(),
        scratch_types=(
            plgpu.SMEM((warpgroups, max(256, 2 * d)), jnp.float32),
            plgpu.SMEM((warpgroups, TILE, d + PAD), jnp.uint8),
        ),
        grid=(batch, 2, -(-tiles // (rounds * warpgroups)), heads),
        grid_names=("batch", "kind", "tiles", "head"),
        num_threads=warpgroups,
        thread_name="warpgroup",
        compiler_params=plgpu.CompilerParams(unsafe_no_auto_barriers=True),
        interpret=plgpu.InterpretGPUParams() if interpret else None,
    )
    tables = jnp.asarray(encode_rows.tables(d, fmt.seed, (fmt.key_bits, fmt.value_bits)))
    total = cache.lengths + count
    first_page = ()
    if fmt.key_offset and new > 1:
        # Every block of keys takes the mean over these, while others write to the ring. (One new
        # token does not go to a slot of theirs.)
        first_page = (cache.recent_k[:, :, : fmt.page_size],)
    kernel(total, count, cache.page_table, tables, k, v, *first_page, *flat)
    out = jax.tree.map(jax.freeze, refs)
    return replace(
        cache,
        lengths=total,
        recent_k=out["recent"][0],
        recent_v=out["recent"][1],
        key_offset=out["key_offset"],
        k_planes=out["planes"][0],
        v_planes=out["planes"][1],
        k_scale=out["scale"][0],
        v_scale=out["scale"][1],
        **({"sink_k": out["sink"][0], "sink_v": out["sink"][1]} if fmt.sinks else {}),
    )


def _kernel(totals, counts, page_table, tables, *refs, sizes, tree, rounds, warpgroups, interpret):
    *refs, shared, codes = refs
    k, v, *first_page = refs[: -tree.num_leaves]
    refs = jax.tree.unflatten(tree, refs[-tree.num_leaves :])
    fmt = sizes.fmt
    batch, kind, group, head, warpgroup = (
        lax.axis_index(name) for name in ("batch", "kind", "tiles", "head", "warpgroup")
    )
    size = fmt.page_size
    total = totals[batch] - fmt.sinks
    length = total - counts[batch]

    def packed(x):  # whole pages before position x, less the window
        return jnp.maximum(x - fmt.window, 0) // size

    start, end = packed(length) * size, jnp.minimum(packed(total), sizes.pages_per_seq) * size
    first = group * rounds * warpgroups

    def run(step, arrays, tile, *more):
        place = (batch, head, start + tile * TILE, end, length, total)
        _inline(step, sizes, warpgroups, arrays, place, more, interpret)

    for i in range(2):
        arrays = Arrays(
            tables,
            page_table,
            (k, v)[i],
            refs["recent"][i],
            refs["sink"][i] if fmt.sinks else None,
            refs["planes"][i],
            refs["scale"][i],
        )

        @pl.when(kind == i)
        def _(i=i, arrays=arrays):
            if i == 0 and fmt.key_offset:

                @pl.when(start + first * TILE < end)
                def _():
                    is_first = (start == 0).astype(jnp.int32)
                    writes = is_first * (group == 0).astype(jnp.int32)
                    page = first_page[0] if first_page else arrays.recent
                    more = (page, refs["key_offset"], shared)
                    run(_offset, arrays, first, warpgroup, is_first, writes, *more)

            def step(j, _):
                tile = first + j * warpgroups + warpgroup

                @pl.when(start + tile * TILE < end)
                def _():
                    if i:
                        run(encode_rows.values, arrays, tile, warpgroup, codes)
                    elif fmt.key_offset:
                        run(encode_rows.keys, arrays, tile, warpgroup, shared)
                    else:
                        run(encode_rows.keys, arrays, tile)

                @pl.when(tile * TILE < fmt.ring_slots)
                def _():
                    run(encode_rows.recent, arrays, tile, tile)

                return 0

            lax.fori_loop(0, rounds, step, 0)


def _offset(threads, warpgroup, is_first, writes, *refs):
    conditions = [~threads.ops.less(x, 1) for x in (is_first, writes)]
    encode_rotate.key_offset(threads, warpgroup, *conditions, *refs)


def _inline(step, sizes, warpgroups, arrays, place, more, interpret):
    """Runs step(threads, *more) in the warpgroup; more: scalars, then references."""
    refs, tree = jax.tree.flatten((tuple(vars(arrays).values()), more[_scalars(more) :]))
    scalars = (*place, *more[: _scalars(more)])

    def run(ops, refs, scalars):
        arrays, more = jax.tree.unflatten(tree, refs)
        n = len(place)
        here, flags = Place(*scalars[:n]), scalars[n:]
        step(Threads(ops, sizes, here, Arrays(*arrays), warpgroups), *flags, *more)

    if not interpret:

        @levels.inline(arg_types=(tuple(plgpu.RefType() for _ in refs), (_SCALAR,) * len(scalars)))
        def threads(_, refs, scalars):
            run(lanes, refs, [lanes.scalar(x.registers.item()) for x in scalars])

        threads(tuple(refs), tuple(scalars))
        return

    def numpy(scalars, *values):
        values = [np.array(x) for x in values]
        with np.errstate(all="ignore"):
            run(lanes_numpy, values, [lanes_numpy.word(int(x)) for x in scalars])
        return values

    kinds = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in refs]
    out = jax.pure_callback(numpy, kinds, scalars, *(ref[...] for ref in refs))
    for ref, value in zip(refs, out, strict=True):
        ref[...] = value


def _scalars(more) -> int:
    return sum(isinstance(x, jax.Array) for x in more)
