"""Round sizes that many batches share, so that steps of few shapes occur and can be recorded.

Padding comes after what counts, in segments of its own in packed rows, and has no target.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

PADDING_TOKEN = 0


@dataclass(frozen=True)
class Rounding:
    """To how many places a batch is filled up.

    Attributes:
        tokens: of so many tokens of a row; in a packed row of those of all roots, and of all that continue them.
        segments: of so many roots or continuations of a packed row.
        targets: of so many targets that count, as far as there are positions; the head is applied to no others.
    """

    tokens: Callable[[int], int]
    segments: Callable[[int], int]
    targets: Callable[[int], int]

    def padding(self, lengths: Sequence[int]) -> list[int]:
        """Lengths of the segments that fill these up: one takes the missing tokens, the others are empty."""
        missing = self.segments(len(lengths)) - len(lengths)
        tokens = sum(lengths)
        return [self.tokens(tokens) - tokens][:missing] + [0] * (missing - 1)


def shared_size(count: int, least: int, sizes: int) -> int:
    """The next size that many counts share: a multiple of `least`, of at most `sizes` between powers of two."""
    power_below = 1 << (count - 1).bit_length() >> 1 if count > 1 else 1
    grain = max(least, power_below // sizes)
    return ceil_div(count, grain) * grain


def ceil_div(dividend: int, divisor: int) -> int:
    """The quotient, rounded up."""
    return -(-dividend // divisor)


EXACT = Rounding(tokens=int, segments=int, targets=int)
"""Nothing is filled up."""

FEW_SHAPES = Rounding(
    # Padded tokens cost as much as others; targets only a row of the head, and segments next to nothing.
    tokens=lambda count: shared_size(count, least=128, sizes=8),
    segments=lambda count: shared_size(count + 1, least=8, sizes=2) if count else 0,  # one of them takes the padding
    targets=lambda count: shared_size(count, least=256, sizes=2),
)
