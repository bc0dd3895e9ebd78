"""Orbax restores through jaxgds: every `jax.Array` leaf, of Orbax v0 and v1 alike.

Both APIs end in one public method, `ocp.type_handlers.ArrayHandler.deserialize`,
called once per restore with all array leaves. `install()` replaces it; `handler()`
gives a subclass to one checkpointer only. What jaxgds cannot restore goes to Orbax's own method
and is in the report with its reason.

All use of Orbax names that are not public sits in `_saved_shardings`.
"""

import dataclasses
import json
import os
import time
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, Sharding

from jaxgds import report, restore
from jaxgds.errors import CheckpointError
from jaxgds.index import Index, open_index
from jaxgds.report import TransferReport
from jaxgds.restore import Wanted


ArrayHandler = ocp.type_handlers.ArrayHandler
Deserialize = Callable[..., Awaitable[Sequence[jax.Array]]]

# Reads on one replica and broadcasts over the network: left alone, but reported.
BroadcastHandler = ocp.type_handlers.SingleReplicaArrayHandler
_STOCK: dict[type, Deserialize] = {c: c.deserialize for c in (ArrayHandler, BroadcastHandler)}


def install(*, strict: bool | None = None) -> None:
    """Sends all Orbax restores of this process through jaxgds, until `uninstall()`.

    Checkpointers and managers that exist already are included. Installing twice is the same
    as once, with the newer `strict`.

    Args:
      strict: raise FallbackError instead of leaving an array to Orbax; None asks the
        environment variable JAXGDS_STRICT.
    """
    for kind, stock in _STOCK.items():
        kind.deserialize = _replacement(stock, strict)


def _replacement(stock: Deserialize, strict: bool | None) -> Deserialize:
    async def deserialize(self, infos, args=None):
        return await _deserialize(self, infos, args, strict, stock)

    return deserialize


def uninstall() -> None:
    """Gives Orbax its own method back."""
    for kind, stock in _STOCK.items():
        kind.deserialize = stock


@contextmanager
def installed(*, strict: bool | None = None) -> Iterator[None]:
    """`install()` within a `with` block."""
    before = {kind: kind.deserialize for kind in _STOCK}
    install(strict=strict)
    try:
        yield
    finally:
        for kind, deserialize in before.items():
            kind.deserialize = deserialize


def handler(*, strict: bool | None = None, **kwargs: Any) -> ocp.PyTreeCheckpointHandler:
    """An Orbax checkpoint handler that restores through jaxgds, without global state.

    Use it as `ocp.Checkpointer(handler())` or `ocp.CheckpointManager(path,
    item_handlers=handler())`, with `ocp.args.PyTreeSave` and `ocp.args.PyTreeRestore`.

    Args:
      strict: as for `install`.
      **kwargs: passed on to `ocp.PyTreeCheckpointHandler`.
    """
    stock = ocp.type_handlers.get_type_handler(jax.Array)
    fast = _Handler.__new__(_Handler)
    # The registered handler carries a metadata store that a fresh one would lack.
    vars(fast).update(vars(stock), _jaxgds_strict=strict)
    kinds = [k for k in ocp.type_handlers.supported_types() if k is not jax.Array]
    pairs = [(k, ocp.type_handlers.get_type_handler(k)) for k in kinds]
    registry = ocp.type_handlers.create_type_handler_registry((jax.Array, fast), *pairs)
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **kwargs)


@dataclasses.dataclass(frozen=True)
class _Leaf:
    wanted: Wanted
    key_impl: str | None  # of a PRNG key, which is stored as its key data


class _Handler(ArrayHandler):
    _jaxgds_strict: bool | None = None

    async def deserialize(self, infos, args=None):
        stock = _STOCK[ArrayHandler]
        return await _deserialize(self, infos, args, self._jaxgds_strict, stock)


async def _deserialize(
    self, infos, args, strict: bool | None, stock: Deserialize
) -> Sequence[jax.Array]:
    """Restores what jaxgds can, leaves the rest to Orbax, keeps the order."""
    if args is None or not infos:
        return await stock(self, infos, args)
    start = time.perf_counter()
    for info in infos:
        await info.await_path_creation()
    wanted, fallbacks = _sort_out(self, infos, args)
    report.check_strict({infos[i].name: why for i, why in fallbacks.items()}, strict)
    indexed = time.perf_counter()
    result: dict[int, jax.Array] = {}
    done = TransferReport(path="orbax")
    if wanted:
        arrays, done = restore.restore([leaf.wanted for leaf in wanted.values()])
        for (i, leaf), array in zip(wanted.items(), arrays, strict=True):
            key = leaf.key_impl
            result[i] = array if key is None else jax.random.wrap_key_data(array, impl=key)
    if fallbacks:
        some = list(fallbacks)
        arrays = await stock(self, [infos[i] for i in some], [args[i] for i in some])
        result.update(zip(some, arrays, strict=True))
    report.publish(
        TransferReport(
            **{
                **done.__dict__,
                "path": "mixed" if wanted and fallbacks else done.path,
                "seconds": time.perf_counter() - start,
                "index_seconds": indexed - start,
                "fallbacks": {infos[i].name: why for i, why in fallbacks.items()},
            }
        )
    )
    return [result[i] for i in range(len(infos))]


def _sort_out(self, infos, args) -> tuple[dict[int, _Leaf], dict[int, str]]:
    """Which leaves jaxgds restores, and why it does not restore the others."""
    folder = os.fspath(infos[0].parent_dir)
    everything = range(len(infos))
    if isinstance(self, BroadcastHandler):
        return {}, dict.fromkeys(everything, "one replica reads and broadcasts it, as asked for")
    if getattr(self, "_dispatcher", None) is not None:
        return {}, dict.fromkeys(everything, "a dispatcher restores on remote workers")
    if not os.path.isdir(folder):
        return {}, dict.fromkeys(everything, f"{folder} is not a local directory")
    index = open_index(folder)
    saved = _SavedShardings(folder)
    keys = _random_keys(folder) if getattr(self, "_array_metadata_store", None) else {}
    wanted: dict[int, _Leaf] = {}
    fallbacks: dict[int, str] = {}
    for i, (info, arg) in enumerate(zip(infos, args, strict=True)):
        try:
            wanted[i] = _leaf(index, info, arg, saved, keys)
        except NotImplementedError as e:
            fallbacks[i] = str(e)
    return wanted, fallbacks


def _leaf(
    index: Index, info, arg, saved: "_SavedShardings", random_keys: Mapping[str, str]
) -> _Leaf:
    """One leaf to restore; NotImplementedError says why it is Orbax's."""
    if info.name not in index:
        raise NotImplementedError("the checkpoint has no such array")
    array = index.array(info.name)
    stored, shape = array.layout.dtype, array.layout.shape
    dtype = getattr(arg, "dtype", None)
    key_impl = random_keys.get(info.name)
    logical = shape
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        if key_impl is None:
            raise NotImplementedError(f"stored as {stored}, wanted as PRNG keys")
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=key_impl)))
        logical, dtype = shape[: len(shape) - data.ndim], None
    wanted_shape = getattr(arg, "global_shape", None)
    if wanted_shape is not None and tuple(wanted_shape) != logical:
        raise NotImplementedError(f"stored with shape {logical}, wanted {tuple(wanted_shape)}")
    if dtype is not None and dtype != stored and not _castable(stored, dtype):
        raise NotImplementedError(f"a cast from {stored} to {dtype}")
    wanted = Wanted(array, _sharding(arg, info.name, saved), dtype)
    why = restore.unsupported(wanted)
    if why is not None:
        raise NotImplementedError(why)
    if not info.raise_array_data_missing_error:  # a chunk left out means the fill value then
        try:
            for _ in array.chunks():
                pass
        except CheckpointError as e:
            raise NotImplementedError(f"not all of its data is stored: {e}") from e
    return _Leaf(wanted, key_impl)


def _castable(stored, dtype) -> bool:
    """Casts that XLA and numpy both define as round-to-nearest-even (a NaN's payload aside)."""
    floats = ("float16", "bfloat16", "float32")
    return stored.name in floats and jax.numpy.dtype(dtype).name in floats


def _sharding(arg, name: str, saved: "_SavedShardings") -> Sharding:
    """The sharding the caller asked for, in Orbax's order of precedence."""
    mesh, axes = getattr(arg, "mesh", None), getattr(arg, "mesh_axes", None)
    if mesh is not None and axes is not None:
        return NamedSharding(mesh, axes)
    sharding = getattr(arg, "sharding", None)
    if sharding is None:
        sharding = saved.get(name)
    elif hasattr(sharding, "to_jax_sharding"):
        sharding = sharding.to_jax_sharding()
    if not isinstance(sharding, Sharding):
        raise NotImplementedError(f"a sharding of type {type(sharding).__name__}")
    return sharding


class _SavedShardings:
    """The shardings the arrays were saved with, from the `_sharding` file, parsed on demand."""

    def __init__(self, folder: str):
        self._file = os.path.join(folder, "_sharding")
        self._strings: dict[str, str] | None = None

    def get(self, name: str) -> Sharding:
        from orbax.checkpoint._src.metadata import sharding as sharding_metadata

        if self._strings is None:
            try:
                with open(self._file, "rb") as f:
                    encoded = json.load(f)
                self._strings = {urlsafe_b64decode(k).decode(): v for k, v in encoded.items()}
            except FileNotFoundError:
                self._strings = {}
            except (ValueError, AttributeError) as e:
                raise CheckpointError(f"{self._file}: damaged sharding file: {e}") from e
        text = self._strings.get(name)
        if not text:
            raise NotImplementedError("no sharding was given and none was saved")
        try:
            return sharding_metadata.from_serialized_string(text).to_jax_sharding()
        except (ValueError, NotImplementedError) as e:
            raise NotImplementedError(f"its saved sharding does not fit here: {e}") from e


def _random_keys(folder: str) -> dict[str, str]:
    """Array name -> implementation of the PRNG keys it holds, from `array_metadatas/`."""
    metadata = os.path.join(folder, "array_metadatas")
    names: dict[str, str] = {}
    if not os.path.isdir(metadata):
        return names
    for file in sorted(os.listdir(metadata)):
        path = os.path.join(metadata, file)
        try:
            with open(path, "rb") as f:
                entries = json.load(f)["array_metadatas"]
            for entry in entries:
                array = entry["array_metadata"]
                if impl := (array["ext_metadata"] or {}).get("random_key_impl"):
                    names[array["param_name"]] = impl
        except (ValueError, KeyError, TypeError) as e:
            raise CheckpointError(f"{path}: damaged array metadata: {e!r}") from e
    return names
