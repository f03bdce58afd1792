"""Snapshots of a run, taken while it goes on."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import pytorch_lightning as pl

from src import storage
from src.errors import TrainingError
from src.training.progress import Start
from src.training.resume import TRAINED, Part, Session, seconds_between_saves
from src.training.stopper import Stopper


class RunSaver(pl.Callback):
    """Puts the parts of a run back at its start, and takes snapshots of them.

    That is at every epoch's end but the last, every so many seconds, when asked to, and when the run is stopped.

    Args:
        session: the run.
        parts: by name, from a trainer that has its optimizer.
        stopper: whether somebody wants an end, or a snapshot.
        start: where this process begins.
        steps_per_epoch: optimizer steps.
        total_steps: of the run.
        remembers_random: whether steps draw random numbers, which then are kept from the last step's end.
    """

    def __init__(
        self,
        session: Session,
        parts: Callable[[pl.Trainer], dict[str, Part]],
        stopper: Stopper,
        start: Start,
        steps_per_epoch: int,
        total_steps: int,
        *,
        remembers_random: bool = False,
    ) -> None:
        self.session = session
        self._make_parts = parts
        self._parts: dict[str, Part] = {}
        self._start = start
        self._steps_per_epoch = steps_per_epoch
        self._total_steps = total_steps
        self._stopper = stopper
        self._remembers_random = remembers_random
        self._random: dict[str, Any] | None = None
        self._step = start.steps
        self._saved_step = start.steps
        self._last = time.monotonic()

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Puts back what the model alone does not hold."""
        self._parts = self._make_parts(trainer)
        for name, part in self._parts.items():
            # What is trained went back into the model before an optimizer or engine was made for it.
            if name in self.session.saved.parts and name != TRAINED:
                part.restore(self.session.saved.parts[name])
        self._keep_random()
        writer = self.session.writer
        if TRAINED in self._parts and not writer.bytes:  # an estimate: with two moments of each value
            writer.bytes = 3 * storage.tensor_bytes(self._parts[TRAINED].state())
        self._last = time.monotonic()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Saves when it is time, unless the epoch's end, with its own file, comes next."""
        if (batch_idx + 1) % self._stopper.accumulate:
            return
        self._step = self._start.steps + trainer.global_step
        self._keep_random()
        wants = self._stopper.wants_save() or (self._is_time() and not self.session.writer.busy)
        if trainer.world_size > 1:
            wants = trainer.strategy.reduce_boolean_decision(wants, all=False)
        if (wants or trainer.should_stop) and self._step % self._steps_per_epoch:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Saves, when the epoch is complete and others follow."""
        if self._step % self._steps_per_epoch == 0 and self._saved_step < self._step < self._total_steps:
            self._save(trainer)

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Saves the last whole step, unless that is where the error is, or other ranks are needed for it."""
        whole = self._step == self._start.steps + trainer.global_step and self._step > self._saved_step
        alone = trainer.world_size == 1 and self._parts
        updates = getattr(module, "updates", None)
        whole = whole and (updates is None or updates.between_steps)
        if whole and alone and isinstance(exception, Exception) and not isinstance(exception, TrainingError):
            self._save(trainer)
        self.session.writer.wait()

    def _save(self, trainer: pl.Trainer) -> None:
        states = {name: part.state() for name, part in self._parts.items()}
        if self._random is not None:
            states["random"] = self._random
        if trainer.is_global_zero:
            self.session.writer.write(dataclasses.replace(self.session.saved, steps=self._step, parts=states))
        self._saved_step = self._step
        self._last = time.monotonic()

    def _keep_random(self) -> None:
        if self._remembers_random:
            self._random = self._parts["random"].state()

    def _is_time(self) -> bool:
        writer = self.session.writer
        seconds = self.session.save_seconds or seconds_between_saves(writer.bytes, writer.seconds)
        return time.monotonic() - self._last >= seconds
