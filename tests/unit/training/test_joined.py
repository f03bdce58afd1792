"""Trained tensors as pieces of wholes: values, gradients, hooks, and which runs have them."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor, nn

from src.adapters.method import method_of
from src.config import TrainConfig
from src.training.joined import Joined, joins

SHAPES = {"a": (3, 4), "b": (5,), "c": (2, 1, 3), "unused": (7,)}


def parameters(seed: int = 1) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    return {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in SHAPES.items()}


def joined_of(named: dict[str, nn.Parameter]) -> Joined:
    first, *others = named.values()
    groups = [{"params": [first], "lr": 1.0}, {"params": others, "lr": 2.0}]
    return Joined(groups, {parameter: name for name, parameter in named.items()})


def loss_of(named: dict[str, nn.Parameter]) -> Tensor:
    return (named["a"].sum() * named["b"].pow(2).sum() + named["c"].sin().sum()) * 3


def test_values_and_groups_stay() -> None:
    named, before = parameters(), parameters()
    joined = joined_of(named)
    assert [group["lr"] for group in joined.groups] == [1.0, 2.0]
    assert [whole.numel() for group in joined.groups for whole in group["params"]] == [12, 18]
    assert all(torch.equal(named[name], before[name]) for name in SHAPES)
    (whole,) = joined.groups[1]["params"]
    with torch.no_grad():
        whole.fill_(4)
    assert all(bool((named[name] == 4).all()) for name in ("b", "c", "unused")), "they are views"
    whole.data = torch.full_like(whole, 5)  # as an engine does, which has a place of its own for it
    joined.tie()
    assert all(bool((named[name] == 5).all()) for name in ("b", "c", "unused"))


def test_a_whole_that_was_moved_is_noticed() -> None:
    named = parameters()
    joined = joined_of(named)
    whole = next(iter(joined.pieces))
    whole.data = whole.data.clone()
    with pytest.raises(AssertionError, match="moved"):
        joined.loss(loss_of(named))


@pytest.mark.parametrize("times", [1, 3])
def test_gradients_of_wholes_are_those_of_the_pieces(times: int) -> None:
    named, plain = parameters(), parameters()
    joined = joined_of(named)
    for _ in range(times):
        loss = joined.loss(loss_of(named))
        expected = loss_of(plain)
        assert loss.item() == expected.item()
        (loss / 2).backward()
        (expected / 2).backward()
    assert all(parameter.grad is None for parameter in named.values()), "an engine sees the wholes alone"
    for whole, pieces in joined.pieces.items():
        assert whole.grad is not None
        for piece in pieces:
            gradient = plain[piece.name].grad
            found = piece.of(whole.grad)
            assert torch.equal(found, torch.zeros_like(found) if gradient is None else gradient), piece.name


def test_hooks_of_the_pieces_are_called() -> None:
    named = parameters()
    named["b"].register_hook(lambda gradient: gradient / 4)
    plain = parameters()
    joined = joined_of(named)
    joined.loss(loss_of(named)).backward()
    loss_of(plain).backward()
    (whole,) = joined.groups[1]["params"]
    expected = plain["b"].grad
    assert expected is not None
    assert whole.grad is not None
    assert torch.equal(whole.grad[:5], expected / 4)


def test_an_optimizers_numbers_by_piece() -> None:
    joined = joined_of(parameters())
    whole = list(joined.pieces)[1]
    values = torch.arange(18.0)
    state = {piece.name: {"exp_avg": piece.of(values)} for piece in joined.pieces[whole]}
    assert {name: tuple(entry["exp_avg"].shape) for name, entry in state.items()} == {
        name: shape for name, shape in SHAPES.items() if name != "a"
    }
    assert torch.equal(joined.whole_of(whole, state, "exp_avg"), values)


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"peft": "lora", "strategy": "deepspeed_stage_1"}, True),
        ({"peft": "bone", "strategy": "deepspeed_stage_2_offload"}, True),
        ({"peft": "lora", "devices": 2, "strategy": "deepspeed_stage_1"}, True),
        ({"peft": "lora", "train_type": "states", "strategy": "deepspeed_stage_2"}, True),
        ({"peft": "lora", "strategy": "deepspeed_stage_3"}, False),
        ({"peft": "lora", "strategy": "single"}, False),
        ({"strategy": "deepspeed_stage_1"}, True),
        ({"train_type": "none", "strategy": "deepspeed_stage_1"}, False),
    ],
)
def test_who_is_joined(flags: dict[str, object], expected: bool) -> None:
    given = {"load_model": "m.pth", "data_file": "data", **{name: str(value) for name, value in flags.items()}}
    strategy = given.pop("strategy")
    config = dataclasses.replace(TrainConfig.from_flags({k: str(v) for k, v in given.items()}), strategy=strategy)
    assert joins(config, method_of(config)) is expected
