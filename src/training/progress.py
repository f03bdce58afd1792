"""Where in its run a process begins."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Start:
    """How much of the run was done before this process began: Lightning counts from 0.

    Attributes:
        steps: optimizer steps.
        epochs: whole epochs.
        batches: micro-batches of the epoch that goes on.
    """

    steps: int = 0
    epochs: int = 0
    batches: int = 0

    @staticmethod
    def after(steps: int, steps_per_epoch: int, accumulate: int) -> Start:
        """Where a run is after so many optimizer steps."""
        epochs, rest = divmod(steps, steps_per_epoch)
        return Start(steps, epochs, rest * accumulate)


BEGINNING = Start()
