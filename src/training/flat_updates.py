"""Adam on what an engine gives a process: one flat piece of everything that is trained, of which it is all or a part.

DeepSpeed's stages 1 and 2 form a norm of copies in fp64, scale the gradient, and then have an optimizer update. Here
norm, clip and update are two passes of `ops.adam`'s kernels, over the gradient where it is; the engine is told to do
none of it. A step whose gradient is not finite changes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from src.adapters.method import Method
from src.config import TrainConfig
from src.ops.adam import BLOCK_VALUES, Constants, Control, ManySteps, Moments
from src.training.aside import Sight
from src.training.joined import joins

PIECE_MULTIPLE = BLOCK_VALUES
"""A process's piece has a multiple of so many values, so that kernels read whole vectors of weight and gradient."""
_VECTOR = 32
"""Values between two places from which every tensor, of bytes or wider, is read in whole vectors."""
_NAMES = ("exp_avg", "exp_avg_sq")


def updates_flat(config: TrainConfig, method: Method) -> bool:
    """Whether a run's engine leaves norm, clip and update to `FlatUpdates`, where the device has the kernels.

    Not where it steps on the host with an Adam of its own, and not with Lion and moments that are paged, which are
    bitsandbytes'.
    """
    others = config.strategy.endswith("offload") or config.optim in ("lion8bit", "paged_adamw8bit")
    return joins(config, method) and not others


@dataclass(frozen=True)
class Share:
    """Values of a whole that one group of the optimizer has: those from `begin` to `end`, which is not one of them."""

    begin: int
    end: int
    lr_scale: float
    decays: bool


def shares_of(groups: Sequence[dict[str, Any]]) -> list[Share]:
    """What each group has of a whole that is made of them all, in their order."""
    shares, begin = [], 0
    for group in groups:
        end = begin + sum(parameter.numel() for parameter in group["params"])
        shares.append(Share(begin, end, group["lr_scale"], group["decays"]))
        begin = end
    return shares


def as_one(groups: Sequence[dict[str, Any]], config: TrainConfig) -> dict[str, Any]:
    """One group of all their parameters, whose rate and decay are those before a share's own factors."""
    return {
        "params": [parameter for group in groups for parameter in group["params"]],
        "lr": config.lr_init,
        "lr_scale": 1.0,
        "weight_decay": config.weight_decay,
        "decays": any(group["decays"] for group in groups),
    }


class FlatUpdates(torch.optim.Optimizer):
    """An optimizer of one tensor, 1-d, fp32: a whole, or after an engine has put it there a process's piece of it.

    Pieces are of equal size, in the order of the processes. Moments in fp32 stand in `state` as torch's do.

    Args:
        group: of the whole, see `as_one`.
        shares: of the whole.
        constants: of Adam, and the clip.
        packed: whether moments are in 8 bits.

    Attributes:
        sight: of the last step, over all processes; the norm is that before it was clipped.
    """

    def __init__(self, group: dict[str, Any], shares: Sequence[Share], constants: Constants, *, packed: bool) -> None:
        super().__init__([group], {})
        self._shares = shares
        self._constants = constants
        self._packed = packed
        self._many: _Many | None = None
        self.sight = Sight()

    def tie(self, whole: nn.Parameter) -> None:
        """Has a process's piece be a part of the whole, wherever that lies, in place of the copy that an engine makes.

        The whole is fp32 itself; a copy would take 4 bytes a value, and time to be copied back.
        """
        (group,) = self.param_groups
        (piece,) = group["params"]
        assert piece.numel() * _count() == whole.numel()
        begin = _rank() * piece.numel()
        copy = piece.untyped_storage()
        piece.data = whole.detach()[begin : begin + piece.numel()]
        if copy.data_ptr() != piece.untyped_storage().data_ptr():
            copy.resize_(0)  # of which the engine has views

    def forget_moments(self) -> None:
        """Lets go of them, after the last step."""
        for state in self.state.values():
            for name in _NAMES if state else ():  # an engine asks for packed ones' too, and finds nothing
                state[name].untyped_storage().resize_(0)  # of which it has views
        self.state.clear()
        self._many = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Takes a step with the gradient that is there."""
        assert closure is None
        (group,) = self.param_groups
        (piece,) = group["params"]
        many = self._prepared(piece)
        many.steps += 1
        rows = [
            self._constants.settings_row(
                group["lr"] * share.lr_scale, group["weight_decay"] if share.decays else 0.0, many.steps
            )
            for share in self._shares
        ]
        control = many.control
        control.tell(rows, many.steps)
        gradient: Tensor = piece.grad
        many.of_cuts.look_at([gradient[cut] for cut in many.cuts])
        numbers = _over_all(self.sight.loss.to(piece.device, torch.float32), many.of_cuts.gradient_norm())
        self.sight.note(numbers)
        control.norm.copy_(numbers[1])
        control.flags[1] = ~numbers[1].isfinite()
        many.of_cuts.step(control, self._constants)
        if not self._packed:
            self.state[piece]["step"] = torch.tensor(float(many.steps))

    def _prepared(self, piece: nn.Parameter) -> _Many:
        """What updates the piece, with the moments that `state` has; what is not there yet begins at 0."""
        if self._packed:
            if self._many is None:
                self._many = self._of_moments(piece, self._cuts(piece), None, 0)
            return self._many
        state = self.state[piece]
        if not state:
            state.update({name: torch.zeros_like(piece) for name in _NAMES}, step=torch.tensor(0.0))
        moments = [state[name] for name in _NAMES]
        if self._many is None or any(a is not b for a, b in zip(self._many.moments, moments, strict=True)):
            self._many = self._of_moments(piece, self._cuts(piece), moments, int(state["step"]))
        return self._many

    def _of_moments(
        self, piece: nn.Parameter, cuts: Sequence[tuple[int, slice]], moments: Sequence[Tensor] | None, steps: int
    ) -> _Many:
        device = piece.device
        control = Control(
            settings=torch.zeros(len(self._shares), 4, device=device),
            norm=torch.full((), math.nan, device=device),
            flags=torch.zeros(2, dtype=torch.int32, device=device),
        )
        weights = [piece.detach()[cut] for _, cut in cuts]
        own = (
            [Moments.zeros(tensor, packed=True) for tensor in weights]
            if moments is None
            else [Moments(*(each[cut] for each in moments)) for _, cut in cuts]
        )
        of_cuts = ManySteps(weights, own, [row for row, _ in cuts], [0] * len(cuts), device)
        return _Many(of_cuts, [cut for _, cut in cuts], control, moments or (), steps)

    def _cuts(self, piece: Tensor) -> list[tuple[int, slice]]:
        """Which values of the piece each share has: its number and a slice, two where vectors begin later than it."""
        first = _rank() * piece.numel()
        cuts = []
        for number, share in enumerate(self._shares):
            begin, end = (min(max(place - first, 0), piece.numel()) for place in (share.begin, share.end))
            middle = min(-(-begin // _VECTOR) * _VECTOR, end)
            cuts += [(number, slice(*ends)) for ends in ((begin, middle), (middle, end)) if ends[0] < ends[1]]
        return cuts


@dataclass
class _Many:
    """Updates of the slices of a piece, whose settings are `control`'s, after `steps` of them."""

    of_cuts: ManySteps
    cuts: list[slice]
    control: Control
    moments: Sequence[Tensor]
    steps: int


def _rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def _count() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _over_all(loss: Tensor, norm: Tensor) -> Tensor:
    """fp32 [2]: the mean of losses, and the norm of all pieces together from the norm of one, both 0-d."""
    if _count() == 1:
        return torch.stack([loss, norm])
    sums = torch.stack([loss / _count(), norm.square()])
    dist.all_reduce(sums)
    return torch.stack([sums[0], sums[1].sqrt()])
