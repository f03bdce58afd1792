"""Numbers of a step, read while the device goes on with what was issued after them."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator

import torch
from torch import Tensor


class Aside:
    """A place in the work that is issued to a device, from which it can be looked at what had been computed by then."""

    def __init__(self) -> None:
        self._place: tuple[torch.device, torch.cuda.Event] | None = None

    def mark(self, device: torch.device) -> None:
        """It is here, behind all that has been issued."""
        if device.type == "cuda":
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(device))
            self._place = device, event

    @contextlib.contextmanager
    def reading(self) -> Iterator[None]:
        """A context in which tensors from before the place are read; what was issued behind it is not waited for."""
        if self._place is None:
            yield
            return
        device, event = self._place
        stream = _stream_beside(device)
        with torch.cuda.stream(stream):
            stream.wait_event(event)
            yield


class Sight(Aside):
    """Loss and norm of a step, by which an optimizer decides on the device whether the step is taken.

    Attributes:
        loss: 0-d, of this process's share of a step, to be said before it.
    """

    def __init__(self) -> None:
        super().__init__()
        self.loss = torch.tensor(math.nan)
        self._numbers = torch.full((2,), math.nan)

    def note(self, numbers: Tensor) -> None:
        """Takes note of a step's fp32 [2]: its loss and the norm of its gradient, of all processes."""
        self._numbers = numbers
        self.mark(numbers.device)

    def read(self) -> tuple[float, float]:
        """What was noted last; waits until it is computed."""
        with self.reading():
            loss, norm = self._numbers.tolist()
        return loss, norm


@functools.cache
def _stream_beside(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)
