"""What state tuning trains and writes."""

from pathlib import Path

import pytest
import torch
from assertions import assert_same_tensors
from factories import tiny_parameters, tiny_shape, tiny_states

from src.adapters.states import StateTuning, blended
from src.loading import LoadOptions, build_model


def test_the_file_holds_every_state_as_the_model_has_it(tmp_path: Path) -> None:
    """Value before key: a transposed state is the same size and as good as random to a client."""
    shape = tiny_shape()
    states = tiny_states(shape)
    model = build_model({**tiny_parameters(shape), **states}, shape, LoadOptions(torch.device("cpu"), torch.float32))
    StateTuning().save(model, tmp_path / "state.pth")
    content = torch.load(tmp_path / "state.pth", weights_only=True)
    assert list(content) == StateTuning().trained_names(shape)
    for name, state in states.items():
        assert torch.equal(content[name], state.bfloat16())
        assert not torch.equal(content[name], content[name].transpose(1, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("weights", [[1.0], [0.3, 0.7], [0.1, 0.2, 0.7], [1.7, -0.7], [0.6, 0.3, 0.1]])
def test_a_blend_of_one_state_with_itself_is_that_state(dtype: torch.dtype, weights: list[float]) -> None:
    state = tiny_states(tiny_shape(), dtype=dtype, scale=50.0)
    assert_same_tensors(blended([state] * len(weights), weights), state)


def test_a_blend_is_the_weighted_sum_rounded_once() -> None:
    shape = tiny_shape()
    states = [tiny_states(shape, seed, torch.bfloat16) for seed in range(3)]
    weights = [0.25, -0.5, 2.0]
    for key, tensor in blended(states, weights).items():
        exact = sum(weight * state[key].double() for weight, state in zip(weights, states, strict=True))
        assert tensor.dtype == torch.bfloat16
        torch.testing.assert_close(tensor, exact.bfloat16(), rtol=0, atol=0)


def test_a_blend_of_two_dtypes_has_one_that_holds_both() -> None:
    shape = tiny_shape()
    half, brain = tiny_states(shape, 0, torch.float16), tiny_states(shape, 1, torch.bfloat16)
    assert {tensor.dtype for tensor in blended([half, brain], [0.5, 0.5]).values()} == {torch.float32}
    assert {tensor.dtype for tensor in blended([half, half], [0.5, 0.5]).values()} == {torch.float16}
