"""What a layer's first pass computes that its second one, in the backward, would compute again."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


class FirstPass:
    """Narrow results, each with a number: noted while a first pass runs, and known while the second one does.

    Attributes:
        count: of the numbers.
    """

    def __init__(self) -> None:
        self.count = 0
        self._results: list[Tensor | None] | None = None

    def add(self) -> int:
        """A number for one more result, which every pass uses once."""
        self.count += 1
        return self.count - 1

    @contextlib.contextmanager
    def of(self, known: Sequence[Tensor]) -> Iterator[list[Tensor]]:
        """A context for one pass, the first without anything known; its value holds all results at the end."""
        results: list[Any] = [*known] or [None] * self.count
        self._results = results
        try:
            yield results
        finally:
            self._results = None

    def known(self, number: int) -> Tensor | None:
        """A result of the first pass in the second one, else None."""
        return None if self._results is None else self._results[number]

    def note(self, number: int, result: Tensor) -> None:
        """Keeps a result if this is a first pass."""
        if self._results is not None:
            self._results[number] = result
