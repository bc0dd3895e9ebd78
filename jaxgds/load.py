"""`jaxgds.load`: a checkpoint on disk -> a pytree of arrays, each with its sharding."""

import dataclasses
import glob
import json
import os
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from jaxgds import report, restore
from jaxgds.arrays_only import restore_arrays
from jaxgds.errors import CheckpointError
from jaxgds.interpreter import no_full_collections
from jaxgds.progress import traced
from jaxgds.report import TransferReport
from jaxgds.restore import Wanted
from jaxgds.safetensors import is_safetensors, open_safetensors
from jaxgds.saved import SavedShardings
from jaxgds.values import read_whole


def load(
    path: str | os.PathLike[str],
    target: Any = None,
    *,
    rename: Callable[[str], str | None] | None = None,
    strict: bool | None = None,
    verify: bool = False,
) -> Any:
    """Restores a checkpoint of Orbax or of safetensors files.

    Args:
      path: an Orbax item directory (with `_METADATA`) or a directory that holds exactly one, such
        as a step of a `CheckpointManager` or an Orbax v1 checkpoint; or a safetensors file,
        a directory of them, or a `*.safetensors.index.json`.
      target: pytree of `jax.ShapeDtypeStruct` with `sharding` set, or an abstract `nnx.State`.
        Without a sharding it is that of the save, from safetensors the default device. None gives
        what was saved: from Orbax, nested dicts and lists with the shardings of the save; from
        safetensors, a flat dict of arrays committed to the default device.
      rename: safetensors only: tensor name -> name in `target`, its key path joined by dots
        (None leaves the tensor out).
      strict: raise `FallbackError` instead of restoring an array by slower means; None asks
        the environment variable JAXGDS_STRICT.
      verify: compare the whole checkpoint with its checksums before it is restored, as `jaxgds
        verify` does; it is read twice then.

    Returns:
      A pytree like `target`; `jaxgds.last_report()` says how it was read.

    Raises:
      CheckpointError: no checkpoint there, or a damaged one.
      ValueError: `target` does not fit the checkpoint, or `verify` finds no checksums.
      NotImplementedError: a safetensors file has elements of less than a byte.
      TimeoutError: the file system does not answer.
    """
    path = os.path.abspath(os.fspath(path))
    if verify:
        from jaxgds.verify import require

        require(path)
    with no_full_collections:
        if is_safetensors(path):
            return _load_safetensors(path, target, rename or (lambda name: name), strict)
        if rename is not None:
            raise ValueError(
                f"{path}: rename is for safetensors; Orbax checkpoints keep their tree"
            )
        return _load_orbax(item_directory(path), target, strict)


def _load_orbax(folder: str, target: Any, strict: bool | None) -> Any:
    start, before = time.perf_counter(), report.last_report()
    file = os.path.join(folder, "_METADATA")
    metadata = read_whole(file)  # before Orbax, which would wait for a pipe or a server forever
    if target is not None and (restored := restore_arrays(folder, metadata, target, strict)):
        return restored[0]
    import orbax.checkpoint as ocp  # slow to import

    from jaxgds import orbax

    checkpointer = ocp.Checkpointer(orbax.handler(strict=strict, warn=False))
    try:
        if target is None:
            tree = checkpointer.restore(folder)
        else:
            restore_args = _restore_args(target, SavedShardings(folder, warn=False))
            args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
            tree = checkpointer.restore(folder, args=args)
        report.took(time.perf_counter() - start, before)
        return tree
    except Exception:
        _check_metadata(file, metadata or b"")
        raise
    finally:
        checkpointer.close()


def _restore_args(target: Any, saved: SavedShardings) -> Any:
    """What Orbax makes of `target`; but without a sharding that is a numpy array."""
    import orbax.checkpoint as ocp

    def made(path: tuple[Any, ...], leaf: Any, given: ocp.RestoreArgs) -> ocp.RestoreArgs:
        name = jax.tree_util.keystr(path, simple=True, separator=".")
        if not isinstance(leaf, jax.ShapeDtypeStruct) or leaf.sharding or name not in saved:
            return given
        key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        return ocp.ArrayRestoreArgs(dtype=leaf.dtype, shape=None if key else leaf.shape)

    restore_args = ocp.checkpoint_utils.construct_restore_args(target)
    return jax.tree_util.tree_map_with_path(made, target, restore_args)


def _check_metadata(file: str, content: bytes) -> None:
    """Raises CheckpointError if that is why Orbax could not make anything of `_METADATA`."""
    try:
        json.loads(content)["tree_metadata"]
    except (ValueError, LookupError, TypeError, RecursionError) as e:
        raise CheckpointError(f"{file}: damaged checkpoint metadata: {e!r}") from e


def item_directory(path: str) -> str:
    """`path`, or the only Orbax item directory inside it."""
    if os.path.isfile(path):
        raise CheckpointError(f"{path}: a file, but neither safetensors nor a checkpoint directory")
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if os.path.exists(os.path.join(path, "_METADATA")):
        return path
    inside = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    items = [item for item in inside if os.path.exists(os.path.join(item, "_METADATA"))]
    if len(items) == 1:
        return items[0]
    deeper = glob.glob(os.path.join(glob.escape(path), "*", "*", "_METADATA"))
    # By number, where they are numbers.
    steps = sorted({file.split(os.sep)[-3] for file in deeper}, key=lambda x: (len(x), x))
    if items:
        why = f"it holds {len(items)} of them: {[os.path.basename(i) for i in items]}, name one"
    elif steps:
        why = f"it looks like that of a CheckpointManager with the steps {steps}, name one"
    else:
        why = "a checkpoint that was not completed has none"
    raise CheckpointError(f"{path}: not an Orbax item directory (no _METADATA); {why}")


def _load_safetensors(
    path: str, target: Any, rename: Callable[[str], str | None], strict: bool | None
) -> Any:
    start = time.perf_counter()
    with traced("index"):
        index = open_safetensors(path)
    stored: dict[str, str] = {}
    for name in index.names():
        new = rename(name)
        if new is not None and stored.setdefault(new, name) != name:
            raise ValueError(
                f"{path}: rename gives the tensors {stored[new]!r} and {name!r} one name, {new!r}"
            )
    if target is None:
        leaves = {name: None for name in stored}
        treedef = None
    else:
        flat, treedef = jax.tree_util.tree_flatten_with_path(target)
        leaves = {leaf_name(path): leaf for path, leaf in flat}
    absent = [name for name in leaves if name not in stored]
    if absent:
        raise ValueError(
            f"{path}: target asks for {absent[:8]}, which no tensor is named; it has "
            f"{list(stored)[:8]} (after rename), pass rename= to map the names"
        )
    default = SingleDeviceSharding(_default_device())
    wanted = {
        name: Wanted(
            index.array(stored[name]),
            getattr(leaf, "sharding", None) or default,
            getattr(leaf, "dtype", None),
        )
        for name, leaf in leaves.items()
    }
    for name, array in ((name, w.array) for name, w in wanted.items()):
        shape = getattr(leaves[name], "shape", array.layout.shape)
        if tuple(shape) != array.layout.shape:
            raise ValueError(
                f"{path}: tensor {array.name!r} has shape {array.layout.shape}, "
                f"but the target {name!r} has {tuple(shape)}"
            )
    fallbacks = {name: why for name, w in wanted.items() if (why := restore.unsupported(w))}
    report.check_strict(fallbacks, strict)
    indexed = time.perf_counter()
    direct = [name for name in wanted if name not in fallbacks]
    done = TransferReport(path="numpy")
    result: dict[str, jax.Array] = {}
    if direct:
        arrays, done = restore.restore([wanted[name] for name in direct], strict=strict)
        result.update(zip(direct, arrays, strict=True))
    result |= restore.undisturbed(
        lambda: {name: _through_numpy(wanted[name]) for name in fallbacks}
    )
    report.publish(
        dataclasses.replace(
            done,
            path="mixed" if direct and fallbacks else done.path,
            seconds=time.perf_counter() - start,
            index_seconds=indexed - start,
            fallbacks=fallbacks,
        )
    )
    ordered = [result[name] for name in leaves]
    return result if treedef is None else jax.tree_util.tree_unflatten(treedef, ordered)


def _default_device() -> jax.Device:
    device = jax.config.jax_default_device  # or the name of a platform
    return device if isinstance(device, jax.Device) else jax.local_devices(backend=device)[0]


def leaf_name(path: tuple[Any, ...]) -> str:
    """A leaf's key path joined by dots; an nnx.Variable's `.value` is not part of the name."""
    if len(path) > 1 and path[-1] == jax.tree_util.GetAttrKey("value"):
        path = path[:-1]
    return jax.tree_util.keystr(path, simple=True, separator=".")


def _through_numpy(wanted: Wanted) -> jax.Array:
    """For what cannot be read in place: one host copy, then JAX's own transfer and dtype rules."""
    layout = wanted.array.layout
    data = np.zeros(layout.shape, layout.dtype)
    if data.size:
        ((_, source),) = wanted.array.chunks()
        assert not isinstance(source, bytes)
        data = np.fromfile(source.file, layout.dtype, data.size, offset=source.offset)
    array = jax.device_put(data.reshape(layout.shape), wanted.sharding)
    return array if wanted.dtype in (None, array.dtype) else array.astype(wanted.dtype)
