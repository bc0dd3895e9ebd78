"""KVCache: packed pages of keys and values, bf16 sinks, and a bf16 ring of the newest tokens."""

from dataclasses import dataclass, field, replace
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, BFloat16, Float, Int32, UInt8

from pallas_kernels import device, packing
from pallas_kernels.codec import encode, levels
from pallas_kernels.format import KVFormat, check_head_dim
from pallas_kernels.rotation import unrotate


type Planes = tuple[UInt8[Array, "pages kv_heads _ _"], ...]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of `batch` sequences in one layer. Immutable; donate it to update in place.

    Invariants, for a sequence of n tokens, t being a token's position:
    - t < sinks: slot t of sink_k, sink_v (bf16).
    - sinks <= t < sinks + fmt.packed(n): position s = t - sinks lies in page
      page_table[b, s // page_size] at offset s % page_size. Keys are packed along head_dim, values
      are stored channel by channel and packed along the page's tokens (planes: see `packing`);
      k_scale, v_scale are per vector. A key is stored without key_offset, the mean over the keys
      of the sequence's first page (zero until that page is packed, or without fmt.key_offset).
    - later t: slot (t - sinks) % fmt.ring_slots of recent_k, recent_v (bf16).
    So what is stored depends on the tokens alone, not on how they were appended. Anything else
    in the arrays is meaningless. lengths > max_len, which only a traced append can cause, marks
    a sequence that overflowed: attention over it gives NaN.
    """

    fmt: KVFormat = field(metadata={"static": True})
    max_len: int = field(metadata={"static": True})
    lengths: Int32[Array, " batch"]
    sink_k: BFloat16[Array, "batch kv_heads sinks head_dim"]
    sink_v: BFloat16[Array, "batch kv_heads sinks head_dim"]
    recent_k: BFloat16[Array, "batch kv_heads ring_slots head_dim"]
    recent_v: BFloat16[Array, "batch kv_heads ring_slots head_dim"]
    key_offset: Float[Array, "batch kv_heads head_dim"]
    page_table: Int32[Array, "batch pages_per_seq"]
    k_planes: Planes  # [pages, kv_heads, page_size, head_dim * plane_bits / 8]
    v_planes: Planes  # [pages, kv_heads, head_dim, page_size * plane_bits / 8]
    k_scale: BFloat16[Array, "pages kv_heads page_size"]
    v_scale: BFloat16[Array, "pages kv_heads page_size"]

    @classmethod
    def create(
        cls,
        fmt: KVFormat,
        batch: int,
        max_len: int,
        kv_heads: int,
        head_dim: int,
        *,
        page_table: Int32[Array, "batch pages_per_seq"] | None = None,
        num_pages: int | None = None,
    ) -> "KVCache":
        """An empty cache for up to `max_len` tokens a sequence.

        page_table: the pages of each sequence, [batch, pages_per_seq]; by default sequence b owns
        pages b * pages_per_seq onwards. num_pages: size of the page pool, by default just enough.
        Raises ValueError for sizes that cannot be, or a table with pages outside the pool.
        """
        check_head_dim(head_dim)
        for name, size in {"batch": batch, "max_len": max_len, "kv_heads": kv_heads}.items():
            if size < 1:
                raise ValueError(f"{name}={size} is not positive")
        # One page at least: kernels then need no case for an empty pool.
        pages_per_seq = max(1, fmt.packed(max_len) // fmt.page_size)
        if page_table is None:
            table = np.arange(batch * pages_per_seq, dtype=np.int32).reshape(batch, pages_per_seq)
        else:
            table = np.asarray(page_table, np.int32)
        if table.shape != (batch, pages_per_seq):
            raise ValueError(f"page_table has shape {table.shape}, not {(batch, pages_per_seq)}")
        pages = int(table.max()) + 1 if num_pages is None else num_pages
        if table.min() < 0 or table.max() >= pages:
            raise ValueError(
                f"page_table names pages {table.min()} to {table.max()} of a pool of {pages}; "
                f"pass num_pages={table.max() + 1} or more, and no negative page"
            )
        size, heads = fmt.page_size, (batch, kv_heads)

        def planes(bits: int, rows: int, n: int) -> Planes:
            return tuple(
                jnp.zeros((pages, kv_heads, rows, n * width // 8), jnp.uint8)
                for width in packing.plane_bits(bits)
            )

        def bf16(*shape: int) -> Array:
            return jnp.zeros(shape, jnp.bfloat16)

        return cls(
            fmt=fmt,
            max_len=max_len,
            lengths=jnp.zeros(batch, jnp.int32),
            sink_k=bf16(*heads, fmt.sinks, head_dim),
            sink_v=bf16(*heads, fmt.sinks, head_dim),
            recent_k=bf16(*heads, fmt.ring_slots, head_dim),
            recent_v=bf16(*heads, fmt.ring_slots, head_dim),
            key_offset=jnp.zeros((*heads, head_dim), jnp.float32),
            page_table=jnp.asarray(table),
            k_planes=planes(fmt.key_bits, size, head_dim),
            v_planes=planes(fmt.value_bits, head_dim, size),
            k_scale=bf16(pages, kv_heads, size),
            v_scale=bf16(pages, kv_heads, size),
        )

    @property
    def head_dim(self) -> int:
        return self.recent_k.shape[-1]

    @property
    def packed_lengths(self) -> Int32[Array, " batch"]:
        """Packed tokens of each sequence."""
        return self.fmt.packed(self.lengths)

    @property
    def bytes_per_token(self) -> float:
        """Bytes of one packed token over all kv_heads: codes and scales, K and V."""
        pages = (*self.k_planes, *self.v_planes, self.k_scale, self.v_scale)
        return sum(x.nbytes for x in pages) / (self.k_scale.shape[0] * self.fmt.page_size)

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays of the cache."""
        return sum(x.nbytes for x in jax.tree.leaves(self))

    def append(
        self,
        k: Float[Array, "batch new kv_heads head_dim"],
        v: Float[Array, "batch new kv_heads head_dim"],
        lengths: Int32[Array, " batch"] | None = None,
        implementation: Literal["xla", "mosaic_gpu"] | None = None,
    ) -> "KVCache":
        """The cache with new tokens at the end of each sequence (keys after RoPE).

        lengths: how many of the `new` tokens are valid, from the front; default all.
        implementation: "mosaic_gpu" is one kernel for Hopper and Blackwell GPUs (compiled for
        Blackwell, not yet run there), "xla" runs everywhere; None is the kernel on Hopper, else
        "xla". They differ where float32's rounding decides: between two levels that are as near,
        and in the last place of a scale or a key offset.
        Raises ValueError for shapes or dtypes that do not fit, and for more than max_len tokens;
        where lengths are traced that last error cannot be raised: see the class's invariants.
        Raises NotImplementedError for "mosaic_gpu" on another device.
        """
        self.check_new(k, v)
        if implementation not in (None, "xla", "mosaic_gpu"):
            raise ValueError(f'{implementation=} is not "xla", "mosaic_gpu" or None')
        batch, new = k.shape[:2]
        count = jnp.full(batch, new, jnp.int32) if lengths is None else valid_counts(lengths, k)
        total = self.lengths + count
        self._check_room(total)
        if implementation == "mosaic_gpu":
            self._require_kernel()
            return self._append_kernel(k, v, count)
        if implementation == "xla" or device.compute_capability(self.lengths) != "9.0":
            return self._append(k, v, count)
        if device.traced(self, k, v, count):
            return jax.lax.platform_dependent(
                self, k, v, count, cuda=KVCache._append_kernel, default=KVCache._append
            )
        return self._append_kernel(k, v, count)

    def dequantize(
        self,
    ) -> tuple[
        Float[Array, "batch max_len kv_heads head_dim"],
        Float[Array, "batch max_len kv_heads head_dim"],
    ]:
        """K and V as attention sees them, float32, zeros beyond each length. For tests: large."""
        return self._dequantize()

    @jax.jit
    def _dequantize(self) -> tuple[Array, Array]:
        fmt = self.fmt
        k = levels(tuple(plane[self.page_table] for plane in self.k_planes), fmt.key_bits)
        v = levels(tuple(plane[self.page_table] for plane in self.v_planes), fmt.value_bits)
        k = self._packed_tokens(k, self.k_scale, self.key_offset)
        v = self._packed_tokens(v.swapaxes(-1, -2), self.v_scale, jnp.zeros_like(self.key_offset))
        return (
            self._all_tokens(k, self.sink_k, self.recent_k),
            self._all_tokens(v, self.sink_v, self.recent_v),
        )

    # Compiled as a whole also when called from code that is not traced.
    @jax.jit
    def _append(self, k: Array, v: Array, count: Array) -> "KVCache":
        total = self.lengths + count
        k, v = k.astype(jnp.bfloat16), v.astype(jnp.bfloat16)
        return replace(
            self._pack_pages(k, v, total),
            lengths=total,
            **self._write_sinks(k, v, total),
            **self._write_ring(k, v, total),
        )

    @jax.jit
    def _append_kernel(self, k: Array, v: Array, count: Array) -> "KVCache":
        from pallas_kernels.mosaic.encode import append  # only here: it takes a second to import

        return append(self, k, v, count)

    def _packed_tokens(self, rotated: Array, pool: Array, offset: Array) -> Array:
        """[batch, pages, kv_heads, page_size, head_dim] -> [batch, tokens, kv_heads, head_dim]."""
        scale = pool[self.page_table][..., None].astype(jnp.float32)
        x = unrotate(rotated, self.fmt.seed) * scale + offset[:, None, :, None]
        return x.swapaxes(2, 3).reshape(x.shape[0], -1, x.shape[2], x.shape[4])

    def _all_tokens(self, packed: Array, sink: Array, recent: Array) -> Array:
        """Every position from where its token lies, [batch, max_len, kv_heads, head_dim]."""
        t = jnp.arange(self.max_len, dtype=jnp.int32)[None]
        s = t - self.fmt.sinks

        def take(x, slots):
            slots = jnp.broadcast_to(slots, (x.shape[0], self.max_len))[..., None, None]
            return jnp.take_along_axis(x, slots, axis=1, mode="clip").astype(jnp.float32)

        def where(condition, x, y):
            condition = jnp.broadcast_to(condition, x.shape[:2])[..., None, None]
            return jnp.where(condition, x, y)

        x = take(recent.swapaxes(1, 2), s % self.fmt.ring_slots)
        x = where(s < self.packed_lengths[:, None], take(packed, s), x)
        if self.fmt.sinks:
            x = where(s < 0, take(sink.swapaxes(1, 2), t), x)
        return where(t < self.lengths[:, None], x, 0.0)

    def _write_sinks(self, k: Array, v: Array, total: Array) -> dict[str, Array]:
        if self.fmt.sinks == 0:
            return {}
        t = self._positions(k)
        slot = jnp.where(t < total[:, None], t, self.fmt.sinks)
        return {"sink_k": _put(self.sink_k, slot, k), "sink_v": _put(self.sink_v, slot, v)}

    def _write_ring(self, k: Array, v: Array, total: Array) -> dict[str, Array]:
        slots = self.fmt.ring_slots
        t = self._positions(k)
        end = total[:, None]
        # Of many new tokens the ring keeps the last, each in a slot of its own.
        kept = (t >= self.fmt.sinks) & (t < end) & (t >= end - slots)
        slot = jnp.where(kept, (t - self.fmt.sinks) % slots, slots)
        return {"recent_k": _put(self.recent_k, slot, k), "recent_v": _put(self.recent_v, slot, v)}

    def _positions(self, new: Array) -> Int32[Array, "batch new"]:
        return self.lengths[:, None] + jnp.arange(new.shape[1], dtype=jnp.int32)[None]

    def _pack_pages(self, k: Array, v: Array, total: Array) -> "KVCache":
        """Packs every page that the new length completes, from the old ring and the new tokens."""
        fmt, size = self.fmt, self.fmt.page_size
        first, end = self.packed_lengths // size, fmt.packed(total) // size
        fields = ("key_offset", "k_planes", "v_planes", "k_scale", "v_scale")

        def pack_page(i, state):
            offset, k_planes, v_planes, k_scale, v_scale = state
            page = first + i
            active = page < end
            t = page[:, None] * size + jnp.arange(size, dtype=jnp.int32)[None] + fmt.sinks
            keys = self._tokens(t, self.recent_k, k)
            if fmt.key_offset:
                is_first = (active & (page == 0))[:, None, None]
                offset = jnp.where(is_first, jnp.mean(keys, axis=2), offset)
                keys = keys - offset[:, :, None, :]
            k_codes, k_new = encode(keys, fmt.key_bits, fmt.seed, fmt.scale_mode)
            values = self._tokens(t, self.recent_v, v)
            v_codes, v_new = encode(values, fmt.value_bits, fmt.seed, fmt.scale_mode)
            k_bytes = packing.pack(k_codes, fmt.key_bits)
            v_bytes = packing.pack(v_codes.swapaxes(-1, -2), fmt.value_bits)

            # A page outside the pool is a write that does not happen.
            nowhere = k_scale.shape[0]
            slot = jnp.minimum(page, self.page_table.shape[1] - 1)[:, None]
            ids = jnp.take_along_axis(self.page_table, slot, axis=1)[:, 0]
            ids = jnp.where(active & (page < self.page_table.shape[1]), ids, nowhere)

            def put(pool, new):
                return pool.at[ids].set(new, mode="drop")

            k_planes = tuple(map(put, k_planes, k_bytes))
            v_planes = tuple(map(put, v_planes, v_bytes))
            return offset, k_planes, v_planes, put(k_scale, k_new), put(v_scale, v_new)

        # A loop rather than a condition: its state is updated in place, it does nothing for most
        # single tokens, and every page is encoded by the same program however tokens arrive.
        state = tuple(getattr(self, name) for name in fields)
        state = jax.lax.fori_loop(0, jnp.max(end - first), pack_page, state)
        return replace(self, **dict(zip(fields, state, strict=True)))

    def _tokens(self, t: Array, ring: Array, new: Array) -> Float[Array, "batch kv_heads t d"]:
        """Tokens at positions t [batch, page_size], out of the old ring or the new ones."""
        slot = (t - self.fmt.sinks) % self.fmt.ring_slots
        old = jnp.take_along_axis(ring, slot[:, None, :, None], axis=2)
        i = jnp.clip(t - self.lengths[:, None], 0, new.shape[1] - 1)
        fresh = jnp.take_along_axis(new, i[:, :, None, None], axis=1).swapaxes(1, 2)
        is_old = (t < self.lengths[:, None])[:, None, :, None]
        return jnp.where(is_old, old, fresh).astype(jnp.float32)

    def check_new(self, k: Array, v: Array) -> None:
        batch, kv_heads, _, head_dim = self.recent_k.shape
        if k.ndim != 4 or (k.shape[0], *k.shape[2:]) != (batch, kv_heads, head_dim):
            raise ValueError(f"{k.shape=} is not [{batch=}, new, {kv_heads=}, {head_dim=}]")
        if v.shape != k.shape:
            raise ValueError(f"{v.shape=} differs from {k.shape=}")
        if k.shape[1] == 0:
            raise ValueError(f"{k.shape=} holds no new token")
        for name, x in {"k": k, "v": v}.items():
            if not jnp.issubdtype(x.dtype, jnp.floating):
                raise ValueError(f"{name}.dtype={x.dtype} is not a floating-point type")

    def _require_kernel(self) -> None:
        capability = device.compute_capability(self.lengths)
        if capability is None or capability.split(".")[0] not in ("9", "10"):
            kind = device.of(self.lengths).device_kind
            raise NotImplementedError(
                f"the kernel is for Hopper and Blackwell GPUs (compute capability 9.0, 10.x), not "
                f'for {kind} ({capability}); use implementation="xla" or None'
            )

    def _check_room(self, total: Array) -> None:
        if not isinstance(total, Tracer) and (needed := int(total.max())) > self.max_len:
            raise ValueError(
                f"the append needs {needed} tokens, but {self.max_len=}; "
                f"create the cache with a larger max_len"
            )


def valid_counts(lengths: Int32[Array, " batch"], new: Array) -> Int32[Array, " batch"]:
    """`lengths` checked against new tokens [batch, new, ...]; traced values are clipped."""
    batch, most = new.shape[:2]
    lengths = jnp.asarray(lengths)
    if lengths.shape != (batch,) or not jnp.issubdtype(lengths.dtype, jnp.integer):
        raise ValueError(f"{lengths.shape=} {lengths.dtype=} is not an integer array [{batch=}]")
    if not isinstance(lengths, Tracer) and not bool(((lengths >= 0) & (lengths <= most)).all()):
        raise ValueError(f"{lengths=} are not all in [0, {most}], the number of new tokens")
    return jnp.clip(lengths, 0, most).astype(jnp.int32)


def _put(ring: Array, slot: Array, new: Array) -> Array:
    """Writes new [batch, new, kv_heads, head_dim] at slot [batch, new], out of range: nowhere."""
    row = jnp.broadcast_to(jnp.arange(ring.shape[0])[:, None], slot.shape)
    return ring.at[row, :, slot].set(new, mode="drop")
