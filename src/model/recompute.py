"""Parts of a layer that keep little but their inputs and are computed again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
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


def recomputed(
    function: Function,
    inputs: Sequence[Tensor | None],
    parameters: Iterable[nn.Parameter],
    *,
    kept: int = 0,
    draws_random: bool = False,
) -> Results:
    """function(*inputs), of which nothing is kept but the inputs, and results if they are asked for.

    The first pass runs without autograd, so that operators need not prepare for a backward. The second, in the
    backward pass, gives the gradients of every input and parameter that requires one at the time of the call;
    results that depend on none of them are passed over.

    Args:
        function: takes the inputs, in the second pass also the results that were kept, and gives a tuple of tensors.
            Besides them it may use parameters, and constants.
        inputs: all tensors that it depends on, None where there is none.
        parameters: those it may use; the frozen ones may be among them.
        kept: how many of the results, the first ones, are kept for the second pass.
        draws_random: whether the second pass must draw the same random numbers.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = next(tensor.device for tensor in inputs if tensor is not None) if draws_random else None
    outputs: Results = _Again.apply(function, kept, device, len(inputs), *inputs, *trained)
    return outputs


class _Again(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, function: Function, kept: int, device: torch.device | None, count: int, *tensors: Tensor | None
    ) -> Results:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.kept, ctx.count = function, kept, count
        ctx.random_state = None if device is None else _random_state(device)
        outputs = function(*tensors[:count])
        ctx.save_for_backward(*outputs[:kept], *tensors)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        known, tensors = saved[: ctx.kept], list(saved[ctx.kept :])
        needed = ctx.needs_input_grad[-len(tensors) :]
        for place in range(ctx.count):
            if tensors[place] is not None:
                tensors[place] = tensors[place].detach().requires_grad_(needed[place])
        with torch.enable_grad():
            arguments = (*tensors[: ctx.count], *(tensor.detach() for tensor in known))
            outputs = ctx.function(*arguments) if ctx.random_state is None else _drawn_again(ctx, arguments)
        asked = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        found = iter(())  # type: Any
        if asked:
            found = iter(
                torch.autograd.grad(
                    [output for output, _ in asked], wanted, [gradient for _, gradient in asked], allow_unused=True
                )
            )
        return (None, None, None, None, *(next(found, None) if need else None for need in needed))


def _random_state(device: torch.device) -> tuple[torch.device, Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return device, torch.get_rng_state(), on_device


def _drawn_again(ctx: Any, arguments: tuple[Tensor | None, ...]) -> Results:
    """The function's results with the random numbers of the first pass; later ones are as if it had not been called."""
    device, on_host, on_device = ctx.random_state
    with torch.random.fork_rng([device] if on_device is not None else []):
        torch.set_rng_state(on_host)
        if on_device is not None:
            torch.cuda.set_rng_state(on_device, device)
        results: Results = ctx.function(*arguments)
        return results
