"""What a restore did: which path, how much, how fast, and what was left to Orbax and why."""

import dataclasses
import logging
import os
from collections.abc import Mapping
from typing import Any

import jax.monitoring


_log = logging.getLogger("jaxgds")


@dataclasses.dataclass(frozen=True)
class TransferReport:
    """One restore, as `jaxgds.last_report()` returns it.

    Attributes:
      path: "gds", "pinned" or "host": the engine that moved the bytes; "gds-compat" if gds was
        forced and cuFile counted no direct read: its compatibility mode, through host memory.
        "mixed" if more than one part of the machinery did (Orbax included; `note` says whether
        cuFile's part was direct); "orbax" if everything fell back. Leaves restored as numpy
        arrays, always by "host", do not make a "gds" mixed.
      bytes_read: from storage by this process, encoded (a zstd checkpoint counts compressed).
      bytes_restored: of the arrays that jaxgds filled on this host, each distinct shard once.
      seconds: of the whole call; index_seconds, plan_seconds and read_seconds are parts of it
        (memory is allocated meanwhile).
      arrays: how many arrays jaxgds filled.
      fallbacks: array name -> why it was left to Orbax.
      note: what else there is to know about the path; "" if nothing.
    """

    path: str
    bytes_read: int = 0
    bytes_restored: int = 0
    seconds: float = 0.0
    index_seconds: float = 0.0
    plan_seconds: float = 0.0
    read_seconds: float = 0.0
    arrays: int = 0
    fallbacks: Mapping[str, str] = dataclasses.field(default_factory=dict)
    note: str = ""

    def __str__(self) -> str:
        restored, seconds = self.bytes_restored / 1e9, max(self.seconds, 1e-9)
        text = (
            f"restored {self.arrays} arrays, {restored:.3f} GB in {seconds:.2f} s "
            f"({restored / seconds:.2f} GB/s) by {self.path}, {len(self.fallbacks)} left to Orbax"
        )
        return f"{text}; {self.note}" if self.note else text

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON types, same names as the attributes, plus `gigabytes_per_second`.

        Keys are added in later versions, none is renamed or changes its meaning.
        """
        return {
            **dataclasses.asdict(self),
            "fallbacks": dict(self.fallbacks),
            "gigabytes_per_second": self.bytes_restored / max(self.seconds, 1e-9) / 1e9,
        }


def total(device: TransferReport, host: TransferReport) -> TransferReport:
    """Two parts of one restore as one report."""
    mine = ("host", device.path) if device.path != "orbax" else ("orbax",)
    added = {
        field.name: getattr(device, field.name) + getattr(host, field.name)
        for field in dataclasses.fields(TransferReport)
        if field.type in (int, float)
    }
    return dataclasses.replace(
        device,
        **added,
        path=device.path if host.path in mine else "mixed",
        fallbacks={**device.fallbacks, **host.fallbacks},
    )


class FallbackError(RuntimeError):
    """`strict` was asked for, and some array could not be restored by jaxgds itself."""


_last: TransferReport | None = None


def last_report() -> TransferReport | None:
    """The report of this process's newest restore; None before the first.

    Of a checkpoint of several items each item is a restore: all reports are in the log "jaxgds"
    at INFO.
    """
    return _last


def publish(report: TransferReport, of: TransferReport | None = None) -> None:
    """Makes `report` the last one, logs it and tells `jax.monitoring`.

    Args:
      of: a restore that is in two parts: the whole of it, which becomes the last report.
    """
    global _last
    _last = of or report
    _log.info("%s", report)
    for name, why in report.fallbacks.items():
        _log.info("left to Orbax: %s: %s", name, why)
    monitoring = jax.monitoring
    for name in ("seconds", "index_seconds", "plan_seconds", "read_seconds"):
        monitoring.record_event_duration_secs(f"/jaxgds/restore/{name}", getattr(report, name))
    for name in ("bytes_read", "bytes_restored", "arrays"):
        monitoring.record_scalar(f"/jaxgds/restore/{name}", getattr(report, name))
    monitoring.record_event("/jaxgds/restore", path=report.path)
    for why in report.fallbacks.values():
        monitoring.record_event("/jaxgds/restore/fallback", reason=why)


def took(seconds: float, before: TransferReport | None) -> None:
    """Adds the time that Orbax took around the restore to the last report, if not `before`."""
    global _last
    if _last is not None and _last is not before:
        _last = dataclasses.replace(_last, seconds=seconds)


def is_strict(strict: bool | None) -> bool:
    """`strict`; None asks the environment variable JAXGDS_STRICT."""
    return os.environ.get("JAXGDS_STRICT", "0") not in ("", "0") if strict is None else strict


def check_strict(fallbacks: Mapping[str, str], strict: bool | None) -> None:
    """Raises FallbackError if there are `fallbacks` that `strict` (None: JAXGDS_STRICT) forbids."""
    if fallbacks and is_strict(strict):
        shown = "; ".join(f"{name}: {why}" for name, why in list(fallbacks.items())[:8])
        count = f"{len(fallbacks)} array{'s' if len(fallbacks) > 1 else ''}"
        raise FallbackError(f"{count} would fall back to Orbax, which strict forbids: {shown}")
