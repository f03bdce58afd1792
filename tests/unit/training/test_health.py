"""Warnings while a run goes on."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from src.training.health import LOOKED_AT, WINDOW, HealthWatch, LossTrend, outgrown


def first_warning(losses: list[float]) -> tuple[int, str]:
    trend = LossTrend()
    said = ((step, trend.take(step, loss)) for step, loss in enumerate(losses, start=1))
    return next(((step, text) for step, text in said if text), (0, ""))


def test_a_loss_that_goes_up_is_said() -> None:
    falling = [3 - step / 100 for step in range(100)]
    step, text = first_warning(falling + [6.0] * 60)
    assert 100 < step < 100 + WINDOW
    assert text.startswith("the loss goes up: ")
    assert text.endswith("2.1550 up to step 100")


def test_a_loss_that_jumps_at_once_is_said_before_there_is_a_mean() -> None:
    # of a LoRA at rate 0.3, which the untrained model's 1.98 is never reached again by
    assert first_warning([1.98, 6.52, 6.68, 5.61, 4.08, 4.21, 3.59, 4.1, 3.66, 3.85, 3.48, 3.28]) == (
        11, "the loss has gone up: 1.9800 at first, 3.4800 or more in 10 steps since",
    )  # fmt: skip
    assert first_warning([0.2, *[1.5] * 5, 0.4, *[1.5] * 30]) == (0, "")


@pytest.mark.parametrize(
    "losses",
    [
        [3 - step / 100 for step in range(200)],
        [1.5 + (0.9 if step % 3 else -0.9) for step in range(400)],
        [0.02] * 60 + [0.15] * 100,
        [2.0] * 50 + [900.0] + [2.0] * 5,  # one bad step
        [9.0] * (WINDOW - 1),
    ],
    ids=["falls", "differs by its data", "is small", "has a spike", "is short"],
)
def test_other_losses_are_not(losses: list[float]) -> None:
    if 900.0 in losses:
        assert first_warning(losses)[0] == 51  # which is no trend, but is worth a word
    else:
        assert first_warning(losses) == (0, "")


def test_states_out_of_bounds() -> None:
    def states(*sizes: float) -> list[tuple[str, torch.Tensor]]:
        return [(f"blocks.{n}.att.time_state", torch.full((2, 4, 4), size)) for n, size in enumerate(sizes)]

    assert outgrown([]) == ""
    assert outgrown(states(0.0, 300.0)) == ""
    assert outgrown(states(1.0, 2000.0)).startswith(
        "the states grow out of bounds: blocks.1.att.time_state has an rms of 2,000"
    )
    (name, spiky) = states(0.0)[0]
    spiky[0, 0, 0] = 4e4
    assert "values up to 40,000" in outgrown([(name, spiky.repeat(1, 100, 1))])


class FakeModule(SimpleNamespace):
    """What the watch asks of a module."""


def sharded(value: torch.Tensor) -> torch.Tensor:
    """As DeepSpeed's stage 3 has a parameter on the first of two ranks, between steps."""
    parameter = torch.empty(0)
    parameter.ds_id, parameter.ds_tensor = 1, value.flatten()[: value.numel() // 2]  # type: ignore[attr-defined]
    return parameter


@pytest.mark.parametrize("kept", [lambda value: value, sharded], ids=["whole", "sharded"])
def test_each_warning_comes_once(kept: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.training.health.TrainingModule", FakeModule)
    name = "blocks.0.att.time_state"
    module: Any = FakeModule(
        model=SimpleNamespace(shape=SimpleNamespace(state_shapes=lambda: {name: (1, 2, 2)})),
        trained=lambda: [(name, kept(torch.full((1, 2, 2), 5000.0))), ("head.weight", torch.full((2, 2), 1e9))],
    )
    losses: list[float] = [1.0] * WINDOW
    said: list[str] = []
    monitor: Any = SimpleNamespace(losses=losses, control=SimpleNamespace(grad_norm=1.0))
    watch = HealthWatch(monitor, said.append, accumulate=2, way_out="stop")
    trainer: Any = SimpleNamespace(is_global_zero=True)
    watch.on_train_start(trainer, module)
    for step in range(3 * LOOKED_AT):
        watch.on_train_batch_end(trainer, module, None, None, 0)  # closes no step
        losses.append(9.0)
        watch.on_train_batch_end(trainer, module, None, None, 1)
        del step
    assert [text.split(":")[0] for text in said] == ["the loss goes up", "the states grow out of bounds"]
    assert all(text.endswith("; stop") for text in said)


@pytest.mark.parametrize(
    ("flags", "loss_scale", "why"),
    [
        ({"bptt_chunks": 2}, 1.0, "--bptt_chunks 2 ends it before what is trained"),
        ({"bptt_chunks": 0}, 128.0, "use --precision bf16"),
        ({"bptt_chunks": 0}, 1.0, "--preview 3 shows what the loss is on"),
    ],
)
def test_steps_that_nothing_is_learnt_in(
    flags: dict[str, int], loss_scale: float, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("src.training.health.TrainingModule", FakeModule)
    module: Any = FakeModule(config=SimpleNamespace(**flags), loss_scale=loss_scale)
    monitor: Any = SimpleNamespace(losses=[], control=SimpleNamespace(grad_norm=0.5))
    said: list[str] = []
    watch = HealthWatch(monitor, said.append, accumulate=1, way_out="stop")
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=3)
    for norm in (0.5, 0.0, 0.0):
        monitor.losses.append(1.0)
        monitor.control.grad_norm = norm
        watch.on_train_batch_end(trainer, module, None, None, 0)
    watch.on_train_end(trainer, module)
    first, last = said
    assert first.startswith("the gradient of step 2 is 0, so that nothing is learnt in it: ")
    assert why in first
    assert last == "the gradient was 0 in 2 steps of 3, in which nothing was learnt"
