"""What Orbax saved beside the arrays: their shardings, and which of them are PRNG keys.

All use of Orbax names that are not public sits here.
"""

import json
import os
import warnings
from base64 import urlsafe_b64decode

from jax.sharding import Sharding

from jaxgds.errors import CheckpointError
from jaxgds.values import read_whole


# Begins as Orbax's own warning does: who filters that one, filters this one too.
_FROM_FILE = (
    "Sharding info not provided when restoring. Arrays get the shardings of the checkpoint's "
    "_sharding file, which may not fit another topology than it was saved on."
)


class SavedShardings:
    """The shardings the arrays were saved with, from the `_sharding` file, parsed on demand."""

    def __init__(self, folder: str, warn: bool = True):
        self._file = os.path.join(folder, "_sharding")
        self._warn = warn
        self._strings: dict[str, str] | None = None
        self._made: dict[str, Sharding] = {}

    def __contains__(self, name: str) -> bool:
        return bool(self._read().get(name))

    def get(self, name: str) -> Sharding:
        from orbax.checkpoint._src.metadata import sharding as sharding_metadata

        text = self._read().get(name)
        if not text:
            raise NotImplementedError("no sharding was given and none was saved")
        try:
            if text not in self._made:  # many arrays are saved alike
                saved = sharding_metadata.from_serialized_string(text)
                self._made[text] = saved.to_jax_sharding()
            return self._made[text]
        except (ArithmeticError, AttributeError, LookupError, RecursionError, TypeError) as e:
            raise CheckpointError(f"{self._file}: array {name!r}: damaged sharding: {e!r}") from e
        except (ValueError, NotImplementedError) as e:
            raise NotImplementedError(f"its saved sharding does not fit here: {e}") from e

    def _read(self) -> dict[str, str]:
        if self._strings is None:
            if self._warn and os.path.exists(self._file):
                warnings.warn(_FROM_FILE, stacklevel=3)
            content = read_whole(self._file)
            try:
                encoded = {} if content is None else json.loads(content)
                self._strings = {urlsafe_b64decode(k).decode(): v for k, v in encoded.items()}
            except (ValueError, AttributeError, TypeError, RecursionError) as e:
                raise CheckpointError(f"{self._file}: damaged sharding file: {e!r}") from e
        return self._strings


def random_keys(folder: str) -> dict[str, str]:
    """Array name -> implementation of the PRNG keys it holds, from `array_metadatas/`."""
    metadata = os.path.join(folder, "array_metadatas")
    names: dict[str, str] = {}
    if not os.path.isdir(metadata):
        return names
    for file in sorted(os.listdir(metadata)):
        path = os.path.join(metadata, file)
        content = read_whole(path) or b""
        try:
            entries = json.loads(content)["array_metadatas"]
            for entry in entries:
                array = entry["array_metadata"]
                if impl := (array["ext_metadata"] or {}).get("random_key_impl"):
                    names[array["param_name"]] = impl
        except (AttributeError, LookupError, RecursionError, TypeError, ValueError) as e:
            raise CheckpointError(f"{path}: damaged array metadata: {e!r}") from e
    return names
