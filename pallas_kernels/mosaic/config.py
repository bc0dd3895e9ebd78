"""Tunings of the Mosaic GPU kernels."""

import math
import tomllib
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Config:
    """How decode attention is cut up; every choice gives the same result up to rounding.

    splits: parts in which each sequence's pages are divided, a thread block each; None chooses.
    blocks: thread blocks that the device runs at once where four fit a multiprocessor, to choose
    by. stages: pages in flight per block. Raises ValueError for a number that is not positive.
    """

    splits: int | None = None
    blocks: int = 132 * 4
    stages: int = 3

    def __post_init__(self):
        for name in ("splits", "blocks", "stages"):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} is not positive")

    @classmethod
    def read(cls, path: str | Path) -> "Config":
        """The [decode] table of a TOML file such as configs/kernels/h100.toml."""
        return cls(**tomllib.loads(Path(path).read_text())["decode"])

    def splits_for(self, sequences: int, pages: int) -> int:
        """Splits for `sequences` (batch * kv_heads) of up to `pages` pages each.

        As few as leave at most a tenth of the device idle, a few pages for each at least.
        """
        if self.splits is not None:
            return self.splits
        most = max(1, min(pages // 4, 2 * math.ceil(self.blocks / sequences)))

        def busy(splits: int) -> float:
            rounds = sequences * splits / self.blocks
            return rounds / math.ceil(rounds)

        enough = [splits for splits in range(1, most + 1) if busy(splits) >= 0.9]
        return enough[0] if enough else max(range(1, most + 1), key=busy)


@dataclass(frozen=True)
class EncodeConfig:
    """How an append is cut up; every choice gives the same result.

    tiles: the most tiles of 64 tokens that a warpgroup encodes, one after the other. warpgroups: of
    a thread block; 4 leave each thread 128 registers, fewer leave more. blocks: thread blocks that
    the device needs at least. Raises ValueError for a number that is not positive.
    """

    tiles: int = 4
    warpgroups: int = 1
    blocks: int = 132 * 12

    def __post_init__(self):
        for name in ("tiles", "warpgroups", "blocks"):
            if (value := getattr(self, name)) < 1:
                raise ValueError(f"{name}={value} is not positive")

    @classmethod
    def read(cls, path: str | Path) -> "EncodeConfig":
        """The [encode] table of a TOML file such as configs/kernels/h100.toml."""
        return cls(**tomllib.loads(Path(path).read_text())["encode"])
