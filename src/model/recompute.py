"""Parts of a layer that keep little but their inputs and are computed again in the backward pass."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

import torch
from torch import Tensor, nn

from src.ops.node import Node, once
from src.ops.totals import totals_together


class Recompute(Enum):
    """What a layer computes again in the backward pass instead of keeping it.

    NOTHING keeps every tensor the backward needs. INPUTS computes the norms and the mixers' inputs again,
    which is cheap and saves most of the memory. ALL keeps only what enters and leaves the layer.
    """

    NOTHING = "nothing"
    INPUTS = "inputs"
    ALL = "all"


class _SecondPass(threading.local):
    """Whether this thread is in the backward of one."""

    running = False


_second_pass = _SecondPass()


def gradients_come_again() -> bool:
    """For a parameter's hook: whether the gradient it is given goes on to that parameter once more.

    So it is in the backward of a second pass, behind which the first one's node hands its gradients to autograd.
    """
    return _second_pass.running


@dataclass(frozen=True)
class Draws:
    """Where the random numbers stand.

    Attributes:
        device: that may draw some besides the host.
        on_host, on_device: states of the generators; None for a device without one of its own.
    """

    device: torch.device
    on_host: Tensor
    on_device: Tensor | None

    @classmethod
    def next(cls, device: torch.device) -> Draws:
        """Those that come next."""
        on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
        return cls(device, torch.get_rng_state(), on_device)

    @contextlib.contextmanager
    def again(self) -> Iterator[None]:
        """A context that draws these again; what comes after it is as if nothing had been drawn in it."""
        with torch.random.fork_rng([self.device] if self.on_device is not None else []):
            torch.set_rng_state(self.on_host)
            if self.on_device is not None:
                torch.cuda.set_rng_state(self.on_device, self.device)
            yield


Results = tuple[Tensor, ...]
Function = Callable[..., Results]


def recomputed(
    function: Function,
    inputs: Sequence[Tensor | None],
    parameters: Iterable[nn.Parameter],
    *,
    kept: int = 0,
    draws_random: bool = False,
    uses_once: bool = False,
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
        uses_once: whether the function uses no parameter twice, so that their gradients may be ready last of all.
    """
    trained = [parameter for parameter in parameters if parameter.requires_grad]
    device = next(tensor.device for tensor in inputs if tensor is not None) if draws_random else None
    outputs: Results = _Again.apply(function, kept, device, uses_once, len(inputs), *inputs, *trained)
    return outputs


class _Again(Node):
    @staticmethod
    def forward(
        ctx: Any,
        function: Function,
        kept: int,
        device: torch.device | None,
        uses_once: bool,
        count: int,
        *tensors: Tensor | None,
    ) -> Results:
        ctx.set_materialize_grads(False)
        ctx.function, ctx.kept, ctx.count = function, kept, count
        # A gradient of another dtype is cast as soon as it is there.
        ctx.can_wait = uses_once and all(t is None or t.dtype is torch.float32 for t in tensors[count:])
        ctx.draws = None if device is None else Draws.next(device)
        outputs = function(*tensors[:count])
        ctx.save_for_backward(*outputs[:kept], *tensors)
        return outputs

    @staticmethod
    @once
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        known, tensors = saved[: ctx.kept], list(saved[ctx.kept :])
        needed = ctx.needs_input_grad[-len(tensors) :]
        for place in range(ctx.count):
            if tensors[place] is not None:
                tensors[place] = tensors[place].detach().requires_grad_(needed[place])
        with torch.enable_grad(), contextlib.nullcontext() if ctx.draws is None else ctx.draws.again():
            outputs = ctx.function(*tensors[: ctx.count], *(tensor.detach() for tensor in known))
        asked = [
            (output, gradient)
            for output, gradient in zip(outputs, gradients, strict=True)
            if gradient is not None and output.requires_grad
        ]
        wanted = [tensor for tensor, need in zip(tensors, needed, strict=True) if need]
        found = iter(())  # type: Any
        if asked:
            outputs, gradients = zip(*asked, strict=True)
            before, _second_pass.running = _second_pass.running, True
            try:
                looked_at = torch.is_anomaly_enabled() or any(tensor._backward_hooks for tensor in wanted)
                with totals_together(ctx.can_wait and not looked_at):
                    found = iter(torch.autograd.grad(outputs, wanted, gradients, allow_unused=True))
            finally:
                _second_pass.running = before
        return (None, None, None, None, None, *(next(found, None) if need else None for need in needed))


def parameters_of(module: nn.Module) -> Iterator[nn.Parameter]:
    """What `module.parameters()` gives where no two modules share one, in a tenth of the time."""
    waiting = [module]
    while waiting:
        part = waiting.pop()
        for parameter in part._parameters.values():
            if parameter is not None:
                yield parameter
        waiting.extend(child for child in reversed(part._modules.values()) if child is not None)
