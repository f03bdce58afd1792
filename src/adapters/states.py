"""State tuning: what is trainable, and the state as a plain dict of tensors.

The trained tensors are the model's `blocks.{i}.att.time_state` alone, kept in fp32 whatever the
computation's dtype. Another way of tuning is another file like this one.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from src.model.parameters import ModelShape, state_key
from src.model.rwkv6 import RWKV6


def state_names(shape: ModelShape) -> list[str]:
    """Names of the trained parameters, in layer order."""
    return [state_key(i) for i in range(shape.n_layer)]


def state_tensors(model: RWKV6) -> dict[str, Tensor]:
    """The model's start states, [H, value, key] fp32, detached, by file key."""
    parameters = dict(model.named_parameters())
    return {name: parameters[name].detach() for name in state_names(model.shape)}


def set_states(model: RWKV6, states: Mapping[str, Tensor]) -> None:
    """Copies start states, given by file key, into the model."""
    with torch.no_grad():
        for name, tensor in state_tensors(model).items():
            tensor.copy_(states[name])
