"""What the configuration of cuFile sets for jaxgds too: sizes and numbers of its reads.

cuFile opens no driver with a value that it does not take, and says no more than "error 5002".
"""

import dataclasses
import functools
import json
import os
import re
from collections.abc import Callable
from typing import Any


@dataclasses.dataclass(frozen=True)
class Settings:
    """What jaxgds goes by.

    Attributes:
      request_bytes: the most that is read straight into an array at once.
      threads: how many read at once, for each GPU.
      peer_to_peer: whether cuFile may use the kernel's own peer-to-peer transfers.
    """

    request_bytes: int = 16 << 20
    threads: int = 8
    peer_to_peer: bool = False


def settings() -> Settings:
    """Those of the file that cuFile reads; its defaults where there is none.

    Raises:
      ValueError: the file cannot be read, or cuFile does not take it.
    """
    file = os.environ.get("CUFILE_ENV_PATH_JSON") or "/etc/cufile.json"
    try:
        with open(file, encoding="utf-8", errors="replace") as f:
            found = parse(f.read(), file)
    except FileNotFoundError:
        found = Settings()
    except OSError as e:
        raise ValueError(f"{file}: {e.strerror}: cuFile needs to read it, or not to find it") from e
    if os.environ.get("CUFILE_USE_PCIP2PDMA", "").lower() in ("1", "true"):
        return dataclasses.replace(found, peer_to_peer=True)
    return found


@functools.cache  # an engine is made for each array that is asked about
def parse(text: str, file: str) -> Settings:
    """The settings in the text of `file`.

    Raises:
      ValueError: cuFile does not take it; names the file, the key, its value and what it may be.
    """
    try:
        config = json.loads(_without_comments(text))
    except ValueError as e:
        raise ValueError(f"{file}: no JSON, and cuFile does not start with it: {e}") from e

    def value(section: str, key: str, fits: Callable[[Any], bool], what: str, default: Any) -> Any:
        part = _object(config, file, "the file").get(section)
        found = _object(part, file, section).get(key)
        if found is None:
            return default
        if not fits(found):
            raise ValueError(
                f"{file}: {section}.{key} is {json.dumps(found)}, where cuFile takes {what}: "
                f"correct it, or take it out for the default, {json.dumps(default)}"
            )
        return found

    default = Settings()
    request_kb = value(
        "properties",
        "max_direct_io_size_kb",
        lambda n: type(n) is int and 64 <= n <= 16384 and n % 64 == 0,
        "a multiple of 64 from 64 to 16384",
        default.request_bytes >> 10,
    )
    # Of cuFile, which splits reads among them if `parallel_io` is set; if not, of jaxgds.
    threads = value(
        "execution",
        "max_io_threads",
        lambda n: type(n) is int and 0 <= n <= 128,
        "a number from 0 to 128",
        default.threads,
    )
    splits = value("execution", "parallel_io", _is_bool, "true or false", True)
    p2p = value("properties", "use_pci_p2pdma", _is_bool, "true or false", default.peer_to_peer)
    return Settings(
        request_kb << 10, default.threads if splits else threads or default.threads, p2p
    )


def _object(part: Any, file: str, name: str) -> dict[str, Any]:
    if part is None:
        return {}
    if not isinstance(part, dict):
        raise ValueError(
            f"{file}: {name} is {json.dumps(part)}, where cuFile takes an object: write {{...}}"
        )
    return part


def _is_bool(value: Any) -> bool:
    return isinstance(value, bool)


def _without_comments(text: str) -> str:
    """`text` with blanks for its comments, so that an error's line and column stay right."""
    return re.sub(
        r'("(?:\\.|[^"\\])*")|//[^\n]*|/\*.*?\*/',
        lambda found: found[1] or re.sub(r"[^\n]", " ", found[0]),
        text,
        flags=re.DOTALL,
    )
