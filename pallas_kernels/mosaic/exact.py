"""What of decode attention is not compressed: queries, sinks and the ring of new tokens."""

import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.mosaic.tiles import (
    along_columns,
    along_rows,
    column,
    full,
    load_rows,
    load_transposed,
    matmul,
    store_transposed,
    store_two_parts,
)


TILE = 64  # rows of what is brought to shared memory at a time
LOWEST = -1e30


def rotate_queries(rotation, q_parts, factor, tile, arrived, q_s, interpret, matmul=matmul):
    """Writes factor * (rotation @ q) / scale as float16 to q_s; returns scale.

    rotation: bf16 [d, d] in global memory; q: the sum of its bf16 parts [rows, d] in shared memory;
    tile: bf16 [TILE, d], scratch; arrived: its barrier.
    """
    rows, d = q_s.shape
    rotated = []
    for m in range(0, d, TILE):
        plgpu.copy_gmem_to_smem(rotation.at[m : m + TILE], tile, arrived)
        plgpu.barrier_wait(arrived)
        x = None
        for part in q_parts:
            x = matmul(tile, part, interpret, x)
        rotated.append(x * factor)
        plgpu.commit_smem()  # all warps are done with the tile
    scale = jnp.float32(1e-30)
    for x in rotated:
        scale = jnp.maximum(scale, jnp.max(column(jnp.max(jnp.abs(x), axis=0))))
    for i, x in enumerate(rotated):
        slots = q_s.at[:, i * TILE : (i + 1) * TILE]
        store_transposed(slots, x * (1 / scale), interpret)
    plgpu.commit_smem()
    return scale


def products(q_parts, vector, interpret):
    """q @ vector, the vector [d] in global memory: one a query."""
    k = load_rows(vector, interpret)
    rows = q_parts[0].shape[0]
    total = 0
    for part in q_parts:
        product = load_transposed(part, interpret) * along_rows(k, rows)
        total += column(jnp.sum(product, axis=0))
    return total


def capped(s, cap):
    """cap * tanh(s / cap), to float32's accuracy, which the GPU's own tanh has not."""
    # 1 / x as a square: a reciprocal that is approximate enough to be one instruction.
    root = lax.rsqrt(jnp.exp2(s * (2 * math.log2(math.e) / cap)) + 1)
    return cap - (2 * cap) * (root * root)


def attend(
    q_parts,
    sinks,
    ring,
    length,
    packed,
    factor,
    tile,
    arrived,
    p_parts,
    interpret,
    soft_cap=None,
    oldest=None,
    matmul=matmul,
):
    """Softmax of one sequence and KV head over its sinks and its ring.

    sinks (or None), ring: (k, v), [tokens, d] in global memory; length, packed: all tokens of
    the sequence and the packed ones; p_parts: two bf16 [rows, TILE] in shared memory; soft_cap: of
    the scores times factor; oldest: position of the first token to attend to, None for all.
    Returns the output [d, rows] and the base-2 logarithm of the sum of exponentials.
    """
    rows, d = q_parts[0].shape
    slots, first = ring[0].shape[0], sinks[0].shape[0] if sinks else 0
    state = (
        full((d, rows), 0.0),
        full((rows,), 0.0, plgpu.Layout.WGMMA.reduce(0)),
        full((rows,), LOWEST, plgpu.Layout.WGMMA.reduce(0)),
    )

    def integers(value):
        return plgpu.layout_cast(jnp.full((TILE, rows), value, jnp.int32), plgpu.Layout.WGMMA)

    def sink(t, state):
        k_sinks, v_sinks = sinks
        acc, total, shift = state
        s = products(q_parts, k_sinks.at[t], interpret) * factor
        if soft_cap is not None:
            s = capped(s, soft_cap)
        raised = jnp.maximum(shift, s)
        down, p = jnp.exp2(shift - raised), jnp.exp2(s - raised)
        v = along_rows(load_rows(v_sinks.at[t], interpret), rows)
        acc = acc * along_columns(down, d) + v * along_columns(p, d)
        return acc, total * down + p, raised

    def ring_tile(i, state):
        acc, total, shift = state
        here = pl.ds(i * TILE, TILE)
        plgpu.copy_gmem_to_smem(ring[0].at[here], tile, arrived)
        plgpu.barrier_wait(arrived)
        s = None
        for part in q_parts:
            s = matmul(tile, part, interpret, s)
        # The only token that a slot can hold: the first one, from the end of the packed on, in it.
        # Up to the end of the ring that is `ahead` tokens after the end of the packed.
        slot = plgpu.broadcasted_iota(
            jnp.int32, (TILE, rows), 0, layout=plgpu.Layout.WGMMA
        ) + integers(i * TILE)
        end = lax.rem(packed, slots)
        ahead = slot - integers(end)
        ahead = jnp.where(ahead < integers(0), ahead + integers(slots), ahead)
        valid = ahead < integers(length - first - packed)
        if oldest is not None:
            valid &= ahead >= integers(oldest - first - packed)
        if slots % TILE:
            valid &= slot < integers(slots)
        s = s * factor
        if soft_cap is not None:
            s = capped(s, soft_cap)
        s = jnp.where(valid, s, full((TILE, rows), LOWEST))
        raised = jnp.maximum(shift, column(jnp.max(s, axis=0)))
        down = jnp.exp2(shift - raised)
        p = jnp.exp2(s - along_columns(raised, TILE))
        p = jnp.where(valid, p, full((TILE, rows), 0.0))
        store_two_parts(p_parts, p, interpret)
        plgpu.commit_smem()  # and all warps are done with K
        plgpu.copy_gmem_to_smem(ring[1].at[here], tile, arrived)
        plgpu.barrier_wait(arrived)
        acc = acc * along_columns(down, d)
        for part in p_parts:
            acc = matmul(tile.T, part, interpret, acc)
        plgpu.commit_smem()  # all warps are done with V
        return acc, total * down + column(jnp.sum(p, axis=0)), raised

    if sinks:
        start = 0 if oldest is None else jnp.maximum(oldest, 0)
        state = lax.fori_loop(start, jnp.minimum(length, first), sink, state)
    acc, total, shift = lax.fori_loop(0, -(-slots // TILE), ring_tile, state)
    out = acc * along_columns(1 / jnp.maximum(total, 1e-30), d)
    return out, shift + jnp.log2(total)
