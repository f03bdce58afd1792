"""The optimizer of what is trainable."""

from unittest.mock import Mock

import pytest
import torch
from factories import tiny_parameters, tiny_shape
from running import GivenLoss
from torch import Tensor

from src.config import TrainConfig
from src.errors import DataError
from src.loading import LoadOptions, build_model
from src.model.parameters import state_shapes
from src.model.rwkv6 import RWKV6
from src.training.module import FP16_LOSS_SCALE, TrainingModule, parameter_groups
from src.training.objectives import Outcome

SHAPE = tiny_shape()


def config(**flags: object) -> TrainConfig:
    """A configuration from the two necessary flags and these."""
    given = {"load_model": "base.pth", "data_file": "data", **{name: str(v) for name, v in flags.items()}}
    return TrainConfig.from_flags(given)


def module(dtype: torch.dtype = torch.float32, **flags: object) -> TrainingModule:
    """A training module of a tiny model whose loss is the sum of its states times their numbers."""
    chosen = config(**flags)
    options = LoadOptions(torch.device("cpu"), dtype, train_weights=not chosen.trains_states)
    model = build_model(tiny_parameters(SHAPE), SHAPE, options)

    def loss(model: RWKV6, batch: float) -> Tensor:
        states = [model.get_parameter(name) for name in state_shapes(SHAPE)]
        return batch * torch.stack([state.sum() for state in states]).sum()

    return TrainingModule(model, GivenLoss(loss), chosen)


class TestStates:
    def test_adam_on_exactly_the_states(self) -> None:
        made = module(beta1=0.8, beta2=0.97, adam_eps=1e-7)
        optimizer = made.configure_optimizers()
        assert type(optimizer) is torch.optim.Adam
        (group,) = optimizer.param_groups
        assert [id(p) for p in group["params"]] == [id(made.model.get_parameter(n)) for n in state_shapes(SHAPE)]
        assert (group["betas"], group["eps"], group["weight_decay"]) == ((0.8, 0.97), 1e-7, 0.0)
        assert (group["lr_scale"], group["decays"]) == (1.0, False)
        assert {name for name, _ in made.trained()} == set(state_shapes(SHAPE))

    def test_weight_decay_makes_it_adamw(self) -> None:
        optimizer = module(weight_decay=0.01).configure_optimizers()
        assert type(optimizer) is torch.optim.AdamW
        (group,) = optimizer.param_groups
        assert (group["weight_decay"], group["decays"]) == (0.01, True)

    def test_a_step_is_adams(self) -> None:
        made = module(lr_init=0.5)
        optimizer = made.configure_optimizers()
        made.training_step(2.0, 0).backward()
        optimizer.step()
        for name in state_shapes(SHAPE):
            assert torch.allclose(made.model.get_parameter(name), torch.tensor(-0.5))

    @pytest.mark.parametrize("loss", [float("inf"), float("-inf"), float("nan")])
    def test_a_loss_that_is_not_finite_shows_in_the_gradient(self, loss: float) -> None:
        made = module()
        states = [made.model.get_parameter(name) for name in state_shapes(SHAPE)]
        made.objective = GivenLoss(lambda model, batch: states[0].sum() + loss)
        made.training_step(None, 0).backward()
        assert states[0].grad is not None
        assert states[0].grad.isnan().all()


class TestFullTraining:
    def test_time_decay_learns_twice_as_fast(self) -> None:
        made = module(train_type="none")
        scales = {id(p): g["lr_scale"] for g in made.configure_optimizers().param_groups for p in g["params"]}
        fast = {name for name, parameter in made.trained() if scales[id(parameter)] == 2.0}
        assert fast == {f"blocks.{layer}.att.time_decay" for layer in range(SHAPE.n_layer)}
        assert set(scales.values()) == {1.0, 2.0}

    def test_unless_layerwise_lr_is_off(self) -> None:
        groups = module(train_type="none", layerwise_lr=0).configure_optimizers().param_groups
        assert {group["lr_scale"] for group in groups} == {1.0}

    def test_weight_decay_acts_on_matrices(self) -> None:
        made = module(train_type="none", weight_decay=0.1)
        groups = parameter_groups(made.trained(), made.config)
        decaying = {id(p) for g in groups if g["decays"] for p in g["params"]}
        for name, parameter in made.trained():
            assert (id(parameter) in decaying) == (parameter.squeeze().ndim >= 2), name
        assert sum(len(group["params"]) for group in groups) == len(list(made.trained()))


class TestLossScale:
    def test_fp16_scales_the_loss_and_not_the_gradient(self) -> None:
        made = module(torch.float16)
        loss = made.training_step(1e-3, 0)
        loss.backward()
        assert made.outcome is not None
        assert float(loss.detach()) == pytest.approx(FP16_LOSS_SCALE * float(made.outcome.loss))
        for name in state_shapes(SHAPE):
            gradient = made.model.get_parameter(name).grad
            assert gradient is not None
            assert torch.allclose(gradient, torch.tensor(1e-3))

    def test_other_precisions_have_none(self) -> None:
        for dtype in (torch.float32, torch.bfloat16):
            made = module(dtype)
            made.training_step(3.0, 0).backward()
            gradient = made.model.get_parameter("blocks.0.att.time_state").grad
            assert gradient is not None
            assert torch.equal(gradient, torch.full_like(gradient, 3.0))


def test_batches_stay_on_the_host() -> None:
    batch = object()
    assert module().transfer_batch_to_device(batch, torch.device("meta"), 0) is batch


def test_the_model_stays_where_it_is_after_training() -> None:
    made = module()
    made.model.to("meta")  # stands for a GPU
    assert made.cpu() is made
    assert {parameter.device.type for parameter in made.parameters()} == {"meta"}


def test_recordings_and_what_refers_to_them_are_released() -> None:
    made = module()
    made.training_step(3.0, 0)
    assert made.outcome is not None
    made.release_recordings()
    assert made.graphed is made.outcome is None


class TestLookAhead:
    @staticmethod
    def graphed() -> Mock:
        loss = torch.zeros((), requires_grad=True)
        return Mock(return_value=Outcome(loss + 1))

    def test_the_following_batch_is_staged_once_the_step_is_under_way(self) -> None:
        made = module()
        made.graphed, made.following = self.graphed(), lambda: "next"
        made.training_step("now", 0)
        assert [(name, *arguments) for name, arguments, _ in made.graphed.mock_calls] == [
            ("", "now"),
            ("look_ahead", "next"),
        ]

    def test_what_is_wrong_with_it_does_not_stop_the_step(self) -> None:
        def broken() -> None:
            raise DataError("document 5 is empty")

        made = module()
        made.graphed, made.following = self.graphed(), broken
        assert made.training_step("now", 0).item() == 1.0
