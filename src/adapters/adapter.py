"""What every adapter is: a frozen matrix, dense or packed, and trained tensors beside it.

An adapter takes the place of the matrix in its mixer, so that its parameters have the keys of RWKV-PEFT's files:
`blocks.0.att.key.lora_A`. They are stored in fp32 and used in the dtype of the activations; their gradients are summed
in fp32 and not rounded. What is kept for the backward is what `kept` names: never a matrix, never its product.

Adapters of matrices that take different mixes of one tensor compute at once, which is what methods named `joint_` do
for one or more of them: their small products are batched where operands lie side by side (`ops.products`).

Shape legend: n positions, in and out features of the matrix, r rank.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from src.model.casts import LayerCasts
from src.model.first_pass import FirstPass
from src.model.layers import Joint, Linear
from src.model.shape import Shape
from src.ops.node import Node, once
from src.quant import FrozenLinear

Kept = tuple[Tensor, ...]
"""What an adapter's parameters need of its input for their gradients."""

OfParameters = Callable[[Sequence[Kept]], list[tuple[Tensor, ...]]]
"""From that of each adapter to the gradients of its parameters, in their order."""


class Adapter(nn.Module, Joint):
    """y = W x + what the trained tensors add.

    Args:
        base: the matrix; it is frozen.
        parameters: fp32, by the names of `parameter_shapes`, on the matrix's device.

    Attributes:
        names: of the parameters, the last part of their keys.
        keeps_input: whether x itself is kept for the backward, beside `narrow_values` of it.
    """

    names: ClassVar[tuple[str, ...]]
    keeps_input: ClassVar[bool] = True

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
    def narrow_values(r: int) -> int:
        """Values per position that are kept between forward and backward, also by a layer that is computed again."""
        return 0

    @staticmethod
    def room_for(r: int) -> int:
        """Values that there is to be room for behind the rows of a matrix [out, in] and of its inputs, see Joint."""
        return 0

    @classmethod
    @abstractmethod
    def joint_kept(
        cls, adapters: Sequence[Any], inputs: Sequence[Tensor], known: Sequence[Tensor | None] = ()
    ) -> list[Kept]:
        """What is kept of each adapter's input [n, in], outside autograd.

        Args:
            known: what each one `remembers`, if that was asked before.
        """

    @classmethod
    @abstractmethod
    def joint_products(cls, adapters: Sequence[Any], inputs: Sequence[Tensor], kept: Sequence[Kept]) -> list[Tensor]:
        """y [n, out] of each adapter's input [n, in] and of what is kept of it, outside autograd."""

    @classmethod
    @abstractmethod
    def joint_gradients(cls, adapters: Sequence[Any], grads: Sequence[Tensor]) -> tuple[list[Tensor], OfParameters]:
        """From the gradients of y [n, out]: those of x [n, in], and a function that gives those of all parameters.

        It needs not x but what was kept of it, so that x can be computed between the two. Outside autograd.
        """

    def joins(self, others: Sequence[object]) -> bool:
        """Of one kind, and outside of a training that draws random numbers."""
        return all(type(other) is type(self) for other in others) and not (self.training and self.draws_random)

    @classmethod
    def joint(cls, matrices: Sequence[Any], inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """See Joint."""
        parameters = [parameter for adapter in matrices for parameter in adapter.trained()]
        results: tuple[Tensor, ...] = _Adapted.apply(tuple(matrices), *inputs, *parameters)
        return results

    def take_room(self) -> None:
        """See Joint: most do not."""

    def remember_with(self, layer: FirstPass) -> None:
        """From now on, a second pass over the layer may be given what the first one computed."""

    def remembers(self) -> Tensor | None:
        """See Linear."""
        return None

    def kept(self, x: Tensor, known: Tensor | None = None) -> Kept:
        """What is kept of x [n, in], without y."""
        return self.joint_kept([self], [x], [known])[0]

    def product(self, x: Tensor, kept: Kept) -> Tensor:
        """y [n, out] of x [n, in] and of what is kept of it, outside autograd."""
        return self.joint_products([self], [x], [kept])[0]

    def gradients(self, grad_output: Tensor) -> tuple[Tensor, Callable[[Kept], tuple[Tensor, ...]]]:
        """See `joint_gradients`; what the function takes is what `kept` gave."""
        (grad_x,), of_parameters = self.joint_gradients([self], [grad_output])
        return grad_x, lambda kept: of_parameters([kept])[0]

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
        (y,) = self.joint([self], [x])
        return y


class _Adapted(Node):
    """y of adapters that join, from their inputs and the parameters of all."""

    @staticmethod
    def forward(ctx: Any, adapters: tuple[Adapter, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        kind, inputs = type(adapters[0]), tensors[: len(adapters)]
        rows = [_rows_of(x) for x in inputs]
        kept = kind.joint_kept(adapters, rows)
        ctx.adapters, ctx.shapes = adapters, [x.shape for x in inputs]
        ctx.save_for_backward(*(tensor for each in kept for tensor in each))
        results = kind.joint_products(adapters, rows, kept)
        return tuple(y.view(*x.shape[:-1], -1) for y, x in zip(results, inputs, strict=True))

    @staticmethod
    @once
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        adapters, count = ctx.adapters, len(ctx.adapters)
        grad_inputs, of_parameters = type(adapters[0]).joint_gradients(adapters, [_rows_of(grad) for grad in grads])
        grad_inputs = [grad.view(shape) for grad, shape in zip(grad_inputs, ctx.shapes, strict=True)]
        needed = ctx.needs_input_grad[1 + count :]
        if not any(needed):
            return None, *grad_inputs, *(None for _ in needed)
        saved = ctx.saved_tensors
        each = len(saved) // count
        found = of_parameters([saved[begin : begin + each] for begin in range(0, len(saved), each)])
        gradients = (gradient for of_adapter in found for gradient in of_adapter)
        return None, *grad_inputs, *(g if need else None for g, need in zip(gradients, needed, strict=True))


def _rows_of(x: Tensor) -> Tensor:
    """[..., features] as [n, features]."""
    return x.reshape(-1, x.shape[-1])
