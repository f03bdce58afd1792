"""Warnings while a run goes on: a loss that goes up, states that grow out of bounds, steps that nothing is learnt in.

Each is said once; of the last how often it was, at the end.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from src.output import several
from src.training.callbacks import TrainingMonitor
from src.training.module import TrainingModule
from src.training.sharded import piece_here

WINDOW = 30
"""Steps that a mean of losses is over: single ones differ by their data."""
_GROWTH, _MARGIN = 1.5, 0.2
"""A mean above so many times the smallest, and so much more, is no chance."""
_FIRST = 10
"""Steps after which a run that began by getting worse, before there is a mean, is told so: when every one of them is
so much above the first, which the untrained model gave."""
LOOKED_AT = 50
"""Steps between two looks at the states."""
_LARGEST_RMS = 1000.0
"""Of a layer's state. Of the demonstration's base model, whose own memory of a text has 73 to 146, a state of 310 still
helped (rate 100, 60 steps); those of good rates have 16 to 110."""
_LARGEST_VALUE = 2.0**15
"""Half of what F16 holds, which Ai00 and web-rwkv take states in."""


class LossTrend:
    """Whether losses go up for good, by means over `WINDOW` steps."""

    def __init__(self) -> None:
        self._first = float("nan")
        self._last: deque[float] = deque(maxlen=WINDOW)
        self._best = (float("inf"), 0)

    def take(self, step: int, loss: float) -> str:
        """Takes note of a step's loss; returns what is wrong, as the beginning of a sentence, or ""."""
        if not self._last:
            self._first = loss
        self._last.append(loss)
        if len(self._last) == _FIRST + 1:
            least = min(list(self._last)[1:])
            if least > _GROWTH * self._first + _MARGIN:
                return f"the loss has gone up: {self._first:.4f} at first, {least:.4f} or more in {_FIRST} steps since"
        if len(self._last) < WINDOW:
            return ""
        mean = sum(self._last) / WINDOW
        if mean < self._best[0]:
            self._best = (mean, step)
        if mean <= _GROWTH * self._best[0] + _MARGIN:
            return ""
        best, at = self._best
        return f"the loss goes up: {mean:.4f} in the mean of the last {WINDOW} steps, {best:.4f} up to step {at:,}"


def outgrown(states: Iterable[tuple[str, Tensor]]) -> str:
    """What is wrong with trained states by their size, as the beginning of a sentence, or "".

    Args:
        states: (key, [H, N, N] or a piece), on one device.
    """
    named = list(states)
    if not named:
        return ""
    tensors = [tensor.detach() for _, tensor in named]
    largest = torch.stack([tensor.abs().max() for tensor in tensors])
    rms = torch.stack([tensor.pow(2).mean().sqrt() for tensor in tensors])
    for (name, _), value, mean in zip(named, largest.tolist(), rms.tolist(), strict=True):
        if mean > _LARGEST_RMS or value > _LARGEST_VALUE:
            return f"the states grow out of bounds: {name} has an rms of {mean:,.0f} and values up to {value:,.0f}"
    return ""


class HealthWatch(pl.Callback):
    """Looks at every step's loss and now and then at the states, on rank 0: at its pieces where every rank has some.

    Args:
        monitor: has the losses, those of a run before it went on included.
        warn: tells the user.
        accumulate: micro-batches of an optimizer step.
        way_out: the end of every warning.
    """

    def __init__(self, monitor: TrainingMonitor, warn: Callable[[str], None], accumulate: int, way_out: str) -> None:
        self._monitor = monitor
        self._warn = warn
        self._accumulate = accumulate
        self._way_out = way_out
        self._trend: LossTrend | None = LossTrend()
        self._looks_at_states = True
        self._idle_steps = 0

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Takes note of what was before."""
        if self._trend is not None:
            for step, loss in enumerate(self._monitor.losses, start=1):
                self._trend.take(step, loss)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Looks where a step closes."""
        assert isinstance(module, TrainingModule)
        if (batch_idx + 1) % self._accumulate or not trainer.is_global_zero or not self._monitor.losses:
            return
        step = len(self._monitor.losses)
        if not self._monitor.control.grad_norm:
            self._idle_steps += 1
            if self._idle_steps == 1:
                self._warn(f"the gradient of step {step:,} is 0, so that nothing is learnt in it: {_why_idle(module)}")
        if self._trend is not None and (problem := self._trend.take(step, self._monitor.losses[-1])):
            self._say(problem)
            self._trend = None
        if self._looks_at_states and step % LOOKED_AT == 0:
            states = module.model.shape.state_shapes()
            named = ((name, piece_here(tensor)) for name, tensor in module.trained() if name in states)
            if problem := outgrown(named):
                self._say(problem)
                self._looks_at_states = False

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Says in how many steps nothing was learnt."""
        if self._idle_steps:
            steps = several(self._idle_steps, "step")
            self._warn(f"the gradient was 0 in {steps} of {trainer.global_step:,}, in which nothing was learnt")

    def _say(self, problem: str) -> None:
        self._warn(f"{problem}; {self._way_out}")


def _why_idle(module: TrainingModule) -> str:
    """Where a gradient of 0 may come from, and the way out."""
    config = module.config
    if config.bptt_chunks:
        return f"--bptt_chunks {config.bptt_chunks} ends it before what is trained; raise that, or leave it out"
    if module.loss_scale != 1.0:
        return "in fp16 it may have been too small for a number; use --precision bf16"
    return "what is trained has no part in the loss of its samples; --preview 3 shows what the loss is on"
