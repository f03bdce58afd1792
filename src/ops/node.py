"""What autograd functions here have in common: a cheap call, and no second derivative."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch.autograd.function import Function


class Node(Function):
    """An autograd function that no functorch transform (`vmap`, `grad` of `torch.func`) goes through.

    `Function.apply` looks for one at each call, which takes as long as half of the rest.
    """

    @classmethod
    def apply(cls, *arguments: Any) -> Any:
        """Runs forward and notes the node."""
        return super(Function, cls).apply(*arguments)  # type: ignore[misc]


def once(backward: Callable[..., Any]) -> Callable[..., Any]:
    """A backward that works on tensors alone and has no derivative itself.

    `torch.autograd.function.once_differentiable` refuses when that is asked for, this one when it could be: where a
    graph of the backward is to be made. It takes a tenth of the time.
    """

    @functools.wraps(backward)
    def checked(ctx: Any, *gradients: Any) -> Any:
        if torch.is_grad_enabled():
            raise RuntimeError("this operation has no second derivative")
        return backward(ctx, *gradients)

    return checked
