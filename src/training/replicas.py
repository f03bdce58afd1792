"""Several processes that each have everything, and average their gradients: for what DeepSpeed's engine cannot take.

Layers that take turns are other tensors every so often, and updates in the backward are over before an engine sees a
gradient. Here nothing is wrapped or flattened: every process computes its own micro-batches, gradients are averaged
before anything looks at them, and so all take one step.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed
from pytorch_lightning.strategies import DDPStrategy
from torch import Tensor

_OWN_MESSAGE_VALUES = 1 << 20
"""A gradient of so many values travels as it is; smaller ones of a dtype travel together."""


class Replicas(DDPStrategy):
    """Lightning's processes and their group, without the wrapper that would keep to the parameters it saw first."""

    def configure_ddp(self) -> None:
        """Leaves the module as it is, which averages gradients itself."""


def average(gradients: Sequence[Tensor]) -> None:
    """Replaces gradients by their means over all processes, in place and in their dtypes; alone, they are left.

    Args:
        gradients: contiguous; as many, as large and in the same order in every process.
    """
    if not (torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1):
        return
    small: dict[torch.dtype, list[Tensor]] = {}
    for gradient in gradients:
        if gradient.numel() < _OWN_MESSAGE_VALUES:
            small.setdefault(gradient.dtype, []).append(gradient)
        else:
            _average_one(gradient)
    for together in small.values():
        flat = torch.cat([gradient.reshape(-1) for gradient in together])
        _average_one(flat)
        parts = flat.split([gradient.numel() for gradient in together])
        torch._foreach_copy_(together, [part.view(own.shape) for part, own in zip(parts, together, strict=True)])


def _average_one(values: Tensor) -> None:
    torch.distributed.all_reduce(values)
    values.div_(torch.distributed.get_world_size())
