"""Orbax restores through jaxgds: every `jax.Array` and numpy leaf, of Orbax v0 and v1 alike.

Both APIs end in one public method per type of leaf, `ocp.type_handlers.ArrayHandler.deserialize`
and that of `NumpyHandler`, called once per restore with all such leaves. `install()` replaces
them; `handler()` gives subclasses to one checkpointer only. What jaxgds cannot restore goes to
Orbax's own method and is in the report with its reason. Scalars and strings stay Orbax's.
"""

import asyncio
import dataclasses
import functools
import os
import signal
import threading
import time
import traceback
import weakref
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, Sharding

from jaxgds import leaves, report, restore
from jaxgds.index import Index, StoredArray, open_index
from jaxgds.interpreter import no_full_collections
from jaxgds.progress import traced
from jaxgds.report import TransferReport
from jaxgds.saved import SavedShardings, random_keys


ArrayHandler = ocp.type_handlers.ArrayHandler
NumpyHandler = ocp.type_handlers.NumpyHandler
Deserialize = Callable[..., Awaitable[Sequence[Any]]]

# Reads on one replica and broadcasts over the network: left alone, but reported.
BroadcastHandler = ocp.type_handlers.SingleReplicaArrayHandler
_STOCK: dict[type, Deserialize] = {
    kind: kind.deserialize for kind in (ArrayHandler, BroadcastHandler, NumpyHandler)
}


def install(*, strict: bool | None = None) -> None:
    """Sends all Orbax restores of this process through jaxgds, until `uninstall()`.

    Checkpointers and managers that exist already are included. Installing twice is the same
    as once, with the newer `strict`. Orbax's limit on bytes in flight, `restore_concurrent_gb`,
    holds for what is left to Orbax; jaxgds bounds the host memory it needs by itself, to a
    staging ring, and waits for no limit.

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


def handler(
    *, strict: bool | None = None, warn: bool = True, **kwargs: Any
) -> ocp.PyTreeCheckpointHandler:
    """An Orbax checkpoint handler that restores through jaxgds, without global state.

    Use it as `ocp.Checkpointer(handler())` or `ocp.CheckpointManager(path,
    item_handlers=handler())`, with `ocp.args.PyTreeSave` and `ocp.args.PyTreeRestore`.

    Args:
      strict: as for `install`.
      warn: as Orbax does, where shardings were not given and are those of the save.
      **kwargs: passed on to `ocp.PyTreeCheckpointHandler`.

    Raises:
      NotImplementedError: something else than Orbax's ArrayHandler is registered for `jax.Array`.
    """
    types = ocp.type_handlers
    handlers = {kind: types.get_type_handler(kind) for kind in types.supported_types()}
    if type(handlers[jax.Array]) is not ArrayHandler:
        raise NotImplementedError(
            f"a {type(handlers[jax.Array]).__name__} is registered for jax.Array, and handler() "
            "stands in for Orbax's ArrayHandler only: register that one, or use install()"
        )
    for kind, stock in handlers.items():
        if type(stock) in _FAST:
            # The registered handler carries a metadata store that a fresh one would lack.
            handlers[kind] = fast = object.__new__(_FAST[type(stock)])
            vars(fast).update(vars(stock), _jaxgds_strict=strict, _jaxgds_warn=warn)
    registry = types.create_type_handler_registry(*handlers.items())
    return ocp.PyTreeCheckpointHandler(type_handler_registry=registry, **kwargs)


class _ArrayHandler(ArrayHandler):
    _jaxgds_strict: bool | None = None

    async def deserialize(self, infos, args=None):
        return await _deserialize(self, infos, args, self._jaxgds_strict, _STOCK[ArrayHandler])


class _NumpyHandler(NumpyHandler):
    _jaxgds_strict: bool | None = None

    async def deserialize(self, infos, args=None):
        return await _deserialize(self, infos, args, self._jaxgds_strict, _STOCK[NumpyHandler])


_FAST: dict[type, type] = {ArrayHandler: _ArrayHandler, NumpyHandler: _NumpyHandler}


async def _deserialize(self, infos, args, strict: bool | None, stock: Deserialize) -> Sequence[Any]:
    try:
        with no_full_collections:
            return await _restore(self, infos, args, strict, stock)
    except BaseException as e:
        if not isinstance(e, Exception):
            # After Ctrl-C Orbax's thread keeps the task, its error, and so the arrays' memory.
            traceback.clear_frames(e.__traceback__)
        raise


async def _restore(self, infos, args, strict: bool | None, stock: Deserialize) -> Sequence[Any]:
    """Restores what jaxgds can, leaves the rest to Orbax, keeps the order."""
    to_host = isinstance(self, NumpyHandler)
    if args is None and to_host:
        args = [ocp.RestoreArgs()] * len(infos)
    if args is None or not infos or isinstance(self, ocp.type_handlers.ScalarHandler):
        return await stock(self, infos, args)
    start = time.perf_counter()
    for info in infos:
        await info.await_path_creation()
    with traced("index"), _interruptible():
        wanted, fallbacks = _sort_out(self, infos, args)
    report.check_strict({infos[i].name: why for i, why in fallbacks.items()}, strict)
    indexed = time.perf_counter()
    result: dict[int, Any] = {}
    done = TransferReport(path="orbax")
    if wanted:
        some = list(wanted.values())
        with _interruptible():
            made, done = restore.restore_to_host(some) if to_host else leaves.restore(some, strict)
        result.update(zip(wanted, made, strict=True))
    if fallbacks:
        some = list(fallbacks)
        made = await stock(self, [infos[i] for i in some], [args[i] for i in some])
        result.update(zip(some, made, strict=True))
    done = dataclasses.replace(
        done,
        path="mixed" if wanted and fallbacks else done.path,
        seconds=time.perf_counter() - start,
        index_seconds=indexed - start,
        fallbacks={infos[i].name: why for i, why in fallbacks.items()},
    )
    _publish(infos[0].byte_limiter, to_host, done)
    return [result[i] for i in range(len(infos))]


@contextmanager
def _interruptible() -> Iterator[None]:
    """Lets Ctrl-C through, which `asyncio.run` turns into a cancellation at the next `await`."""
    handler = signal.getsignal(signal.SIGINT)
    owner = getattr(getattr(handler, "func", None), "__self__", None)
    main = threading.current_thread() is threading.main_thread()
    if not main or not isinstance(owner, asyncio.Runner):
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _publish(restore_id: object, to_host: bool, done: TransferReport) -> None:
    """Publishes the report of a restore: of one type of leaf, or of both when the second is done.

    Args:
      restore_id: the byte limiter, which Orbax makes anew for each restore.
    """
    parts = {} if restore_id is None else _PARTS.setdefault(restore_id, {})
    parts[to_host] = done
    report.publish(done, report.total(parts[False], parts[True]) if len(parts) == 2 else None)


_PARTS: weakref.WeakKeyDictionary[object, dict[bool, TransferReport]] = weakref.WeakKeyDictionary()


def _sort_out(self, infos, args) -> tuple[dict[int, Any], dict[int, str]]:
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
    index.fetch(info.name for info in infos)
    if isinstance(self, NumpyHandler):
        leaf = functools.partial(_numpy_leaf, index)
    else:
        saved = SavedShardings(folder, warn=getattr(self, "_jaxgds_warn", True))
        keys = random_keys(folder) if getattr(self, "_array_metadata_store", None) else {}
        leaf = functools.partial(_leaf, index, saved, keys)
    wanted: dict[int, Any] = {}
    fallbacks: dict[int, str] = {}
    for i, (info, arg) in enumerate(zip(infos, args, strict=True)):
        try:
            wanted[i] = leaf(info, arg)
        except NotImplementedError as e:
            fallbacks[i] = str(e)
    return wanted, fallbacks


def _numpy_leaf(index: Index, info, arg) -> StoredArray:
    """One array to restore to the host; NotImplementedError says why it is Orbax's."""
    array = leaves.stored(index, info.name)
    stored, dtype = array.layout.dtype, arg.dtype
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        dtype = None  # numpy has none: it gets the key data
    if dtype is not None and dtype != stored:
        raise NotImplementedError(f"a cast from {stored} to {np.dtype(dtype)}, in numpy")
    leaves.check(array, complete=info.raise_array_data_missing_error)
    return array


def _leaf(index: Index, saved: SavedShardings, keys: Mapping[str, str], info, arg) -> leaves.Leaf:
    """One leaf to restore; NotImplementedError says why it is Orbax's."""
    return leaves.leaf(
        index,
        info.name,
        lambda: _sharding(arg, info.name, saved),
        dtype=getattr(arg, "dtype", None),
        shape=getattr(arg, "global_shape", None),
        key_impl=keys.get(info.name),
        complete=info.raise_array_data_missing_error,
    )


def _sharding(arg, name: str, saved: SavedShardings) -> Sharding:
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
