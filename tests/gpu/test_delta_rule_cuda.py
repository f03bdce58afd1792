"""The fused operators around RWKV-7's recurrence, on a GPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial

import pytest
import torch
from delta_rule_cases import (
    EPS,
    SHAPES,
    Heads,
    check_a_key_of_zeros,
    check_keys,
    check_keys_with_unused_outputs,
    check_readout,
    check_that_wrong_arguments_are_named,
    check_values,
    check_values_near_saturation,
    combinations,
    keys,
    layer,
    layer_gradients,
    layer_inputs,
    readout,
    strided,
)
from fused_operators import fresh_leaves, normal
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from src.ops import delta_rule, delta_rule_cuda

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]

GPU = "cuda"


@pytest.fixture(autouse=True)
def fresh_memory_is_nan() -> Iterator[None]:
    """Fills every new tensor with NaN: a kernel that forgets an element fails loudly."""
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("shape", [*SHAPES, (1, 500, 40, 64), (1, 33, 64, 64)])
def test_keys_and_readout(shape: Heads, wide: bool) -> None:
    for wanted in ((), (0, 1), (0, 1, 2, 3)):
        check_keys(shape, wanted, GPU, wide=wide)
    for wanted in ((), (0, 1, 2, 3, 4), tuple(range(8))):
        check_readout(shape, wanted, GPU, wide=wide)


def test_every_choice_of_gradients() -> None:
    for wanted in combinations(4):
        check_keys((2, 19, 3, 64), wanted, GPU)
    for wanted in combinations(8):
        check_readout((2, 19, 3, 64), wanted, GPU)


def test_outputs_that_are_not_used() -> None:
    for used in combinations(3):
        check_keys_with_unused_outputs(used, GPU)


def test_a_key_of_zeros_removes_nothing() -> None:
    check_a_key_of_zeros(GPU)


@pytest.mark.parametrize("shape", [(1, 1, 8), (2, 15, 64), (3, 7, 2048), (1, 501, 2560), (1, 33, 4096)])
def test_values(shape: tuple[int, int, int]) -> None:
    for wanted in combinations(3):
        check_values(shape, wanted, GPU)


def test_values_near_saturation() -> None:
    check_values_near_saturation(GPU)


def test_wrong_arguments_are_named() -> None:
    check_that_wrong_arguments_are_named(GPU)


def test_a_readout_of_a_large_mean_is_exact() -> None:
    check_readout((1, 4, 2, 64), (0, 1, 2, 3, 4), GPU, mean=256.0)


def test_no_rows_give_none() -> None:
    for output in delta_rule_cuda.removal_and_replacement(*keys(1, 0, 2, 64, GPU)):
        assert output.shape == (1, 0, 2, 64)
    assert delta_rule_cuda.group_norm_bonus_gate(*readout(1, 0, 2, 64, GPU), EPS).shape == (1, 0, 128)


def test_models_take_the_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("removal_and_replacement", "value_residual", "group_norm_bonus_gate"):
        monkeypatch.setattr(delta_rule, f"{name}_torch", None)
    delta_rule.removal_and_replacement(*keys(1, 3, 2, 64, GPU))
    delta_rule.value_residual(*(normal(1, 3, 128) for _ in range(3)))
    delta_rule.group_norm_bonus_gate(*readout(1, 3, 2, 64, GPU), EPS)


def test_two_runs_checkpoints_and_strided_inputs_give_the_same_bits() -> None:
    expected = layer_gradients(layer, GPU)
    for run in (layer, partial(checkpoint, layer, use_reentrant=False), strided):
        for first, second in zip(expected, layer_gradients(run, GPU), strict=True):
            assert torch.equal(first, second)


def test_a_cuda_graph_replays_forward_and_backward() -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    inputs, grad = layer_inputs(GPU), normal(1, 33, 128, seed=3)

    def step() -> tuple[Tensor, ...]:
        leaves = fresh_leaves(inputs)
        out = layer(*leaves)
        return (out.detach(), *torch.autograd.grad(out, leaves, grad))

    try:
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
                tensor.copy_(normal(*tensor.shape, seed=7 + seed))
        graph.replay()
        for ours, eager in zip(captured, step(), strict=True):
            assert torch.equal(ours, eager)
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = True


def test_what_is_saved() -> None:
    k, rate, k_k, k_a = (tensor.requires_grad_(tensor.dim() == 4) for tensor in keys(1, 9, 2, 64, GPU))
    y, r, _, v, gate, *parameters = readout(1, 9, 2, 64, GPU)
    own = {parameter.data_ptr() for parameter in (k_k, k_a, *parameters)}

    def saved_by(run: Callable[[], object]) -> list[int]:
        found: list[int] = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t: (found.append(t.data_ptr()), t)[1], lambda t: t):
            results.append(run())
        return [pointer for pointer in found if pointer not in own]

    results: list[object] = []
    assert saved_by(lambda: delta_rule.removal_and_replacement(k, rate, k_k, k_a)) == [k.data_ptr(), rate.data_ptr()]
    pointers = saved_by(lambda: delta_rule.value_residual(k, r, v))
    assert isinstance(results[-1], Tensor)
    assert pointers == [r.data_ptr(), v.data_ptr(), results[-1].data_ptr()]
    expected = [tensor.data_ptr() for tensor in (y, r, k, v, gate)]
    assert saved_by(lambda: delta_rule.group_norm_bonus_gate(y, r, k, v, gate, *parameters, EPS)) == expected
