"""A leaf of a tree: the array that is stored for it, what was asked for, whether that can be."""

import dataclasses
from collections.abc import Callable, Sequence

import jax
from jax.sharding import Sharding

from jaxgds import restore as restoring
from jaxgds.errors import CheckpointError
from jaxgds.index import Index, StoredArray
from jaxgds.report import TransferReport
from jaxgds.restore import Wanted


@dataclasses.dataclass(frozen=True)
class Leaf:
    wanted: Wanted
    key_impl: str | None  # of a PRNG key, which is stored as its key data


def leaf(
    index: Index,
    name: str,
    sharding: Callable[[], Sharding],
    *,
    dtype=None,
    shape: tuple[int, ...] | None = None,
    key_impl: str | None = None,
    complete: bool = True,
) -> Leaf:
    """One leaf to restore.

    Args:
      sharding: called where the array is fit for it.
      dtype, shape: asked for; None: as stored.
      key_impl: of the PRNG keys that the array was saved from.
      complete: a chunk that is not stored is a damage; else it stands for the fill value.

    Raises:
      NotImplementedError: it is Orbax's to restore; says why.
      CheckpointError: it is damaged.
    """
    array = stored(index, name)
    saved, logical = array.layout.dtype, array.layout.shape
    if dtype is not None and jax.dtypes.issubdtype(dtype, jax.dtypes.prng_key):
        if key_impl is None:
            raise NotImplementedError(f"stored as {saved}, wanted as PRNG keys")
        data = jax.eval_shape(lambda: jax.random.key_data(jax.random.key(0, impl=key_impl)))
        logical, dtype = logical[: len(logical) - data.ndim], None
    if shape is not None and tuple(shape) != logical:
        raise NotImplementedError(f"stored with shape {logical}, wanted {tuple(shape)}")
    if dtype is not None and dtype != saved and not _castable(saved, dtype):
        raise NotImplementedError(f"a cast from {saved} to {jax.numpy.dtype(dtype)}")
    wanted = Wanted(array, sharding(), dtype)
    why = restoring.unsupported(wanted)
    if why is not None:
        raise NotImplementedError(why)
    check(array, complete=complete)
    return Leaf(wanted, key_impl)


def restore(leaves: Sequence[Leaf], strict: bool | None) -> tuple[list[jax.Array], TransferReport]:
    """`jaxgds.restore.restore`, and key data become PRNG keys."""
    arrays, done = restoring.restore([leaf.wanted for leaf in leaves], strict=strict)
    keys = [leaf.key_impl for leaf in leaves]
    if any(keys):
        arrays = restoring.undisturbed(
            lambda: [
                array if key is None else jax.random.wrap_key_data(array, impl=key)
                for key, array in zip(keys, arrays, strict=True)
            ]
        )
    return arrays, done


def stored(index: Index, name: str) -> StoredArray:
    """The array of that name; NotImplementedError if there is none."""
    if name not in index:
        raise NotImplementedError("the checkpoint has no such array")
    return index.array(name)


def check(array: StoredArray, *, complete: bool) -> None:
    """Raises CheckpointError if too little is stored; NotImplementedError if Orbax would fill it.

    complete: see `leaf`.
    """
    if not complete:
        try:
            for _ in array.chunks():
                pass
        except CheckpointError as e:
            raise NotImplementedError(f"not all of its data is stored: {e}") from e
    array.check_stored()


def _castable(stored, dtype) -> bool:
    """Casts that XLA and numpy both define as round-to-nearest-even (a NaN's payload aside)."""
    floats = ("float16", "bfloat16", "float32")
    return stored.name in floats and jax.numpy.dtype(dtype).name in floats
