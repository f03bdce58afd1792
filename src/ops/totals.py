"""Sums over tiles of rows, the second half of a parameter's gradient: of a layer by one launch where they can wait.

Inside `totals_together` what `total_of_tiles` returns is empty until the context ends.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from torch import Tensor

from src.ops.kernels import Kernel

MOST_TOGETHER = 8
"""Of one launch."""
_VALUES = 128
"""Of a total, that a block of threads sums."""
TOTALS = Kernel("elementwise.cu", "elementwise::totals_kernel", f"({'PP' * MOST_TOGETHER}{'iii' * MOST_TOGETHER})")


class _Waiting(threading.local):
    """Pairs of sums and totals of this thread's innermost context; None outside of all."""

    pairs: list[tuple[Tensor, Tensor]] | None = None


_waiting = _Waiting()


@contextlib.contextmanager
def totals_together(together: bool = True) -> Iterator[None]:
    """A context at whose end totals are summed up; nothing in it may read them: no operation, and no hook of a tensor
    whose gradient they are. `together` False: they do not wait."""
    before, _waiting.pairs = _waiting.pairs, [] if together else None
    try:
        yield
        _launch(_waiting.pairs or [])
    finally:
        _waiting.pairs = before


def total_of_tiles(sums: Tensor) -> Tensor:
    """fp32 [tiles, ...], contiguous, a multiple of 4 values each -> their sum [...]."""
    if not sums.shape[0]:
        return sums.sum(0)
    total = sums.new_empty(sums.shape[1:])
    if _waiting.pairs is None:
        _launch([(sums, total)])
    else:
        _waiting.pairs.append((sums, total))
    return total


def _launch(pairs: list[tuple[Tensor, Tensor]]) -> None:
    for first in range(0, len(pairs), MOST_TOGETHER):
        sums, totals = zip(*pairs[first : first + MOST_TOGETHER], strict=True)
        counts = [total.numel() for total in totals]
        ends = [0]
        for count in counts:
            ends.append(ends[-1] - (-count // _VALUES))
        absent = MOST_TOGETHER - len(sums)
        nothing, zeros = absent * [None], absent * [0]
        tiles = (each.shape[0] for each in sums)
        sizes = (*tiles, *zeros, *counts, *zeros, *ends[1:], *absent * [ends[-1]])
        TOTALS(totals[0], ends[-1], 256, *sums, *nothing, *totals, *nothing, *sizes)
