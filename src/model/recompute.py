"""Parts of a layer that keep little but their input and are computed again in the backward pass."""

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
    which is cheap and saves most of the memory. ALL keeps only what enters and leaves the layer.
    """

    NOTHING = "nothing"
    INPUTS = "inputs"
    ALL = "all"


Results = tuple[Tensor, ...]
Function = Callable[..., Results]


class Recomputed:
    """Calls a function of one tensor and keeps nothing of it but that tensor, and results if it is told to.

    The first pass runs without autograd, so that operators need not prepare for a backward. The second, in the
    backward pass, gives the gradients of the tensor and of every trainable parameter of `modules`. It is called
    with the results that were kept, so that it need not compute them.

    Args:
        modules: all modules whose parameters the function may use.
        unused: names of parameters in them that it does not use.
    """

    def __init__(self, *modules: nn.Module, unused: tuple[str, ...] = ()) -> None:
        self._modules_used = modules
        self._unused = unused
        self._trainable: list[tuple[nn.Module, str]] | None = None

    def __call__(self, function: Function, x: Tensor, *, kept: int = 0, draws_random: bool = False) -> Results:
        """x -> function(x).

        Args:
            function: takes x, in the second pass also the results that were kept, and gives a tuple of tensors.
            x: the one tensor that is kept in any case.
            kept: how many of the results, the first ones, are kept for the second pass.
            draws_random: whether the second pass must draw the same random numbers.
        """
        if draws_random:
            function = _Redrawn(function, x.device)
        outputs: Results = _Again.apply(function, kept, x, *self._parameters_used())
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
    """A function that draws the same random numbers at every call."""

    def __init__(self, function: Function, device: torch.device) -> None:
        self._function = function
        self._device = device
        self._first = True

    def __call__(self, x: Tensor, *known: Tensor) -> Results:
        on_gpu = self._device.type == "cuda"
        if self._first:
            self._first = False
            self._drawn_from = (torch.get_rng_state(), torch.cuda.get_rng_state(self._device) if on_gpu else None)
            return self._function(x, *known)
        with torch.random.fork_rng([self._device] if on_gpu else []):
            on_host, on_device = self._drawn_from
            torch.set_rng_state(on_host)
            if on_device is not None:
                torch.cuda.set_rng_state(on_device, self._device)
            return self._function(x, *known)


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, function: Function, kept: int, x: Tensor, *parameters: Tensor) -> Results:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.kept = function, kept
        outputs = function(x)
        ctx.save_for_backward(*outputs[:kept], x, *parameters)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        known, (x, *parameters) = saved[: ctx.kept], saved[ctx.kept :]
        with torch.enable_grad():
            x = x.detach().requires_grad_(ctx.needs_input_grad[2])
            outputs = ctx.function(x, *(tensor.detach() for tensor in known))
        asked = [pair for pair in zip(outputs, gradients, strict=True) if pair[1] is not None]
        wanted = [tensor for tensor in (x, *parameters) if tensor.requires_grad]
        found = torch.autograd.grad(
            [output for output, _ in asked], wanted, [gradient for _, gradient in asked], allow_unused=True
        )
        by_tensor = iter(found)
        return (None, None, *(next(by_tensor) if tensor.requires_grad else None for tensor in (x, *parameters)))
