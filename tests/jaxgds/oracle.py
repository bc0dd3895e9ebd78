"""What the tests compare with: checkpoints of stock Orbax, as TensorStore and Orbax read them."""

from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import tensorstore as ts
import zstandard

import jaxgds
from jaxgds.index import Source, StoredArray


# (use_ocdbt, use_zarr3, use_compression)
FORMATS = [(o, z, c) for o in (True, False) for z in (False, True) for c in (True, False)]


def format_id(fmt: tuple[bool, bool, bool]) -> str:
    ocdbt, zarr3, compress = fmt
    return f"{'ocdbt' if ocdbt else 'files'}-zarr{2 + zarr3}-{'zstd' if compress else 'raw'}"


def save(
    path,
    tree: Any,
    fmt: tuple[bool, bool, bool] = (True, False, True),
    *,
    chunk_bytes: int | None = None,
    file_bytes: int | None = None,
) -> str:
    """Saves with Orbax v0 into `path`, an item directory; returns it as a string."""
    ocdbt, zarr3, compress = fmt
    handler = ocp.PyTreeCheckpointHandler(
        use_ocdbt=ocdbt, use_zarr3=zarr3, use_compression=compress
    )
    args = ocp.args.PyTreeSave(
        tree,
        save_args=jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=chunk_bytes), tree),
        ocdbt_target_data_file_size=file_bytes,
    )
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(path, args)
    return str(path)


def save_v1(path, tree: Any, *, zarr3: bool = True, ocdbt: bool = True, compress: bool = True):
    context = ocp.v1.Context()
    context.array.saving.use_zarr3 = zarr3
    context.array.saving.use_ocdbt = ocdbt
    context.array.saving.use_compression = compress
    with context:
        ocp.v1.save(path, tree)
    return str(path)


def kvstore(path, ocdbt: bool) -> ts.KvStore:
    base = f"file://{path}/"
    return ts.KvStore.open({"driver": "ocdbt", "base": base} if ocdbt else base).result()


def stored_values(path, ocdbt: bool) -> dict[str, bytes]:
    """Every key of a checkpoint's store with its bytes, as TensorStore reads them."""
    store = kvstore(path, ocdbt)
    return {key.decode(): store.read(key).result().value for key in store.list().result()}


def zarr_array(path, name: str, ocdbt: bool, zarr3: bool) -> np.ndarray:
    base: Any = {"driver": "file", "path": f"{path}/"}
    store = {"driver": "ocdbt", "base": base, "path": f"{name}/"} if ocdbt else None
    spec = {
        "driver": "zarr3" if zarr3 else "zarr",
        "kvstore": store or {"driver": "file", "path": f"{path}/{name}/"},
    }
    return ts.open(spec, open=True, read=True).result().read().result()


def content(source: Source) -> bytes:
    if isinstance(source, bytes):
        return source
    with open(source.file, "rb") as f:
        f.seek(source.offset)
        return f.read(source.nbytes)


def decoded(array: StoredArray, source: Source) -> np.ndarray:
    """One chunk as an array of the chunk's (padded) shape."""
    data = content(source)
    if array.layout.codec == "zstd":
        data = zstandard.ZstdDecompressor().decompress(data)
    return np.frombuffer(data, array.layout.dtype).reshape(array.layout.chunk)


def raw(x: Any) -> bytes:
    """The bytes of an array, whatever its dtype (PRNG keys included)."""
    if isinstance(x, jax.Array) and jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    return np.asarray(x).tobytes()


def assert_same(ours: Any, stock: Any) -> None:
    """Equal trees: structure, types, dtypes, shardings, and every shard's bytes."""
    assert jax.tree.structure(ours) == jax.tree.structure(stock)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(stock)]
    for name, a, b in zip(paths, jax.tree.leaves(ours), jax.tree.leaves(stock), strict=True):
        assert type(a) is type(b), name
        if not isinstance(b, jax.Array | np.ndarray):
            assert a == b, name
            continue
        assert (a.dtype, a.shape) == (b.dtype, b.shape), name
        if isinstance(b, np.ndarray):
            assert a.tobytes() == b.tobytes(), name
            continue
        assert a.sharding == b.sharding, name
        assert a.committed == b.committed, name
        if jax.dtypes.issubdtype(b.dtype, jax.dtypes.prng_key):
            a, b = jax.random.key_data(a), jax.random.key_data(b)
            assert a.sharding.is_equivalent_to(b.sharding, a.ndim), name
        else:
            assert getattr(a, "format") == getattr(b, "format"), name  # noqa: B009  not in its stubs
        assert a.weak_type == b.weak_type, name
        for s, t in zip(a.addressable_shards, b.addressable_shards, strict=True):
            assert (s.device, s.index, s.replica_id) == (t.device, t.index, t.replica_id), name
            assert raw(s.data) == raw(t.data), (name, s.device)


def last_report() -> jaxgds.TransferReport:
    report = jaxgds.last_report()
    assert report is not None
    return report
