"""What happens around the steps, without Lightning's loop."""

import contextlib
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from pytorch_lightning.strategies import DeepSpeedStrategy
from running import GivenLoss
from torch import Tensor

from src.adapters.method import method_of
from src.config import TrainConfig
from src.errors import CheckpointError, TrainingError
from src.loading import LoadOptions, build_model
from src.schedule import Schedule
from src.training.callbacks import AtEnd, CheckpointSaver, GoodTensors, StepControl, TrainingMonitor
from src.training.logs import EpochLog, StepLog
from src.training.module import TrainingModule
from src.training.objectives import Staged
from src.training.progress import Start

SCHEDULE = Schedule(lr_init=1.0, lr_final=0.1, warmup_steps=0, total_steps=10, weight_decay=0.5)


def module(**flags: object) -> TrainingModule:
    """A training module whose loss is the batch's number times the sum of the first state."""
    given = {"load_model": "base.pth", "data_file": "data", **{name: str(v) for name, v in flags.items()}}
    shape = tiny_shape()
    model = build_model(tiny_parameters(shape), shape, LoadOptions(torch.device("cpu"), torch.float32))

    def loss(model: Any, batch: Any) -> Tensor:
        return 1 + batch.factor * model.get_parameter("blocks.0.att.time_state").sum()

    config = TrainConfig.from_flags(given)
    return TrainingModule(model, GivenLoss(loss), config, method_of(config), [])


def batch(*samples: int, factor: float = 1.0) -> Any:
    """What the callbacks read of a batch."""
    return Staged({}, SimpleNamespace(sample_indices=samples, token_count=10 * len(samples), factor=factor))


def trainer(made: TrainingModule, **changes: object) -> Any:
    """What the callbacks read of a trainer."""
    values = {
        "global_step": 0, "current_epoch": 0, "max_epochs": 3, "world_size": 1, "is_global_zero": True,
        "should_stop": False, "strategy": None, "num_training_batches": 4,
        "optimizers": [made.configure_optimizers()], **changes,
    }  # fmt: skip
    return SimpleNamespace(**values)


def run_batch(control: StepControl, loop: Any, made: TrainingModule, item: Any, number: int) -> None:
    """One micro-batch as Lightning runs it."""
    control.on_train_batch_start(loop, made, item, number)
    loss: Tensor = made.training_step(item, number)
    loss.backward()
    control.on_before_optimizer_step(loop, made, loop.optimizers[0])
    control.on_train_batch_end(loop, made, None, item, number)


class TestStepControl:
    def test_it_sets_rate_and_weight_decay_of_every_group(self) -> None:
        made = module(train_type="states", weight_decay=0.5)
        loop = trainer(made, global_step=9)
        loop.optimizers[0].param_groups[0]["lr_scale"] = 2.0
        StepControl(SCHEDULE, 1).on_train_batch_start(loop, made, batch(0), 0)
        assert loop.optimizers[0].param_groups[0]["lr"] == pytest.approx(0.2)
        assert loop.optimizers[0].param_groups[0]["weight_decay"] == 0.5

    def test_it_moves_the_weight_decay_of_the_groups_that_have_one(self) -> None:
        made = module(weight_decay=0.5)
        moving = Schedule(1.0, 0.1, 0, total_steps=10, weight_decay=0.5, weight_decay_final=0.05)
        loop = trainer(made)
        loop.optimizers[0].add_param_group(
            {"params": [torch.nn.Parameter(torch.ones(2))], "weight_decay": 0.0, "lr_scale": 1.0, "decays": False}
        )
        for step, wanted in ((4, 0.5 * 0.1**0.5), (9, 0.05)):
            loop.global_step = step
            control = StepControl(moving, 1)
            control.on_train_batch_start(loop, made, batch(0), 0)
            groups = loop.optimizers[0].param_groups
            assert {group["decays"] for group in groups} == {True, False}
            for group in groups:
                assert group["weight_decay"] == (pytest.approx(wanted) if group["decays"] else 0.0)
            assert control.weight_decay == pytest.approx(wanted)

    def test_loss_and_norm_of_a_step(self) -> None:
        made, control = module(), StepControl(SCHEDULE, 1)
        run_batch(control, trainer(made), made, batch(4, factor=2.0), 0)
        assert control.loss == pytest.approx(1.0)
        assert control.grad_norm == pytest.approx(2.0 * (4 * 8 * 8) ** 0.5)

    @pytest.mark.parametrize("factor", [float("nan"), float("inf"), float("-inf")])
    def test_a_loss_that_is_not_finite_is_refused_with_step_and_sample(self, factor: float) -> None:
        made, control = module(), StepControl(SCHEDULE, 1)
        made.model.get_parameter("blocks.0.att.time_state").data.fill_(1.0)
        with pytest.raises(TrainingError, match=r"the loss is not finite at step 8 \(samples \[3, 5\]\)"):
            run_batch(control, trainer(made, global_step=7), made, batch(3, 5, factor=factor), 0)

    def test_only_the_bad_micro_batch_of_an_accumulated_step_is_named(self) -> None:
        made, control = module(), StepControl(SCHEDULE, 3)
        made.model.get_parameter("blocks.0.att.time_state").data.fill_(1.0)
        loop = trainer(made)
        run_batch(control, loop, made, batch(1), 0)
        run_batch(control, loop, made, batch(2, factor=float("nan")), 1)
        with pytest.raises(TrainingError, match=r"the loss is not finite at step 1 \(samples \[2\]\)"):
            run_batch(control, loop, made, batch(3), 2)

    @pytest.mark.parametrize("value", [float("nan"), float("inf")])
    def test_a_gradient_that_is_not_finite_is_refused_though_the_loss_is_fine(self, value: float) -> None:
        made, control = module(), StepControl(SCHEDULE, 1)
        state = made.model.get_parameter("blocks.1.att.time_state")
        state.register_hook(lambda gradient: gradient + value)
        made.objective = GivenLoss(lambda model, item: state.sum())
        with pytest.raises(TrainingError, match=r"the gradient is not finite at step 1 \(samples \[6\]\)"):
            run_batch(control, trainer(made), made, batch(6), 0)

    def test_an_accumulated_step_has_the_mean_loss_and_starts_afresh(self) -> None:
        made, control = module(), StepControl(SCHEDULE, 2)
        made.model.get_parameter("blocks.0.att.time_state").data.fill_(1 / 256)
        loop = trainer(made)
        for number, factor in enumerate((1.0, 3.0)):
            run_batch(control, loop, made, batch(number, factor=factor), number)
        assert control.loss == pytest.approx(3.0)
        for number, factor in enumerate((0.0, 0.0), start=2):
            run_batch(control, loop, made, batch(number, factor=factor), number)
        assert control.loss == pytest.approx(1.0)


class TestGoodTensors:
    """Kept is what was there before the last step that was taken."""

    @pytest.mark.parametrize("deep", [False, True], ids=["before the step", "behind the step"])
    def test_which(self, deep: bool) -> None:
        made, good = module(), GoodTensors()
        state = made.model.get_parameter("blocks.0.att.time_state")
        seen = []
        for number in range(4):
            if not deep:
                good.keep(made, deep=False)
            state.data.fill_(number + 1)  # the step
            if deep:
                good.keep(made, deep=True)
            kept = good.tensors.get("blocks.0.att.time_state")
            seen.append(None if kept is None else float(kept.mean()))
        assert seen == ([None, 1, 2, 3] if deep else [0, 1, 2, 3])

    def test_not_of_what_is_large(self) -> None:
        made, good = module(), GoodTensors()
        made.method = Mock(small=False)
        good.keep(made, deep=False)
        assert good.tensors == {}


class TestUnderDeepSpeed:
    """The engine clips and refuses; what it found is asked for after the step."""

    @staticmethod
    def loop(made: TrainingModule, norm: float | Tensor, **changes: object) -> Any:
        strategy = Mock(spec=DeepSpeedStrategy, model=Mock(get_global_grad_norm=lambda: norm))
        return trainer(made, strategy=strategy, **changes)

    def test_the_norm_is_the_engines(self) -> None:
        made, control = module(), StepControl(SCHEDULE, 1)
        run_batch(control, self.loop(made, torch.tensor(0.25)), made, batch(4), 0)
        assert (control.loss, control.grad_norm) == (pytest.approx(1.0), 0.25)

    @pytest.mark.parametrize(
        ("loss", "norm", "said"),
        [
            (2.0, 0.25, ""),
            (2.0, math.nan, r"the gradient is not finite at step 1 \(samples \[3\]; samples \[4\]\)"),
            (math.nan, math.nan, r"the loss is not finite at step 1 \(in the samples of another GPU\)"),
        ],
    )
    def test_loss_and_norm_are_the_optimizers_that_looks_itself(self, loss: float, norm: float, said: str) -> None:
        made, control = module(), StepControl(SCHEDULE, 2)
        sight = Mock(read=lambda: (loss, norm))
        made.flat = Mock(sight=sight)
        made.model.get_parameter("blocks.0.att.time_state").data.fill_(1 / 256)
        loop = self.loop(made, math.inf, world_size=2)
        run_batch(control, loop, made, batch(3, factor=3.0), 0)
        with pytest.raises(TrainingError, match=said) if said else contextlib.nullcontext():
            run_batch(control, loop, made, batch(4), 1)
        assert sight.loss == pytest.approx(3.0), "of its own micro-batches"
        assert control.loss == pytest.approx(loss, nan_ok=True)
        assert control.grad_norm == pytest.approx(norm, nan_ok=True)

    def test_a_step_the_engine_did_not_take_is_an_error(self) -> None:
        made, control = module(), StepControl(SCHEDULE, 1)
        loop = self.loop(made, math.inf, global_step=7)
        control.on_train_batch_start(loop, made, batch(6), 0)
        made.training_step(batch(6), 0).backward()
        control.on_before_optimizer_step(loop, made, loop.optimizers[0])
        assert control.loss == control.grad_norm == 0.0, "the gradients are the engine's, not the parameters'"
        loop.global_step = 8  # Lightning counts it all the same
        with pytest.raises(TrainingError, match=r"the gradient is not finite at step 8 \(samples \[6\]\)"):
            control.on_train_batch_end(loop, made, None, batch(6), 0)


class Remembering:
    """A sink that keeps what it is given."""

    def __init__(self) -> None:
        self.steps: list[StepLog] = []
        self.epochs: list[EpochLog] = []
        self.has_ended = self.closed = 0

    def step(self, log: StepLog) -> None:
        self.steps.append(log)

    def epoch(self, log: EpochLog) -> None:
        self.epochs.append(log)

    def ended(self) -> None:
        self.has_ended += 1

    def close(self) -> None:
        self.closed += 1


class TestMonitor:
    def test_one_log_per_optimizer_step_and_epoch(self) -> None:
        made, control, sink = module(), StepControl(SCHEDULE, 2), Remembering()
        monitor = TrainingMonitor(control, [sink], epoch_begin=5)
        loop = trainer(made)
        monitor.on_train_start(loop, made)
        for number, item in enumerate([batch(0), batch(1, 2), batch(3), batch(4)]):
            run_batch(control, loop, made, item, number)
            loop.global_step += number % 2
            monitor.on_train_batch_end(loop, made, None, item, number)
        monitor.on_train_epoch_end(loop, made)
        monitor.on_train_end(loop, made)
        assert [log.step for log in sink.steps] == [1, 2]
        assert [log.tokens for log in sink.steps] == [30, 20]
        assert [(log.epoch, log.local_epoch) for log in sink.epochs] == [(5, 0)]
        assert sink.epochs[0].loss == pytest.approx(sum(monitor.losses) / 2)
        assert (sink.epochs[0].steps, sink.epochs[0].of_steps) == (2, 2)
        assert (sink.has_ended, sink.closed) == (1, 0)
        for _ in range(2):
            monitor.close()
        assert sink.closed == 1

    def test_a_run_that_goes_on_counts_on(self) -> None:
        made, start, sink = module(), Start(steps=7, epochs=2, batches=1), Remembering()
        control = StepControl(SCHEDULE, 1, start=start)
        monitor = TrainingMonitor(control, [sink], epoch_begin=5, start=start)
        losses = torch.arange(7, dtype=torch.float64)
        monitor.restore({"losses": losses, "tokens": 700})
        loop = trainer(made)
        monitor.on_train_start(loop, made)
        run_batch(control, loop, made, batch(0), 0)
        assert control.learning_rate == SCHEDULE.learning_rate(7)
        loop.global_step = 1
        monitor.on_train_batch_end(loop, made, None, batch(0), 0)
        monitor.on_train_epoch_end(loop, made)
        assert (sink.steps[0].step, sink.steps[0].epoch) == (8, 7)
        assert (sink.epochs[0].epoch, sink.epochs[0].local_epoch) == (7, 2)
        assert sink.epochs[0].loss == pytest.approx((6 + sink.steps[0].loss) / 2)
        assert monitor.state()["tokens"] == 710
        assert torch.equal(monitor.state()["losses"][:7], losses)

    def test_an_epoch_without_a_step_writes_nothing(self) -> None:
        made, sink = module(), Remembering()
        TrainingMonitor(StepControl(SCHEDULE, 1), [sink], 0).on_train_epoch_end(trainer(made), made)
        assert sink.epochs == []


def save_epoch(saver: CheckpointSaver, loop: Any, batches: int = 2) -> None:
    """An epoch of two micro-batches, or as many as there were before it was stopped, as Lightning runs it."""
    loop.num_training_batches = 2
    for number in range(batches):
        saver.on_train_batch_end(loop, module(), None, None, number)
    saver.on_train_epoch_end(loop, module())


class TestSaver:
    @pytest.mark.parametrize(
        ("epoch_save", "epoch_begin", "saved"),
        [
            (1, 0, ["rwkv-0.pth", "rwkv-1.pth", "rwkv-2.pth"]),
            (2, 0, ["rwkv-0.pth", "rwkv-2.pth"]),
            (3, 4, ["rwkv-4.pth", "rwkv-6.pth"]),
            (0, 0, ["rwkv-2.pth"]),
        ],
    )
    def test_which_epochs(self, epoch_save: int, epoch_begin: int, saved: list[str], tmp_path: Path) -> None:
        written: list[Path] = []
        saver = CheckpointSaver(written.append, tmp_path, epoch_begin, epoch_save)
        for epoch in range(3):
            save_epoch(saver, trainer(module(), current_epoch=epoch))
        assert [path.name for path in written] == saved
        assert saver.files == written

    def test_other_ranks_write_nothing(self, tmp_path: Path) -> None:
        written: list[Path] = []
        saver = CheckpointSaver(written.append, tmp_path, 0, 1)
        save_epoch(saver, trainer(module(), is_global_zero=False))
        assert saver.files == [tmp_path / "rwkv-0.pth"]
        assert written == []

    def test_a_run_that_goes_on_counts_on(self, tmp_path: Path) -> None:
        """From the second of two batches of its fourth epoch."""
        written: list[Path] = []
        saver = CheckpointSaver(written.append, tmp_path, 10, 1, Start(steps=7, epochs=3, batches=1))
        save_epoch(saver, trainer(module()), batches=1)
        save_epoch(saver, trainer(module(), current_epoch=1))
        assert [path.name for path in written] == ["rwkv-13.pth", "rwkv-14.pth"]

    def test_a_file_that_cannot_be_written_is_said(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        def fail(path: Path) -> None:
            raise CheckpointError(f"{path.name}: no room")

        saver = CheckpointSaver(fail, tmp_path, 0, 1)
        save_epoch(saver, trainer(module()))
        assert saver.files == []
        assert "warning: rwkv-0.pth: no room; training goes on" in capsys.readouterr().err

    def test_an_epoch_that_was_stopped_has_no_file(self, tmp_path: Path) -> None:
        written: list[Path] = []
        saver = CheckpointSaver(written.append, tmp_path, 0, 1)
        save_epoch(saver, trainer(module()))
        save_epoch(saver, trainer(module(), current_epoch=1), batches=1)
        assert [path.name for path in written] == ["rwkv-0.pth"]


def test_at_end_acts_on_rank_0_only() -> None:
    calls: list[str] = []
    for is_first in (True, False):
        AtEnd(lambda: calls.append("done")).on_train_end(trainer(module(), is_global_zero=is_first), module())
    assert calls == ["done"]
