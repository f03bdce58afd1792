"""Layers that are trained by turns, in a run: when others are drawn, their moments, and going on with them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.adapters.lisa import Lisa
from src.adapters.turns import LayerTurns, Turn
from src.training.device_updates import DeviceUpdates
from src.training.module import TrainingModule
from src.training.optimizers import put_moments
from src.training.progress import Start
from src.training.resume import Settled


class Draws(pl.Callback):
    """Changes the layers that are trained when it is time, and takes care of their moments.

    Args:
        module: whose `turns` they are; those of the step before have theirs now.
        start: where in the run this process begins.

    Attributes:
        parked: moments of layers that wait, on the host, by key.
    """

    def __init__(self, module: TrainingModule, start: Start) -> None:
        assert isinstance(module.method, Lisa)
        assert module.turns is not None
        self._method = module.method
        self._turns = module.turns
        self._layer_count = module.model.shape.n_layer
        self._start = start
        self._period = -1
        self._places: tuple[int, ...] = ()
        self.parked: dict[str, dict[str, Any]] = {}
        self._turns.change(self._layers_of(max(start.steps - 1, 0)))
        module.look_again()

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Before the first micro-batch of a period."""
        assert isinstance(module, TrainingModule)
        layers = self._layers_of(self._start.steps + trainer.global_step)
        if layers != self._turns.layers:
            changed = self._turns.change(layers)
            module.look_again()
            self._exchange_moments(trainer.optimizers[0], changed)

    def state(self) -> dict[str, Any]:
        """See `resume.Part`: moments of layers that wait."""
        return {key: _settled(moments) for key, moments in self.parked.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `resume.Part`."""
        self.parked = {key: dict(moments) for key, moments in state.items()}

    def _layers_of(self, step: int) -> tuple[int, ...]:
        while self._period < step // self._method.draw.steps:
            self._period += 1
            self._places = self._method.draw.after(self._places, self._period, self._layer_count)
        return self._places

    def _exchange_moments(self, optimizer: torch.optim.Optimizer, changed: list[Turn]) -> None:
        """A layer's moments leave with it; whoever has none begins anew."""
        for turn in changed:
            moments = optimizer.state.pop(turn.parameter, {})
            if turn.before and moments and self._method.parks_moments:
                self.parked[turn.before] = {name: _on_host(value) for name, value in moments.items()}
        coming = {turn.parameter: self.parked.pop(turn.now, {}) for turn in changed}
        if isinstance(optimizer, DeviceUpdates):
            optimizer.exchange(coming)
            return
        for parameter, moments in coming.items():
            if moments:
                put_moments(optimizer, parameter, moments)


class TrainedInTurn:
    """Everything that was trained, of layers that wait, too: a `resume.Part`."""

    def __init__(self, turns: LayerTurns) -> None:
        self._turns = turns

    def state(self) -> dict[str, Any]:
        """See Part."""
        waiting = self._turns.waiting()
        values = self._turns.trained()
        return {key: Settled(value) if key in waiting else value for key, value in values.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See Part."""
        self._turns.restore(state)


def _on_host(value: Any) -> Any:
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _settled(moments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: Settled(value) if isinstance(value, Tensor) else value for name, value in moments.items()}
