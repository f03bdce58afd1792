"""Updates as `src.training.updates` has them, on a GPU with Adam: nothing of them waits for the device.

Rates and the number of the step go to the device before a step, and what is decided within one stays there: the norm
that clips, and whether a gradient was not finite. So a backward that updates its layers can be recorded and replayed.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from src.ops.adam import Constants, Control, Gradient, ManySteps, Moments, adam_step, dynamic_map
from src.ops.row_gradient import RowGradient, values_of
from src.ops.stochastic import seed_of
from src.training.aside import Sight
from src.training.updates import Unit, UnitUpdates, stop_in_words

_FEWEST_PACKED = 4096
"""Tensors of fewer values keep fp32 moments, as bitsandbytes has it."""


class _Row(NamedTuple):
    """What parameters have in common that share settings: their group, and how many steps their moments have seen."""

    group: int
    steps: int


class DeviceUpdates(UnitUpdates):
    """See `TensorUpdates`; the same rules, with `ops.adam` for an optimizer.

    In the backward it takes sparse gradients of tables, too.

    Args:
        groups, names, in_backward: see there.
        constants: of Adam, and the clip.
        seed: of what is rounded.
        packed: whether moments are in 8 bits.
        on_host: whether those are in pinned host memory, which the kernel reads and writes over the bus.
        looks_itself: whether a step whose gradient is not finite changes nothing, so that nobody has to look at it
            before; not `in_backward`.

    Attributes:
        sight: of the last step, if it `looks_itself`.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Iterable[tuple[str, nn.Parameter]],
        *,
        constants: Constants,
        seed: int,
        packed: bool,
        on_host: bool,
        in_backward: bool,
        looks_itself: bool = False,
    ) -> None:
        super().__init__(groups, names, in_backward=in_backward)
        assert not (in_backward and looks_itself)
        self.sight = Sight() if looks_itself else None
        device = next(iter(self._keys)).device
        self._constants = constants
        self._packed = packed
        self._seeds = {parameter: seed_of(seed, name) >> 1 for parameter, name in self._keys.items()}
        self._groups = {p: number for number, group in enumerate(self.param_groups) for p in group["params"]}
        self._rows: list[_Row] = []
        self._row_of: dict[nn.Parameter, int] = {}
        self._control = Control(
            settings=torch.empty(0, 4, device=device),
            norm=torch.full((), math.nan, device=device),
            flags=torch.zeros(2, dtype=torch.int32, device=device),
        )
        self._numbers = {name: number for number, name in enumerate(self._units)}
        self._unit_norms = torch.zeros(len(self._units), device=device)
        self._whole_norm: Tensor | None = None
        self._order: list[str] = []  # of the units in the backward
        self._within = False
        self._moments: dict[nn.Parameter, Moments] = {}
        for parameter in self._keys:
            in_8_bits = packed and parameter.numel() >= _FEWEST_PACKED
            self._moments[parameter] = Moments.zeros(parameter, packed=in_8_bits, on_host=on_host)
        self._many = ManySteps(
            list(self._keys),
            [self._moments[parameter] for parameter in self._keys],
            [0] * len(self._keys),
            [self._seeds[parameter] for parameter in self._keys],
        )
        self._sort_into_rows(dict.fromkeys(self._keys, 0))

    @property
    def between_steps(self) -> bool:
        """See UnitUpdates."""
        return not self._within

    @property
    def norm(self) -> float:
        """Of the last step's gradient, before it was clipped; nan before the first; waits for the device."""
        return float(self._control.norm)

    @norm.setter
    def norm(self, norm: float) -> None:
        self._control.norm.fill_(norm)

    @property
    def stopped_at(self) -> str:
        """The unit whose gradient was not finite; "" is none; waits for the device."""
        number = int(self._control.flags[1])
        return list(self._units)[number - 1] if number else ""

    @property
    def updated(self) -> list[str]:
        """Units that this step has updated, in order; waits for the device."""
        if not self._within:
            return []
        stopped = self.stopped_at
        return self._order[: self._order.index(stopped)] if stopped else self._order

    def begin(self) -> None:
        """See UnitUpdates."""
        self._within = self.in_backward
        self._whole_norm = None
        if self.in_backward:
            self._write_control()

    def _write_control(self) -> None:
        """Tells the device what only the host knows of a step."""
        rows = [
            self._constants.settings_row(group["lr"], group["weight_decay"], row.steps + 1)
            for row in self._rows
            for group in [self.param_groups[row.group]]
        ]
        self._control.tell(rows, self.steps)
        self._unit_norms.zero_()

    def gradient_norm(self) -> Tensor:
        """See UnitUpdates."""
        if self._whole_norm is None:
            if self.in_backward:
                self.finish_backward()
                self._whole_norm = torch.linalg.vector_norm(self._unit_norms)
            else:
                # All that a step needs, so that it can follow at once when the host has seen the norm.
                self._write_control()
                self._many.look_at([parameter.grad for parameter in self._keys])
                self._whole_norm = self._many.gradient_norm()
                self._control.norm.copy_(self._whole_norm)
        return self._whole_norm

    def describe_stop(self) -> str:
        """See UnitUpdates."""
        return stop_in_words(self.stopped_at if self.in_backward else "", self.updated)

    def forget_moments(self) -> None:
        """See UnitUpdates."""
        self._moments.clear()
        del self._many

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; the closure computes the gradients.

        What is not finite is the caller's to find between the two, or found here if it `looks_itself`.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        norm = self.gradient_norm()
        if self.sight:
            self.sight.note(torch.stack([self.sight.loss.to(norm.device, torch.float32), norm]))
            self._control.flags[1] = ~norm.isfinite()
        if self.in_backward:
            self._control.norm.copy_(norm)
        else:
            self._many.step(self._control, self._constants)
        self.steps += 1
        self._rows = [_Row(row.group, row.steps + 1) for row in self._rows]
        self._within = False
        self._whole_norm = None
        self._show_moments()
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes on moments; groups stay as they are."""
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        kept = {order[number]: moments for number, moments in state_dict["state"].items()}
        counts = self._take_on(kept)
        self.steps = max(counts.values())
        self._show_moments()

    def exchange(self, kept: Mapping[nn.Parameter, Mapping[str, Any]]) -> None:
        """Goes on with other moments of some parameters, between two steps.

        Args:
            kept: of each what `state` once had of a parameter as large; nothing: it begins anew.
        """
        self._take_on(kept)
        if self.state:
            self._show(kept)
            self._count_steps()

    @torch.no_grad()
    def _take_on(self, kept: Mapping[nn.Parameter, Mapping[str, Any]]) -> dict[nn.Parameter, int]:
        """Copies moments; gives the number of steps that those of each parameter have seen, as it then is."""
        counts = {parameter: self._rows[row].steps for parameter, row in self._row_of.items()}
        for parameter, theirs in kept.items():
            moments = self._moments[parameter]
            counts[parameter] = int(theirs["step"]) if theirs else 0
            if not theirs:
                moments.clear()
                continue
            for own, name in zip((moments.first, moments.second), _NAMES[self._packed], strict=True):
                assert own.dtype == theirs[name].dtype
                own.copy_(theirs[name])
            if moments.first_scales is not None and moments.second_scales is not None:
                moments.first_scales.copy_(theirs["absmax1"])
                moments.second_scales.copy_(theirs["absmax2"])
        self._sort_into_rows(counts)
        return counts

    def _sort_into_rows(self, counts: Mapping[nn.Parameter, int]) -> None:
        """Has parameters of one group, whose moments have seen as many steps, share a row of settings."""
        numbers: dict[_Row, int] = {}
        self._row_of = {p: numbers.setdefault(_Row(self._groups[p], counts[p]), len(numbers)) for p in self._keys}
        self._rows = list(numbers)
        if len(self._rows) != len(self._control.settings):
            settings = torch.zeros(len(self._rows), 4, device=self._control.settings.device)
            self._control = dataclasses.replace(self._control, settings=settings)
        self._many.use_rows([self._row_of[parameter] for parameter in self._keys])

    def _show_moments(self) -> None:
        """Puts them where an optimizer's are looked for, under the names they have in torch's or bitsandbytes'.

        Not before the first step: Lightning copies what it finds at the start to the device.
        """
        if not self.state:
            self._show(self._moments)
        self._count_steps()

    def _count_steps(self) -> None:
        shown = [row.steps if self._packed else torch.tensor(float(row.steps)) for row in self._rows]
        for parameter, row in self._row_of.items():
            self.state[parameter]["step"] = shown[row]

    def _show(self, parameters: Iterable[nn.Parameter]) -> None:
        for parameter in parameters:
            moments = self._moments[parameter]
            shown: dict[str, Any] = dict(zip(_NAMES[self._packed], (moments.first, moments.second), strict=True))
            if moments.first_scales is not None:
                shown |= {"absmax1": moments.first_scales, "absmax2": moments.second_scales}
                shown |= {"qmap1": dynamic_map(signed=True), "qmap2": dynamic_map(signed=False)}
            self.state[parameter] = shown

    @torch.no_grad()
    def _update_unit(self, unit: Unit) -> None:
        arrived = [(p, unit.arrived[p].grad) for p in unit.parameters if p in unit.arrived]
        self.average([gradient for _, gradient in arrived if gradient is not None])
        gradients = {
            parameter: RowGradient.of(gradient) if gradient.is_sparse else gradient
            for parameter, gradient in arrived
            if gradient is not None
        }
        del arrived
        for holder in unit.arrived.values():
            holder.grad = None
        if unit.name in self._order:
            self._order.remove(unit.name)
        self._order.append(unit.name)
        unit.arrived = {}
        self._note_norm(unit.name, list(gradients.values()))
        flag, number = self._control.flags[1], self._numbers[unit.name]
        fine = self._unit_norms[number].isfinite() | (flag != 0)
        flag.copy_(torch.where(fine, flag, number + 1))
        for parameter in list(gradients):
            self._update(parameter, gradients.pop(parameter))  # and with it goes the memory

    def _note_norm(self, unit: str, gradients: list[Gradient]) -> None:
        norms: list[Tensor] = []
        values = list(map(values_of, gradients))
        for dtype in dict.fromkeys(each.dtype for each in values):  # of one dtype they are one kernel's
            same = [each for each in values if each.dtype == dtype]
            norms += torch._foreach_norm(same, 2, torch.float32)
        if norms:
            self._unit_norms[self._numbers[unit]].copy_(torch.linalg.vector_norm(torch.stack(norms)))

    def _update(self, parameter: nn.Parameter, gradient: Gradient) -> None:
        adam_step(
            parameter.detach(),
            gradient,
            self._moments[parameter],
            self._control,
            self._constants,
            self._row_of[parameter],
            self._seeds[parameter],
        )


_NAMES = {False: ("exp_avg", "exp_avg_sq"), True: ("state1", "state2")}
"""By whether moments are packed."""
