"""One endless stream of batches, of which every rank takes its share.

The batches of a run follow each other pass after pass, each pass a permutation of the data that is a
function of (seed, pass), or the data's own order without a seed. Ranks take turns: step s of rank r is batch
s·world_size + r of the stream. So ranks share a pass without overlap, take equally many steps, and n ranks see what one
rank sees in n steps.
Nothing is dropped or repeated: the last batch of a pass may have fewer rows, and a step in which a pass
ends takes its other batches from the next pass.

An epoch is a number of steps of that stream. One pass means as many as it takes to see all data, rounded
up to whole optimizer steps; the next epoch goes on where this one ended.
"""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from typing import TYPE_CHECKING, Generic, TypeVar

import numpy as np

from src.data.documents import Positions
from src.data.packing import pass_generator
from src.data.rounding import EXACT, Rounding, ceil_div
from src.errors import UserError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

BatchT = TypeVar("BatchT", bound="DataclassInstance")
"""A dataclass with a `step_weight`."""
MadeT = TypeVar("MadeT")


class PassDataset(ABC, Generic[BatchT]):
    """Every batch of a run, by its step: `dataset[step]` is a function of step and the constructor's arguments alone.

    Steps count batches of this rank from the start of the run, without end; `len` is an epoch.

    Args:
        batches_per_pass: of all ranks together.
        rank: of this process, among `world_size`.
        world_size: processes that train on batches of their own.
        epoch_steps: batches of an epoch on each rank; 0 means one pass.
        accumulate: batches of an optimizer step on each rank; an epoch is rounded up to whole ones.
    """

    def __init__(
        self, batches_per_pass: int, *, rank: int = 0, world_size: int = 1, epoch_steps: int = 0, accumulate: int = 1
    ) -> None:
        assert accumulate >= 1
        assert epoch_steps >= 0
        assert 0 <= rank < world_size
        self.batches_per_pass = batches_per_pass
        self._rank = rank
        self._world_size = world_size
        self._batches_per_step = accumulate * world_size
        self._epoch_steps = ceil_div(epoch_steps or ceil_div(batches_per_pass, world_size), accumulate) * accumulate
        # Two are kept, because an optimizer step may begin in one pass and end in the next.
        self._pass = lru_cache(maxsize=2)(self._divide)
        self._weights_of_step = lru_cache(maxsize=2)(self._weigh)

    @abstractmethod
    def _divide(self, pass_number: int) -> list[Positions]:
        """The int64 indices that each batch of a pass is made of, over all ranks."""

    @abstractmethod
    def _batch(self, number: int, rounding: Rounding) -> BatchT:
        """The batch with this number, all ranks counted on."""

    @abstractmethod
    def _weight(self, number: int) -> int:
        """What that batch weighs against the others of its optimizer step."""

    @abstractmethod
    def _positions_in(self, number: int) -> int:
        """Positions that the batch with this number is computed at, padding included."""

    @property
    @abstractmethod
    def tokens_per_pass(self) -> int:
        """Of all batches of a pass, padding not counted."""

    @property
    def tokens_per_step(self) -> float:
        """Of an optimizer step on all ranks, in the mean of a pass, padding not counted."""
        return self.tokens_per_pass / self.batches_per_pass * self._batches_per_step

    def positions_of(self, step: int) -> int:
        """Positions that the batch of a step is computed at, padding included, before it is filled up to few shapes."""
        return self._positions_in(step * self._world_size + self._rank)

    def largest_step(self, steps: int) -> int:
        """The first of so many steps whose batch has most positions."""
        return max(range(steps), key=self.positions_of)

    def statements(self) -> tuple[str, ...]:
        """What the user should know of steps and passes, one sentence each."""
        if self._batches_per_step <= self.batches_per_pass:
            return ()
        times = self._batches_per_step / self.batches_per_pass
        ways = "--accumulate_grad_batches" if self._world_size == 1 else "--accumulate_grad_batches or --devices"
        return (
            f"warning: an optimizer step takes {self._batches_per_step} micro-batches and a pass over the data has "
            f"{self.batches_per_pass}: every step sees the data {times:.3g} times; lower {ways}.",
        )

    def __len__(self) -> int:
        return self._epoch_steps

    def __getitem__(self, step: int) -> BatchT:
        return self.rounded(step, EXACT)

    def rounded(self, step: int, rounding: Rounding) -> BatchT:
        """The batch of a step, filled up to few shapes or not at all."""
        number = step * self._world_size + self._rank
        place = number % self._batches_per_step
        whole = self._weights_of_step(number - place)
        weight = self._weight(number) * self._batches_per_step / whole
        return replace(self._batch(number, rounding), step_weight=weight)

    def _weigh(self, first: int) -> int:
        """What all batches of an optimizer step weigh, from the number of its first."""
        return sum(self._weight(first + other) for other in range(self._batches_per_step))

    def _indices(self, number: int) -> Positions:
        """What the batch with this number is made of."""
        pass_number, place = self._place(number)
        return self._pass(pass_number)[place]

    def _place(self, number: int) -> tuple[int, int]:
        """(pass, place in it) of a batch."""
        return divmod(number, self.batches_per_pass)


class Lookahead(Generic[MadeT]):
    """What a run works on, step after step; what comes next can be made while the device works.

    Every iteration is an epoch and goes on where the last ended; the first is what is left of one.

    Args:
        make: from a step, counted from 0, to what it works on.
        epoch_steps: steps of an iteration.
        first_step: where to begin.
    """

    def __init__(self, make: Callable[[int], MadeT], epoch_steps: int, first_step: int = 0) -> None:
        self._make = make
        self._epoch_steps = epoch_steps
        self._next_step = first_step
        self._ahead: MadeT | None = None

    def __len__(self) -> int:
        return self._epoch_steps

    def __iter__(self) -> Iterator[MadeT]:
        for _ in range(self._epoch_steps - self._next_step % self._epoch_steps):
            yield self._next()

    def look_ahead(self, then: Callable[[MadeT], MadeT]) -> None:
        """Makes what comes next, and does with it what else can be done before its turn.

        What is wrong with it is raised when its turn comes, if it does.
        """
        with contextlib.suppress(UserError, OSError):
            self._ahead = then(self._make(self._next_step))

    @property
    def ahead(self) -> MadeT | None:
        """What comes next, if it was made."""
        return self._ahead

    def _next(self) -> MadeT:
        made = self._make(self._next_step) if self._ahead is None else self._ahead
        self._ahead = None
        self._next_step += 1
        return made


def shuffled_batches(indices: Positions, batch_size: int, seed: int | None, pass_number: int) -> list[Positions]:
    """int64 indices in the order of a pass, `batch_size` at a time; the last batch may have fewer."""
    order = pass_generator(seed, pass_number).permutation(indices)
    return np.split(order, range(batch_size, len(order), batch_size))


def listed(numbers: Sequence[int]) -> str:
    """The first eight for a message, and how many more."""
    shown = ", ".join(map(str, numbers[:8]))
    return f"{shown} and {len(numbers) - 8} more" if len(numbers) > 8 else shown
