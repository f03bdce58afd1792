"""What a layer computes again gives the gradients of what it would have kept, whatever is trained and carried."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from factories import ARCHITECTURES
from recompute_cases import (
    CASES,
    Gradients,
    another_choice_at_the_second_step,
    carried_state,
    loss_of,
    model_of,
    own_start,
    the_other_choice,
    tokens_of,
)
from tables import covering
from torch import Tensor, nn

from src.model.language_model import LanguageModel
from src.model.recompute import Recompute, recomputed
from src.model.state import LayerState

TOLERANCE = 1e-5
"""Relative to the norm, fp32. Measured: 1e-6 at most (mode ALL, whose feed-forward takes its output from a difference;
the others give the same bits), torch 2.13 on an x86-64 CPU; the rest is room for another order of additions."""


@pytest.mark.parametrize(
    ("case", "architecture", "mode", "quant_type"),
    [
        *covering(CASES, ["x060"], [Recompute.ALL, Recompute.INPUTS], [None, "nf4"]),
        *covering(CASES, ["x070"], [Recompute.INPUTS, Recompute.ALL], [None, "nf4"]),
    ],
)
def test_gradients_are_those_of_plain_autograd(
    architecture: str, mode: Recompute, case: Callable[[LanguageModel], Gradients], quant_type: str | None
) -> None:
    kept = case(model_of(Recompute.NOTHING, quant_type, architecture=architecture))
    again = case(model_of(mode, quant_type, architecture=architecture))
    assert kept.keys() == again.keys()
    for name, expected in kept.items():
        assert (again[name] - expected).norm() <= TOLERANCE * expected.norm(), name


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_plain_autograd_uses_parameters_as_they_are_now(architecture: str) -> None:
    """The reference of the table: after steps and with another choice a model gives what a fresh one would."""
    used = another_choice_at_the_second_step(model_of(Recompute.NOTHING, None, architecture=architecture))
    fresh = model_of(Recompute.NOTHING, None, architecture=architecture)
    the_other_choice(fresh)
    expected = own_start(fresh)
    assert used.keys() == expected.keys()
    assert all(torch.equal(used[name], expected[name]) for name in expected)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_gradient_of_a_carried_state_is_right_in_double_precision(architecture: str) -> None:
    """Central differences of the whole model, per part of the memory, in one random direction."""
    model = model_of(Recompute.ALL, None, architecture=architecture)
    model.compute_dtype = torch.float64
    for module in model.modules():
        for name, parameter in list(module.named_parameters(recurse=False)):
            module.register_parameter(name, nn.Parameter(parameter.detach().double(), requires_grad=False))
    state = [LayerState(*(part.detach().double().requires_grad_() for part in layer)) for layer in carried_state(model)]
    tokens = tokens_of(7)
    loss_of(model(tokens, state)[0]).backward()
    generator = torch.Generator().manual_seed(9)
    for layer in range(model.shape.n_layer):
        for place, part in enumerate(state[layer]):
            direction = torch.randn(part.shape, generator=generator, dtype=torch.float64)
            values = []
            for sign in (1, -1):
                moved = list(state)
                moved[layer] = state[layer]._replace(**{state[layer]._fields[place]: part + sign * 1e-5 * direction})
                with torch.no_grad():
                    values.append(loss_of(model(tokens, moved)[0]))
            assert part.grad is not None
            slope = float((values[0] - values[1]) / 2e-5)
            assert float((part.grad * direction).sum()) == pytest.approx(slope, rel=1e-5, abs=1e-10)


class TestRecomputed:
    """The function alone."""

    def test_results_that_need_no_gradient_are_passed_over(self) -> None:
        x, weight = torch.randn(3, requires_grad=True), nn.Parameter(torch.randn(3))
        frozen = torch.randn(3)

        def function(x: Tensor, other: Tensor) -> tuple[Tensor, ...]:
            return x * weight, other * 2

        product, constant = recomputed(function, (x, frozen), [weight])
        (product.sum() + (product.detach() * constant).sum()).backward()
        assert torch.equal(x.grad, weight.detach())  # type: ignore[arg-type]
        assert torch.equal(weight.grad, x.detach())  # type: ignore[arg-type]

    def test_inputs_may_be_missing_and_unused(self) -> None:
        x, unused = torch.randn(3, requires_grad=True), torch.randn(3, requires_grad=True)
        (result,) = recomputed(lambda x, nothing, unused: (x.exp(),), (x, None, unused), [])
        result.sum().backward()
        assert torch.equal(x.grad, x.detach().exp())  # type: ignore[arg-type]
        assert unused.grad is None

    def test_trainability_is_looked_up_at_every_call(self) -> None:
        first, second = nn.Parameter(torch.randn(3)), nn.Parameter(torch.randn(3))
        x = torch.randn(3)
        for trained, frozen in ((first, second), (second, first)):
            trained.requires_grad_(True)
            frozen.requires_grad_(False)
            first.grad = second.grad = None
            (result,) = recomputed(lambda x: (x * first * second,), (x,), [first, second])
            result.sum().backward()
            assert torch.equal(trained.grad, x * frozen)  # type: ignore[arg-type]
            assert frozen.grad is None

    def test_it_draws_the_same_numbers_and_disturbs_no_others(self) -> None:
        x = torch.ones(1000, requires_grad=True)
        torch.manual_seed(0)
        (result,) = recomputed(lambda x: (nn.functional.dropout(x, 0.5),), (x,), [], draws_random=True)
        after_forward = torch.get_rng_state()
        result.sum().backward()
        assert torch.equal(x.grad, result.detach())  # type: ignore[arg-type]
        assert torch.equal(torch.get_rng_state(), after_forward)

    def test_it_keeps_its_inputs_and_what_is_asked_for(self) -> None:
        x = torch.randn(5, requires_grad=True)
        saved: list[Tensor] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (saved.append(t), t)[1], lambda t: t):
            recomputed(lambda x, *known: (x.exp().sin(), x.cos()), (x,), [], kept=1)
        assert [tuple(tensor.shape) for tensor in saved] == [(5,), (5,)]
