"""Ends of a run that come from outside."""

from __future__ import annotations

import contextlib
import os
import signal
from types import FrameType
from typing import Any

import pytorch_lightning as pl

from src.device import global_rank
from src.schedule import Schedule
from src.training.exits import ENDING, SAVING, put_back, replaced
from src.training.progress import BEGINNING, Start

_STDERR = 2
_STOPPING = b"\nfinishing this step, then saving; a second Ctrl-C stops at once, without saving\n"


class Stopper(pl.Callback):
    """Ends the run after the current step: on Ctrl-C, SIGTERM, SIGHUP, or when `exit_tokens` are trained.

    SIGUSR1, by which batch systems announce an end, asks for a save only. A second Ctrl-C stops at once, without
    saving. What is ignored from the start, as SIGHUP under nohup, stays ignored.
    """

    def __init__(self, schedule: Schedule, accumulate: int = 1, start: Start = BEGINNING) -> None:
        self.schedule = schedule
        self.accumulate = accumulate
        self.start = start
        self.signal_name: str | None = None
        self.exhausted = False
        self._wants_save = False
        self._handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Takes over the signals."""
        self._handlers = replaced(ENDING, self._remember) | replaced(SAVING, self._save)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Asks all ranks whether one of them wants to stop, once the optimizer step is complete."""
        if (batch_idx + 1) % self.accumulate:
            return
        self.exhausted = self.schedule.exhausted(self.start.steps + trainer.global_step)
        wants_stop = self.signal_name is not None or self.exhausted
        if trainer.world_size > 1:
            wants_stop = trainer.strategy.reduce_boolean_decision(wants_stop, all=False)
        if wants_stop:
            trainer.should_stop = True

    def wants_save(self) -> bool:
        """Whether a save was asked for since this was last asked."""
        wants, self._wants_save = self._wants_save, False
        return wants

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Gives the signals back."""
        self._restore()

    def on_exception(self, trainer: pl.Trainer, module: pl.LightningModule, exception: BaseException) -> None:
        """Gives the signals back."""
        self._restore()

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal_name is not None and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self.signal_name is None and global_rank() == 0:
            # A print could meet another one that the signal interrupted.
            with contextlib.suppress(OSError):  # with SIGHUP the terminal is gone
                os.write(_STDERR, _STOPPING)
        self.signal_name = signal.Signals(number).name

    def _save(self, number: int, frame: FrameType | None) -> None:
        self._wants_save = True

    def _restore(self) -> None:
        put_back(self._handlers)
        self._handlers = {}
