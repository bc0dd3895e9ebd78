"""`jaxgds.load`: a checkpoint directory -> a pytree of arrays, each with its sharding."""

import os
from typing import Any

import orbax.checkpoint as ocp

from jaxgds import orbax
from jaxgds.errors import CheckpointError


def load(path: str | os.PathLike[str], target: Any = None, *, strict: bool | None = None) -> Any:
    """Restores a checkpoint that Orbax wrote.

    Args:
      path: the checkpoint: an item directory (with `_METADATA`), or a directory that holds exactly
        one, such as a step of a `CheckpointManager` or an Orbax v1 checkpoint.
      target: pytree of `jax.ShapeDtypeStruct` with `sharding` set, or an abstract `nnx.State`;
        None gives nested dicts and lists, with the shardings the arrays were saved with.
      strict: raise `FallbackError` instead of leaving an array to Orbax; None asks
        the environment variable JAXGDS_STRICT.

    Returns:
      A pytree like `target`; `jaxgds.last_report()` says how it was read.

    Raises:
      CheckpointError: no checkpoint there, or a damaged one.
      ValueError: `target` does not fit the checkpoint.
    """
    folder = _item_directory(os.path.abspath(os.fspath(path)))
    checkpointer = ocp.Checkpointer(orbax.handler(strict=strict))
    try:
        if target is None:
            return checkpointer.restore(folder)
        restore_args = ocp.checkpoint_utils.construct_restore_args(target)
        args = ocp.args.PyTreeRestore(item=target, restore_args=restore_args)
        return checkpointer.restore(folder, args=args)
    finally:
        checkpointer.close()


def _item_directory(path: str) -> str:
    if not os.path.isdir(path):
        raise CheckpointError(f"{path}: no such checkpoint directory")
    if os.path.exists(os.path.join(path, "_METADATA")):
        return path
    inside = [os.path.join(path, name) for name in sorted(os.listdir(path))]
    items = [item for item in inside if os.path.exists(os.path.join(item, "_METADATA"))]
    if len(items) == 1:
        return items[0]
    found = f"it holds {len(items)} of them: {[os.path.basename(i) for i in items]}"
    raise CheckpointError(
        f"{path}: not an Orbax item directory (no _METADATA)"
        + (f"; {found}, name one" if items else "; a checkpoint that was not completed has none")
    )
