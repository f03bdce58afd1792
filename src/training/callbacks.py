"""What happens around the steps of a run: schedule, checks, logs, saving, stopping."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.strategies import DeepSpeedStrategy
from torch import Tensor

from src.errors import CheckpointError, TrainingError
from src.schedule import Schedule
from src.training.console import warn
from src.training.logs import EpochLog, Sink, StepLog
from src.training.module import TrainingModule
from src.training.objectives import Staged
from src.training.progress import BEGINNING, Start
from src.training.sharded import any_sharded, is_sharded, readable


class NotFiniteError(TrainingError):
    """A step that was not taken, because its loss or gradient is not finite."""

    def __init__(self, step: int, message: str) -> None:
        super().__init__(message)
        self.step = step


class GoodTensors:
    """What was trained when loss and gradient were last seen to be finite, of methods that train little.

    After a step nobody knows yet whether what it made is any good: that shows in the next one.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, Tensor] = {}
        self._newest: dict[str, Tensor] = {}

    def keep(self, module: TrainingModule, *, deep: bool) -> None:
        """Takes a copy.

        Args:
            deep: whether it is taken behind the step, so that the one before is the good one.
        """
        if not module.method.small or any(is_sharded(parameter) for _, parameter in module.trained()):
            return
        if deep:
            self.tensors, self._newest = self._newest, self.tensors
        into = self._newest if deep else self.tensors
        now = {name: parameter.detach() for name, parameter in module.trained()}
        if into:
            torch._foreach_copy_(list(into.values()), list(now.values()))
        else:
            into.update({name: tensor.clone() for name, tensor in now.items()})


class StepControl(pl.Callback):
    """Sets the learning rate before a step and refuses to take one with a non-finite loss or gradient."""

    def __init__(
        self,
        schedule: Schedule,
        accumulate: int,
        describe: Callable[[Any], str] = lambda batch: f"samples {list(batch.sample_indices)}",
        start: Start = BEGINNING,
    ) -> None:
        self.schedule = schedule
        self.accumulate = accumulate
        self.describe = describe
        self.start = start
        self.good = GoodTensors()
        self.learning_rate = 0.0
        self.weight_decay = 0.0
        self.loss = 0.0
        self.grad_norm = 0.0
        self._pending: list[tuple[Tensor, Any]] = []

    def on_train_batch_start(self, trainer: pl.Trainer, module: pl.LightningModule, batch: Any, batch_idx: int) -> None:
        """Puts the scheduled rate and weight decay into the optimizer."""
        step = self.start.steps + trainer.global_step
        self.learning_rate = self.schedule.learning_rate(step)
        self.weight_decay = self.schedule.weight_decay_at(step)
        for group in trainer.optimizers[0].param_groups:
            group["lr"] = self.learning_rate * group["lr_scale"]
            if group["decays"]:
                group["weight_decay"] = self.weight_decay
        self._batch = batch.source
        self._step = step + 1
        self._closes_step = (batch_idx + 1) % self.accumulate == 0

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        """Looks at loss and gradients of the whole step before the optimizer does, unless that or an engine does so.

        Raises:
            TrainingError: naming step and samples when something is not finite.
        """
        assert isinstance(module, TrainingModule)
        if not self._closes_step:
            return
        if module.sight:
            losses = [loss for loss, _ in [*self._pending, self._current(module)]]
            module.sight.loss = torch.stack(losses).float().mean()
        elif not _has_engine(trainer):
            if module.updates:
                norm = module.updates.gradient_norm()
            else:
                gradients = [parameter.grad for _, parameter in module.trained() if parameter.grad is not None]
                norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
            self._examine(trainer, module, norm)
            if module.clips:
                module.clip(self.grad_norm)
            self.good.keep(module, deep=False)

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Remembers a micro-batch that did not close a step; looks at one that did, if the optimizer or an engine does.

        They form the norm for themselves, over all ranks, and do not take a step in which it is not finite; a loss that
        is not finite makes it so (`TrainingModule.training_step`). To form it before, too, would take as long as Adam
        does, and to wait for it would leave the device without work.

        Raises:
            TrainingError: as `on_before_optimizer_step`.
        """
        assert isinstance(module, TrainingModule)
        if not self._closes_step:
            self._pending.append(self._current(module))
            return
        if module.sight or _has_engine(trainer):
            engine: Any = getattr(trainer.strategy, "model", None)
            norm = None if module.sight else torch.as_tensor(engine.get_global_grad_norm(), dtype=torch.float32)
            self._examine(trainer, module, norm)
            self.good.keep(module, deep=True)
        self._pending.clear()

    def _examine(self, trainer: pl.Trainer, module: TrainingModule, norm: Tensor | None) -> None:
        """Takes note of the step's loss and gradient norm, 0-d; raises a TrainingError if one is not finite.

        Without a norm both are those of `module.sight`.
        """
        pending = [*self._pending, self._current(module)]
        if norm is None:
            assert module.sight
            self.loss, self.grad_norm = module.sight.read()  # of all ranks
            norm_everywhere = self.grad_norm
            values = [] if math.isfinite(self.loss) else [float(loss) for loss, _ in pending]
        else:
            losses = torch.stack([loss for loss, _ in pending]).float()
            *values, self.grad_norm = torch.cat([losses, norm.reshape(1).to(losses.device)]).tolist()
            self.loss, norm_everywhere = sum(values) / len(values), self.grad_norm
            if trainer.world_size > 1:
                # All ranks learn of it, so that all stop at the same step and none waits for another.
                own = torch.tensor([self.loss, self.grad_norm], device=module.device)
                self.loss, norm_everywhere = trainer.strategy.all_gather(own).view(-1, 2).mean(0).tolist()
        if not (math.isfinite(self.loss) and math.isfinite(norm_everywhere)):
            bad = [batch for value, (_, batch) in zip(values, pending, strict=False) if not math.isfinite(value)]
            what = "gradient" if math.isfinite(self.loss) else "loss"
            guilty = bad or ([batch for _, batch in pending] if what == "gradient" else [])
            where = "; ".join(self.describe(batch) for batch in guilty) or "in the samples of another GPU"
            done = module.updates.describe_stop() if module.updates else "the step was not taken"
            raise NotFiniteError(
                self._step,
                f"the {what} is not finite at step {self._step} ({where}): {done}; lower --lr_init or look at these "
                "samples",
            )

    def _current(self, module: TrainingModule) -> tuple[Tensor, Any]:
        assert module.outcome is not None
        return module.outcome.loss, self._batch


class TrainingMonitor(pl.Callback):
    """Makes one log per optimizer step and per epoch and hands it to the sinks (rank 0 only)."""

    def __init__(self, control: StepControl, sinks: Sequence[Sink], epoch_begin: int, start: Start = BEGINNING) -> None:
        self.control = control
        self.sinks = sinks
        self.epoch_begin = epoch_begin
        self.start = start
        self.peak_bytes = 0
        self.used_bytes = 0
        self.losses: list[float] = []
        self.tokens = 0
        self.step_seconds: list[float] = []
        self._tokens = 0
        self._logs: list[dict[str, float]] = []
        self._epoch_losses: list[float] = []

    def on_train_start(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Starts the clock."""
        self._last = time.perf_counter()

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Staged, batch_idx: int
    ) -> None:
        """Adds the micro-batch up; writes the log when it closed an optimizer step."""
        assert isinstance(module, TrainingModule)
        assert module.outcome is not None
        self._tokens += batch.source.token_count
        self._logs.append(module.outcome.logs())
        if (batch_idx + 1) % self.control.accumulate:
            return
        extra = _averages(self._logs)
        now = time.perf_counter()
        log = StepLog(
            step=self.start.steps + trainer.global_step,
            epoch=self.epoch_begin + self.start.epochs + trainer.current_epoch,
            loss=self.control.loss,
            lr=self.control.learning_rate,
            weight_decay=self.control.weight_decay,
            grad_norm=self.control.grad_norm,
            seconds=now - self._last,
            tokens=self._tokens * trainer.world_size,
            extra=extra,
        )
        self._last, self._tokens, self._logs = now, 0, []
        self.losses.append(log.loss)
        self.tokens += log.tokens
        self.step_seconds.append(log.seconds)
        self._epoch_losses.append(log.loss)
        for sink in self.sinks:
            sink.step(log)

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Writes the epoch's line."""
        if not self._epoch_losses:
            return
        epoch = self.start.epochs + trainer.current_epoch
        mean = sum(self._epoch_losses) / len(self._epoch_losses)
        of_steps = trainer.num_training_batches // self.control.accumulate
        steps = len(self._epoch_losses)
        log = EpochLog(self.epoch_begin + epoch, epoch, mean, self.control.learning_rate, steps, int(of_steps))
        self._epoch_losses = []
        for sink in self.sinks:
            sink.epoch(log)

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Reads the GPU's memory while the run's own is still allocated."""
        if module.device.type == "cuda":
            free, total = torch.cuda.mem_get_info(module.device)
            self.used_bytes = total - free
            self.peak_bytes = torch.cuda.max_memory_allocated(module.device)
        for sink in self.sinks:
            sink.ended()

    def state(self) -> dict[str, Any]:
        """See `resume.Part`."""
        return {"losses": torch.tensor(self.losses, dtype=torch.float64), "tokens": self.tokens}

    def restore(self, state: Mapping[str, Any]) -> None:
        """See `resume.Part`."""
        self.losses[:] = state["losses"].tolist()  # whose list it is, sees them, too
        self.tokens = state["tokens"]
        of_this_epoch = self.start.batches // self.control.accumulate
        self._epoch_losses = self.losses[len(self.losses) - of_this_epoch :]

    def leave_out(self, seconds: float) -> None:
        """What passed between two steps without being work on either."""
        self._last += seconds

    def close(self) -> None:
        """Closes the sinks, once."""
        for sink in self.sinks:
            sink.close()
        self.sinks = ()


class AtEnd(pl.Callback):
    """Calls a function on rank 0 after the last step, while the model is still on its device.

    On all ranks together where weights are sharded among them.
    """

    def __init__(self, action: Callable[[], None]) -> None:
        self.action = action

    def on_train_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Calls it."""
        if trainer.is_global_zero or any_sharded(module):
            self.action()


class CheckpointSaver(pl.Callback):
    """Writes `rwkv-{epoch}.pth` after every `epoch_save` epochs and after the last (rank 0 only).

    An epoch that was stopped before its end has no such file: its name would say that the epoch was trained.

    Args:
        save: writes a file; may return where it lies instead. When it cannot, that is said, and the run goes on:
            its last file, after the last step, has another chance.
        folder: of the files.
        epoch_begin: number of the run's first epoch.
        epoch_save: see above; 0 for the last epoch only.
        start: where in the run this process begins.
    """

    def __init__(
        self,
        save: Callable[[Path], Path | None],
        folder: Path,
        epoch_begin: int,
        epoch_save: int,
        start: Start = BEGINNING,
    ) -> None:
        self.save = save
        self.folder = folder
        self.epoch_begin = epoch_begin
        self.epoch_save = epoch_save
        self.start = start
        self.files: list[Path] = []
        self._complete = False

    def on_train_batch_end(
        self, trainer: pl.Trainer, module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Notices the epoch's end."""
        before = self.start.batches if trainer.current_epoch == 0 else 0
        self._complete = before + batch_idx + 1 >= trainer.num_training_batches

    def on_train_epoch_end(self, trainer: pl.Trainer, module: pl.LightningModule) -> None:
        """Saves if the epoch is complete and its number asks for it."""
        if not self._complete:
            return
        epoch = self.start.epochs + trainer.current_epoch
        is_last = trainer.max_epochs is not None and trainer.current_epoch + 1 >= trainer.max_epochs
        if is_last or (self.epoch_save and epoch % self.epoch_save == 0):
            path = self.folder / f"rwkv-{self.epoch_begin + epoch}.pth"
            try:
                with readable(module):
                    elsewhere = self.save(path) if trainer.is_global_zero else None
            except CheckpointError as problem:
                warn(f"{problem}; training goes on")
            else:
                self.files.append(elsewhere or path)


def _has_engine(trainer: pl.Trainer) -> bool:
    return isinstance(trainer.strategy, DeepSpeedStrategy)


def _averages(logs: list[dict[str, float]]) -> dict[str, float]:
    names = {name for row in logs for name in row}
    averages = {}
    for name in sorted(names):
        values = [row[name] for row in logs if name in row]
        averages[name] = sum(values) / len(values)
    return averages
