"""Updates tensor by tensor: weights kept in bf16, and gradients that are used up in the backward.

Each tensor has an optimizer to itself, of the kind that `--optim` names. A bf16 weight is widened, updated in fp32 and
rounded stochastically, one tensor at a time. With `in_backward` a layer is updated as soon as all its gradients are
there, which are then freed: no two layers' gradients exist together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from src.adapters.method import Method
from src.config import TrainConfig
from src.model.shape import LAYER_KEY
from src.ops.stochastic import round_stochastically, seed_of
from src.training.optimizers import put_moments

Maker = Callable[[list[dict[str, Any]]], torch.optim.Optimizer]


@dataclass
class _Tensor:
    """A trained tensor.

    Attributes:
        name: its key.
        group: the settings it is updated with now.
        inner: the optimizer of `work`.
        work: what is updated: the parameter itself, or its fp32 values while that lasts.
    """

    name: str
    group: dict[str, Any]
    inner: torch.optim.Optimizer
    work: nn.Parameter


@dataclass
class Unit:
    """What is updated together: a layer, the embedding, the last norm, the head."""

    name: str
    parameters: list[nn.Parameter] = field(default_factory=list)
    arrived: dict[nn.Parameter, Tensor] = field(default_factory=dict)  # whose gradients stand at these tensors


class UnitUpdates(torch.optim.Optimizer):
    """An optimizer that may update each unit of the model as soon as all its gradients are there.

    Args:
        groups: as for any optimizer.
        names: key of each parameter, in the model's order.
        in_backward: whether it does.

    Attributes:
        steps: that were taken.
        average: called with the gradients of a unit before they are used up, which it replaces by their means over all
            processes.
    """

    norm: float

    def __init__(
        self, groups: list[dict[str, Any]], names: Iterable[tuple[str, nn.Parameter]], *, in_backward: bool
    ) -> None:
        super().__init__(groups, {})
        self.in_backward = in_backward
        self.average: Callable[[Sequence[Tensor]], None] = lambda gradients: None
        self.steps = 0
        optimized = {parameter for group in self.param_groups for parameter in group["params"]}
        self._keys = {parameter: name for name, parameter in names if parameter in optimized}
        self._units: dict[str, Unit] = {}
        for parameter, name in self._keys.items():
            self._units.setdefault(unit_of(name), Unit(unit_of(name))).parameters.append(parameter)
            if in_backward:
                self.watch(parameter, parameter)

    @property
    def between_steps(self) -> bool:
        """Whether no tensor is a step ahead of another."""
        raise NotImplementedError

    def begin(self) -> None:
        """To be called before a step's forward."""

    def gradient_norm(self) -> Tensor:
        """Of the whole gradient, 0-d, once the backward is done; with `in_backward` everything is then updated."""
        raise NotImplementedError

    def describe_stop(self) -> str:
        """What a step that met a gradient that is not finite has left, as half a sentence."""
        raise NotImplementedError

    def forget_moments(self) -> None:
        """Frees them, after the last step."""
        raise NotImplementedError

    def watch(self, parameter: nn.Parameter, holder: Tensor) -> None:
        """Takes a parameter's gradient from a leaf, itself or one in its place, as soon as it is there."""
        holder.register_post_accumulate_grad_hook(lambda leaf: self._take(parameter, leaf))

    def finish_backward(self) -> None:
        """Updates what has not all of its gradients, after the backward."""
        for unit in self._units.values():
            if unit.arrived:
                self._update_unit(unit)

    def forget_arrived(self) -> None:
        """After a backward that failed."""
        for unit in self._units.values():
            unit.arrived = {}

    def _take(self, parameter: nn.Parameter, holder: Tensor) -> None:
        """A gradient is there."""
        unit = self._units[unit_of(self._keys[parameter])]
        unit.arrived[parameter] = holder
        if len(unit.arrived) == len(unit.parameters):
            self._update_unit(unit)

    def _update_unit(self, unit: Unit) -> None:
        """With what has arrived, whose gradients are freed."""
        raise NotImplementedError


class TensorUpdates(UnitUpdates):
    """An optimizer that updates one tensor after the other.

    Gradients are clipped by the norm of all of them; with `in_backward`, where that is not known yet, by that of the
    step before, and those of the first step not at all. A unit whose gradient is not finite, and all that come after it
    in the backward, are not updated: `stopped_at` names it.

    Args:
        groups: as for any optimizer.
        names: key of each parameter, in the model's order.
        make: gives the optimizer of some groups of fp32 parameters.
        clip: largest norm.
        seed: of what is rounded; noise is a function of it, of the step and of the tensor's name.
        in_backward: see above.

    Attributes:
        steps: that were taken.
        norm: of the last step's gradient, before it was clipped; nan before the first.
        stopped_at: see above; "" is nothing.
        updated: units that this step has updated, in order.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        names: Iterable[tuple[str, nn.Parameter]],
        make: Maker,
        *,
        clip: float,
        seed: int,
        in_backward: bool,
    ) -> None:
        super().__init__(groups, names, in_backward=in_backward)
        self.norm = math.nan
        self.stopped_at = ""
        self.updated: list[str] = []
        self._clip, self._seed = clip, seed
        self._tensors: dict[nn.Parameter, _Tensor] = {}
        self._norms: dict[nn.Parameter, Tensor] = {}
        self._generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            settings = {name: value for name, value in group.items() if name != "params"}
            for parameter in group["params"]:
                wide = parameter.dtype == torch.float32
                work = parameter if wide else nn.Parameter(torch.empty(0, device=parameter.device))
                inner = make([{**settings, "params": [work]}])
                self._tensors[parameter] = _Tensor(self._keys[parameter], group, inner, work)

    @property
    def between_steps(self) -> bool:
        """See UnitUpdates."""
        return not self.updated

    def gradient_norm(self) -> Tensor:
        """See UnitUpdates."""
        if self.in_backward:
            self.finish_backward()
        else:
            self._norms = _norms({p: p.grad for p in self._keys if p.grad is not None})
        return _norm_of([self._norms[parameter] for parameter in self._keys if parameter in self._norms])

    def describe_stop(self) -> str:
        """See UnitUpdates."""
        return stop_in_words(self.stopped_at, self.updated)

    def forget_moments(self) -> None:
        """See UnitUpdates."""
        for own in self._tensors.values():
            own.inner.state.clear()

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes a step; the closure computes the gradients.

        What is not finite is the caller's to find between the two (`stopped_at`, `gradient_norm`).
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        norm = float(self.gradient_norm())
        if not self.in_backward:
            for unit in self._units.values():
                self.updated.append(unit.name)
                for parameter in unit.parameters:
                    if parameter.grad is not None:
                        self._update(parameter, norm)
        self.norm = norm
        self.steps += 1
        self._norms = {}
        self.updated = []
        return result

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes on moments, of each tensor as its optimizer wants them; groups stay as they are."""
        order = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, moments in state_dict["state"].items():
            parameter = order[number]
            own = self._tensors[parameter]
            self._widen(parameter, own)
            put_moments(own.inner, own.work, moments)
            self._narrow(parameter, own)
            self.state[parameter] = own.inner.state[own.work]

    def _take(self, parameter: nn.Parameter, holder: Tensor) -> None:
        if self.stopped_at:
            holder.grad = None
            return
        super()._take(parameter, holder)

    def _update_unit(self, unit: Unit) -> None:
        gradients = {p: p.grad for p in unit.parameters if p in unit.arrived and p.grad is not None}
        unit.arrived = {}
        self.average(list(gradients.values()))
        norms = _norms(gradients)
        self._norms |= norms
        if self.stopped_at or not bool(_norm_of(list(norms.values())).isfinite()):
            self.stopped_at = self.stopped_at or unit.name
        else:
            self.updated.append(unit.name)
        for parameter in list(gradients):
            if not self.stopped_at:
                self._update(parameter, self.norm)
            parameter.grad = None
            del gradients[parameter]  # and with it the memory

    @torch.no_grad()
    def _update(self, parameter: nn.Parameter, norm: float) -> None:
        """One tensor's; its gradient may be scaled in place."""
        own = self._tensors[parameter]
        (settings,) = own.inner.param_groups
        settings |= {name: own.group[name] for name in ("lr", "weight_decay")}
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        if (factor := self._clip / (norm + 1e-6)) < 1:
            gradient.mul_(factor)
        self._widen(parameter, own)
        own.work.grad = gradient
        own.inner.step()
        if own.work is not parameter:
            generator = self._generators.setdefault(parameter.device, torch.Generator(parameter.device))
            generator.manual_seed(seed_of(self._seed, self.steps, own.name))
            round_stochastically(parameter, own.work.detach(), generator)
        self._narrow(parameter, own)
        self.state[parameter] = own.inner.state[own.work]

    def _widen(self, parameter: nn.Parameter, own: _Tensor) -> None:
        if own.work is not parameter:
            own.work.data = parameter.detach().float()

    def _narrow(self, parameter: nn.Parameter, own: _Tensor) -> None:
        if own.work is not parameter:
            own.work.data = torch.empty(0, device=parameter.device)
            own.work.grad = None


class UpdateCount:
    """What updates remember beside moments: a `resume.Part`."""

    def __init__(self, updates: UnitUpdates) -> None:
        self._updates = updates

    def state(self) -> dict[str, Any]:
        """See Part."""
        return {"steps": self._updates.steps, "norm": torch.tensor(self._updates.norm, dtype=torch.float64)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Part."""
        self._updates.steps = state["steps"]
        self._updates.norm = float(state["norm"])


def leaves_gradients(config: TrainConfig, method: Method) -> bool:
    """Whether a recorded step leaves gradients where the optimizer reads them: of a large method, without an engine.

    An engine wants to be handed gradients, and those of a small method are handed out as well.
    """
    return not (method.small or config.has_engine)


def unit_of(name: str) -> str:
    """What a tensor is updated together with: "blocks.3", "emb"."""
    found = LAYER_KEY.match(name)
    return f"blocks.{found[1]}" if found else name.partition(".")[0]


def stop_in_words(stopped_at: str, updated: list[str]) -> str:
    """See `UnitUpdates.describe_stop`.

    Args:
        stopped_at: the unit in which the step met it; "" is none.
        updated: those it had updated, in order.
    """
    if not stopped_at:
        return "the step was not taken"
    taken = f"{', '.join(updated)} had been updated" if updated else "nothing had been updated"
    return f"it was met in {stopped_at}, which was not updated, nor was what comes after it; {taken}"


def _norms(gradients: Mapping[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
    """fp32, 0-d."""
    if not gradients:
        return {}
    return dict(zip(gradients, torch._foreach_norm(list(gradients.values()), 2, torch.float32), strict=True))


def _norm_of(norms: list[Tensor]) -> Tensor:
    return torch.linalg.vector_norm(torch.stack(norms)) if norms else torch.zeros(())
