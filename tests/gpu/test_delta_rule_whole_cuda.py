"""RWKV-7's joined node and its small maps at once, on a GPU."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from delta_rule_whole_cases import (
    CASES,
    CHOICES,
    EPS,
    NAMES,
    check_small_maps,
    check_that_maps_without_gradients_are_the_same,
    check_that_sums_are_rounded_once,
    check_whole,
    joined,
    maps_of,
    results_of,
    tensors_of,
)
from fused_operators import fresh_leaves, normal
from torch import Tensor

from src.ops import delta_rule_whole, small_maps
from src.ops.wkv7_cuda import one_part

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = "cuda"


@pytest.fixture
def fresh_memory_is_nan() -> Iterator[None]:
    """Fills every new tensor with NaN: a kernel that forgets an element fails loudly."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("used", ["gated and final", "gated"])
@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("name", CASES)
def test_it_is_what_its_parts_are(name: str, choice: str, used: str, fresh_memory_is_nan: None) -> None:
    check_whole(name, "value" if choice == "first" and name == "the first layer" else choice, used, GPU)


def test_two_runs_give_the_same_bits(fresh_memory_is_nan: None) -> None:
    case = {"batch": 1, "tokens": 700}
    first, second = (results_of(joined(case, GPU), case, NAMES, "gated and final", GPU) for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_sums_are_rounded_once() -> None:
    check_that_sums_are_rounded_once(GPU)


@pytest.mark.parametrize("apart", [False, True])
@pytest.mark.parametrize("gate_width", [16, 20, 3])
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("rows", [1, 37, 1024])
def test_small_maps_are_those_of_each(rows: int, count: int, gate_width: int, apart: bool) -> None:
    check_small_maps(rows, count, gate_width, GPU, apart=apart)


def test_small_maps_without_gradients_are_the_same() -> None:
    check_that_maps_without_gradients_are_the_same(GPU)


def test_a_cuda_graph_replays_both() -> None:
    tensors = tensors_of(GPU, batch=1, tokens=70)
    maps, _ = maps_of(3, 128, (24, 12, 6), 16, GPU)
    state = tensors["state"]
    assert state is not None
    inputs = [*(normal(1, 70, 128, seed=seed, device=GPU) for seed in range(4)), state]
    grad = normal(1, 70, 128, seed=9, device=GPU)

    def step() -> tuple[Tensor, ...]:
        leaves = fresh_leaves(inputs)
        gate, w_raw, rate, amount = small_maps.small_maps(maps, leaves[0], leaves[1:4])
        made = {**tensors, "gate": gate, "w_raw": w_raw, "rate": rate, "amount": amount, "state": leaves[4]}
        given = delta_rule_whole.Inputs(**made)  # type: ignore[arg-type]
        gated, _ = delta_rule_whole.whole(given, EPS, one_part(70, None))
        return (gated.detach(), *torch.autograd.grad(gated, leaves, grad))

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for seed, tensor in enumerate(inputs):
            tensor.copy_(normal(*tensor.shape, seed=7 + seed, device=GPU))
    graph.replay()
    for ours, eager in zip(captured, step(), strict=True):
        assert torch.equal(ours, eager)
