"""Trained tensors in the dtype of the activations, those of a layer cast at once.

Adapters are small and many: cast one by one at every use, a step casts a thousand times, and a GPU that trains a small
model waits for that. Layers take turns with one buffer, which is as large as one layer's tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from src.ops.cast import caster
from src.ops.node import Node, once
from src.ops.products import outer_sum

_ALIGNMENT_VALUES = 64
"""Where a tensor begins in the buffer: 128 bytes in 16 bits, which matrix products like."""


class HasTrained(Protocol):
    """What has tensors to cast."""

    def trained(self) -> Sequence[Tensor]:
        """The tensors as they are now, always as many and of the same shapes."""
        ...


class CastBuffer:
    """The buffer and whose tensors it holds.

    Values are those of the last `forget`: it is to be called whenever tensors may have changed, as a model does at the
    start of each forward. All layers that share a buffer run on one stream.
    """

    def __init__(self) -> None:
        self._values: Tensor | None = None
        self._holder: LayerCasts | None = None

    def forget(self) -> None:
        """Takes the buffer's contents for unknown."""
        self._holder = None

    def holds(self, layer: LayerCasts, dtype: torch.dtype) -> bool:
        """Whether it holds this layer's tensors in this dtype."""
        return self._holder is layer and self._values is not None and self._values.dtype is dtype

    def take(self, layer: LayerCasts, numel: int, like: Tensor, dtype: torch.dtype) -> Tensor:
        """The buffer for a layer that will fill it, at least [numel], on `like`'s device."""
        values = self._values
        if values is None or values.numel() < numel or values.dtype is not dtype or values.device != like.device:
            values = self._values = torch.empty(numel, dtype=dtype, device=like.device)
        self._holder = layer
        return values


class LayerCasts:
    """The trained tensors beside a layer's matrices."""

    def __init__(self, buffer: CastBuffer) -> None:
        self._buffer = buffer
        self._owners: list[HasTrained] = []
        self._elsewhere: list[tuple[int, Tensor]] = []
        self._views: list[Tensor] = []
        self._filled: Tensor | None = None  # what the views are of
        self._addresses: list[int] = []  # of what was cast there last
        self._cast: Callable[[], None] = lambda: None

    def add(self, owner: HasTrained) -> int:
        """Takes an owner's tensors in; the number of the first of them."""
        first = len(self._tensors())
        self._owners.append(owner)
        self._filled = None
        self._buffer.forget()
        return first

    def cast_to(self, number: int, place: Tensor) -> None:
        """From now on, a tensor is cast to this place, too, which may be strided: whenever the layer's are."""
        self._elsewhere.append((number, place))
        self._addresses = []
        self._buffer.forget()

    def cast(self, number: int, dtype: torch.dtype) -> Tensor:
        """A tensor in this dtype, outside autograd: to be used at once, as another layer's overwrite it."""
        if not self._buffer.holds(self, dtype):
            self._fill(dtype)
        return self._views[number]

    def _fill(self, dtype: torch.dtype) -> None:
        tensors = self._tensors()
        begins = [0]
        for tensor in tensors:
            begins.append(begins[-1] + -(-tensor.numel() // _ALIGNMENT_VALUES) * _ALIGNMENT_VALUES)
        values = self._buffer.take(self, begins[-1], tensors[0], dtype)
        addresses = [tensor.data_ptr() for tensor in tensors]
        if self._filled is values and addresses == self._addresses:
            return self._cast()
        if self._filled is not values:
            self._views = [
                values[begin : begin + tensor.numel()].view(tensor.shape)
                for begin, tensor in zip(begins, tensors, strict=False)
            ]
            self._filled = values
        sources = [*tensors, *(tensors[number] for number, _ in self._elsewhere)]
        self._addresses = addresses
        self._cast = caster(sources, [*self._views, *(place for _, place in self._elsewhere)])
        self._cast()

    def _tensors(self) -> list[Tensor]:
        return [tensor for owner in self._owners for tensor in owner.trained()]


class WideProduct(Node):
    """x W + b with W [in, out] and b stored wider than x, whose gradients are summed in their own dtype.

    Arguments: x [..., in], W, b [..., out] or None, and functions that give W and b in x's dtype: they are called in
    the backward again, so that no cast lives until then.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        narrow_weight: Callable[[], Tensor],
        narrow_bias: Callable[[], Tensor],
    ) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        ctx.save_for_backward(rows)
        ctx.shape, ctx.bias_shape, ctx.narrow_weight = x.shape, None if bias is None else bias.shape, narrow_weight
        w = narrow_weight()
        y = rows @ w if bias is None else torch.addmm(narrow_bias().view(-1), rows, w)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (rows,) = ctx.saved_tensors
        grad = grad.reshape(-1, grad.shape[-1])
        of_x, of_weight, of_bias, *_ = ctx.needs_input_grad
        grad_x = (grad @ ctx.narrow_weight().t()).view(ctx.shape) if of_x else None
        grad_weight = outer_sum(rows, grad) if of_weight else None
        grad_bias = grad.sum(0, dtype=torch.float32).view(ctx.bias_shape) if of_bias else None
        return grad_x, grad_weight, grad_bias, None, None
