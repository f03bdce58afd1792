"""Trained tensors as pieces of a few, for an engine that does something in Python for every tensor it is given.

An adapter trains some hundreds of small tensors: 870 at 1.6B, for whose gradients alone DeepSpeed's stages 1 and 2 take
four times as long as the step; states are one a layer. They become views of one tensor for each group of the optimizer,
or of one for all, the engine is given these, and their gradients are put together from those of the pieces when the
backward is over, or in a recorded one as they come.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from src.adapters.method import Method
from src.config import TrainConfig


def joins(config: TrainConfig, method: Method) -> bool:
    """Whether a run's engine is given wholes: where small tensors are trained beside a model, and kept unsharded.

    Args:
        config: with the strategy that was chosen.
        method: what is trained.
    """
    sharded = config.shards_weights
    return config.has_engine and not (sharded or method.in_place)


@dataclass(frozen=True)
class Piece:
    """A trained tensor's place in a whole.

    Attributes:
        begin: number of its first value there.
    """

    name: str
    parameter: nn.Parameter
    begin: int

    def of(self, whole: Tensor) -> Tensor:
        """Its values in a tensor as large as the whole, in its shape; a view."""
        return whole.view(-1)[self.begin : self.begin + self.parameter.numel()].view(self.parameter.shape)


class Joined:
    """Wholes, one for each of the optimizer's groups, whose order and settings they take over.

    Args:
        groups: whose `params` become the pieces of a whole each; of one dtype and device within a group.
        names: of all these parameters, by parameter.
        multiple: wholes are filled up with zeros to a multiple of so many values.
    """

    def __init__(self, groups: Iterable[dict[str, Any]], names: dict[nn.Parameter, str], *, multiple: int = 1) -> None:
        self.groups: list[dict[str, Any]] = []
        self.pieces: dict[nn.Parameter, list[Piece]] = {}
        for group in groups:
            values = [parameter.detach().reshape(-1) for parameter in group["params"]]
            filling = -sum(map(torch.numel, values)) % multiple
            whole = nn.Parameter(torch.cat([*values, values[0].new_zeros(filling)]))
            begins = [0]
            for parameter in group["params"]:
                begins.append(begins[-1] + parameter.numel())
            self.pieces[whole] = [
                Piece(names[parameter], parameter, begin)
                for parameter, begin in zip(group["params"], begins, strict=False)
            ]
            self.groups.append({**group, "params": [whole]})
        self.tie()

    def tie(self) -> None:
        """Makes the trained tensors views of the wholes, wherever these lie now."""
        for whole, pieces in self.pieces.items():
            for piece in pieces:
                piece.parameter.data = piece.of(whole.detach())

    def whole_of(self, whole: nn.Parameter, state: Mapping[str, Mapping[str, Tensor]], key: str) -> Tensor:
        """One of an optimizer's numbers by name of a piece and key, put together; 1-d, 0 where no piece is."""
        result = torch.zeros(whole.numel(), dtype=state[self.pieces[whole][0].name][key].dtype)
        for piece in self.pieces[whole]:
            piece.of(result).copy_(state[piece.name][key])
        return result

    def check(self) -> None:
        """Sees to it that wholes are where they were tied."""
        lost = [whole for whole, pieces in self.pieces.items() if pieces[0].parameter.data_ptr() != whole.data_ptr()]
        assert not lost, "an engine has moved a whole: what it updates is not what computes"

    def loss(self, loss: Tensor) -> Tensor:
        """The same loss as a function of the wholes, 0-d; its backward is the loss's own, once."""
        self.check()
        result: Tensor = _OfWholes.apply([loss], self.pieces, *self.pieces)
        return result


class _OfWholes(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, losses: list[Tensor], pieces: dict[nn.Parameter, list[Piece]], *wholes: Tensor) -> Tensor:
        ctx.losses, ctx.pieces = losses, pieces
        return losses[0].detach().clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        (loss,) = ctx.losses
        ctx.losses.clear()
        parameters = [piece.parameter for pieces in ctx.pieces.values() for piece in pieces]
        found: Sequence[Tensor | None] = torch.autograd.grad(loss, parameters, grad, allow_unused=True)
        gradients = dict(zip(parameters, found, strict=True))
        del found, loss
        wholes = []
        for whole, pieces in ctx.pieces.items():
            own = [gradients.pop(piece.parameter) for piece in pieces]
            total = torch.zeros_like(whole)
            there = [(piece, grad) for piece, grad in zip(pieces, own, strict=True) if grad is not None]
            if there:
                torch._foreach_copy_([piece.of(total) for piece, _ in there], [grad for _, grad in there])
            wholes.append(total)
        return None, None, *wholes
