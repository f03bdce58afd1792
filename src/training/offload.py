"""What the backward pass needs, kept in host memory instead of on the GPU: `--offload_activations 1`."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.multiprocessing.reductions import StorageWeakRef

_SMALLEST_BYTES = 1 << 20


class KeptOnHost(saved_tensors_hooks):
    """A context in which tensors that autograd saves leave the GPU and come back when they are wanted.

    Copies go through pinned memory in the order of the stream, so nothing waits for the host. The model's own
    parameters, views of them, and what is smaller than 1 MiB stay where they are. What two neighbours save, one as
    its result and one as its input, is copied once.
    """

    def __init__(self, model: nn.Module) -> None:
        stays = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
        super().__init__(partial(_pack, stays=stays, sent={}), _unpack)


def _leaves(tensor: Tensor) -> bool:
    return tensor.is_cuda and tensor.numel() * tensor.element_size() >= _SMALLEST_BYTES


Sent = dict[tuple[Any, ...], tuple[StorageWeakRef, tuple[torch.device, Tensor]]]


def _pack(tensor: Tensor, stays: Collection[int], sent: Sent) -> Tensor | tuple[torch.device, Tensor]:
    storage = tensor.untyped_storage()
    if not _leaves(tensor) or storage.data_ptr() in stays:
        return tensor.detach()  # a node's own result would keep the node
    for key, (memory, _) in list(sent.items()):
        if memory.expired():
            del sent[key]
    # The weak reference keeps its memory's address from being used again.
    memory = StorageWeakRef(storage)
    key = (memory.cdata, tensor.storage_offset(), tensor.shape, tensor.stride(), tensor.dtype, tensor._version)
    if key not in sent:
        on_host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        on_host.copy_(tensor, non_blocking=True)
        sent[key] = memory, (tensor.device, on_host)
    return sent[key][1]


def _unpack(packed: Any) -> Tensor:
    if isinstance(packed, Tensor):
        return packed
    device, on_host = packed
    back: Tensor = on_host.to(device, non_blocking=True)
    return back
