"""A few steps of a run, tried on its device: how long they take and how much memory, with nothing kept of them.

Tried are the largest micro-batch of the first pass, as often as its recording needs, and some from all over the first
epoch, through the loop that a run goes through; the learning rate is 0.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from src.adapters.method import Method
from src.adapters.turns import LayerTurns
from src.config import TrainConfig
from src.data.passes import PassDataset
from src.data.preference_batches import PreferenceDataset
from src.data.rounding import Rounding
from src.model.language_model import LanguageModel
from src.schedule import Schedule
from src.system import process_bytes
from src.training.engine import Hardware
from src.training.fitting import fit
from src.training.module import TrainingModule, records_steps
from src.training.results import Results
from src.training.work import Work

TRIED_BATCHES = 4
"""From all over the first epoch."""
_ROUNDS_WHEN_RECORDED = 3
"""A shape is computed once, then recorded, then replayed."""
_MOST_ACCUMULATED = 8
_MOST_COMPARED = 20_000


@dataclass(frozen=True)
class Trial:
    """What the steps took.

    Attributes:
        steps: how many there were.
        positions: of the largest micro-batch.
        step_seconds: of an optimizer step, in the mean of those from all over the epoch.
        accumulation: how many times as many micro-batches a step of the run has.
        spread: the standard deviation of the single ones over their mean.
        records: whether steps were recorded.
        peak_bytes: of torch's allocator; on a CPU of the process.
        used_bytes: of the device, as a run reports it; on a CPU as above.
    """

    steps: int
    positions: int
    step_seconds: float
    accumulation: float
    spread: float
    records: bool
    peak_bytes: int
    used_bytes: int


class ChosenBatches:
    """Some batches of a data set, in the place of all of it.

    Args:
        dataset: that has them.
        numbers: their steps, in the order in which they are to come.
    """

    def __init__(self, dataset: PassDataset[Any], numbers: Sequence[int]) -> None:
        self._dataset = dataset
        self._numbers = numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def rounded(self, step: int, rounding: Rounding) -> Any:
        """See `PassDataset`."""
        return self._dataset.rounded(self._numbers[step % len(self._numbers)], rounding)


class _NoResults(Results):
    """Writes nothing."""

    def save(self, model: LanguageModel, path: Path) -> None:
        """Does nothing."""


def try_steps(
    config: TrainConfig,
    method: Method,
    hardware: Hardware,
    work: Work,
    model: LanguageModel,
    turns: LayerTurns | None,
    folder: Path,
) -> Trial:
    """Takes the steps.

    Args:
        config: final flags of a run on one device.
        method: what is trained.
        hardware: the device.
        work: the data.
        model: on the device, ready for training.
        turns: layers that are trained by turns, or None.
        folder: for what is written meanwhile; the caller removes it.

    Raises:
        TrainingError: no memory is left, or a loss is not finite.
    """
    accumulated = config.accumulate_grad_batches
    config = dataclasses.replace(
        config,
        accumulate_grad_batches=min(accumulated, _MOST_ACCUMULATED),
        epoch_begin=0,
        epoch_count=1,
        epoch_save=0,
        val_steps=0,
        my_exit_tokens=0,
        wandb="",
    )
    if isinstance(work.dataset, PreferenceDataset) and config.dpo:
        work.dataset.references = torch.zeros(work.dataset.plan.pairs, 2, dtype=torch.float64)
    accumulate = config.accumulate_grad_batches
    largest = work.dataset.largest_step(min(len(work.dataset), _MOST_COMPARED))
    others = sorted(set(np.linspace(0, len(work.dataset) - 1, TRIED_BATCHES).round().astype(int).tolist()))
    records = records_steps(config, method, model) and work.objective.recordable
    rounds = _ROUNDS_WHEN_RECORDED if records else 1
    order = [*[largest] * rounds, *others * rounds]
    chosen: Any = ChosenBatches(work.dataset, [number for number in order for _ in range(accumulate)])
    tried = dataclasses.replace(work, dataset=chosen, batches_per_epoch=len(chosen), measure=None)
    module = TrainingModule(model, work.objective, config, method, chosen, 0, turns)
    schedule = Schedule(0.0, 0.0, 0, len(order))
    results = _NoResults(method, config)
    _, monitor, _ = fit(module, tried, schedule, hardware, config, folder, results=results, quiet=True)
    seconds = monitor.step_seconds[-len(others) :]
    peak, used = monitor.peak_bytes, monitor.used_bytes
    if hardware.device.type != "cuda":
        _, peak = process_bytes()
        used = peak
    mean = statistics.fmean(seconds)
    return Trial(
        steps=len(order),
        positions=work.dataset.positions_of(largest),
        step_seconds=mean,
        accumulation=accumulated / accumulate,
        spread=statistics.pstdev(seconds) / mean if mean else 0.0,
        records=records,
        peak_bytes=peak,
        used_bytes=used,
    )
