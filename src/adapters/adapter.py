"""What every adapter is: a frozen matrix, dense or packed, and trained tensors beside it.

An adapter takes the place of the matrix in its mixer, so that its parameters have the keys of RWKV-PEFT's files:
`blocks.0.att.key.lora_A`. They are stored in fp32 and used in the dtype of the activations; their gradients are summed
in fp32 and not rounded. What is kept for the backward is what `kept` names: never a matrix, never its product.

Shape legend: n positions, in and out features of the matrix, r rank.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from src.model.casts import LayerCasts
from src.model.layers import Linear
from src.model.shape import Shape
from src.ops.node import Node, once
from src.quant import FrozenLinear

Kept = tuple[Tensor, ...]
"""What an adapter's parameters need of its input for their gradients."""

OfParameters = Callable[[Kept], tuple[Tensor, ...]]
"""From that to the gradients of the parameters, in their order."""


class Adapter(nn.Module, ABC):
    """y = W x + what the trained tensors add.

    Args:
        base: the matrix; it is frozen.
        parameters: fp32, by the names of `parameter_shapes`, on the matrix's device.

    Attributes:
        names: of the parameters, the last part of their keys.
    """

    names: ClassVar[tuple[str, ...]]

    def __init__(self, base: Linear | FrozenLinear, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        assert tuple(parameters) == self.names
        self.base = base.requires_grad_(False)
        for name, values in parameters.items():
            self.register_parameter(name, nn.Parameter(values))
        self._casts: LayerCasts | None = None
        self._first_cast = 0

    @staticmethod
    @abstractmethod
    def parameter_shapes(r: int, out_features: int, in_features: int) -> dict[str, Shape]:
        """Name -> shape of the parameters beside a matrix [out, in]."""

    @staticmethod
    @abstractmethod
    def kept_values(r: int, in_features: int) -> int:
        """Values per position that are kept between forward and backward."""

    @abstractmethod
    def product(self, x: Tensor) -> tuple[Tensor, Kept]:
        """x [n, in] -> (y [n, out], what is kept), outside autograd."""

    @abstractmethod
    def kept(self, x: Tensor) -> Kept:
        """What is kept of x [n, in], without y."""

    @abstractmethod
    def gradients(self, grad_output: Tensor) -> tuple[Tensor, OfParameters]:
        """From the gradient of y [n, out]: that of x [n, in], and a function that gives those of the parameters.

        It needs not x but what was kept of it, so that x can be computed between the two. Outside autograd.
        """

    @property
    def draws_random(self) -> bool:
        """Whether two calls in training differ."""
        return False

    def trained(self) -> list[nn.Parameter]:
        """The parameters, in the order of their gradients."""
        own: Any = self._parameters  # an attribute of a module takes ten times as long
        return [own[name] for name in self.names]

    def cast_with(self, layer: LayerCasts) -> None:
        """From now on, the parameters are cast with others of their layer."""
        self._casts, self._first_cast = layer, layer.add(self)

    def used(self, name: str, dtype: torch.dtype) -> Tensor:
        """A parameter in the dtype of the activations, outside autograd; see `LayerCasts.cast`."""
        own: Any = self._parameters
        parameter: nn.Parameter = own[name]
        if self._casts is None or parameter.dtype is dtype:
            return parameter.to(dtype)
        return self._casts.cast(self._first_cast + self.names.index(name), dtype)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] -> [..., out] in x's dtype."""
        y: Tensor = _Adapted.apply(x, self, *self.trained())
        return y

    def rows_of(self, x: Tensor) -> Tensor:
        """[..., features] as [n, features]."""
        return x.reshape(-1, x.shape[-1])


class _Adapted(Node):
    @staticmethod
    def forward(ctx: Any, x: Tensor, adapter: Adapter, *parameters: Tensor) -> Tensor:
        y, kept = adapter.product(adapter.rows_of(x))
        ctx.adapter, ctx.shape = adapter, x.shape
        ctx.save_for_backward(*kept)
        return y.view(*x.shape[:-1], -1)

    @staticmethod
    @once
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        grad_x, of_parameters = ctx.adapter.gradients(ctx.adapter.rows_of(grad))
        gradients = of_parameters(ctx.saved_tensors) if any(ctx.needs_input_grad[2:]) else ()
        wanted = zip(ctx.needs_input_grad[2:], gradients or (None,) * len(ctx.adapter.names), strict=True)
        return grad_x.view(ctx.shape), None, *(gradient if need else None for need, gradient in wanted)
