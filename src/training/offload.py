"""What the backward pass needs, kept in host memory instead of on the GPU: `--offload_activations 1`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

_SMALLEST_BYTES = 1 << 20


class KeptOnHost(saved_tensors_hooks):
    """A context in which tensors that autograd saves leave the GPU and come back when they are wanted.

    Copies go through pinned memory in the order of the stream, so nothing waits for the host. Parameters and what
    is smaller than 1 MiB stay where they are.
    """

    def __init__(self) -> None:
        super().__init__(_pack, _unpack)


def _leaves(tensor: Tensor) -> bool:
    trained = tensor.is_leaf and tensor.requires_grad
    return tensor.is_cuda and not trained and tensor.numel() * tensor.element_size() >= _SMALLEST_BYTES


def _pack(tensor: Tensor) -> Tensor | tuple[torch.device, Tensor]:
    if not _leaves(tensor):
        return tensor
    on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
    on_host.copy_(tensor, non_blocking=True)
    return tensor.device, on_host


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, on_host = packed
    back: Tensor = on_host.to(device, non_blocking=True)
    return back
