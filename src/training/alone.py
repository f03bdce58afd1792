"""The communication of a run of one process: none.

DeepSpeed's engine reduces gradients and asks for norms through collectives even when it is alone. NCCL keeps
over 900 MiB of a GPU for that (H200, two groups), gloo sends every gradient to the host and back. For a group
of one process each collective's result is its input, so here nothing moves.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

BACKEND = "alone"


class _Done(dist.Work):
    """A collective that was complete when it was called."""

    def __init__(self, result: Any) -> None:
        super().__init__()
        self._future: torch.futures.Future[Any] = torch.futures.Future()
        self._future.set_result(result)

    def wait(self, timeout: Any = None) -> bool:
        return True

    def get_future(self) -> torch.futures.Future[Any]:
        return self._future


class AloneGroup(dist.ProcessGroup):
    """A process group of one; names and arguments are those torch.distributed calls."""

    def __init__(self, rank: int, size: int) -> None:
        super().__init__(rank, size)  # type: ignore[call-arg]
        assert size == 1

    def getBackendName(self) -> str:
        return BACKEND

    def allreduce(self, tensors: list[Tensor], opts: Any = None) -> _Done:  # type: ignore[override]
        return _Done(tensors)

    def broadcast(self, tensors: list[Tensor], opts: Any = None) -> _Done:  # type: ignore[override]
        return _Done(tensors)

    def reduce(self, tensors: list[Tensor], opts: Any = None) -> _Done:  # type: ignore[override]
        return _Done(tensors)

    def barrier(self, opts: Any = None) -> _Done:
        return _Done(None)

    def allgather(  # type: ignore[override]
        self, outputs: list[list[Tensor]], inputs: list[Tensor], opts: Any = None
    ) -> _Done:
        for (output,), given in zip(outputs, inputs, strict=True):
            output.copy_(given)
        return _Done(outputs)

    def all_gather_single(self, output: Tensor, given: Tensor, opts: Any = None) -> _Done:
        output.view_as(given).copy_(given)
        return _Done(output)

    def reduce_scatter_single(self, output: Tensor, given: Tensor, opts: Any = None) -> _Done:
        output.view_as(given).copy_(given)
        return _Done(output)

    # Their names before torch 2.13.
    _allgather_base = all_gather_single  # type: ignore[assignment]
    _reduce_scatter_base = reduce_scatter_single  # type: ignore[assignment]


def register() -> str:
    """Makes the backend known to torch.distributed, once; returns its name."""
    if BACKEND.upper() not in dist.Backend.__dict__:
        dist.Backend.register_backend(
            BACKEND, lambda store, rank, size, timeout: AloneGroup(rank, size), devices=["cpu", "cuda"]
        )
    return BACKEND
