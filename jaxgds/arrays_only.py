"""An Orbax checkpoint of nothing but arrays, for a target of nothing but arrays: without Orbax.

To import Orbax and to go through its handlers takes longer than to read a small model. What is
restored is the same, and so are the errors: whatever is not plain is left to Orbax (None).
"""

import dataclasses
import json
import time
from typing import Any

import jax
from jax.sharding import Sharding
from jax.tree_util import DictKey, FlattenedIndexKey, GetAttrKey, SequenceKey

from jaxgds import leaves, report
from jaxgds.index import open_index
from jaxgds.progress import traced
from jaxgds.saved import random_keys


_UNFINISHED = ".orbax-checkpoint-tmp"  # in the name of a directory that is being written
_SEQUENCE, _MAPPING = 1, 2  # kinds of keys in `_METADATA`
_ARRAYS = ("jax.Array", "np.ndarray")

type _Path = tuple[tuple[str, int], ...]  # keys and their kinds


def restore_arrays(
    folder: str, metadata: bytes | None, target: Any, strict: bool | None
) -> tuple[Any] | None:
    """The restored tree, alone in a tuple, and its report published; None if that is for Orbax.

    Args:
      folder: the item directory.
      metadata: the content of its `_METADATA`.
      target: pytree of `jax.ShapeDtypeStruct` with shardings.
    """
    start = time.perf_counter()
    if jax.process_count() > 1 or _UNFINISHED in folder:  # Orbax's processes wait for each other
        return None
    with traced("index"):
        asked, saved = _asked(target), _saved(metadata)
        if asked is None or saved is None or asked.keys() != saved[0]:
            return None
        index = open_index(folder)
        index.fetch(name for name, _ in asked.values())
        keys = random_keys(folder)
        try:
            found = [
                leaves.leaf(
                    index,
                    name,
                    lambda leaf=leaf: leaf.sharding,
                    dtype=leaf.dtype,
                    shape=leaf.shape,
                    key_impl=keys.get(name),
                    complete=saved[1],
                )
                for name, leaf in asked.values()
            ]
        except NotImplementedError:
            return None
    indexed = time.perf_counter()
    arrays, done = leaves.restore(found, strict)
    took = time.perf_counter() - start
    report.publish(dataclasses.replace(done, seconds=took, index_seconds=indexed - start))
    return (jax.tree.unflatten(jax.tree.structure(target), arrays),)


def _asked(target: Any) -> dict[_Path, tuple[str, jax.ShapeDtypeStruct]] | None:
    """By its path each leaf, and its array's name; None if something is no leaf, or nothing."""
    flat, structure = jax.tree_util.tree_flatten_with_path(target)
    if _empty_somewhere(structure):
        return None
    found: dict[_Path, tuple[str, jax.ShapeDtypeStruct]] = {}
    for path, leaf in flat:
        if not isinstance(leaf, jax.ShapeDtypeStruct) or not isinstance(leaf.sharding, Sharding):
            return None
        keys = tuple(map(_key, path))
        found[keys] = ".".join(key for key, _ in keys), leaf
    names = {name for name, _ in found.values()}
    return found if len(names) == len(flat) else None  # Orbax says what of two of one name


def _empty_somewhere(structure: jax.tree_util.PyTreeDef) -> bool:
    return not structure.num_leaves or any(map(_empty_somewhere, structure.children()))


def _key(key: Any) -> tuple[str, int]:
    """As Orbax names it."""
    match key:
        case SequenceKey(idx=number):
            return str(number), _SEQUENCE
        case FlattenedIndexKey(key=number):
            return str(number), _SEQUENCE
        case DictKey(key=name):
            return str(name), _MAPPING
        case GetAttrKey(name=name):
            return name, _MAPPING
        case _:
            return str(key), 0


def _saved(metadata: bytes | None) -> tuple[set[_Path], bool] | None:
    """The paths of what was saved, and whether all chunks are stored; None if not just arrays.

    Also if they are damaged, which Orbax says.
    """
    try:
        content = json.loads(metadata or b"")
        paths = set()
        for entry in content["tree_metadata"].values():
            value = entry["value_metadata"]
            if value["value_type"] not in _ARRAYS or value["skip_deserialize"]:
                return None
            paths.add(tuple((key["key"], key["key_type"]) for key in entry["key_metadata"]))
    except (AttributeError, LookupError, RecursionError, TypeError, ValueError):
        return None
    if content.get("value_metadata_tree") is not None:  # of richer types
        return None
    return paths, bool(content.get("store_array_data_equal_to_fill_value", False))
