"""What is looked at while a run goes on.

Held-out data are measured: the best result is kept, and a run that gets no better can end. And prompts are answered.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl

from src.errors import CheckpointError
from src.model.language_model import LanguageModel
from src.output import several
from src.training.callbacks import TrainingMonitor
from src.training.evaluation import HeldOut
from src.training.logs import HeldOutLog, Sample, SamplesLog
from src.training.module import TrainingModule
from src.training.progress import BEGINNING, Start
from src.training.samples import Sampler
from src.training.sharded import any_sharded, computable, readable

BEST = "rwkv-best.pth"


def log_held_out(
    monitor: TrainingMonitor,
    step: int,
    measured: HeldOut,
    label: str = "",
    *,
    best: bool = False,
    worse: bool = False,
) -> None:
    """Hands a measurement to the sinks."""
    log = HeldOutLog(step, dataclasses.asdict(measured), str(measured), best, label, worse)
    for sink in monitor.sinks:
        sink.held_out(log)


class HeldOutWatch(pl.Callback):
    """Measures every so many optimizer steps on rank 0, and changes no step by that.

    Args:
        measure: scores the model.
        save_best: writes the model's result under this name, and returns where.
        warn: tells the user.
        every: optimizer steps between measurements.
        patience: the run ends after so many measurements none of which was the best; 0: it does not.
        monitor: its sinks are told, and its clock does not count the time.
        accumulate: micro-batches of an optimizer step.
        start: where in the run this process begins.
        before: what was measured before the first step.

    Attributes:
        stopped: whether the run was ended because it got no better.
    """

    def __init__(
        self,
        measure: Callable[[LanguageModel], HeldOut],
        save_best: Callable[[str], Path],
        warn: Callable[[str], None],
        *,
        every: int,
        patience: int,
        monitor: TrainingMonitor,
        accumulate: int,
        start: Start = BEGINNING,
        before: HeldOut | None = None,
    ) -> None:
        self.stopped = False
        self._before = before
        self._measure = measure
        self._save_best = save_best
        self._warn = warn
        self._every = every
        self._patience = patience
        self._monitor = monitor
        self._accumulate = accumulate
        self._start = start
        self._best = math.inf
        self._best_line = ""
        self._without = 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Measures where a step closes whose number asks for it."""
        assert isinstance(module, TrainingModule)
        step = self._start.steps + trainer.global_step
        if (batch_idx + 1) % self._accumulate or step % self._every:
            return
        begin = time.perf_counter()
        if trainer.is_global_zero or any_sharded(module):
            with computable(module.model):
                measured = self._measure(module.model)
            with readable(module.model):
                if trainer.is_global_zero:
                    self.take(step, measured)
        self.stopped = bool(self._patience) and self._without >= self._patience
        if trainer.world_size > 1:
            self.stopped = trainer.strategy.reduce_boolean_decision(self.stopped, all=False)
        trainer.should_stop = trainer.should_stop or self.stopped
        self._monitor.leave_out(time.perf_counter() - begin)

    def take(self, step: int, measured: HeldOut, label: str = "") -> None:
        """Takes note of a measurement after so many steps, and keeps what was trained if it is the best."""
        best = measured.score < self._best
        self._without = 0 if best else self._without + 1
        if best:
            self._best = measured.score
            try:
                self._best_line = f"{self._save_best(BEST)}, after step {step:,}: {measured}"
            except CheckpointError as problem:
                self._best_line = ""
                self._warn(f"{problem}; training goes on")
        worse = self._before is not None and measured.score > self._before.score
        log_held_out(self._monitor, step, measured, label, best=best, worse=worse)

    def end(self, step: int, measured: HeldOut) -> None:
        """Says which result was the best, after a last measurement that is one of these if none was due then."""
        if step % self._every:
            self.take(step, measured, "tuned")
        ended = f"; ended after {several(self._without, 'measurement')} without a better one" if self.stopped else ""
        print(f"best       {self._best_line or 'could not be saved'}{ended}", flush=True)

    def state(self) -> dict[str, Any]:
        """See `resume.Part`."""
        return {"best": self._best, "best_line": self._best_line, "without": self._without}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `resume.Part`."""
        self._best, self._best_line, self._without = state["best"], state["best_line"], state["without"]


class SampleWatch(pl.Callback):
    """Answers the prompts every so many optimizer steps on rank 0, and changes no step by that.

    Args:
        sampler: has the prompts.
        before: what was answered before training; of other ranks than 0 nothing.
        warn: tells the user.
        every: optimizer steps between two times; 0: after the last step only.
        monitor: its sinks are told, and its clock does not count the time.
        accumulate: micro-batches of an optimizer step.
        start: where in the run this process begins.
    """

    def __init__(
        self,
        sampler: Sampler,
        before: Sequence[str],
        warn: Callable[[str], None],
        *,
        every: int,
        monitor: TrainingMonitor,
        accumulate: int,
        start: Start = BEGINNING,
    ) -> None:
        self._sampler = sampler
        self._before = list(before)
        self._warn = warn
        self._every = every
        self._monitor = monitor
        self._accumulate = accumulate
        self._start = start

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Samples where a step closes whose number asks for it."""
        assert isinstance(module, TrainingModule)
        step = self._start.steps + trainer.global_step
        if (batch_idx + 1) % self._accumulate or not self._every or step % self._every or not trainer.is_global_zero:
            return
        begin = time.perf_counter()
        self.take(step, module.model)
        self._monitor.leave_out(time.perf_counter() - begin)

    def take(self, step: int, model: LanguageModel) -> None:
        """Answers after so many steps, and hands on what came of it."""
        try:
            answers = self._sampler.answers(model)
        except CheckpointError as problem:  # the next step says what is wrong
            self._warn(f"no samples after step {step:,}: {problem}")
            return
        asked = zip(self._sampler.prompts, self._before, answers, strict=True)
        log = SamplesLog(step, [Sample(prompt.shown, before, answer) for prompt, before, answer in asked])
        for sink in self._monitor.sinks:
            sink.samples(log)

    def end(self, step: int, model: LanguageModel) -> None:
        """Answers after the last step, unless that has been done."""
        if not self._every or step % self._every:
            self.take(step, model)

    def state(self) -> dict[str, Any]:
        """See `resume.Part`."""
        return {"texts": [prompt.text for prompt in self._sampler.prompts], "before": self._before}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `resume.Part`; `kept_answers` has been asked before."""
