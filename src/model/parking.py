"""Tensors that wait in host memory and are copied there and back beside what is computed."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

_MOST_LEAVING = 2


@dataclass(frozen=True)
class Coming:
    """A tensor on its way back.

    Attributes:
        tensor: where it arrives.
        done: when it has; None where there was no way to go.
    """

    tensor: Tensor
    done: torch.cuda.Event | None = None

    def arrived(self) -> Tensor:
        """The tensor, for work that is issued from now on; to be called in any case, or its memory is used too soon."""
        if self.done is not None:
            torch.cuda.current_stream(self.tensor.device).wait_event(self.done)
        return self.tensor


class Parking:
    """Host memory beside a device; with a GPU pinned, and copies go on a stream of their own.

    All calls are to come from one stream. Nothing here waits for the host.

    Args:
        device: where tensors come from. Those of a CPU stay as they are.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._leaving: deque[tuple[Tensor, torch.cuda.Event]] = deque()

    def park(self, tensor: Tensor) -> Tensor:
        """Its copy on the host, not to be read there before `settle`; the tensor must not be written to meanwhile.

        Of those that are still being copied only the last few keep their memory on the device.
        """
        if self._stream is None:
            return tensor
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            on_host.copy_(tensor, non_blocking=True)
        self._leaving.append((tensor, self._stream.record_event()))
        self._settle(_MOST_LEAVING)
        return on_host

    def settle(self) -> None:
        """Makes later work on the device wait for what is leaving it."""
        self._settle(0)

    def fetch(self, on_host: Tensor, there: Tensor | None = None) -> Coming:
        """Begins to copy what `park` gave back to the device, as soon as what was issued so far is done.

        Args:
            there: where it is to arrive; None: in memory of its own.
        """
        if self._stream is None:
            return Coming(on_host if there is None else there.copy_(on_host))
        if there is None:
            there = torch.empty(on_host.shape, dtype=on_host.dtype, device=self._device)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            there.copy_(on_host, non_blocking=True)
        return Coming(there, self._stream.record_event())

    def _settle(self, most: int) -> None:
        while len(self._leaving) > most:
            _, done = self._leaving.popleft()
            torch.cuda.current_stream(self._device).wait_event(done)
