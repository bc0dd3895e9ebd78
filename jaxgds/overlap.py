"""Weights load while the step compiles: compilation needs their shapes only."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from jaxgds.load import load


def load_and_compile[T](
    path: str | os.PathLike[str],
    target: Any,
    compile: Callable[[], T],
    *,
    rename: Callable[[str], str | None] | None = None,
    strict: bool | None = None,
) -> tuple[Any, T]:
    """Restores a checkpoint in a thread of its own while `compile` runs in this one.

        weights, step = jaxgds.load_and_compile(
            path, target, lambda: jax.jit(f).lower(target, tokens).compile()
        )

    Args:
      path, target, rename, strict: as for `jaxgds.load`.
      compile: called at once; it may compile several functions and allocate what does not
        depend on the weights, such as a KV cache.

    Returns:
      What `jaxgds.load` and `compile` return. They take as long as the slower of the two, where
      the file system, the links to the devices and the cores of the host allow it; and less with
      JAX's persistent compilation cache (`jax_compilation_cache_dir`) from the second time on.

    Raises:
      What the two raise, and when both have ended: there is no way to stop either. If both fail,
      `compile`'s error, whose note says what the other was. JAX's settings for one thread
      (`with jax.enable_x64()` and the like) do not reach the restore.
    """
    with ThreadPoolExecutor(1, thread_name_prefix="jaxgds-load") as pool:
        loading = pool.submit(load, path, target, rename=rename, strict=strict)
        try:
            compiled = compile()
        except BaseException as e:
            if (other := loading.exception()) is not None:
                e.add_note(f"meanwhile the restore failed: {type(other).__name__}: {other}")
            raise
        return loading.result(), compiled
