"""What a compressed KV cache stores: the settings, and where each token of a sequence lies."""

from dataclasses import dataclass
from typing import Literal, get_args


type ScaleMode = Literal["norm_preserving", "norm", "eden"]

BITS = (2, 3, 4, 8)
HEAD_DIMS = (64, 128, 256)
PAGE_SIZES = (16, 32, 64, 128)
SCALE_MODES: tuple[str, ...] = get_args(ScaleMode.__value__)


@dataclass(frozen=True)
class KVFormat:
    """Settings of a compressed cache; hashable, and static in every pytree that carries it.

    A token is a *sink* (the first `sinks`, kept in bf16), *packed* (`key_bits` and `value_bits`
    per coordinate and one bf16 scale per vector) or *recent* (the newest `window` to
    `window + page_size - 1`, kept in bf16). Tokens are packed a page at a time.

    key_bits, value_bits: bits per coordinate, one of 2, 3, 4, 8.
    window, sinks: tokens kept in bf16 at the end and at the start of each sequence.
    key_offset: subtract each head's mean key (of its first page) before quantising.
    seed: selects the random signs of the rotation, 0 <= seed < 2**64.
    scale_mode: what the scale of a vector preserves, see `quantize`.
    page_size: tokens per page, one of 16, 32, 64, 128.
    Raises ValueError for a setting outside these ranges.
    """

    key_bits: int = 4
    value_bits: int = 4
    window: int = 128
    sinks: int = 4
    key_offset: bool = True
    seed: int = 0
    scale_mode: ScaleMode = "norm_preserving"
    page_size: int = 64

    def __post_init__(self):
        check_bits(self.key_bits, "key_bits")
        check_bits(self.value_bits, "value_bits")
        check_seed(self.seed)
        check_scale_mode(self.scale_mode)
        if self.page_size not in PAGE_SIZES:
            raise ValueError(f"{self.page_size=} is not one of {PAGE_SIZES}")
        for name in ("window", "sinks"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} is negative; use 0 for none")

    @property
    def ring_slots(self) -> int:
        """Slots of the ring of recent tokens: a full window and one page that fills up."""
        return -(-(self.window + self.page_size) // self.page_size) * self.page_size

    def packed[N](self, length: N) -> N:
        """Packed tokens of a sequence of `length` tokens (an int or an integer array)."""
        over = length - self.sinks - self.window  # pyright: ignore[reportOperatorIssue]
        # over + |over| is twice max(over, 0), for a Python int as for a traced array.
        return (over + abs(over)) // (2 * self.page_size) * self.page_size

    def bytes_per_token(self, kv_heads: int, head_dim: int) -> float:
        """Bytes that a packed token takes: the codes of K and V and their two bf16 scales."""
        return kv_heads * ((self.key_bits + self.value_bits) * head_dim / 8 + 4)


def check_bits(bits: int, name: str = "bits") -> None:
    if bits not in BITS:
        raise ValueError(f"{name}={bits!r} is not one of {BITS}")


def check_head_dim(head_dim: int) -> None:
    if head_dim not in HEAD_DIMS:
        raise ValueError(f"{head_dim=} is not one of {HEAD_DIMS}; pad each head with zeros")


def check_seed(seed: int) -> None:
    if not 0 <= seed < 2**64:
        raise ValueError(f"{seed=} is not in [0, 2**64)")


def check_scale_mode(scale_mode: str) -> None:
    if scale_mode not in SCALE_MODES:
        raise ValueError(f"{scale_mode=} is not one of {SCALE_MODES}")
