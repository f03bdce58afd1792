"""Parts of a layer that keep only their input and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


class Recompute(Enum):
    """What a layer computes again in the backward pass instead of keeping it.

    NOTHING keeps every tensor the backward needs. INPUTS computes the norms and the mixers' inputs again,
    which is cheap and saves most of the memory. ALL keeps only what enters the layer.
    """

    NOTHING = "nothing"
    INPUTS = "inputs"
    ALL = "all"


class Recomputed:
    """Calls a function of one tensor and keeps nothing of it but that tensor.

    The first pass runs without autograd, so that operators need not prepare for a backward. The second, in the
    backward pass, gives the gradients of the tensor and of every trainable parameter of `modules`.

    Args:
        modules: all modules whose parameters the function may use.
        unused: names of parameters in them that it does not use.
    """

    def __init__(self, *modules: nn.Module, unused: tuple[str, ...] = ()) -> None:
        self._modules_used = modules
        self._unused = unused
        self._trainable: list[tuple[nn.Module, str]] | None = None

    def __call__(
        self, function: Callable[[Tensor], tuple[Tensor, ...]], x: Tensor, *, draws_random: bool = False
    ) -> tuple[Tensor, ...]:
        """x -> function(x), a tuple of tensors; `draws_random` if the second pass must draw the same numbers."""
        if draws_random:
            function = _Redrawn(function, x.device)
        outputs: tuple[Tensor, ...] = _Again.apply(function, x, *self._parameters_used())
        return outputs

    def _parameters_used(self) -> list[Tensor]:
        """Looked up by name at each call: a caller may have put other tensors in the parameters' places."""
        if self._trainable is None:
            self._trainable = [
                (module, name)
                for used in self._modules_used
                for module in used.modules()
                for name, parameter in module.named_parameters(recurse=False)
                if parameter.requires_grad and name not in self._unused
            ]
        return [getattr(module, name) for module, name in self._trainable]


class _Redrawn:
    """A function of one tensor that draws the same random numbers at every call."""

    def __init__(self, function: Callable[[Tensor], tuple[Tensor, ...]], device: torch.device) -> None:
        self._function = function
        self._device = device
        self._first = True

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        on_gpu = self._device.type == "cuda"
        if self._first:
            self._first = False
            self._drawn_from = (torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_gpu else None)
            return self._function(x)
        with torch.random.fork_rng([self._device] if on_gpu else []):
            on_host, on_device = self._drawn_from
            torch.set_rng_state(on_host)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self._device)
            return self._function(x)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Callable[..., Any], x: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        ctx.function = function
        ctx.save_for_backward(x, *parameters)
        outputs: tuple[Tensor, ...] = function(x)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        x, *parameters = ctx.saved_tensors
        with torch.enable_grad():
            x = x.detach().requires_grad_(ctx.needs_input_grad[1])
            outputs = ctx.function(x)
        asked = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
        wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in asked], wanted, [gradient for _, gradient in asked], allow_unused=True
        )
        by_tensor = iter(found)
        return (None, *(next(by_tensor) if tensor.requires_grad else None for tensor in (x, *parameters)))
